"""A plan says before a run what the run's own ledger says after it, and reads no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pipelines
from genalign.algorithms.recipes import Recipe, dense_grpo, dragon, flow_grpo, mix_grpo, nft, prdp
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.memory_options import Memory
from genalign.scoring.budget import Ledger, backward
from genalign.scoring.score import NamedReward
from genalign.training.dry_run import Counted, Levels, StandIn, count
from genalign.training.memory_estimate import Part, Training, adapter_numbers, held, seconds
from genalign.training.trainer import Trainer, TrainerSettings
from genalign.types import Prompt
from genalign.worlds import shapes
from pipelines import SD3
from pipelines.meta_device import MetaPipeline, outline
from tests.packages import ROOT

CONFIGS = ROOT / "scripts" / "configs"
RECIPES = {
    "flow_grpo": flow_grpo(window=1),
    "flow_grpo with a distance": flow_grpo(kl=0.1, kl_form="exact"),
    "mix_grpo": mix_grpo(window=1, rounds_each=1),
    "dense_grpo": dense_grpo(),
    "prdp": prdp(),
    "dragon": dragon(),
    "nft": nft(),
}
SETTINGS = TrainerSettings(rounds=2, prompts_per_round=4, group_size=2, batch_size=4, updates_per_round=2)


def redness(samples: Tensor, prompts: list[Prompt]) -> Tensor:
    """Never the same for two images."""
    return samples[:, 0].flatten(1).mean(1)


REWARDS = [NamedReward("red", redness, 0.5), NamedReward("told", redness, 0.0)]


def _planned(pipeline: SD3, recipe: Recipe, sampling: Sampling, settings: TrainerSettings = SETTINGS) -> Counted:
    levels = Levels.of(pipeline, sampling)
    return count(levels, REWARDS, shapes.prompts("train"), recipe, settings, sampling.guidance)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_counts_what_a_run_bills(tiny: SD3, name: str, guidance: float) -> None:
    sampling = Sampling(4, guidance=guidance)
    planned = _planned(tiny, RECIPES[name], sampling)
    policy = Policy(tiny.denoiser, Lora(2, 4))
    prompts = shapes.prompts("train")
    trainer = Trainer(tiny, policy, REWARDS, prompts, RECIPES[name], SETTINGS, sampling)
    rounds = [dict(trainer.ledger.counts) for _ in trainer.rounds()]
    assert dict(planned.first.counts) == rounds[0]
    assert dict(planned.total.counts) == rounds[-1]
    assert planned.rounds == len(rounds) == 2


def test_a_run_ends_where_the_plan_says(tiny: SD3) -> None:
    sampling, recipe = Sampling(4), flow_grpo(window=1)
    settings = TrainerSettings(
        rounds=9, max_nfe=100, prompts_per_round=2, group_size=2, batch_size=4, updates_per_round=1
    )
    planned = _planned(tiny, recipe, sampling, settings)
    trainer = Trainer(
        tiny, Policy(tiny.denoiser, Lora(2, 4)), REWARDS, shapes.prompts("train"), recipe, settings, sampling
    )
    assert len(list(trainer.rounds())) == planned.rounds < 9
    assert trainer.ledger.counts == planned.total.counts


def test_what_a_round_stores(tiny: SD3) -> None:
    assert _planned(tiny, flow_grpo(), Sampling(4)).stored == 4 * 2 + 1  # two trained steps, and the final latents
    assert _planned(tiny, nft(), Sampling(4)).stored == 1


def test_the_stand_in_knows_only_its_own_grid(tiny: SD3) -> None:
    levels = Levels.of(tiny, Sampling(4))
    assert StandIn(levels).grid(99) is levels.grid
    assert Levels.straight(3).grid.sigma.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_an_outline_is_the_checkpoint_without_values(tiny_folder: Path, tiny: SD3) -> None:
    made = outline(tiny_folder)
    real = {name: part for name, part in tiny.pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {part.name: part.numbers for part in made.parts} == {
        name: sum(parameter.numel() for parameter in network.parameters()) for name, network in real.items()
    }
    assert made.parts[0].name == "transformer" and all(part.present for part in made.parts)
    assert made.pipeline.denoiser.device.type == "meta"
    assert torch.equal(made.pipeline.grid(5).sigma, tiny.grid(5).sigma)
    assert made.pipeline.latent_shape == tuple(tiny.initial_noise([0]).shape[1:])


def test_what_a_prediction_keeps_is_what_a_real_one_keeps(tiny_folder: Path, tiny: SD3) -> None:
    made = outline(tiny_folder)
    Policy(made.pipeline.denoiser, Lora(2, 4))
    Policy(tiny.denoiser, Lora(2, 4))
    real = MetaPipeline(tiny, tiny_folder, Memory())
    assert made.kept(3, 1.0) == real.kept(3, 1.0) and made.kept(3, 2.0) == real.kept(6, 1.0)
    assert made.decoding(3) == real.decoding(3)
    checkpointing = MetaPipeline(made.pipeline, tiny_folder, Memory(checkpointing=True))
    assert checkpointing.kept(3, 1.0) < made.kept(3, 1.0)


def test_a_folder_without_weight_files_is_told(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder, ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")])
    assert not any(part.present for part in outline(folder).parts)
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--training.rounds", "1"]
    assert main(["plan", *plain, "--model.path", str(folder)]) == 2
    told = capsys.readouterr()
    assert "has no weights in text_encoder/, text_encoder_2/, text_encoder_3/, transformer/, vae/" in told.err
    assert "sum while learning" in told.out


class _Fixed:
    """An outline of round numbers."""

    def __init__(self, pipeline: SD3) -> None:
        self.pipeline = pipeline

    parts = (Part("transformer", 1000, 600, True), Part("vae", 100, 0, True), Part("text_encoder", 50, 0, True))

    def kept(self, samples: int, guidance: float) -> int:
        return 7 * samples

    def decoding(self, samples: int) -> int:
        return 11 * samples


def _held(tiny: SD3, memory: Memory, lora: bool = True) -> dict[str, float]:
    training = Training(2, memory, "adamw8bit", lora, False, 1.0, 4, images=8, stored=2)
    found = held(_Fixed(tiny), _Fixed.parts, 10, training)
    batch = 4 * 8 * (2 * 4 * 16 * 16 + 3 * 64 * 64)
    return {phase: size - (batch if phase != "encoding" else 0) for phase, size in found.peaks().items()}


def test_memory_by_hand(tiny: SD3) -> None:
    assert tiny.latent_shape == (4, 16, 16) and tiny.resolution == (64, 64)
    always = 2 * 1150 + 10 * (4 + 4 + 4 + 2)
    assert _held(tiny, Memory()) == {"encoding": always, "decoding": always + 132, "learning": always + 28}
    trunk = 2 * 1000 + 140
    lent = _held(tiny, Memory(offload=True, decode_batch=1))
    assert lent == {"encoding": trunk + 100, "decoding": trunk + 200 + 33, "learning": trunk + 28}
    nf4 = _held(tiny, Memory(quantization="nf4", offload=True))
    assert nf4["learning"] == 2 * 400 + 0.5625 * 600 + 140 + 28
    assert _held(tiny, Memory(offload=True), lora=False)["learning"] == 4 * 1000 + 140 + 28


def test_a_backward_pass_is_priced_as_two_forwards() -> None:
    ledger = Ledger()
    ledger.bill("forward", 10)
    ledger.bill(backward("forward"), 5)
    assert seconds(ledger, {"forward": 0.5}) == 10.0
    assert seconds(ledger, {"forward": 0.5, "forward backward": 3.0}) == 20.0
    ledger.bill("decode", 1)
    with pytest.raises(ValueError, match="no price for decode"):
        seconds(ledger, {"forward": 0.5})


def test_the_command_prints_all_and_reads_no_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "load", None)
    monkeypatch.chdir(tmp_path)
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"forward": 0.6, "decode": 0.0, "reward/partial": 0.0, "reward/strict": 0.0}))
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--model.path", str(tiny_folder)]
    assert main(["plan", *plain, "--prices", str(prices), "--training.rounds", "2"]) == 0
    told = capsys.readouterr().out
    for word in (
        "24 prompts x 8 = 192",
        "forward backward",
        "before_after: decode",
        "transformer",
        "sum while learning",
        "to hold less",
        "--model.memory.checkpointing true",
        "--training.batch_size 48",
    ):
        assert word in told, word
    assert "time: " in told and "min of training" in told
    assert list(tmp_path.iterdir()) == [prices]


UNKNOWN = (
    "train/sd35_medium_flow_grpo_geneval",
    "train/sd35_medium_flow_grpo_ocr",
    "train/flux_dev_flow_grpo_pickscore",
    "train/sdxl_flow_grpo_pickscore",
    "train/sd15_flow_grpo_aesthetic",
)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_plan_without_the_weights_says_the_rest(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(repository: str, file: str) -> str:
        raise PermissionError(f"{repository} is gated")

    monkeypatch.setattr("pipelines.checkpoint_files._from_hub", gated)
    monkeypatch.chdir(tmp_path)
    small = ["--training.prompts_per_round", "4", "--training.rounds", "3", "--training.updates_per_round", "1"]
    assert main(["plan", "--config", str(CONFIGS / f"{name}.yaml"), *small]) == 2
    told = capsys.readouterr()
    assert "forward backward" in told.out and "is gated" in told.err and "no prompt file" in told.err
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_measured_by_their_heads(tiny: SD3, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, Lora(2, 4))
    assert policy.config is not None
    tiny.save_lora(tmp_path / "lora", policy.adapter_state(), policy.config)
    assert adapter_numbers(tmp_path / "lora") == sum(parameter.numel() for parameter in policy.parameters)
    assert adapter_numbers(tmp_path / "none") is None
