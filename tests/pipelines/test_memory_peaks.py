"""The memory that `genalign plan` counts is that of a CUDA device without one, and fits the GPU of a configuration."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genalign import assets
from genalign.algorithms import recipes
from genalign.algorithms.recipe import Recipe
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.training.memory_estimate import MemoryEstimate, estimate_memory
from genalign.training.meta_round import GeneratedSamples
from genalign.training.outline import Outline
from genalign.training.settings import FittedSettings
from genalign.training.trainer import Trainer
from pipelines import meta_device
from pipelines.base import DiffusersPipeline
from pipelines.meta_device import outline_of
from scripts.benchmarks.published_sizes import MODELS, default_dtype
from tests.fake_cuda import FakeCuda
from tests.packages import ROOT

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in schedulers
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # diffusers, in the autoencoder of audio
]
PRESETS = Path(assets.__file__).parent / "presets"
SETTINGS = FittedSettings(
    rounds=1,
    prompts_per_round=2,
    group_size=4,
    batch_size=4,
    micro_batch=2,
    updates_per_round=1,
    overlap_scoring=False,
)
PROMPTS = ["red circle", "blue square"]
EVALUATION = GeneratedSamples("held_out", Sampling(2, guidance=4.0), batch_size=6, count=6)
DISTILLED = replace(EVALUATION, sampling=Sampling(2, guidance=1.0))


def sharpness(samples: Tensor, prompts: object) -> Tensor:
    return samples.diff(dim=-1).abs().flatten(1).mean(1)


REWARDS = [NamedReward("sharpness", sharpness)]


def evaluation_of(name: str) -> GeneratedSamples:
    return DISTILLED if name == "flux_dev" else EVALUATION


def build(name: str, blocks: int | None, device: str, memory: Memory) -> tuple[Any, type[DiffusersPipeline], Any]:
    make, family, options = MODELS[name]
    with torch.device(device), default_dtype(torch.bfloat16):
        pipe = make(blocks)
    return pipe, family, {**options, "autocast": torch.bfloat16, "memory": memory}


def planned(
    name: str, recipe: Recipe, sampling: Sampling, blocks: int | None, memory: Memory, settings: FittedSettings
) -> MemoryEstimate:
    pipe, family, options = build(name, blocks, "meta", memory)
    meta = outline_of(pipe, family, torch.bfloat16, **options)
    policy = Policy(meta.pipeline.denoiser, Lora(rank=32))
    (estimate,) = estimate_memory(meta, policy, recipe, settings, sampling, REWARDS, [evaluation_of(name)]).values()
    return estimate


def place_as_loaded(pipe: Any, family: type[DiffusersPipeline], memory: Memory) -> None:
    """Bring networks that were built on the device to the dtype and place of a checkpoint that was loaded."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for layer in (layer for network in networks.values() for layer in network.modules()):
        if "weight_g" in layer._parameters:  # of weight norm, whose product is not moved with a network
            layer.weight = torch.zeros(0)
    for name, network in networks.items():
        network.to(torch.bfloat16)  # buffers too, as those that are read from a file
        if memory.offload != "none" and name != family.denoiser_name:
            network.to("cpu")
            if isinstance(network, PreTrainedModel):
                network.tie_weights()  # which a copy from the device without values separates


