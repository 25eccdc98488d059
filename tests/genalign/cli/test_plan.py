"""`genalign plan` predicts a run's ledger and estimates its memory, without reading weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import pipelines
from genalign.algorithms.recipes import Recipe, dense_grpo, dragon, flow_grpo, mix_grpo, nft, prdp
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.training import dry_run as counting
from genalign.training.dry_run import DryRun, ToyPipeline, dry_run
from genalign.training.memory_estimate import NetworkSize, Outline, estimate_memory, prediction_activations
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.worlds import shapes
from pipelines import SD3
from pipelines.meta_device import outline
from tests.genalign.training.toy_runs import redness
from tests.packages import ROOT

CONFIGS = ROOT / "scripts" / "configs"
LARGE = [path for path in sorted(CONFIGS.glob("train/*.yaml")) if "shapes" not in path.stem and "own" not in path.stem]
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


REWARDS = [NamedReward("red", redness, 0.5), NamedReward("reported", redness, 0.0)]


def _planned(pipeline: SD3, recipe: Recipe, sampling: Sampling, settings: TrainerSettings = SETTINGS) -> DryRun:
    toy = ToyPipeline.like(pipeline, sampling)
    return dry_run(toy, REWARDS, shapes.prompts("train"), recipe, settings, sampling.guidance_scale(pipeline))


def _trainer(pipeline: SD3, recipe: Recipe, sampling: Sampling, settings: TrainerSettings = SETTINGS) -> Trainer:
    policy = Policy(pipeline.denoiser, Lora(2, 4))
    return Trainer(pipeline, policy, REWARDS, shapes.prompts("train"), recipe, settings, sampling)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_counts_what_a_run_bills(tiny: SD3, name: str, guidance: float) -> None:
    sampling = Sampling(4, guidance=guidance)
    planned, trainer = _planned(tiny, RECIPES[name], sampling), _trainer(tiny, RECIPES[name], sampling)
    rounds = [dict(trainer.ledger.counts) for _ in trainer.rounds()]
    assert dict(planned.first.counts) == rounds[0]
    assert dict(planned.total.counts) == rounds[-1]
    assert planned.rounds == len(rounds) == 2


def test_max_nfe_ends_a_dry_run_and_a_run_after_the_same_round(tiny: SD3) -> None:
    small = replace(SETTINGS, rounds=9, max_nfe=100, prompts_per_round=2, updates_per_round=1)
    planned = _planned(tiny, flow_grpo(window=1), Sampling(4), small)
    trainer = _trainer(tiny, flow_grpo(window=1), Sampling(4), small)
    assert len(list(trainer.rounds())) == planned.rounds < 9
    assert trainer.ledger.counts == planned.total.counts


def test_a_long_run_repeats_its_first_rounds(tiny: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mix_grpo(window=1, rounds_each=1)  # a period of four rounds on four steps
    for settings in (replace(SETTINGS, rounds=43), replace(SETTINGS, rounds=99, max_nfe=1500)):
        monkeypatch.setattr(counting, "COUNTED_ROUNDS", 1000)
        every_round = _planned(tiny, recipe, Sampling(4), settings)
        monkeypatch.setattr(counting, "COUNTED_ROUNDS", 12)
        assert _planned(tiny, recipe, Sampling(4), settings) == every_round
        assert 12 < every_round.rounds < 99


def test_a_run_of_any_length_is_planned_from_a_bounded_number_of_rounds(
    tiny: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "COUNTED_ROUNDS", 100)
    schedule = Mock(side_effect=flow_grpo().schedule)
    planned = _planned(tiny, replace(flow_grpo(), schedule=schedule), Sampling(4), replace(SETTINGS, rounds=10**9))
    assert schedule.call_count == 100
    assert planned.rounds == 10**9
    assert planned.total.counts == {call: 10**9 * count for call, count in planned.first.counts.items()}


def test_stored_tensors_of_a_sample(tiny: SD3) -> None:
    around_two_steps, predictions, final = 3, 2, 1
    assert _planned(tiny, flow_grpo(), Sampling(4)).stored == around_two_steps + predictions + final
    assert _planned(tiny, nft(), Sampling(4)).stored == 1


def test_the_toy_pipeline_has_one_grid(tiny: SD3) -> None:
    toy = ToyPipeline.like(tiny, Sampling(4))
    assert toy.grid(99) is toy.steps and len(toy.steps) == 4
    assert ToyPipeline.flow(3).steps.sigma.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_an_outline_is_the_checkpoint_without_values(tiny_folder: Path, tiny: SD3) -> None:
    meta = outline(tiny_folder)
    real = {name: part for name, part in tiny.pipe.components.items() if isinstance(part, nn.Module)}
    assert {network.name: network.parameters for network in meta.networks} == {
        name: sum(parameter.numel() for parameter in network.parameters()) for name, network in real.items()
    }
    assert meta.networks[0].name == "transformer"
    assert meta.pipeline.denoiser.device.type == "meta"
    assert torch.equal(meta.pipeline.grid(5).sigma, tiny.grid(5).sigma)
    assert meta.pipeline.latent_shape == tuple(tiny.initial_noise([0]).shape[1:])


def test_activations_on_the_meta_device_are_those_on_the_cpu(tiny_folder: Path, tiny: SD3) -> None:
    meta = outline(tiny_folder)
    policy = Policy(meta.pipeline.denoiser, Lora(2, 4))
    Policy(tiny.denoiser, Lora(2, 4))
    real = replace(meta, pipeline=tiny)
    assert prediction_activations(meta, 3, 1.0) == prediction_activations(real, 3, 1.0)
    assert prediction_activations(meta, 3, 2.0) == prediction_activations(real, 6, 1.0)
    estimates = [estimate_memory(o, policy, nft(), SETTINGS, 1.0, stored=2) for o in (meta, real)]
    assert estimates[0] == estimates[1]
    checkpointing = replace(meta, memory=Memory(checkpointing=True))
    assert prediction_activations(checkpointing, 3, 1.0) < prediction_activations(meta, 3, 1.0)


def test_missing_weight_files_are_refused_and_memory_is_estimated(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder, ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")])
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--training.rounds", "1"]
    assert main(["plan", *plain, "--model.path", str(folder)]) == 2
    printed = capsys.readouterr()
    assert "has no weights in text_encoder/, text_encoder_2/, text_encoder_3/, transformer/, vae/" in printed.err
    assert "sum while learning" in printed.out


SIZES = {"transformer": (1000, 600), "vae": (100, 0), "text_encoder": (50, 0)}
NETWORKS = tuple(NetworkSize(name, *sizes) for name, sizes in SIZES.items())


def test_memory_by_hand(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genalign.training.memory_estimate.largest_layer", lambda vae, run: 11 * len(run()))
    monkeypatch.setattr("genalign.training.memory_estimate.saved_activations", lambda network, run, again: 28)
    pipeline = outline(tiny_folder).pipeline
    assert pipeline.latent_shape == (4, 16, 16) and pipeline.resolution == (64, 64)
    settings = replace(SETTINGS, optimizer="adamw8bit")
    samples = 4 * 8 * (2 * 4 * 16 * 16 + 3 * 64 * 64)

    lora = Policy(nn.Sequential(nn.Linear(4, 6)), Lora(1, targets=("0",)))  # 10 weights
    whole = Policy(nn.Linear(5, 2, bias=False), None)  # 10 weights

    def peaks(memory: Memory, policy: Policy = lora) -> dict[str, float]:
        meta = Outline(pipeline, NETWORKS, memory, width=2)
        sizes = estimate_memory(meta, policy, flow_grpo(), settings, 1.0, stored=2).peaks
        return {phase: size - (samples if phase != "encoding" else 0) for phase, size in sizes.items()}

    always = 2 * 1150 + 10 * (4 + 4 + 4 + 2)
    assert peaks(Memory()) == {"encoding": always, "decoding": always + 132, "learning": always + 28}
    denoiser = 2 * 1000 + 140
    text = peaks(Memory(offload="text"))
    assert text == {"encoding": denoiser + 200 + 100, "decoding": denoiser + 200 + 132, "learning": denoiser + 200 + 28}
    offloaded = peaks(Memory(offload="all", decode_batch=1))
    assert offloaded == {"encoding": denoiser + 100, "decoding": denoiser + 200 + 33, "learning": denoiser + 28}
    assert peaks(Memory(quantization="nf4", offload="all"))["learning"] == 2 * 400 + 0.5625 * 600 + 140 + 28
    assert peaks(Memory(offload="all"), whole)["learning"] == 4 * 1000 + 10 * (4 + 2) + 28  # the rest is on the CPU


def test_the_command_prints_all_and_reads_no_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "load", None)
    monkeypatch.chdir(tmp_path)
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--model.path", str(tiny_folder)]
    assert main(["plan", *plain, "--training.rounds", "2"]) == 0
    printed = capsys.readouterr().out
    for words in ("24 prompts x 8 = 192", "3 x 64 x 64", "nfe backward", "transformer", "sum while learning"):
        assert words in printed, words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_calls_are_counted_without_the_checkpoint(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Mock(side_effect=PermissionError("it is gated"))
    monkeypatch.setattr("pipelines.checkpoint_files.download", gated)
    monkeypatch.chdir(tmp_path)
    small = ["--training.prompts_per_round", "4", "--training.rounds", "3", "--training.updates_per_round", "1"]
    assert main(["plan", "--config", str(path), *small]) == 2
    printed = capsys.readouterr()
    assert "nfe backward" in printed.out and "is gated" in printed.err and "no prompt file" in printed.err
    assert list(tmp_path.iterdir()) == []
