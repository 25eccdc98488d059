"""Steering in batches of bounded size gives what whole batches give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from torch import Tensor, nn

from genalign.search import BestOfN, FKSteering, Prune
from pipelines import prune, steer
from pipelines.steering.batches import bounded_batches
from tests.pipelines.steering.test_prompts_of_calls import _open
from tests.pipelines.tiny_checkpoints import FolderOf
from tests.pipelines.tiny_pipelines import STEPS, Family, flux, sd3, sd15, sdxl, stable_audio

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]
EDM = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
FAMILIES: dict[str, Callable[[], Family]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "stable_audio": lambda: stable_audio(scheduler=EDM),
}
FK = FKSteering(4, start=0.0, stop=0.5, every=0.25)


class Sizes:
    """The sizes of the batches that the network, the decoder and a reward see."""

    def __init__(self, network: nn.Module, vae: nn.Module) -> None:
        self.network, self.vae, self.reward = list[int](), list[int](), list[int]()
        first = next(module for name, module in network.named_modules() if name.endswith("to_q"))
        last = [module for module in vae.decoder.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        first.register_forward_hook(lambda module, inputs, output: self.network.append(len(output)))
        last[-1].register_forward_hook(lambda module, inputs, output: self.vae.append(len(output)))

    def loudness(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        self.reward.append(len(samples))
        assert len(samples) == len(prompts)
        return samples.flatten(1).mean(1)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_bounded_batches_give_the_samples_of_whole_ones(name: str, size: int) -> None:
    family = FAMILIES[name]()
    results = []
    for bound in (None, size):
        sizes = Sizes(family.network, family.pipe.vae)
        with steer(family.pipe, sizes.loudness, FK, prompts=["noise"], batch_size=bound) as steering:
            family.run(range(4))
        results.append(steering)
    whole, parts = results
    assert max(sizes.network) <= size and max(sizes.vae) <= size and max(sizes.reward) <= size
    torch.testing.assert_close(parts.result.samples, whole.result.samples, rtol=0, atol=2e-3)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-3)
    assert parts.ledger == whole.ledger and parts.result.winners == whole.result.winners
    assert "forward" not in vars(family.network) and "decode" not in vars(family.pipe.vae)


@pytest.mark.parametrize(
    "name", ["sd15", "flux2_klein", "sana", "qwen_image", "qwen_image21", "z_image", "ace_step", "audio_ldm2"]
)
def test_a_whole_call_by_text_is_bounded_with_its_own_decoding(name: str, folder_of: FolderOf) -> None:
    pipe: Any = _open(folder_of(name))
    made: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 2}
    images = []
    for bound in (None, 2):
        sizes = Sizes(pipe.components.get("unet") or pipe.transformer, pipe.vae)
        with steer(
            pipe, sizes.loudness, BestOfN(), batch_size=bound, prompts=["a ring"] if name == "ace_step" else None
        ):
            generator = torch.Generator().manual_seed(1)
            if name == "ace_step":
                images.append(pipe(["a ring"] * 3, [""] * 3, audio_duration=3.1, generator=generator, **made).audios)
                continue
            if name == "audio_ldm2":
                made["output_type"] = "latent"  # diffusers would put the waveforms in an order of its own
                call = {"audio_length_in_s": 3.0, "num_waveforms_per_prompt": 3, "generator": generator}
                images.append(pipe("a ring", **call, **made).audios)
                continue
            size = (
                {"height": 64, "width": 64}
                if name != "sana"
                else {"use_resolution_binning": False, "height": 32, "width": 32}
            )
            extra = {"qwen_image21": {"use_kv_cache": False}, "flux2_klein": {"max_sequence_length": 8}}
            size |= extra.get(name, {})
            images.append(pipe(prompt="a ring", num_images_per_prompt=3, generator=generator, **size, **made).images)
    assert max(sizes.network) <= 2 and max(sizes.vae) <= 2
    torch.testing.assert_close(torch.as_tensor(images[1]), torch.as_tensor(images[0]), rtol=0, atol=1e-3)


def test_a_cache_cannot_be_divided(folder_of: FolderOf) -> None:
    pipe: Any = _open(folder_of("qwen_image21"))
    with (
        pytest.raises(ValueError, match="cannot divide the cache of a call: call the pipeline with use_kv_cache=False"),
        bounded_batches(pipe, 1),
    ):
        pipe(prompt=["a ring"] * 2, num_inference_steps=2, height=64, width=64)


def test_pruning_is_bounded_too() -> None:
    family = sd15()
    call = {
        **family.shared,
        **{key: tensor[:1] for key, tensor in family.samples.items()},
        "num_inference_steps": STEPS,
    }
    results = []
    for bound in (None, 3):
        sizes = Sizes(family.network, family.pipe.vae)
        results.append(
            prune(family.pipe, "noise", sizes.loudness, Prune((0, 2), (0.5, 0.5), 8), batch_size=bound, **call)
        )
    assert max(sizes.network) <= 3 and max(sizes.vae) <= 3
    torch.testing.assert_close(results[1].samples, results[0].samples, rtol=0, atol=1e-3)


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    family = sd15()
    with pytest.raises(ValueError, match="batch_size must be at least 1 sample"), bounded_batches(family.pipe, 0):
        pass
    other = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=4,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=4,
        caption_channels=4,
    )
    family.pipe.unet = other
    with (
        pytest.raises(ValueError, match=r"calls of PixArtTransformer2DModel.*leave it out.*SD3Transformer2DModel"),
        bounded_batches(family.pipe, 2),
    ):
        pass
    family = sdxl()
    with (
        pytest.raises(ValueError, match=r"cannot divide what cross_attention_kwargs holds \(masks\)"),
        bounded_batches(family.pipe, 2),
    ):
        family.run(range(4), cross_attention_kwargs={"masks": torch.zeros(4, 1)})


def test_lists_of_plain_values_are_divided_among_their_samples() -> None:
    lists = []

    class Network(diffusers.QwenImageTransformer2DModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, hidden_states: Tensor, img_shapes: list[tuple[int, int]]) -> tuple[Tensor]:
            lists.append(img_shapes)
            return (hidden_states,)

    family, network = flux(), Network()
    family.pipe.transformer = network
    with bounded_batches(family.pipe, 2):
        network(hidden_states=torch.arange(3.0), img_shapes=[(1, 2), (3, 4), (5, 6)])
    assert lists == [[(1, 2), (3, 4)], [(5, 6)]]
