"""Rewards by questions about an image that are answered with yes or no, and a local model that answers them.

A judge is any callable from images (n, 3, H, W) in [0, 1] and n questions to the n probabilities of "yes", NaN where
there was no answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from genalign.types import Prompt
from rewards.pixels import pictures

Judge = Callable[[Tensor, Sequence[str]], Tensor]
Answer = Literal["yes", "no"]

VQASCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'
ARTIFACTS = "Are there artifacts or distorted things in this image? Answer with yes or no."
_WORDS: Mapping[Answer, tuple[str, ...]] = {
    "yes": ("yes", "Yes", "YES", " yes", " Yes", " YES"),
    "no": ("no", "No", "NO", " no", " No", " NO"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Question:
    """A question and the answer that a good image gets."""

    text: str
    answer: Answer = "yes"

    def __post_init__(self) -> None:
        if self.answer not in ("yes", "no"):
            raise ValueError(
                f"the answer to {self.text!r} must be yes or no, not {self.answer!r}: ask whether it is so instead"
            )


@dataclass(frozen=True)
class AboutPrompt:
    """One question about the whole prompt, whose text replaces {prompt} in the template."""

    template: str

    def __call__(self, prompt: Prompt) -> tuple[Question, ...]:
        return (Question(self.template.replace("{prompt}", prompt.text)),)


def vqascore(prompt: Prompt) -> tuple[Question, ...]:
    """VQAScore's question, whether the image shows the prompt (arXiv 2404.01291)."""
    return AboutPrompt(VQASCORE)(prompt)


@dataclass(frozen=True)
class Always:
    """The same question about every image, such as whether there are artifacts (arXiv 2601.03468)."""

    text: str = ARTIFACTS
    answer: Answer = "no"

    def __call__(self, prompt: Prompt) -> tuple[Question, ...]:
        return (Question(self.text, self.answer),)


def listed(prompt: Prompt) -> tuple[Question, ...]:
    """The "questions" of the prompt's metadata: texts, or pairs of a text and its answer, yes or no (arXiv 2303.11897).

    Empty where it has none. Raises ValueError for another answer.
    """
    rows = (prompt.metadata or {}).get("questions", ())
    return tuple(Question(row) if isinstance(row, str) else Question(row[0], row[1].lower()) for row in rows)


def geneval(prompt: Prompt) -> tuple[Question, ...]:
    """Questions about the objects, their numbers, colours and places in the prompt's GenEval metadata.

    Empty where it has no "include".
    """
    include = (prompt.metadata or {}).get("include", ())
    return tuple(question for item in include for question in _about(item, include))


def _about(item: Mapping[str, Any], include: Sequence[Mapping[str, Any]]) -> Iterator[Question]:
    name, count = item["class"], int(item.get("count", 1))
    if count == 1:
        yield Question(f"Is there any {name} in this image? Answer with yes or no.")
    else:
        yield Question(f"Does this image show {name} exactly {count} times? Answer with yes or no.")
    if "color" in item:
        yield Question(f"Is the {name} in this image {item['color']}? Answer with yes or no.")
    if "position" in item:
        relation, other = item["position"]
        yield Question(f"Is the {name} {relation} the {include[other]['class']}? Answer with yes or no.")


@dataclass(frozen=True)
class QuestionReward:
    """The mean probability, in [0, 1], that a judge gives to the right answers of a prompt's questions.

    ``questions`` tells those of a prompt: ``vqascore``, ``listed``, ``geneval``, ``AboutPrompt(template)``,
    ``Always()`` or your own. Means are those of Soft-TIFA (GenEval 2, arXiv 2512.16853): "arithmetic" credits every
    part, "geometric" wants them all.
    """

    judge: Callable  # type: ignore[type-arg]  # bare, as below: configurations name any Judge
    questions: Callable = vqascore  # type: ignore[type-arg]
    mean: Literal["arithmetic", "geometric"] = "arithmetic"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; NaN for a prompt without questions, and where a question got no
        answer. Raises ValueError where the judge returns another shape, or no probabilities."""
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per image: found {len(prompts)} for {len(samples)} images")
        asked = [(row, question) for row, prompt in enumerate(prompts) for question in self.questions(prompt)]
        if not asked:
            return samples.new_full((len(samples),), torch.nan, dtype=torch.float32)
        rows = torch.tensor([row for row, _ in asked], device=samples.device)
        yes = _checked(self.judge(samples[rows], [question.text for _, question in asked]), len(asked)).to(rows.device)
        wanted = torch.tensor([question.answer == "yes" for _, question in asked], device=rows.device)
        right = torch.where(wanted, yes, 1 - yes)
        if self.mean == "geometric":
            return _mean(right.log(), rows, len(samples)).exp()
        return _mean(right, rows, len(samples))


def _mean(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The mean (count,) of the values of each row; NaN for a row without any."""
    total = values.new_zeros(count).index_add(0, rows, values)
    return total / torch.bincount(rows, minlength=count)


