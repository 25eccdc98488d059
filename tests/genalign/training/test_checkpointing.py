"""A resumed run equals an uninterrupted one bit for bit, and damaged checkpoints are detected."""

from __future__ import annotations

import copy
import inspect
import itertools
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genalign.algorithms import pathwise_recipes, preference_recipes, recipes
from genalign.algorithms import recipe_changes as changes
from genalign.algorithms.credit import NormalizedSum
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.recipe import Lag, Recipe
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.metrics.vendi import vendi_score
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter, DamagedCheckpointError
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.training.trust_region import TrustRegion
from genalign.types import Prompt, PromptSet
from pipelines import SD3, AceStep
from pipelines.base import DiffusersPipeline
from tests.genalign.training.toy_runs import (
    Session,
    adversary,
    careless,
    channels,
    redness,
    require_same_checkpoints,
    seed_generators,
)
from tests.pipelines.tiny_checkpoints import FAMILIES

PROMPTS = PromptSet("five", tuple(Prompt(f"{number} circles", {"n": number}) for number in range(5)))
SETTINGS = TrainerSettings(
    rounds=3,
    prompts_per_round=2,
    group_size=2,
    batch_size=2,
    learning_rate=1e-2,
    learning_rate_schedule="cosine",
    warmup_rounds=1,
    max_grad_norm=10.0,
)
LORA = Lora(rank=2)
SAMPLING = Sampling(num_steps=3, sigmas=(1.0, 0.6, 0.3))


GRID: Mapping[str, Callable[[], Recipe]] = {
    "flow_grpo": lambda: recipes.flow_grpo(window=1, kl=0.01),
    "dense_grpo": lambda: recipes.dense_grpo(window=1),
    "ngrpo": lambda: recipes.ngrpo(window=1, best=10.0),
    "guard_grpo": lambda: recipes.guard_grpo(window=1),
    "mix_grpo": lambda: recipes.mix_grpo(window=1, rounds_each=1),
    "tempflow_grpo": recipes.tempflow_grpo,
    "vgpo": lambda: recipes.vgpo(window=1),
    "turning_point": lambda: recipes.turning_point(window=2),
    "flow_dppo": lambda: recipes.flow_dppo(window=1),
    "ddpo": lambda: recipes.ddpo(window=1),
    "adv_grpo": lambda: recipes.adv_grpo(window=1),
    "prdp": lambda: recipes.prdp(window=1),
    "dragon": lambda: recipes.dragon(anchor=0.1),
    "dragon_set": lambda: recipes.dragon_set(vendi_score, channels, quality=0.5),
    "nft": lambda: recipes.nft(lag=Lag(slope=0.3)),
    "awm": recipes.awm,
    "align_prop": lambda: pathwise_recipes.align_prop(mean=0.5, std=0.3),
    "direct_align": lambda: pathwise_recipes.direct_align(high=0.8, inversion=0.3),
    "draft": lambda: pathwise_recipes.draft(2, Ascent(anchor=0.1, weight_distance=0.01)),
    "draft_lv": pathwise_recipes.draft_lv,
    "drtune": pathwise_recipes.drtune,
    "flow_bp": lambda: pathwise_recipes.flow_bp(active=2),
    "instruct_video": lambda: pathwise_recipes.instruct_video(moves=4),
    "noise_hypernetwork": pathwise_recipes.noise_hypernetwork,
    "refl": lambda: pathwise_recipes.refl(last=0.6),
    "crd": preference_recipes.crd,
    "dgpo": preference_recipes.dgpo,
    "dp2o_sr": lambda: preference_recipes.dp2o_sr(count=1),
    "dpo": lambda: preference_recipes.dpo(sft=0.5),
    "gdro": preference_recipes.gdro,
    "kto": lambda: preference_recipes.kto(threshold=3.0),
    "rwr": preference_recipes.rwr,
    "sft": preference_recipes.sft,
    "awm with a trail": lambda: recipes.awm(trail=1.0),
    "with_chi_squared": lambda: changes.with_chi_squared(recipes.flow_grpo(window=1, kl=0.01), 50.0),
    "with_credit": lambda: changes.with_credit(recipes.flow_grpo(window=1), NormalizedSum()),
    "with_gradient_balance": lambda: changes.with_gradient_balance(recipes.flow_grpo(window=1, kl=0.01), every=3),
    "with_elastic_reset": lambda: changes.with_elastic_reset(recipes.nft(lag=Lag(slope=0.3)), every=2, decay=0.5),
    "with_dynamic_sampling": lambda: changes.with_dynamic_sampling(recipes.flow_grpo(window=1)),
    "with_adaptive_group_size": lambda: changes.with_adaptive_group_size(recipes.flow_grpo(window=1)),
    "with_recalibration": lambda: changes.with_recalibration(recipes.dense_grpo(window=1)),
}


