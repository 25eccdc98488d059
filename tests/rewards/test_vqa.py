from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from genalign.evaluation.benchmarks.geneval2 import AnswerJudge
from genalign.evaluation.benchmarks.tifa import QuestionJudge, TifaReward
from genalign.types import Prompt, Reward
from rewards.backbones.pixels import pictures
from rewards.vqa import ARTIFACTS, AnswerModel, QuestionReward, YesNoModel, answerable, spellings
from tests.rewards.gray_images import grays, named, plain

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
QUESTION = ["is", "there", "a", "red", "circle", "two", "squares", "?"]
WORDS = [*SPECIAL, "yes", "no", "Yes", "No", *QUESTION, "USER:", "BOT:"]
NUMBER_WORDS = [*WORDS, "2", "Two", "word."]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}BOT:"
)


def words_tokenizer(words: Sequence[str], images: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each word; ``images`` are the words that stand for an image."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(images), **special)


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with weights so large that answers differ."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def save_llava(folder: Path, words: Sequence[str], template: str | None) -> Path:
    """A tiny random LLaVA with its processor."""
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    LlavaProcessor(
        CLIPImageProcessor(**size),
        words_tokenizer(words, ["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    text = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **tower, **ids)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **tower)
    torch.manual_seed(0)
    towers = {"vision_config": vision, "text_config": text, "vision_feature_layer": -1}
    model = LlavaForConditionalGeneration(LlavaConfig(image_token_index=4, image_seq_length=4, **towers))
    return save(model, folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"), WORDS, TEMPLATE)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("qwen"))


def save_qwen(folder: Path) -> Path:
    """A tiny random Qwen2-VL, whose images have as many tokens as their size asks for."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = [*WORDS, *marks]
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}),
        words_tokenizer(words, marks),
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 256}
    text |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": words.index(mark) for name, mark in zip(names, marks, strict=True)}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    return save(model, folder)


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 40, 52, generator=torch.Generator().manual_seed(0))


QUESTIONS = ["is there a red circle ?", "two squares ?", "is there a red circle ?", "two ?", "is there two squares ?"]


def test_a_model_answers_by_the_probabilities_of_its_first_word(llava: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    expected = []
    for picture, question in zip(pictures(images()), QUESTIONS, strict=True):
        inputs = processor(images=[picture], text=[f"USER: <image> {answerable(question)} BOT:"], return_tensors="pt")
        with torch.no_grad():
            p = model(**inputs).logits[0, -1].softmax(-1)
        yes, no = p[5] + p[7], p[6] + p[8]
        expected.append(float(yes / (yes + no)))
    answers = YesNoModel(str(llava))(images(), QUESTIONS)
    assert answers.tolist() == pytest.approx(expected, abs=1e-5)
    assert answers.std() > 0.01


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_an_answer_does_not_depend_on_its_batch(family: str, request: pytest.FixtureRequest) -> None:
    model = str(request.getfixturevalue(family))
    together = YesNoModel(model)(images(), QUESTIONS)
    assert ((together > 0) & (together < 1)).all() and together.std() > 0.01
    torch.testing.assert_close(YesNoModel(model, batch_size=1)(images(), QUESTIONS), together, rtol=0, atol=1e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = YesNoModel(model)(images()[order], [QUESTIONS[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    halved = YesNoModel(model, "bfloat16")(images(), QUESTIONS)
    assert halved.dtype == torch.float32 and (halved - together).abs().max() < 0.1


def test_what_cannot_be_answered_is_nan(llava: Path) -> None:
    broken = images()
    broken[1, 0, 0, 0] = torch.nan
    assert YesNoModel(str(llava))(broken, QUESTIONS).isnan().tolist() == [False, True, False, False, False]
    assert YesNoModel(str(llava), least_mass=1.0)(images(), QUESTIONS).isnan().all()
    with pytest.raises(ValueError, match="one question per image, not 4 for 5 images"):
        YesNoModel(str(llava))(images(), QUESTIONS[:4])


def test_models_without_a_template_or_the_words_are_refused(tmp_path: Path) -> None:
    save_llava(tmp_path / "mute", WORDS, None)
    with pytest.raises(ValueError, match="has no chat template"):
        YesNoModel(str(tmp_path / "mute"))(images(1), QUESTIONS[:1])
    save_llava(tmp_path / "foreign", [*SPECIAL, "oui", "non", "USER:", "BOT:"], TEMPLATE)
    with pytest.raises(ValueError, match="no single token for 'yes'"):
        YesNoModel(str(tmp_path / "foreign"))(images(1), ["oui"])


def brightness(images: Tensor, questions: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def test_one_question_about_the_prompt() -> None:
    seen: list[str] = []

    def judge(images: Tensor, questions: Sequence[str]) -> Tensor:
        seen.extend(questions)
        return brightness(images, questions)

    reward, prompts = QuestionReward(judge), [Prompt("a {cat}"), Prompt('a sign that says "yes"')]
    assert isinstance(reward, Reward)
    assert plain(reward(grays(0.2, 0.7), prompts)) == [0.2, 0.7]
    assert plain(QuestionReward(judge, ARTIFACTS, "no")(grays(0.2, 0.7), prompts)) == [0.8, 0.3]
    texts = ("a {cat}", "a sign that says 'yes'")  # which cannot end the quotes around it
    assert seen[:2] == [f'Does this figure show "{text}"? Please answer yes or no.' for text in texts]
    assert seen[2:] == [ARTIFACTS] * 2 and "{prompt}" not in ARTIFACTS


def test_a_question_says_how_to_answer() -> None:
    assert answerable("Is there a dog in the image?") == "Is there a dog in the image? Answer with yes or no."
    assert answerable(ARTIFACTS) == ARTIFACTS


def test_the_local_model_judges_several_questions_too(llava: Path) -> None:
    judge: QuestionJudge = YesNoModel(str(llava))
    questions = ["is there a red circle ?", "is there two squares ?"]
    prompts = [Prompt("a", {"questions": questions}), Prompt("b", {"questions": questions[:1]})]
    answers = judge(images(2)[[0, 0, 1]], [*questions, questions[0]])
    scores = TifaReward(judge)(images(2), prompts)
    torch.testing.assert_close(scores, torch.stack([answers[:2].mean(), answers[2]]), rtol=0, atol=1e-5)


def test_judges_and_answers_are_checked() -> None:
    def reward(answers: list[float]) -> Tensor:
        return QuestionReward(lambda images, questions: torch.tensor(answers))(grays(0, 1), named(2))

    assert reward([0.5, torch.nan]).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"returned \(1,\) for 2 questions"):
        reward([1.0])
    with pytest.raises(ValueError, match=r"must return probabilities of yes, in \[0, 1\]"):
        reward([0.5, 1.5])
    with pytest.raises(ValueError, match="must be yes or no, not 'two': rephrase the question"):
        QuestionReward(brightness, "How many?", "two")
    with pytest.raises(ValueError, match="one prompt per image, not 2 for 1 images"):
        QuestionReward(brightness)(grays(1), named(2))


def test_numbers_have_words_and_digits() -> None:
    assert spellings("Two") == {"two", "2"} and spellings(" yes") == {"yes"} and spellings("eleven") == {"eleven"}


def test_a_model_answers_by_the_probability_of_the_right_word(tmp_path: Path) -> None:
    folder = save_llava(tmp_path, NUMBER_WORDS, TEMPLATE)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for picture, answer in zip(pictures(images()), ["two", "Yes", "two", "no", "yes"], strict=True):
        text = "USER: <image> two squares ? Answer in one word. BOT:"
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        with torch.no_grad():
            p = model(**inputs).logits[0, -1].softmax(-1)
        words = {"two": ("two", "2", "Two"), "yes": ("yes", "Yes"), "no": ("no", "No")}[answer.lower()]
        right = float(sum(p[NUMBER_WORDS.index(word)] for word in words))
        assert int(p.argmax()) >= len(SPECIAL)
        expected.append(right)
    judge: AnswerJudge = AnswerModel(str(folder))
    broken = images()
    answers = judge(broken, ["two squares ?"] * 5, ["two", "Yes", "two", "no", "yes"]).tolist()
    assert answers == pytest.approx(expected, abs=1e-5)
    broken[0, 0, 0, 0] = torch.nan
    assert judge(broken, ["two squares ?"] * 5, ["two"] * 5).isnan().tolist()[0]


def test_a_thought_is_no_answer(tmp_path: Path) -> None:
    folder = save_llava(tmp_path, NUMBER_WORDS, TEMPLATE)

    class Fixed(AnswerModel):
        def first_tokens(self, images: Tensor, questions: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
            likeliest = [NUMBER_WORDS.index(word) for word in ("two", "<s>", "?", "2")]
            yield (
                [0, 1, 2, 3],
                torch.full((4, len(NUMBER_WORDS)), 0.01).scatter(1, torch.tensor(likeliest)[:, None], 0.7),
            )

    answers = Fixed(str(folder))(images(4), ["how many ?"] * 4, ["two", "two", "two", "no"])
    assert answers.tolist() == pytest.approx([0.72, torch.nan, torch.nan, 0.02], nan_ok=True)
