"""What a call is scored by comes from that call: by prompt or by embeddings, once or many times in a block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from torch import Tensor

from genalign.search import BestOfN
from genalign.types import Prompt
from pipelines import steer
from tests.pipelines.tiny_checkpoints import FAMILIES

pytestmark = [  # of diffusers: tensors of numpy arrays, torch's old weight norm, and rounding in torchsde
    pytest.mark.filterwarnings("ignore:Should have t[ab](>=t0|<=t1) but:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]
ENCODED = ("sd15", "sd3", "flux", "flux2_klein", "qwen_image", "qwen_image21", "z_image", "stable_audio", "audio_ldm2")
FEW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: FAMILIES[family].save(folder / family) for family in ENCODED}


class KeepsPrompts:
    """A reward that keeps the prompts that it scored by."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.texts = [prompt.text for prompt in prompts]
        return samples.flatten(1).mean(1)


def _open(folder: Path) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if "unet" in pipe.components:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def _call(pipe: Any, family: str, **arguments: Any) -> None:
    if family == "audio_ldm2":
        pipe(**{**FEW, **arguments}, num_waveforms_per_prompt=2, audio_length_in_s=1.0)
    elif family == "stable_audio":
        pipe(**{**FEW, **arguments}, num_waveforms_per_prompt=2, audio_end_in_s=1.0)
    else:
        arguments |= {name: n for name, n in FAMILIES[family].options.items() if name == "max_sequence_length"}
        pipe(**{**FEW, **arguments}, num_images_per_prompt=2, height=64, width=64)


@pytest.mark.parametrize("family", ENCODED)
def test_every_call_is_scored_by_its_own_prompts(family: str, folders: dict[str, Path]) -> None:
    pipe, seen = _open(folders[family]), KeepsPrompts()
    with steer(pipe, seen, BestOfN()) as steering:
        for prompts in ("a red circle", ["two blue squares", "a ring"]):
            negative = "a blur" if isinstance(prompts, str) else ["a blur"] * len(prompts)
            _call(pipe, family, prompt=prompts, **({} if "flux" in family else {"negative_prompt": negative}))
            prompts = [prompts] if isinstance(prompts, str) else prompts
            assert seen.texts == [text for text in prompts for _ in range(2)]
            assert steering.scores is not None and bool(steering.scores.isfinite().all())


def test_a_negative_prompt_that_is_encoded_separately_is_not_scored_by(folders: dict[str, Path]) -> None:
    pipe, seen = _open(folders["flux"]), KeepsPrompts()
    assert isinstance(pipe, FluxPipeline)
    with steer(pipe, seen, BestOfN()):
        _call(pipe, "flux", prompt="a red circle", negative_prompt="a blur", true_cfg_scale=2.0)
    assert seen.texts == ["a red circle"] * 2


def test_a_call_with_embeddings_alone_is_refused_whatever_came_before(folders: dict[str, Path]) -> None:
    pipe, seen = _open(folders["sd15"]), KeepsPrompts()
    embeddings = pipe.encode_prompt("two blue squares", "cpu", 1, True)
    given = {"prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
    with steer(pipe, seen, BestOfN()):
        _call(pipe, "sd15", prompt="a red circle")
        with pytest.raises(ValueError, match="the call has no prompt to score by"):
            _call(pipe, "sd15", **given)
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            pipe(prompt="lost", callback_on_step_end_tensor_inputs=["none"])  # a call that fails before its first step
        _call(pipe, "sd15", prompt="a ring")
        assert seen.texts == ["a ring"] * 2
    with steer(pipe, seen, BestOfN(), prompts=["two blue squares"]):
        _call(pipe, "sd15", **given)
        assert seen.texts == ["two blue squares"] * 2


def test_a_call_that_fails_leaves_no_result_of_the_one_before(folders: dict[str, Path]) -> None:
    pipe = _open(folders["sd15"])
    with steer(pipe, KeepsPrompts(), BestOfN()) as steering:
        _call(pipe, "sd15", prompt="a red circle")
        assert steering.scores is not None and len(steering.result.per_prompt) == 1
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            pipe(prompt="lost", callback_on_step_end_tensor_inputs=["none"])
        assert steering.scores is None
        with pytest.raises(ValueError, match="no call of the pipeline is complete"):
            _ = steering.result


def test_the_lineage_is_that_of_the_last_call(folders: dict[str, Path]) -> None:
    pipe, results = _open(folders["sd15"]), []
    with steer(pipe, KeepsPrompts(), BestOfN()) as steering:
        for _ in range(2):
            _call(pipe, "sd15", prompt="a red circle", generator=torch.Generator().manual_seed(1))
            results.append(steering.result)
    first, second = results
    assert first.lineage == second.lineage and first.winners == second.winners


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_packed_latents_are_decoded_at_the_size_of_their_call(family: str, folders: dict[str, Path]) -> None:
    pipe = _open(folders[family])
    with steer(pipe, KeepsPrompts(), BestOfN()) as steering:
        for height, width in ((64, 32), (32, 64)):
            pipe(prompt="a ring", num_images_per_prompt=2, height=height, width=width, **FEW)
            assert steering.result.samples.shape[1:] == (3, height, width)


def test_packed_latents_that_are_not_known_ask_for_a_decoder() -> None:
    from pipelines.steering.latent_scores import decode_latents

    class Unknown:
        vae = object()

    with pytest.raises(ValueError, match=r"Unknown packs its latents, \(N, tokens, C\): give steer your own decode="):
        decode_latents(Unknown(), torch.zeros(1, 4, 8))
