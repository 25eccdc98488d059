"""`genalign plan` predicts a run's ledger and estimates its memory, without reading weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import pipelines
from genalign.algorithms.credit import BestOfNCredit, BetaNormalized, VirtualBest
from genalign.algorithms.interfaces import Credit
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.pathwise_recipes import draft, draft_lv, drtune, flow_bp, instruct_video
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipe_changes import with_credit, with_gradient_balance
from genalign.algorithms.recipes import (
    dense_grpo,
    dragon,
    flow_grpo,
    mix_grpo,
    nft,
    prdp,
    tempflow_grpo,
    turning_point,
    vgpo,
)
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.training import dry_run as counting
from genalign.training.dry_run import DryRun, ToyPipeline, dry_run
from genalign.training.memory_estimate import MemoryEstimate, estimate_memory
from genalign.training.meta_round import GeneratedSamples
from genalign.training.settings import FittedSettings, TrainerSettings
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
    "turning_point": turning_point(window=2),
    "tempflow_grpo with branching": tempflow_grpo(branching=True),
    "prdp": prdp(),
    "dragon": dragon(),
    "nft": nft(),
    "draft": draft(2, Ascent(anchor=0.1)),
    "draft_lv": draft_lv(),
    "flow_bp": flow_bp(active=2),
    "instruct_video": instruct_video(moves=6),
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


@pytest.mark.parametrize("credit", [VirtualBest(best=-9.0), BetaNormalized(20.0, 30.0)])
def test_a_dry_run_takes_scores_that_do_not_suit_the_credit(tiny: SD3, credit: Credit) -> None:
    base = flow_grpo(window=1)
    planned = _planned(tiny, with_credit(base, credit), Sampling(4))
    assert planned.total.counts == _planned(tiny, base, Sampling(4)).total.counts


def test_a_dry_run_refuses_groups_that_are_too_small_for_the_credit(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="needs groups of 9 or more, not of 2: lower n, or raise group_size"):
        _planned(tiny, with_credit(flow_grpo(window=1), BestOfNCredit(n=9)), Sampling(4))


def test_a_dry_run_needs_no_scores_above_0(tiny: SD3) -> None:
    planned = _planned(tiny, vgpo(window=2), Sampling(4))
    assert planned.first.counts["nfe"] == _planned(tiny, flow_grpo(window=2), Sampling(4)).first.counts["nfe"]


def test_max_nfe_ends_a_dry_run_and_a_run_after_the_same_round(tiny: SD3) -> None:
    small = replace(SETTINGS, rounds=9, max_nfe=100, prompts_per_round=2, updates_per_round=1)
    planned = _planned(tiny, flow_grpo(window=1), Sampling(4), small)
    trainer = _trainer(tiny, flow_grpo(window=1), Sampling(4), small)
    assert len(list(trainer.rounds())) == planned.rounds < 9
    assert trainer.ledger.counts == planned.total.counts


def test_the_gradients_of_a_balance_are_counted_in_the_rounds_that_have_them(tiny: SD3) -> None:
    recipe = with_gradient_balance(flow_grpo(window=1, window_reach=0.25), every=3)
    settings = replace(SETTINGS, rounds=4)
    rewards = [NamedReward("red", redness, 0.5), NamedReward("again", redness, 2.0)]
    toy, prompts = ToyPipeline.like(tiny, Sampling(4)), shapes.prompts("train")
    planned = dry_run(toy, rewards, prompts, recipe, settings, 1.0)
    trainer = Trainer(tiny, Policy(tiny.denoiser, Lora(2, 4)), rewards, prompts, recipe, settings, Sampling(4))
    rounds = [dict(trainer.ledger.counts) for _ in trainer.rounds()]
    passes = [after["nfe backward"] - before.get("nfe backward", 0) for before, after in pairwise([{}, *rounds])]
    assert passes == [16, 16, 8, 16]  # in the updates 0, 3 and 6 of 8, of 4 samples and 2 rewards
    assert dict(planned.total.counts) == rounds[-1] and planned.windows == ((0,),)


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
    assert toy.grid(4) is toy.steps and len(toy.steps) == 4 and len(toy.grid(99)) == 99
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


def test_missing_weight_files_are_refused_and_memory_is_estimated(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder, ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")])
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--training.rounds", "1"]
    assert main(["plan", *plain, "--model.path", str(folder), "--max_seconds", "60"]) == 2
    printed = capsys.readouterr()
    assert "1 of 1, or as many as end within 60 s" in printed.out
    assert "has no weights in text_encoder/, text_encoder_2/, text_encoder_3/, transformer/, vae/" in printed.err
    assert "sum while learning" in printed.out


FITTED, LORA, MEMORY = FittedSettings(**vars(SETTINGS)), Lora(2, 4), Memory()


def _estimate(
    folder: Path,
    memory: Memory = MEMORY,
    settings: FittedSettings = FITTED,
    lora: Lora | None = LORA,
    recipe: Recipe = RECIPES["flow_grpo"],
    processes: int = 1,
    generations: Sequence[GeneratedSamples] = (),
) -> dict[str, MemoryEstimate]:
    meta = outline(folder, memory=memory)
    policy, sampling = Policy(meta.pipeline.denoiser, lora), Sampling(4)
    return estimate_memory(meta, policy, recipe, settings, sampling, REWARDS, generations, processes)


def test_networks_that_wait_are_counted_where_they_are_used(tiny_folder: Path) -> None:
    sizes = {network.name: network.nbytes for network in outline(tiny_folder).networks}
    texts = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    estimates = {offload: _estimate(tiny_folder, Memory(offload))["rank 0"] for offload in ("none", "text", "all")}
    peaks = {offload: estimate.peaks for offload, estimate in estimates.items()}
    for phase, moved in (("encoding texts", 0), ("sampling", texts), ("decoding", texts), ("learning", texts)):
        assert peaks["none"][phase] - peaks["text"][phase] == moved
    assert peaks["text"]["decoding"] == peaks["all"]["decoding"]
    for phase in ("sampling", "learning", "encoding texts"):
        assert peaks["text"][phase] - peaks["all"][phase] == sizes["vae"]


def test_the_held_weights_are_those_of_the_method(tiny_folder: Path) -> None:
    lora, whole = (_estimate(tiny_folder, lora=one, recipe=nft())["rank 0"].always for one in (Lora(2, 4), None))
    assert lora["optimizer"] == 2 * lora["trained weights"]
    assert lora["copies of trained weights"] == 2 * lora["trained weights"]  # the average and the lagging weights
    assert whole["copies of trained weights"] == 0 and "transformer" not in whole
    settings = replace(FITTED, optimizer="adamw8bit")
    assert _estimate(tiny_folder, settings=settings)["rank 0"].always["optimizer"] == lora["trained weights"] / 2
    quantized = _estimate(tiny_folder, Memory(quantization="int8"))["rank 0"].always["transformer"]
    denoiser = outline(tiny_folder).networks[0]
    assert quantized == denoiser.nbytes - 3 * denoiser.linear


def test_a_round_takes_memory_by_its_settings(tiny_folder: Path) -> None:
    settings = FITTED

    def phases(**changes: Any) -> Mapping[str, Mapping[str, float]]:
        return _estimate(tiny_folder, settings=replace(settings, **changes))["rank 0"].phases

    plain = phases()
    assert plain["sampling"]["earlier batches"] == plain["learning"]["samples of the round"] / 2 > 0
    beside = plain["sampling beside decoding"]["tensors"]
    assert beside == plain["sampling"]["tensors"] + plain["decoding"]["tensors"]
    assert "sampling beside decoding" not in phases(overlap_scoring=False)
    offloaded = phases(offload_rollouts=True)
    assert offloaded["learning"]["samples of the round"] < plain["learning"]["samples of the round"] / 4
    assert phases(micro_batch=1)["learning"]["tensors"] < plain["learning"]["tensors"]
    recomputed = _estimate(tiny_folder, Memory(checkpointing=True))["rank 0"].phases
    assert recomputed["learning"]["tensors"] < plain["learning"]["tensors"]


@pytest.mark.parametrize("make", [flow_bp, *(pytest.param(one, marks=pytest.mark.slow) for one in (draft, drtune))])
def test_learning_holds_one_graph_however_many_steps_carry_a_gradient(
    make: Callable[[int], Recipe], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps in place of two add latents alone; kept graphs would add two of the network's."""

    def learning(steps: int) -> float:
        return _estimate(tiny_folder, recipe=make(steps))["rank 0"].phases["learning"]["tensors"]

    latents = 4 * math.prod(outline(tiny_folder).pipeline.latent_shape) * FITTED.batch_size
    grown = learning(4) - learning(2)
    monkeypatch.setattr("genalign.algorithms.tails.checkpoint", lambda run, x, use_reentrant: run(x))
    kept = learning(4) - learning(2)
    assert grown <= 16 * latents < kept / 4