EACH_STATE = (
    "flow_grpo",
    "adv_grpo",
    "dragon_set",
    "nft",
    "mix_grpo",
    "draft",
    "noise_hypernetwork",
    "awm with a trail",
    "with_gradient_balance",
    "with_elastic_reset",
    "with_dynamic_sampling",
    "with_recalibration",
)
"""Recipes whose runs keep a state of a kind of their own; the others take half a minute more together."""


def test_the_grid_has_every_recipe() -> None:
    factories = {
        name
        for module in (recipes, pathwise_recipes, preference_recipes, changes)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and inspect.signature(function).return_annotation == "Recipe"
    }
    elsewhere = {"matching", "pathwise", "rpo"}  # rpo learns from a pool that marks references, see test_offline
    assert {name for name in factories if not name.startswith("_")} - elsewhere == set(GRID) - {"awm with a trail"}


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> SD3:
    """The tiny pipeline for images of 32 x 32, with the last of its blocks alone, which every session copies."""
    pipeline = SD3.load(tiny_folder, height=32, width=32)
    pipeline.denoiser.transformer_blocks = pipeline.denoiser.transformer_blocks[1:]
    return pipeline


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, opened: SD3, tmp_path_factory: pytest.TempPathFactory) -> DiffusersPipeline:
    if request.param == "image":
        return opened
    folder = FAMILIES["ace_step"].save(tmp_path_factory.mktemp("audio") / "ace_step")
    pipeline = AceStep.load(folder, seconds=1.0)
    for module in pipeline.pipe.vae.modules():  # which could not be copied with weight norm
        if "weight_g" in dict(module.named_parameters(recurse=False)):
            torch.nn.utils.remove_weight_norm(module)
    return pipeline


def _session(
    folder: Path,
    opened: DiffusersPipeline,
    recipe: Recipe,
    lora: Lora | None = LORA,
    seed: int = 0,
    rewards: Sequence[NamedReward] = (NamedReward("red", redness), NamedReward("careless", careless, 0.5)),
    settings: TrainerSettings = SETTINGS,
) -> Session:
    """Create the objects of a run in a process that has just started."""
    seed_generators(seed)
    if recipe.kernel == recipes.adv_grpo().kernel:
        rewards = [NamedReward("adversary", adversary(opened.sample_shape, batch_size=4))]
    pipeline, score_log = copy.deepcopy(opened), ScoreLog()
    policy = Policy(pipeline.denoiser, lora)
    trainer = Trainer(pipeline, policy, score_log.logged(rewards), PROMPTS, recipe, settings, SAMPLING)
    return Session(folder, trainer, score_log)


def _require_exact_resume(
    folder: Path,
    opened: DiffusersPipeline,
    recipe: Recipe,
    lora: Lora | None = LORA,
    raise_kl: float | None = None,
    settings: TrainerSettings = SETTINGS,
) -> None:
    """Interrupt a run before the first update of its second round, resume it, and require its exact end."""
    rows = _session(folder / "unbroken", opened, recipe, lora, settings=settings).go(3, raise_kl)
    broken = _session(folder / "broken", opened, recipe, lora, settings=settings)

    def interrupt(*_: object) -> None:
        if broken.trainer.rounds_done == 1:
            raise KeyboardInterrupt

    broken.trainer.learner.optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.go(3, raise_kl)
    resumed = _session(folder / "broken", opened, recipe, lora, seed=99, settings=settings)
    resumed.resume()
    assert resumed.go(3) == rows[1:]
    require_same_checkpoints(folder / "unbroken" / "latest", folder / "broken" / "latest")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "name"),
    [pytest.param("image", name, marks=() if name in EACH_STATE else pytest.mark.slow) for name in GRID]
    + [("audio", name) for name in ("flow_grpo", "adv_grpo", "dragon_set", "nft")],  # one of each kind of state
    indirect=["model"],
)
def test_every_recipe_resumes_exactly(name: str, model: DiffusersPipeline, tmp_path: Path) -> None:
    _require_exact_resume(tmp_path, model, GRID[name]())


def test_a_whole_network_and_a_raised_kl_resume_exactly(opened: SD3, tmp_path: Path) -> None:
    _require_exact_resume(tmp_path, opened, recipes.flow_grpo(window=1), lora=None, raise_kl=0.05)


@pytest.mark.parametrize("name", ["flow_grpo", "nft"])
def test_an_adapted_rate_and_later_passes_resume_exactly(name: str, opened: SD3, tmp_path: Path) -> None:
    region = TrustRegion(initial_rate=1.0, probe=2)
    settings = replace(SETTINGS, learning_rate="auto", trust_region=region, epochs=2)
    _require_exact_resume(tmp_path, opened, GRID[name](), settings=settings)