def _checked(answers: Tensor, count: int) -> Tensor:
    if answers.shape != (count,):
        raise ValueError(f"the judge returned {tuple(answers.shape)} for {count} questions: return ({count},)")
    if bool(((answers < 0) | (answers > 1)).any()):
        raise ValueError("the judge must return probabilities of yes, in [0, 1]")
    return answers.float()


@dataclass(frozen=True)
class YesNoModel:
    """A judge: P(yes) / (P(yes) + P(no)) of the first word that a vision-language model answers with.

    ``model`` is a folder or Hub id that transformers' AutoModelForImageTextToText and AutoProcessor open, with a chat
    template; the processor prepares the images from 8-bit pixels, so that there is no gradient. Upper and lower case
    count together. NaN where yes and no together are less likely than ``least_mass``: the model says something else,
    such as a thought. Questions of one length are asked together, so that nothing is padded and an answer does not
    depend on its batch. Opened at the first call; then follows the images' device.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 8
    least_mass: float = 0.01

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probabilities (n,) in float32 for images (n, 3, H, W) in [0, 1]; NaN, too, for one that is not finite."""
        if len(images) != len(questions):
            raise ValueError(f"there must be one question per image: found {len(questions)} for {len(images)} images")
        opened = _opened(self.model, self.dtype)
        opened.network.to(images.device)
        shown, answers = pictures(images), torch.full((len(images),), torch.nan)
        for rows in self._batches([opened.length(question) for question in questions], shown):
            asked = [picture for row in rows if (picture := shown[row]) is not None]
            answers[rows] = opened.yes(asked, [questions[row] for row in rows], self.least_mass).cpu()
        return answers.to(images.device)

    def _batches(self, lengths: Sequence[int], shown: Sequence[Image.Image | None]) -> Iterator[list[int]]:
        for length in sorted(set(lengths)):
            rows = [row for row, found in enumerate(lengths) if found == length and shown[row] is not None]
            for begin in range(0, len(rows), self.batch_size):
                yield rows[begin : begin + self.batch_size]


@dataclass(frozen=True)
class _Opened:
    """A vision-language model with its processor, and the tokens that mean yes and no."""

    network: Any
    processor: Any
    yes_tokens: list[int]
    no_tokens: list[int]

    def length(self, question: str) -> int:
        """How many tokens the chat with a question has, before its image is put in."""
        text = self.processor.apply_chat_template(_chat(question, {}), add_generation_prompt=True, tokenize=False)
        return len(self.processor.tokenizer(text).input_ids)

    def yes(self, shown: Sequence[Image.Image], questions: Sequence[str], least_mass: float) -> Tensor:
        """P(yes) (n,) for images of one size and questions of one length."""
        chats = [_chat(question, {"image": picture}) for picture, question in zip(shown, questions, strict=True)]
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.network.device, self.network.dtype)
        said = self.network.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        probabilities = said.logits[0].float().softmax(-1)
        yes, no = (probabilities[:, tokens].sum(1) for tokens in (self.yes_tokens, self.no_tokens))
        return torch.where(yes + no >= least_mass, yes / (yes + no), torch.nan)


def _chat(question: str, image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a user says who shows an image and asks about it."""
    return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": question}]}]


@functools.cache
def _opened(model: str, dtype: str) -> _Opened:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    if not processor.chat_template:
        raise ValueError(f"{model} has no chat template: put a chat_template.jinja into its folder")
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=_DTYPES[dtype])
    yes, no = (_single_tokens(model, processor.tokenizer, _WORDS[answer]) for answer in ("yes", "no"))
    return _Opened(network.requires_grad_(False).eval(), processor, yes, no)


def _single_tokens(model: str, tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that are one of these words each, every token once."""
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    tokens = sorted({found[0] for found in encoded if len(found) == 1} - {tokenizer.unk_token_id})
    if not tokens:
        raise ValueError(f"the tokenizer of {model} has no single token for {words[0]!r}: use another model")
    return tokens
