"""A yes/no question about every image as a reward, and local models that answer questions.

The judge is any ``genalign.evaluation.benchmarks.tifa.QuestionJudge``, from images (n, 3, H, W) in [0, 1] and n
questions to n probabilities of "yes": ``YesNoModel`` in this process, ``rewards.blip_vqa.BlipVqa``,
``rewards.remote.vlm_judges.YesNoJudge`` on a server, or your own. For several questions per prompt see
``genalign.evaluation.benchmarks.tifa.TifaReward``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genalign.types import AnyCallable, Precision, Prompt
from rewards.backbones.pixels import pictures

Answer = Literal["yes", "no"]

VQASCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'
ARTIFACTS = "Are there artifacts or distorted things in this image? Answer with yes or no."
_WORDS: Mapping[Answer, tuple[str, ...]] = {
    "yes": ("yes", "Yes", "YES", " yes", " Yes", " YES"),
    "no": ("no", "No", "NO", " no", " No", " NO"),
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class QuestionReward:
    """The probability, in [0, 1], that a judge gives to ``answer``, the right answer to ``question``.

    Args:
        judge: The judge that answers questions, any ``genalign.evaluation.benchmarks.tifa.QuestionJudge``.
        question: The question, by default VQAScore's (arXiv 2404.01291). ``{prompt}`` in it is replaced by the prompt,
            with double quotes turned into single ones, so it cannot end the quotation. ``ARTIFACTS``, with the
            answer "no", looks at the image alone, against hacking of other rewards (arXiv 2601.03468).
        answer: The right answer, "yes" or "no".
    """

    judge: AnyCallable
    question: str = VQASCORE
    answer: Answer = "yes"

    def __post_init__(self) -> None:
        if self.answer not in _WORDS:
            raise ValueError(f"the answer must be yes or no, not {self.answer!r}: rephrase the question")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), float32 on the CPU; NaN where there was no answer.

        Raises ValueError where the judge returns another shape, or no probabilities.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per image, not {len(prompts)} for {len(samples)} images")
        texts = [self.question.replace("{prompt}", prompt.text.replace('"', "'")) for prompt in prompts]
        answers: Tensor = self.judge(samples, texts)
        if answers.shape != (len(texts),):
            raise ValueError(f"the judge returned {tuple(answers.shape)} for {len(texts)} questions: return (n,)")
        if bool(((answers < 0) | (answers > 1)).any()):
            raise ValueError("the judge must return probabilities of yes, in [0, 1]")
        yes: Tensor = answers.detach().float().cpu()
        return yes if self.answer == "yes" else 1 - yes


def answerable(question: str) -> str:
    """Append "Answer with yes or no." to a question that does not say so itself."""
    return question if "yes or no" in question.lower() else f"{question} Answer with yes or no."


@dataclass(frozen=True)
class VisionLanguageModel:
    """A local model that answers a question about each image with one token.

    ``model`` is a folder or Hub id that transformers' AutoModelForImageTextToText and AutoProcessor open, with a chat
    template; the processor prepares the images from 8-bit pixels, so there is no gradient. Questions of one length
    form a batch, so nothing is padded and an answer does not depend on its batch. Loaded at the first call; then
    follows the images' device.
    """

    model: str
    dtype: Precision = "float32"
    batch_size: int = 8

    @torch.no_grad()
    def first_tokens(self, images: Tensor, questions: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield rows of images (n, 3, H, W) in [0, 1], with the probabilities (b, vocabulary) of the first token.

        Images with NaN are left out.
        """
        if len(images) != len(questions):
            raise ValueError(f"there must be one question per image, not {len(questions)} for {len(images)} images")
        network, processor = load_model(self.model, self.dtype)
        network.to(images.device)
        chats: dict[int, list[dict[str, Any]]] = {}
        by_length: dict[int, list[int]] = {}  # rows by the number of tokens of their question
        for row, picture in enumerate(pictures(images)):
            if picture is None:
                continue
            text = {"type": "text", "text": questions[row]}
            chats[row] = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
            without = [{"role": "user", "content": [{"type": "image"}, text]}]
            template = processor.apply_chat_template(without, add_generation_prompt=True, tokenize=False)
            by_length.setdefault(len(processor.tokenizer(template).input_ids), []).append(row)
        size = self.batch_size
        batches = [rows[i : i + size] for _, rows in sorted(by_length.items()) for i in range(0, len(rows), size)]
        for rows in batches:
            batch, options = [chats[row] for row in rows], {"return_dict": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template(batch, add_generation_prompt=True, tokenize=True, **options)
            inputs = inputs.to(network.device, network.dtype)
            options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            output = network.generate(**inputs, max_new_tokens=1, **options)
            yield rows, output.logits[0].float().softmax(-1)

    def tokenizer(self) -> Any:
        """Return the tokenizer of the model."""
        return load_model(self.model, self.dtype)[1].tokenizer


@dataclass(frozen=True)
class YesNoModel(VisionLanguageModel):
    """A ``QuestionJudge``: P(yes) / (P(yes) + P(no)) of the first word that a vision-language model answers with.

    Upper and lower case count together. NaN where yes and no together are less likely than ``least_mass``: the model
    says something else, such as a thought.
    """

    least_mass: float = 0.01

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Answer questions (n) about images (n, 3, H, W) in [0, 1] as (n,) in float32; NaN for an image with NaN."""
        tokens = yes_no_tokens(self.model, self.tokenizer())
        answers = torch.full((len(images),), torch.nan)
        for rows, probabilities in self.first_tokens(images, [answerable(question) for question in questions]):
            yes, no = (probabilities[:, tokens[answer]].sum(1) for answer in _WORDS)
            answers[rows] = torch.where(yes + no >= self.least_mass, yes / (yes + no), torch.nan).cpu()
        return answers.to(images.device)


@dataclass(frozen=True)
class AnswerModel(VisionLanguageModel):
    """An ``AnswerJudge`` (``genalign.evaluation.benchmarks.geneval2``): the probability of a right one-word answer.

    It is the sum over the spellings of the answer of the probability of their first token, which counts once, as in
    GenEval 2 (arXiv 2512.16853). NaN where the likeliest token is a special one or no word, such as a thought's.
    """

    def __call__(self, images: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Compute the probabilities (n,), float32, of n answers about images (n, 3, H, W) in [0, 1]."""
        tokenizer = self.tokenizer()
        scores = torch.full((len(images),), torch.nan)
        texts = [f"{question} Answer in one word." for question in questions]
        for rows, probabilities in self.first_tokens(images, texts):
            for row, values in zip(rows, probabilities.cpu(), strict=True):
                if not _is_word(tokenizer, int(values.argmax())):
                    continue
                words = [form for word in spellings(answers[row]) for form in (word, word.capitalize())]
                ids = [tokenizer.encode(f"{space}{w}", add_special_tokens=False) for w in words for space in ("", " ")]
                # without those that are no word, such as a space
                first = sorted({own[0] for own in ids if own and _is_word(tokenizer, own[0])})
                scores[row] = values[first].sum().clamp(max=1)
        return scores.to(images.device)


def spellings(answer: str) -> frozenset[str]:
    """Return an answer in lower case, and for the word of a number up to ten its digits."""
    word = answer.strip().lower()
    return frozenset({word, str(_NUMBERS.index(word))} if word in _NUMBERS else {word})


def _is_word(tokenizer: Any, token: int) -> bool:
    if token in tokenizer.added_tokens_decoder or token == tokenizer.unk_token_id:
        return False
    return any(letter.isalnum() for letter in tokenizer.decode([token]))


@functools.cache
def load_model(model: str, dtype: str) -> tuple[Any, Any]:
    """Load a frozen vision-language model and its processor, once per process and ``dtype``, and shared."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    if not processor.chat_template:
        raise ValueError(f"{model} has no chat template: put a chat_template.jinja into its folder")
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype))
    return network.requires_grad_(False).eval(), processor


def yes_no_tokens(model: str, tokenizer: Any) -> dict[Answer, list[int]]:
    """Return the ids of the words of yes and no that are a single token. Raises ValueError where none is."""
    tokens: dict[Answer, list[int]] = {}
    for answer, words in _WORDS.items():
        encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        tokens[answer] = sorted({ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id})
        if not tokens[answer]:
            raise ValueError(f"the tokenizer of {model} has no single token for {answer!r}: use another model")
    return tokens