def measured(
    name: str, recipe: Recipe, sampling: Sampling, blocks: int | None, memory: Memory, settings: FittedSettings
) -> dict[str, int]:
    """The peaks of a round and an evaluation on the device without values, by phase."""
    peaks: dict[str, int] = {}
    with FakeCuda() as cuda:
        pipe, family, options = build(name, blocks, "cuda", memory)
        place_as_loaded(pipe, family, memory)
        pipeline = family(pipe, device="cuda", **options)
        with torch.no_grad():
            pipeline.decode(pipeline.zeros(1, *pipeline.latent_shape))  # as in an earlier round
        policy = Policy(pipeline.denoiser, Lora(rank=32))
        trainer = Trainer(pipeline, policy, REWARDS, PROMPTS, recipe, settings, sampling)
        phase = "encoding texts"

        def begin(following: str) -> None:
            nonlocal phase
            peaks[phase] = max(peaks.get(phase, 0), cuda.peak)
            phase = following
            cuda.reset_peak()

        decode, predict, learn = pipeline.decode, pipeline.predict, trainer.learner.learn

        def predicting(*arguments: Any) -> Tensor:
            if phase in ("encoding texts", "decoding"):
                begin("sampling")
            return predict(*arguments)

        def decoding(latents: Tensor) -> Tensor:
            if phase == "sampling":
                begin("decoding")
            return decode(latents)

        def learning(*arguments: Any) -> Any:
            begin("learning")
            return learn(*arguments)

        pipeline.predict, pipeline.decode, trainer.learner.learn = predicting, decoding, learning
        cuda.reset_peak()
        pipeline.encode([*PROMPTS, "3", "4", "5"])  # and the empty text: as many as are evaluated
        (_,) = trainer.rounds()
        begin("held out")
        evaluation = evaluation_of(name)
        size, scale = evaluation.batch_size, evaluation.sampling.guidance_scale(pipeline)
        grid = evaluation.sampling.grid(pipeline)
        assert len(next(generate(pipeline, PROMPTS * (size // 2), range(size), grid, scale, size))) == size
        begin("")
    return peaks


CASES: dict[str, tuple[Memory, float, dict[str, Any]]] = {
    "plain": (Memory(), 1.0, {}),
    "lean": (Memory(offload="all", checkpointing=True, decode_batch=2), 4.0, {"offload_rollouts": True}),
}


def compare(name: str, recipe: Recipe, case: str, blocks: int | None, settings: FittedSettings = SETTINGS) -> None:
    memory, guidance, changes = CASES[case]
    guidance = 1.0 if name == "flux_dev" else guidance  # which is distilled
    arguments = name, recipe, Sampling(3, guidance=guidance), blocks, memory, replace(settings, **changes)
    expected, counted = measured(*arguments), planned(*arguments).peaks
    for phase, size in expected.items():
        assert counted[phase] == pytest.approx(size, rel=0.1), (phase, expected, counted)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_phases_take_what_the_device_counts(case: str) -> None:
    compare("sd35_medium", recipes.flow_grpo(window=1), case, 1)


@pytest.mark.slow  # models of billions of parameters
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["flux_dev", "sd15", "sdxl", "stable_audio_open"])
def test_phases_of_other_models(name: str, case: str) -> None:
    if name == "stable_audio_open" and CASES[case][0].checkpointing:
        pytest.skip("diffusers has no gradient checkpointing for this network that keeps its attention")
    compare(name, recipes.flow_grpo(window=1), case, 1)


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("recipe", [recipes.flow_grpo(window=1, kl=0.1), recipes.nft()], ids=["flow_grpo", "nft"])
def test_phases_at_full_size(recipe: Recipe) -> None:
    settings = replace(SETTINGS, batch_size=16, group_size=8, micro_batch=8)
    compare("sd35_medium", recipe, "lean", None, settings)


CONFIGURATIONS = [*sorted((ROOT / "scripts/configs/train").glob("sd*.yaml")), *sorted(PRESETS.glob("*.yaml"))]
PUBLISHED = {
    "stable-diffusion-3.5-medium": "sd35_medium",
    "FLUX.1-dev": "flux_dev",
    "stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5": "sd15",
}
HEADER = re.compile(
    r"# GPU: (?P<count>\d+) x (?P<card>\d+) GB; counted peak: (?P<peak>[\d.]+) GiB, while (?P<phase>[\w ]+)\."
)


def header(path: Path) -> re.Match[str]:
    """The line of a configuration's header that names its GPU."""
    found = [match for line in path.read_text().splitlines() if (match := HEADER.match(line))]
    assert len(found) == 1, f"{path} names no GPU"
    return found[0]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_names_a_gpu_that_it_fits(path: Path) -> None:
    named = header(path)
    assert float(named["peak"]) <= 0.9 * int(named["card"])
    assert f"{named['card']}gb" in path.stem or "gb" not in path.stem


@pytest.mark.slow  # each builds a whole network
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_peak_in_a_header_is_that_of_plan(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def published(path_or_id: str, *, family: str | None = None, dtype: torch.dtype, **options: Any) -> Outline:
        make, kind, _ = MODELS[PUBLISHED[path_or_id.split("/")[1]]]
        with torch.device("meta"), default_dtype(dtype):
            return outline_of(make(None), kind, dtype, **options)

    monkeypatch.setattr(meta_device, "outline", published)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(400)))
    named = header(path)
    reward = ["--rewards", '{"sharpness": {"function": "tests.pipelines.test_memory_peaks.sharpness"}}']
    arguments = ["--prompts", str(prompts), *reward, "--output", str(tmp_path / "run"), "--processes", named["count"]]
    main(["plan", "--config", str(path), *arguments])
    printed = capsys.readouterr().out
    peaks = re.findall(r"peak of [\w ]+: ([\d.]+) GiB, while ([\w ]+)", printed)
    peak, phase = max(peaks, key=lambda found: float(found[0]))
    print(path.stem, peaks)
    assert (phase, float(peak)) == (named["phase"], pytest.approx(float(named["peak"]), abs=0.2))
