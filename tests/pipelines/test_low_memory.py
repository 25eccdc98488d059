"""A quantised base under a LoRA, and networks that wait on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from genalign.algorithms.pathwise_recipes import draft
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.search import DNO, FKSteering, ReNO, RewardGradient, run_search
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from pipelines import SD3
from pipelines.low_memory import multiply_in_float8, on_device, require_quantization
from tests.fake_cuda import FakeCuda

Offload = Literal["none", "text", "all"]
PROMPTS = ["a red circle", "a blue square"]


def test_a_lora_is_trained_on_an_int8_base(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the extra genalign[memory] is not installed")
    small = SD3.load(tiny_folder, memory=Memory(quantization="int8"))
    policy = Policy(small.denoiser, Lora(rank=4))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    x, conditioning, step = tiny.initial_noise([1, 2]), tiny.encode(PROMPTS), tiny.grid(4)[1]
    small.predict(x, step, conditioning, 1.0).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.parameters[:4])
    with torch.no_grad(), policy.reference():
        rounded, exact = (pipeline.predict(x, step, conditioning, 1.0) for pipeline in (small, tiny))
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < 0.02  # 8 bits of weights
    small.save_lora(tmp_path, policy.adapter_state(), policy.config)  # it has one
    tiny.load_lora(tmp_path)


def _gradient(pipeline: SD3) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradient of a LoRA whose weights are not zero."""
    policy = Policy(pipeline.denoiser, Lora(rank=4))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    x, conditioning = pipeline.initial_noise([1, 2]), pipeline.encode(PROMPTS)
    output = pipeline.predict(x, pipeline.grid(4)[1], conditioning, 1.0)
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_a_lora_is_trained_on_a_float8_base(tiny_folder: Path) -> None:
    float8 = pytest.importorskip("torchao.float8", reason="the extra genalign[memory] is not installed")
    exact, rounded = (SD3.load(tiny_folder, autocast=torch.bfloat16) for _ in range(2))
    rowwise = float8.Float8LinearConfig.from_recipe_name("rowwise")
    multiply_in_float8(rounded.denoiser, replace(rowwise, emulate=True))  # rounds to float8, and multiplies wider
    kinds = {type(layer) for block in rounded.denoiser.transformer_blocks for layer in block.modules()}
    assert nn.Linear not in kinds
    fingerprint = rounded.fingerprint
    (output, gradient), (rounded_output, rounded_gradient) = _gradient(exact), _gradient(rounded)
    assert 1e-4 < float((rounded_output - output).norm() / output.norm()) < 0.1  # 3 bits
    assert 0.98 < float(torch.cosine_similarity(gradient, rounded_gradient, dim=0)) < 0.99999
    assert fingerprint == exact.fingerprint  # the weights themselves are not rounded


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU")
def test_float8_needs_a_gpu_that_has_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(quantization="fp8")
    with pytest.raises(ValueError, match=r"'fp8' needs a CUDA device of compute capability 8\.9"):
        SD3.load(tiny_folder, memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"take 'int8', or none"):
        require_quantization(memory, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'genalign\[memory\]'"):
        require_quantization(memory, "cuda:0")


def test_float8_needs_bfloat16(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loading.require_quantization", lambda *_: None)
    with pytest.raises(ValueError, match=r"'fp8' returns bfloat16: set model\.autocast"):
        SD3.load(tiny_folder, memory=Memory(quantization="fp8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU")
def test_nf4_needs_a_gpu(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="'nf4' needs a CUDA device: take 'int8', or none, on this machine"):
        SD3.load(tiny_folder, memory=Memory(quantization="nf4"))


def _storages(modules: Sequence[nn.Module]) -> list[int]:
    return [tensor.data_ptr() for module in modules for tensor in module.parameters()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("offload", ["none", "text", "all"])
def test_offloaded_weights_are_copied_to_the_device_and_never_back(offload: Offload, tiny_folder: Path) -> None:
    with FakeCuda() as cuda:
        pipeline = SD3.load(tiny_folder, device="cuda", memory=Memory(offload=offload))
        encoders, vae = pipeline._text_encoders, pipeline.pipe.vae
        assert next(encoders[0].parameters()).is_cpu == (offload != "none")
        assert next(vae.parameters()).is_cpu == (offload == "all")
        waiting = [*(encoders if offload != "none" else ()), *([vae] if offload == "all" else ())]
        before, names, sizes = _storages(waiting), [*vae.state_dict()], sum(_size(module) for module in waiting)
        cuda.waits.clear()
        cuda.copies.clear()
        held = cuda.live
        conditioning = pipeline.encode(PROMPTS)
        with torch.no_grad():
            pipeline.decode(pipeline.initial_noise([1, 2]))
        assert _storages(waiting) == before and [*vae.state_dict()] == names
        back = [wait for wait in cuda.waits if wait.kind == "copy to the CPU"]
        own = {wait.size for wait in back}
        assert len(back) == len(own) == len(conditioning.tensors)  # the embeddings alone
        weights = [copy.size for copy in cuda.copies if copy.functions[-1] == "_copy"]
        assert sum(weights) == sizes  # each weight once, though T5's embedding is in two places
        assert cuda.live == held  # the copies are gone


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def _sharpness(samples: Tensor, prompts: object) -> Tensor:
    return samples.diff(dim=-1).abs().flatten(1).mean(1)


def _searches(strategy: Any, pipeline: SD3) -> Iterator[None]:
    """Search once for each value."""
    while True:
        reward, sampling = NamedReward("sharpness", _sharpness), Sampling(num_steps=4)
        run_search.search(pipeline, PROMPTS[:1], reward, strategy, sampling=sampling)
        yield


def _training(pipeline: SD3) -> Iterator[object]:
    """Train a round for each value."""
    settings = TrainerSettings(rounds=2, prompts_per_round=2, group_size=2, batch_size=4, overlap_scoring=False)
    rewards, policy = [NamedReward("sharpness", _sharpness)], Policy(pipeline.denoiser, Lora(rank=2))
    return Trainer(pipeline, policy, rewards, PROMPTS, draft(), settings, Sampling(num_steps=2)).rounds()


DIFFERENTIATED: dict[str, Callable[[SD3], Iterator[object]]] = {  # all that differentiates rewards through the decoder
    "ReNO": partial(_searches, ReNO(2)),
    "DNO": partial(_searches, DNO(2, gamma=0.1, permutations=2)),
    "RewardGradient": partial(_searches, FKSteering(2, 1.0, start=0.0, guide=RewardGradient())),
    "pathwise": _training,
}


@contextmanager
def _moved_and_back(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Move the weights themselves, which are back on the CPU when the samples' gradient is taken."""
    for module in modules:
        module.to(device)
    yield
    for module in modules if offload else ():
        module.to("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, in schedulers
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_an_offloaded_decoder_stays_on_the_device_until_the_backward_pass(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_search, "check_rewards", lambda *_, **__: None)  # values are random
    with FakeCuda() as cuda:
        pipeline = SD3.load(tiny_folder, device="cuda", memory=Memory(offload="all", decode_batch=1))
        vae, before, held = pipeline.pipe.vae, _storages([pipeline.pipe.vae]), cuda.live
        runs = DIFFERENTIATED[name](pipeline)
        next(runs)
        assert all(weight.is_cpu for weight in vae.parameters()) and _storages([vae]) == before
        assert [wait for wait in cuda.waits if wait.functions[-1] == "_copy"] == []
        assert cuda.live - held < _size(vae)  # the graph that kept the copies is gone
        monkeypatch.setattr("pipelines.base.on_device", _moved_and_back)
        with pytest.raises(RuntimeError, match="weight is on cpu"):
            next(runs)


def test_offloaded_weights_are_in_place_again_after_an_error() -> None:
    layer, weights = nn.Linear(2, 2), []
    with pytest.raises(KeyError), on_device([layer], torch.device("meta"), offload=True):
        weights.append(layer.weight)
        raise KeyError
    assert weights[0].is_meta and not layer.weight.is_meta
