"""Run N rounds, or run some, lose the process, and go on: the same, bit for bit."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from genalign.algorithms import recipes
from genalign.algorithms.credit import NormalizedSum
from genalign.algorithms.recipes import Lag, Recipe
from genalign.cli.resume import EncoderCache, requested, require_same
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.metrics.vendi import vendi_score
from genalign.runtime.files import load_state
from genalign.runtime.state import Generators, State, Stateful
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter, DamagedCheckpointError
from genalign.training.reward_hacking import Actions, HackingGuard, Limits, PanelMeasures, PanelSnapshot
from genalign.training.trainer import Trainer, TrainerSettings
from genalign.types import Prompt, PromptSet
from pipelines import SD3, AceStep
from pipelines.base import DiffusersPipeline
from rewards.adversarial import AdversarialReward, DiscriminatorSettings, PatchWeights
from rewards.backbones.reference_images import ReferencePool
from tests.pipelines.tiny_checkpoints import FAMILIES

PROMPTS = PromptSet("five", tuple(Prompt(f"{number} circles", {"n": number}) for number in range(5)))
SETTINGS = TrainerSettings(
    rounds=3,
    prompts_per_round=2,
    group_size=2,
    batch_size=2,
    learning_rate=1e-2,
    learning_rate_schedule="linear",
    max_grad_norm=10.0,
)
LORA = Lora(rank=2)
SAMPLING = Sampling(num_steps=3, sigmas=(1.0, 0.6, 0.3))


def channels(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def careless(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Draws from generators that nobody seeds."""
    noise = torch.rand(len(samples)) + random.gauss(0, 1) + float(np.random.standard_normal())
    return redness(samples, prompts) + 0.01 * noise


def rewards() -> list[NamedReward]:
    return [NamedReward("red", redness), NamedReward("careless", careless, 0.5)]


