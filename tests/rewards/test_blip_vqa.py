from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

from genalign.evaluation.benchmarks.tifa import QuestionJudge
from rewards.backbones.pixels import pictures
from rewards.blip_vqa import BlipVqa
from tests.rewards.low_precision import require_alike

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "blue", "cup", "?", "[DEC]", "[ENC]"]
QUESTIONS = ["a red cup?", "a blue cup?", "a cup?", "a red cup?"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLIP with its processor."""
    folder: Path = tmp_path_factory.mktemp("blip")
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": WORDS.index("[DEC]")}
    text = {**tower, **ids, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 40, 52, generator=torch.Generator().manual_seed(0))


def test_answers_are_those_of_the_first_token(blip: Path) -> None:
    network = BlipForQuestionAnswering.from_pretrained(blip).eval()
    processor = BlipProcessor.from_pretrained(blip)
    expected = []
    for picture, question in zip(pictures(images()), QUESTIONS, strict=True):
        inputs = processor(images=picture, text=question, return_tensors="pt")
        inputs["input_ids"][0, 0] = WORDS.index("[ENC]")
        output = network.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        probabilities = output.logits[0][0].softmax(-1)
        yes, no = float(probabilities[5]), float(probabilities[6])
        expected.append(yes / (yes + no))
    judge: QuestionJudge = BlipVqa(str(blip))
    answers = judge(images(), QUESTIONS)
    assert answers.tolist() == pytest.approx(expected, abs=1e-5) and answers.std() > 1e-3


def test_an_answer_does_not_depend_on_its_batch(blip: Path) -> None:
    broken = images()
    broken[1, 0, 0, 0] = torch.nan
    together = BlipVqa(str(blip))(broken, QUESTIONS)
    assert together.isnan().tolist() == [False, True, False, False]
    alone = torch.cat([BlipVqa(str(blip), batch_size=1)(broken[i : i + 1], QUESTIONS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5, equal_nan=True)


def test_weights_in_bfloat16_answer_alike(blip: Path) -> None:
    full, low = (BlipVqa(str(blip), dtype=dtype)(images(8), QUESTIONS * 2) for dtype in ("float32", "bfloat16"))
    require_alike(full, low, 0.002)