def test_ranks_share_a_round_and_the_main_one_measures(tiny_folder: Path) -> None:
    sampling = Sampling(4, guidance=3.0)
    panel = GeneratedSamples("sample_grid", sampling, batch_size=4, count=40, joined=True, on_main=True)
    alone = _estimate(tiny_folder, generations=[panel])["rank 0"]
    main_rank, other = (shared := _estimate(tiny_folder, processes=2, generations=[panel])).values()
    assert [*shared] == ["rank 0", "rank 1"]
    assert alone.peak[0] == "sample grid" and "sample grid" not in other.phases
    assert main_rank.phases["sample grid"] == alone.phases["sample grid"]
    held = [estimate.phases["learning"]["samples of the round"] for estimate in (alone, other)]
    assert held[0] == pytest.approx(2 * held[1], rel=0.05)
    (joined,) = _estimate(tiny_folder, processes=2)
    assert joined == "ranks 0 to 1"


def test_the_command_prints_all_and_reads_no_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "load", None)
    monkeypatch.chdir(tmp_path)
    plain = ["--config", str(CONFIGS / "train" / "shapes_flow_grpo_partial.yaml"), "--model.path", str(tiny_folder)]
    assert main(["plan", *plain, "--training.rounds", "2"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "24 prompts x 8 = 192",
        "3 x 64 x 64",
        "nfe backward",
        "transformer",
        "peak of rank 0: ",
        "while learning",
    ):
        assert words in printed, words
    assert "activations of this model's text encoders" not in printed
    assert list(tmp_path.iterdir()) == []

    def refused(*_: object) -> None:
        raise TypeError("this tokenizer returns no tensors")

    monkeypatch.setattr(SD3, "encode_texts", refused)
    assert main(["plan", *plain, "--training.rounds", "2"]) == 0
    assert "Not counted: networks of rewards" in (printed := capsys.readouterr().out)
    assert "activations of this model's text encoders" in printed


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