class Samples:
    """Random references, images or clips."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.samples = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, rows: Sequence[int]) -> Tensor:
        return self.samples[list(rows)]


def adversarial(shape: Sequence[int]) -> list[NamedReward]:
    pool = ReferencePool(Samples(shape))
    learning = DiscriminatorSettings(steps_per_update=2, batch_size=4, replay=6, learning_rate=1e-2)
    return [
        NamedReward("adversary", AdversarialReward(channels, pool, weights=PatchWeights(1.0, 0.0), learning=learning))
    ]


GRID: Mapping[str, Callable[[], Recipe]] = {
    "flow_grpo": lambda: recipes.flow_grpo(window=1, kl=0.01),
    "dense_grpo": lambda: recipes.dense_grpo(window=1),
    "guard_grpo": lambda: recipes.guard_grpo(window=1),
    "mix_grpo": lambda: recipes.mix_grpo(window=1, rounds_each=1),
    "tempflow_grpo": recipes.tempflow_grpo,
    "ddpo": lambda: recipes.ddpo(window=1),
    "adv_grpo": lambda: recipes.adv_grpo(window=1),
    "prdp": lambda: recipes.prdp(window=1),
    "dragon": lambda: recipes.dragon(anchor=0.1),
    "dragon_set": lambda: recipes.dragon_set(vendi_score, channels, quality=0.5),
    "nft": lambda: recipes.nft(lag=Lag(slope=0.3)),
    "awm": recipes.awm,
    "with_credit": lambda: recipes.with_credit(recipes.flow_grpo(window=1), NormalizedSum()),
}


def test_the_grid_has_every_recipe() -> None:
    made = {
        name
        for name, function in inspect.getmembers(recipes, inspect.isfunction)
        if function.__module__ == recipes.__name__ and inspect.signature(function).return_annotation == "Recipe"
    }
    assert made - {"matching"} == set(GRID)  # of which matching() is the stem


class Session:
    """What one process of a run holds."""

    def __init__(
        self, folder: Path, tiny: DiffusersPipeline, recipe: Recipe, scored: Sequence[NamedReward], lora: Lora | None
    ) -> None:
        self.pipeline = copy.deepcopy(tiny)
        policy = Policy(self.pipeline.denoiser, lora)
        score_log = ScoreLog()
        self.trainer = Trainer(self.pipeline, policy, score_log.logged(scored), PROMPTS, recipe, SETTINGS, SAMPLING)
        parts: dict[str, Stateful] = {
            "trainer": self.trainer,
            "texts": EncoderCache(self.pipeline),
            "generators": Generators(),
        }
        self.keeper = CheckpointWriter(Checkpoints(folder), parts, score_log)
        self.rows = folder.with_suffix(".jsonl")

    def go(self, until: int, raise_kl: float | None = None) -> list[str]:
        """The rows of rounds up to ``until``, which a file beside the checkpoints has, too."""
        rows = []
        for result in self.trainer.rounds():
            row = result.as_dict()
            row.pop("machine")
            rows.append(json.dumps(row))
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(f"{rows[-1]}\n")
            if raise_kl is not None and self.trainer.rounds_done == 1:
                self.trainer.raise_kl(raise_kl)
            self.keeper.after(self.trainer.rounds_done, last=False)
            if self.trainer.rounds_done == until:
                break
        return rows


def _seed(seed: int) -> None:
    """The generators that the process starts with."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _same(one: Path, other: Path) -> None:
    """Two checkpoints, but for the seconds."""
    first, second = (load_state(path / "state.safetensors")[0] for path in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    numbers = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for found in numbers:
        found["parts"]["trainer"].pop("seconds")
    assert numbers[0] == numbers[1]


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> SD3:
    """Never used itself."""
    return SD3.load(tiny_folder)


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["ace_step"].save(tmp_path_factory.mktemp("audio") / "ace_step")


@pytest.fixture(scope="module")
def audio(audio_folder: Path) -> AceStep:
    """The same for clips, by a flow."""
    return clips(audio_folder)


def clips(folder: Path) -> AceStep:
    """A tiny pipeline that can be copied, for which its decoder's weights must not be computed from others."""
    pipeline = AceStep.load(folder, seconds=1.0)
    for module in pipeline.pipe.vae.modules():
        if "weight_g" in dict(module.named_parameters(recurse=False)):
            torch.nn.utils.remove_weight_norm(module)
    return pipeline


def _session(
    folder: Path, opened: DiffusersPipeline, recipe: Recipe, lora: Lora | None = LORA, seed: int = 0
) -> Session:
    """What a process holds that has just begun."""
    _seed(seed)
    adversary = recipe.kernel == recipes.adv_grpo().kernel
    return Session(folder, opened, recipe, adversarial(opened.sample_shape) if adversary else rewards(), lora)


def _require_same_end(folder: Path, opened: DiffusersPipeline, recipe: Recipe, lora: Lora | None = LORA) -> None:
    """The run in ``broken``, which lost its process in its second round, ends as that in ``unbroken``."""
    resumed = _session(folder / "broken", opened, recipe, lora, seed=99)
    checkpoint = resumed.keeper.checkpoints.latest()
    assert checkpoint is not None and checkpoint.rounds == 1
    resumed.keeper.resume(checkpoint)
    resumed.go(3)
    assert (folder / "broken.jsonl").read_bytes() == (folder / "unbroken.jsonl").read_bytes()
    _same(folder / "unbroken" / "latest", folder / "broken" / "latest")


def _broken_equals_unbroken(
    folder: Path, opened: DiffusersPipeline, recipe: Recipe, lora: Lora | None = LORA, raise_kl: float | None = None
) -> None:
    _session(folder / "unbroken", opened, recipe, lora).go(3, raise_kl)
    _session(folder / "broken", opened, recipe, lora).go(1, raise_kl)
    _require_same_end(folder, opened, recipe, lora)


@pytest.mark.parametrize("name", GRID)
def test_every_recipe_goes_on_exactly(name: str, opened: SD3, tmp_path: Path) -> None:
    _broken_equals_unbroken(tmp_path, opened, GRID[name]())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", GRID)
def test_every_recipe_goes_on_exactly_in_audio(name: str, audio: AceStep, tmp_path: Path) -> None:
    _broken_equals_unbroken(tmp_path, audio, GRID[name]())


def test_a_whole_network_and_a_raised_pull_go_on_exactly(opened: SD3, tmp_path: Path) -> None:
    _broken_equals_unbroken(tmp_path, opened, recipes.flow_grpo(window=1), lora=None, raise_kl=0.05)


def train_and_die(folder: Path, load: Callable[[Path], DiffusersPipeline], model: Path, name: str) -> None:
    """What a process does that kills itself before the first update in its second round, be it an adversary's."""
    session = _session(folder, load(model), GRID[name]())

    def die(*_: object) -> None:
        if session.trainer.rounds_done == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(die)
    session.go(3)


def _killed_equals_unbroken(
    folder: Path, load: Callable[[Path], DiffusersPipeline], model: Path, opened: DiffusersPipeline, name: str
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genalign.cli.main", "torch", __name__])
    process = context.Process(target=train_and_die, args=(folder / "broken", load, model, name))
    process.start()
    _session(folder / "unbroken", opened, GRID[name]()).go(3)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    _require_same_end(folder, opened, GRID[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_every_recipe_survives_sigkill(name: str, opened: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    _killed_equals_unbroken(tmp_path, SD3.load, tiny_folder, opened, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", GRID)
def test_every_recipe_survives_sigkill_in_audio(name: str, audio: AceStep, audio_folder: Path, tmp_path: Path) -> None:
    _killed_equals_unbroken(tmp_path, clips, audio_folder, audio, name)


class Part:
    """A state of one number."""

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
    found, part = checkpoints.latest(), Part()
    assert found is not None
    found.restore({"part": part})
    assert (checkpoints.folder / "latest").resolve() == found.path
    return part.value


def test_the_last_few_stay(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 0, 2, 4, 6, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "round-000002",
        "round-000004",
        "round-000006",
    ]
    assert _value(checkpoints) == 6
    assert Checkpoints(tmp_path / "none").latest() is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: _flip(path / "state.safetensors"), "state.safetensors does not have the checksum"),
    "another bit": (lambda path: _flip(path / "state.json"), "state.json does not have the checksum"),
    "cut off": (lambda path: (path / "state.json").write_text(""), "state.json does not have the checksum"),
    "gone": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1'),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_told_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, message = DAMAGE[kind]
    checkpoints = _saved(tmp_path, 1, 2)
    damage(tmp_path / "round-000002")
    assert _value(checkpoints) == 1
    assert message in caplog.text and "resuming from round-000001" in caplog.text
    checkpoints.save(2, {"part": Part(20)})  # the round is had again
    assert _value(checkpoints) == 20
    for path in tmp_path.glob("round-*"):
        damage(path)
    with pytest.raises(
        DamagedCheckpointError, match=r"no checkpoint to resume from: .*round-000002 is damaged.*000001"
    ):
        checkpoints.latest()


def test_what_a_later_genalign_wrote_is_not_read(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 1)
    manifest = tmp_path / "round-000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedCheckpointError, match="written by a later genalign"):
        checkpoints.latest()


def test_those_after_a_damaged_one_do_not_outlive_it(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 1, 2, 3, keep=3)
    _flip(tmp_path / "round-000003" / "state.json")
    assert _value(checkpoints) == 2
    checkpoints.save(2, {"part": Part(2)})
    assert sorted(path.name for path in tmp_path.glob("round-*")) == ["round-000001", "round-000002"]


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of files, which the kernel holds every write to, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [10, 200])  # for no file, for all but the manifest
def test_no_room_for_a_checkpoint_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, small_files: Callable[[int], None], room: int
) -> None:
    score_log, part = ScoreLog(), Part(1)
    keeper = CheckpointWriter(Checkpoints(tmp_path), {"part": part}, score_log)
    keeper.begin()
    part.value = 2
    small_files(room)
    keeper.after(1, last=False)
    small_files(resource.RLIM_INFINITY)
    assert "Round 1: no checkpoint could be written, the previous one is intact" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-000000"]
    assert _value(keeper.checkpoints) == 1
    keeper.after(2, last=False)
    assert _value(keeper.checkpoints) == 2


class Metered:
    """A reward that never answers the same twice, elsewhere."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.answers = itertools.count()
        self.dies_at: int | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(samples)
        return torch.tensor([1 / (3 + next(self.answers)) for _ in samples])


def test_scores_of_the_round_in_flight_are_not_asked_for_again(opened: SD3, tmp_path: Path) -> None:
    reward = Metered()
    reward.dies_at = 3  # in the second batch of the second round
    named = [NamedReward("remote", reward)]
    session = Session(tmp_path, opened, recipes.flow_grpo(window=1), named, LORA)
    session.keeper.begin()
    with pytest.raises(KeyboardInterrupt):
        session.go(2)
    reward.dies_at = None
    with (tmp_path / "round-000001" / "scores.jsonl").open("a") as file:
        file.write('\n{"key": "cut o')
    again = Session(tmp_path, opened, recipes.flow_grpo(window=1), named, LORA)
    checkpoint = again.keeper.checkpoints.latest()
    assert checkpoint is not None and checkpoint.rounds == 1
    again.keeper.resume(checkpoint)
    (row,) = again.go(2)
    assert len(reward.asked) == 4  # two rounds of two batches
    assert len({samples.numpy().tobytes() for samples in reward.asked}) == 4
    expected = torch.tensor([1 / (3 + place) for place in range(4, 8)]).mean()
    assert json.loads(row)["reward"] == float(expected) and json.loads(row)["calls"]["reward/remote"] == 8


def test_failures_are_asked_again(tmp_path: Path) -> None:
    answers = iter([torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), torch.tensor([7.0, 7.0])])
    samples, prompts = torch.rand(2, 3, 4, 4), PROMPTS.prompts[:2]

    def asked() -> list[float]:
        score_log = ScoreLog()
        score_log.load([tmp_path / "scores.jsonl"])
        score_log.record_to(tmp_path / "scores.jsonl")
        (kept,) = score_log.logged([NamedReward("flaky", lambda *_: next(answers))])
        return kept(samples, prompts).tolist()

    assert np.isnan(asked()[1])
    assert asked() == asked() == [1.0, 2.0]


def test_a_guard_goes_on(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [prompt for prompt in PROMPTS.prompts[:3] for _ in range(2)]
    measures = PanelMeasures({"red": redness}, channels, {"mean": lambda images, _: float(images.mean())})

    def guard(*looks: PanelSnapshot) -> HackingGuard:
        return HackingGuard(iter(looks).__next__, ("red",), Limits(), Actions(keep_best=True), every=1)

    shifted = measures(images * 1.001, prompts)
    first = guard(measures(images, prompts), shifted, shifted)
    first.begin()
    seen = first.report(1, False, 0.1)
    assert seen is not None and first.is_best(seen)
    first.stopped = True
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"guard": first})
    second = guard(shifted)
    found = checkpoints.latest()
    assert found is not None
    found.restore({"guard": second})
    assert second.stopped and second.report(2, False, 0.1) == first.report(2, False, 0.1)
    assert not second.is_best(seen)


def test_texts_are_encoded_in_the_company_that_they_had(opened: SD3) -> None:
    first, second = copy.deepcopy(opened), copy.deepcopy(opened)
    first.encode(["a", "b", "c"])
    first.encode(["d"])
    second.encode_together(first.encoded)
    expected = first.encode(["b", "d"]).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.encode(["b", "d"]).tensors.items())
    assert sorted(second.encoded) == sorted(first.encoded) == [["", "a", "b", "c"], ["d"]]


def test_a_resumed_run_keeps_its_settings() -> None:
    stored: dict[str, Any] = {"output": "a", "training": {"rounds": 2, "seed": 0}, "checkpoint": {"every": 1}}
    free = {"output": "b", "training": {"rounds": 9, "seed": 0}, "checkpoint": {"every": 5}}
    require_same(stored, free)
    with pytest.raises(ValueError, match=r"training\.seed was 0 and is 1: choose another output"):
        require_same(stored, stored | {"training": {"rounds": 2, "seed": 1}})
    with pytest.raises(ValueError, match=r"lora\.rank was None and is 4; training\.seed was 0 and is None"):
        require_same(stored, stored | {"training": {"rounds": 2}, "lora": {"rank": 4}})


def test_what_resume_stands_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert requested(["--config", "x"]) == replace(requested([]), arguments=["--config", "x"])
    assert not requested([]).resume
    assert requested(["--config", "x", "--resume"]).resume and requested(["--resume", "--config", "x"]).resume
    named = requested(["--resume", str(tmp_path), "--training.rounds", "9"])
    expected = ["--config", str(tmp_path / "config.json"), "--training.rounds", "9", "--output", str(tmp_path)]
    assert named.resume and named.arguments == expected
    with pytest.raises(FileNotFoundError, match="nowhere holds no run to resume"):
        requested(["--resume=nowhere"])
