"""A network under torch.compile samples and learns as the plain one does, up to rounding, by few graphs."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from genalign.diffusion.hypernetwork import Hypernetwork
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import ReplayBatch, Rollout, RolloutInputs, kernel_per_step, replay, rollout
from genalign.diffusion.transitions import FlowSDE
from genalign.runtime.memory_options import Memory
from pipelines import SD3, compilation
from pipelines.compilation import require_compiler

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
KERNEL = FlowSDE(0.7)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Count the graphs that are traced, each of which then runs op by op."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def _sample(tiny: SD3, steps: tuple[int, ...] = (0, 1), noise_seeds: tuple[int, ...] = (1, 2, 3, 4)) -> Rollout:
    start = RolloutInputs(tiny.encode(["a circle"]), torch.zeros(4, dtype=torch.long), noise_seeds, (5, 6, 7, 8))
    return rollout(tiny, start, tiny.grid(3), kernel_per_step(KERNEL, steps, 3), 1.0, steps)


def _log_ratio(tiny: SD3, sampled: Rollout, stored: int) -> Tensor:
    return replay(tiny, sampled, tiny.grid(3), KERNEL, ReplayBatch.of_step(stored, 4), 1.0).log_ratio


def _policy(tiny: SD3, hypernetwork: Hypernetwork | None = None) -> Policy:
    """A policy whose adapter is not zero."""
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4, hypernetwork=hypernetwork))
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return policy


def _gradient(policy: Policy) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters if parameter.grad is not None])


class _Held:
    """What autograd saves: the number of tensors that it holds now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> _Held:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda s: s.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class _Saved:
    def __init__(self, held: _Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor.detach()  # an output that its own operation saves would never be freed
        held.now += 1
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= 1


@pytest.mark.slow  # tracing takes 10 seconds
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hypernetwork", [None, Hypernetwork(width=8)])
def test_sampling_and_learning_share_their_graphs(
    tiny_folder: Path, graphs: Any, checkpointing: bool, hypernetwork: Hypernetwork | None
) -> None:
    tiny = SD3.load(tiny_folder, compile=True, memory=Memory(checkpointing=checkpointing))
    policy = _policy(tiny, hypernetwork)
    tiny.compile_blocks((4,))
    with _Held() as sampling:
        sampled = _sample(tiny, (1,), (1, 1, 1, 1))  # of one noise: the first step has one sample
    count = graphs()
    assert count == 2  # the last block of SD3 returns no text
    assert not sampled.final.requires_grad and not sampled.states.requires_grad
    with _Held() as learning:
        log_ratio = _log_ratio(tiny, sampled, 0)
    assert graphs() == count and float(log_ratio.abs().max()) == 0
    assert sampling.now == 0
    if not checkpointing:
        assert sampling.most < 0.7 * learning.most  # a block's at a time
    log_ratio.sum().backward()
    assert graphs() == count and bool(_gradient(policy).any())
    with torch.no_grad(), policy.reference():
        assert float(_log_ratio(tiny, sampled, 0).abs().max()) > 0
    assert graphs() <= 2 * count
    with policy.averaged():
        _sample(tiny, (1,), (1, 1, 2, 2))
    assert graphs() <= 2 * count


def test_nothing_is_compiled_before_the_adapter_is_on(tiny_folder: Path, graphs: Any) -> None:
    tiny = SD3.load(tiny_folder, compile=True)
    _sample(tiny)
    assert graphs() == 0
    plain = SD3.load(tiny_folder)
    plain.compile_blocks((4,))
    _sample(plain)
    assert graphs() == 0


def test_too_many_graphs_are_an_error(tiny_folder: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_GRAPHS", 1)
    tiny = SD3.load(tiny_folder, compile=True)
    tiny.compile_blocks()
    step, conditioning = tiny.grid(3)[0], tiny.encode(["a circle"])
    with torch.no_grad():
        tiny.predict(tiny.initial_noise([1, 2]), step, conditioning[torch.zeros(2, dtype=torch.long)], 1.0)
        one = tiny.predict(tiny.initial_noise([1]), step, conditioning, 1.0)  # padded to two
        assert len(one) == 1
        with pytest.raises(ValueError, match=r"model\.compile: a block has 1 graphs already.* or leave model\.comp"):
            tiny.predict(tiny.initial_noise([1, 2, 3]), step, conditioning[torch.zeros(3, dtype=torch.long)], 1.0)
    assert torch.is_grad_enabled()


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_it_samples_and_learns_as_the_plain_one(tiny_folder: Path) -> None:
    plain, fast = SD3.load(tiny_folder), SD3.load(tiny_folder, compile=True)
    expected_policy, policy = _policy(plain), _policy(fast)
    fast.compile_blocks((4,))
    sampled, compiled = _sample(plain), _sample(fast)
    torch.testing.assert_close(compiled.final, sampled.final, rtol=0, atol=1e-4)
    first = _log_ratio(fast, compiled, 1)
    assert float(first.abs().max()) == 0  # bit for bit
    first.sum().backward()
    _log_ratio(plain, sampled, 1).sum().backward()
    expected = _gradient(expected_policy)
    assert float((_gradient(policy) - expected).norm()) < 1e-3 * float(expected.norm())


def test_a_platform_without_a_compiler_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on the CPU: install g\+\+ .*, or leave model\.comp"):
        SD3.load(tiny_folder, compile=True)
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: False)
    with pytest.raises(ValueError, match=r"needs triton on a CUDA device: install it .*, or leave model\.compile"):
        require_compiler("cuda:1", Memory())
    with pytest.raises(ValueError, match="works on the devices cpu and cuda, not on mps"):
        require_compiler("mps", Memory())
    with pytest.raises(ValueError, match="does not go with quantization 'nf4'"):
        require_compiler("cuda", Memory(quantization="nf4"))
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    with pytest.raises(ValueError, match=r"needs a newer torch than .*: install 2\.14, or leave model\.compile out"):
        require_compiler("cpu", Memory())


@pytest.mark.slow  # torchao takes seconds
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_base_is_compiled(
    tiny_folder: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    float8 = pytest.importorskip("torchao.float8", reason="the extra genalign[memory] is not installed")
    rowwise = float8.Float8LinearConfig.from_recipe_name("rowwise")
    monkeypatch.setattr("pipelines.loading.require_quantization", lambda *_: None)
    monkeypatch.setattr(rowwise.__class__, "from_recipe_name", lambda _: float8.Float8LinearConfig(emulate=True))
    memory = Memory(quantization=quantization)
    tiny = SD3.load(tiny_folder, compile=True, memory=memory, autocast=torch.bfloat16)
    policy = _policy(tiny)
    tiny.compile_blocks((4,))
    sampled = _sample(tiny)
    count = graphs()
    log_ratio = _log_ratio(tiny, sampled, 1)
    log_ratio.sum().backward()
    assert graphs() == count <= 4 and float(log_ratio.abs().max()) == 0
    assert bool(_gradient(policy).any()) and bool(_gradient(policy).isfinite().all())