class Part:
    """A part of a checkpoint whose state is one number."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def state(self) -> State:
        return State({"value": torch.tensor(self.value)}, {"value": self.value})

    def restore(self, state: State) -> None:
        assert float(state.tensors["value"]) == state.numbers["value"]
        self.value = state.numbers["value"]


def _saved(folder: Path, *rounds: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for number in rounds:
        checkpoints.save(number, {"part": Part(number)})
    return checkpoints


def _value(checkpoints: Checkpoints) -> float:
    latest, part = checkpoints.latest(), Part()
    assert latest is not None
    latest.restore({"part": part})
    assert (checkpoints.folder / "latest").resolve() == latest.path
    return part.value


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_few_are_retained(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 0, 2, 4, 6, keep=3)
    assert _names(tmp_path) == ["latest", "round-000002", "round-000004", "round-000006"]
    assert _value(checkpoints) == 6
    assert Checkpoints(tmp_path / "none").latest() is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: _flip(path / "state.safetensors"), "state.safetensors does not match its checksum"),
    "another bit": (lambda path: _flip(path / "state.json"), "state.json does not match its checksum"),
    "cut off": (lambda path: (path / "state.json").write_text(""), "state.json does not match its checksum"),
    "gone": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1'),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, message = DAMAGE[kind]
    checkpoints = _saved(tmp_path, 1, 2)
    damage(tmp_path / "round-000002")
    assert _value(checkpoints) == 1
    assert message in caplog.text and "resuming from round-000001" in caplog.text
    checkpoints.save(2, {"part": Part(20)})  # the round is trained again
    assert _value(checkpoints) == 20
    for path in tmp_path.glob("round-*"):
        damage(path)
    message = r"no checkpoint to resume from: .*round-000002 is damaged.*000001"
    with pytest.raises(DamagedCheckpointError, match=message):
        checkpoints.latest()


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 1)
    manifest = tmp_path / "round-000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedCheckpointError, match="written by a later genalign"):
        checkpoints.latest()


def test_damaged_checkpoints_of_later_rounds_are_removed(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 1, 2, 3, keep=3)
    _flip(tmp_path / "round-000003" / "state.json")
    assert _value(checkpoints) == 2
    checkpoints.save(2, {"part": Part(2)})
    assert _names(tmp_path) == ["latest", "round-000001", "round-000002"]


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the size of written files, which fails writes like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [10, 200])  # no file fits; all but the manifest fit
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, small_files: Callable[[int], None], room: int
) -> None:
    score_log, part = ScoreLog(), Part(1)
    writer = CheckpointWriter(Checkpoints(tmp_path), {"part": part}, score_log)
    writer.begin()
    part.value = 2
    small_files(room)
    writer.after(1, last=False)
    small_files(resource.RLIM_INFINITY)
    assert "Round 1: no checkpoint could be written, the previous one is intact" in caplog.text
    assert _names(tmp_path) == ["latest", "round-000000"]
    assert _value(writer.checkpoints) == 1
    writer.after(2, last=False)
    assert _value(writer.checkpoints) == 2


def test_scores_of_an_interrupted_round_are_not_computed_again(opened: SD3, tmp_path: Path) -> None:
    batches: list[Tensor] = []
    answers = itertools.count(3)

    def remote(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        batches.append(samples)
        if len(batches) == 4:  # the second batch of the second round
            raise KeyboardInterrupt
        return torch.tensor([1 / next(answers) for _ in samples])  # never the same score twice

    def session() -> Session:
        return _session(tmp_path, opened, recipes.flow_grpo(window=1), rewards=[NamedReward("remote", remote)])

    first = session()
    first.writer.begin()
    with pytest.raises(KeyboardInterrupt):
        first.go(2)
    with (tmp_path / "round-000001" / "scores.jsonl").open("a") as file:
        file.write('\n{"key": "cut o')
    again = session()
    again.resume()
    (row,) = again.go(2)
    assert len(batches) == 5 and torch.equal(batches[3], batches[4])
    expected = torch.tensor([1 / (3 + place) for place in range(4, 8)]).mean()
    assert row["reward"] == float(expected) and row["calls"]["reward/remote"] == 8


def test_failed_scores_are_computed_again(tmp_path: Path) -> None:
    answers = iter([torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), torch.tensor([7.0, 7.0])])
    samples, prompts = torch.rand(2, 3, 4, 4), PROMPTS.prompts[:2]

    def scores() -> list[float]:
        score_log = ScoreLog()
        score_log.load([tmp_path / "scores.jsonl"])
        score_log.record_to(tmp_path / "scores.jsonl")
        (logged,) = score_log.logged([NamedReward("flaky", lambda *_: next(answers))])
        return logged(samples, prompts).tolist()

    assert np.isnan(scores()[1])
    assert scores() == scores() == [1.0, 2.0]
