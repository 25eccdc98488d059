"""Published models on a CUDA device without one: devices, dtypes, waits for the device, copies to it and its memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genalign.algorithms import recipes
from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.distributed import own_device
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward, score
from genalign.search import run_search
from genalign.search.noise_search import ZeroOrder
from genalign.training.sampler import in_thread
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines.base import DiffusersPipeline
from scripts.benchmarks.published_sizes import MODELS, default_dtype
from tests.fake_cuda import Event, FakeCuda, _Backward, by_place

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in schedulers
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # diffusers, in the autoencoder of audio
]
PROMPTS = ["red circle", "blue square", "green circle", "red square"]
RECIPES = {
    "nft": recipes.nft(),
    "awm": recipes.awm(),
    "dragon": recipes.dragon(),
    "prdp": recipes.prdp(window=1),
    "dense_grpo": recipes.dense_grpo(window=1),
}
SETTINGS = TrainerSettings(
    rounds=1,
    prompts_per_round=4,
    group_size=4,
    batch_size=16,
    micro_batch=8,
    updates_per_round=1,
    overlap_scoring=False,
)
LARGE = 1 << 18  # bytes: more than the noise levels and positions that a network call takes, less than any text


def sharpness(samples: Tensor, prompts: object) -> Tensor:
    return samples.diff(dim=-1).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Round:
    """The events of a training round, and the memory at its highest while sampling and while learning."""

    waits: list[Event]
    copies: list[Event]
    sampling_peak: int
    learning_peak: int

    def steps(self, events: list[Event]) -> list[Event]:
        """Those of the rollout that come after the first network call."""
        return [event for event in events if "rollout" in event.functions and event.mark > 0]

    def learning(self, events: list[Event]) -> list[Event]:
        return [event for event in events if "_accumulate" in event.functions]


def opened(cuda: FakeCuda, name: str, blocks: int | None, checkpointing: bool = False) -> DiffusersPipeline:
    """A model with bfloat16 weights under autocast, which marks each of its network calls."""
    build, family, options = MODELS[name]
    with torch.device("cuda"), default_dtype(torch.bfloat16):
        pipe = build(blocks)
    memory = Memory(checkpointing=checkpointing)
    pipeline = family(pipe, device="cuda", autocast=torch.bfloat16, memory=memory, **options)
    predict = pipeline.predict

    def marked(*arguments: Any) -> Tensor:
        cuda.mark()
        return predict(*arguments)

    pipeline.predict = marked  # type: ignore[method-assign]
    return pipeline


def train(name: str, recipe: Recipe, blocks: int | None = 2, checkpointing: bool = False) -> Round:
    with FakeCuda() as cuda:
        pipeline = opened(cuda, name, blocks, checkpointing)
        policy = Policy(pipeline.denoiser, Lora(rank=32))
        assert {parameter.dtype for parameter in policy.parameters} == {torch.float32}
        rewards = [NamedReward("sharpness", sharpness)]
        trainer = Trainer(pipeline, policy, rewards, PROMPTS, recipe, SETTINGS, Sampling(num_steps=3))
        cuda.reset_peak()
        sample, peaks = trainer.sample, []

        def measured(*arguments: Any) -> Any:
            batches = sample(*arguments)
            peaks.append(cuda.peak)
            cuda.reset_peak()
            return batches

        trainer.sample = measured  # type: ignore[method-assign]
        (result,) = trainer.rounds()
        assert result.skipped_updates == 0 and result.failed_rewards == 0
        return Round(cuda.waits, cuda.copies, peaks[0], cuda.peak)


def check(trained: Round) -> None:
    """The limits are two waits in a step and four in a micro-batch, and none is left today."""
    assert by_place(trained.steps(trained.waits)) == {}
    assert by_place(trained.learning(trained.waits)) == {}
    for events in (trained.steps(trained.copies), trained.learning(trained.copies)):
        expected = {"seeded_noise", "unconditional_tensors"}  # noise of a step; the negative prompt, once a run
        large = [event for event in events if event.size > LARGE and not expected & {*event.functions}]
        assert {event.functions[-2] for event in large} <= {"to"}  # Conditioning.to
        assert not [event for event in large if "predict" in event.functions]
    assert sum("unconditional_tensors" in event.functions for event in trained.copies) <= 2
    conditionings = [event for event in trained.learning(trained.copies) if event.functions[-2:-1] == ("to",)]
    assert 0 < len(conditionings) <= 2 * 2  # two tensors, two micro-batches


@pytest.mark.parametrize("name", MODELS)
def test_a_round_of_flow_grpo_waits_for_the_device_in_no_step(name: str) -> None:
    check(train(name, recipes.flow_grpo(window=1)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_waits_for_the_device_in_a_step(recipe: str) -> None:
    check(train("sd35_medium", RECIPES[recipe]))


@pytest.mark.slow  # up to a minute each
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [recipes.flow_grpo(window=1), recipes.nft()], ids=["flow_grpo", "nft"])
def test_a_round_at_full_size(name: str, recipe: Recipe) -> None:
    check(train(name, recipe, blocks=None, checkpointing=name != "stable_audio_open"))


@pytest.mark.slow  # two rounds
def test_checkpointing_takes_less_memory() -> None:
    plain, checkpointed = (train("sd35_medium", recipes.flow_grpo(window=1), 2, flag) for flag in (False, True))
    assert checkpointed.learning_peak < 0.7 * plain.learning_peak
    assert checkpointed.sampling_peak == plain.sampling_peak


def test_a_search_sends_its_conditioning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_search, "check_rewards", lambda *_: None)  # values are random
    with FakeCuda() as cuda:
        pipeline = opened(cuda, "sd35_medium", 2)
        rewards = [NamedReward("sharpness", sharpness)]
        run_search.search(
            pipeline, PROMPTS[:1], rewards, ZeroOrder(neighbors=2, rounds=2), sampling=Sampling(num_steps=2)
        )
    in_search = [event for event in cuda.waits if "advance" in event.functions]
    calls = len({event.mark for event in in_search if event.mark})
    assert len(in_search) <= 2 * calls  # latents of candidates are on the CPU between steps: one copy each way
    assert {event.functions[-1] for event in in_search} == {"predict"}
    once = "start", "unconditional_tensors"  # the prompt's, and the negative prompt's
    sent = [event for event in cuda.copies if event.functions[-2:-1] == ("to",) and "search" in event.functions]
    assert sent and all({*once} & {*event.functions} for event in sent)


def test_waits_and_copies_are_counted() -> None:
    with FakeCuda() as cuda:
        x = torch.ones(4, 3, device="cuda")
        waits: list[Any] = [
            lambda: x[0, 0].item(),
            lambda: bool(x[0, 0]),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x[:, 0] > 0],
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.ones(2).to("cuda"),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.cuda.synchronize(),
        ]
        for number, wait in enumerate(waits, 1):
            wait()
            assert len(cuda.waits) == number, cuda.waits[number - 1 :]
        assert [event.size for event in cuda.copies] == [16, 8, 4]
        torch.ones(2).to("cuda", non_blocking=True)
        assert len(cuda.waits) == len(waits) and len(cuda.copies) == 4
        NamedReward("mean", lambda samples, prompts: samples.mean(1))(x, [Prompt("")] * 4)
        score([NamedReward("mean", lambda samples, prompts: samples.mean(1))], x, [Prompt("")] * 4)
        assert str(cuda.waits[-1]).startswith("copy to the CPU at genalign/scoring/score.py:")


def test_devices_and_dtypes_do_not_mix() -> None:
    with FakeCuda():
        x = torch.ones(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 2)
        with pytest.raises(RuntimeError, match="several dtypes"):
            x @ x.half()
        assert (x + torch.tensor(1.0)).device == torch.device("cuda", 0)  # one number is an argument of the kernel


def test_memory_is_that_of_live_tensors() -> None:
    with FakeCuda() as cuda:
        x = torch.empty(1000, 256, device="cuda")
        part = x[:10]
        assert cuda.live == cuda.peak == torch.cuda.memory_allocated() == 1000 * 256 * 4
        del x
        assert cuda.live == 1000 * 256 * 4
        del part
        assert cuda.live == 0 and torch.cuda.max_memory_allocated() == 1000 * 256 * 4


def test_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)

    def loss() -> Tensor:
        hidden = network(x)
        return (hidden * hidden[:1]).exp().mean() + network[0](x).square().sum()

    wanted = [x, *network.parameters()]
    expected = torch.autograd.grad(loss(), wanted)
    root = loss()
    for ours, theirs in zip(_Backward(False, False, wanted).run([root], [None]), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)
    root = loss()
    _Backward(False, False, (), True, True).run([root], [None])
    torch.testing.assert_close(network[0].weight.grad, expected[1])


def test_everything_is_restored() -> None:
    names = ("is_available", "device_count", "set_device", "synchronize", "memory_allocated")
    before = [getattr(torch.cuda, name) for name in names]
    others = nn.Module._apply, torch.autograd._engine_run_backward, nn.functional.scaled_dot_product_attention
    with pytest.raises(KeyError), FakeCuda():
        raise KeyError
    assert [getattr(torch.cuda, name) for name in names] == before
    assert others == (nn.Module._apply, torch.autograd._engine_run_backward, nn.functional.scaled_dot_product_attention)
    assert not torch.cuda.is_available() and not torch._C._only_lift_cpu_tensors()
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 3


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The CUDA device of each thread, 0 where none was set, of a machine with several."""
    current: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.update({threading.get_ident(): index}))
    return current


def test_the_scoring_thread_is_on_its_makers_device(devices: dict[int, int]) -> None:
    torch.cuda.set_device(3)

    def calls() -> Iterator[Any]:
        for _ in range(2):
            yield lambda: (threading.get_ident(), torch.cuda.current_device())

    seen = list(in_thread(calls()))
    assert [device for _, device in seen] == [3, 3]
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_a_reward_with_a_timeout_is_on_its_makers_device(devices: dict[int, int]) -> None:
    torch.cuda.set_device(2)

    def device(samples: Tensor, prompts: object) -> Tensor:
        time.sleep(0)
        return torch.full((len(samples),), float(torch.cuda.current_device()))

    scores = score([NamedReward("device", device, timeout=10.0)], torch.zeros(2, 3), [Prompt("")] * 2)
    assert scores[:, 0].tolist() == [2.0, 2.0]


def test_a_device_has_an_index(devices: dict[int, int]) -> None:
    torch.cuda.set_device(5)
    assert own_device("cuda", {}) == own_device("cuda", {"LOCAL_RANK": "5"}) == torch.device("cuda", 5)
    assert own_device("cuda:1", {}) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="one GPU: set model"):
        own_device("cuda:1", {"LOCAL_RANK": "1"})
