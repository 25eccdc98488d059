"""Training on a GPU: tiny checkpoints of four families in three precisions, and two processes on two GPUs.

None of it has run on a GPU yet. All but NCCL and nf4 is run on the CPU by ``GENALIGN_TEST_DEVICE=cpu make test-gpu``.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.rollout import ReplayBatch, RolloutInputs, kernel_per_step, replay, rollout
from genalign.runtime.memory_options import Memory
from genalign.scoring.score_log import ScoreLog
from tests.genalign.training.toy_runs import Session
from tests.gpu.small_runs import as_rank, cosine, first_gradient, on_gpu, opened, trained_policy, trainer_of
from tests.http_servers import free_port
from tests.pipelines.tiny_checkpoints import FolderOf

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers, in schedulers
    "ignore:.*weight_norm:FutureWarning",  # diffusers, in the autoencoder of audio
)
FAMILIES = ["sd3", "sd15", "flux", "stable_audio"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COSINES = {"bfloat16": 0.98, "float16": 0.99}  # of gradients with those of float32


def gpu(function: object) -> object:
    """Mark a test that runs on the device."""
    for mark in on_gpu:
        function = mark(function)
    return function


def largest_log_ratio(name: str, folder: Path, device: str, dtype: torch.dtype, **options: object) -> float:
    """The largest |log-ratio| of a replay under the weights that sampled, at all steps of four samples.

    It is 0: a forward pass with a graph must run the kernels of one without. Otherwise ratios are biased on this card.
    """
    pipeline = opened(name, folder, device, dtype, **options)
    trained_policy(pipeline)
    grid, kernel = pipeline.grid(3), flow_grpo().kernel_on(pipeline.path)
    inputs = RolloutInputs(
        pipeline.encode(["a red circle"]), torch.zeros(4, dtype=torch.long), (1, 2, 3, 4), (5, 6, 7, 8)
    )
    sampled = rollout(pipeline, inputs, grid, kernel_per_step(kernel, (0, 1), 3), 1.0, (0, 1)).to(pipeline.device)
    ratios = [replay(pipeline, sampled, grid, kernel, ReplayBatch.of_step(i, 4), 1.0).log_ratio for i in (0, 1)]
    assert all(ratio.requires_grad for ratio in ratios)
    return float(torch.stack(ratios).detach().abs().max())


def gradient(name: str, folder: Path, device: str, dtype: torch.dtype = torch.float32, **options: object) -> Tensor:
    """The gradient of the first update of a run."""
    pipeline = opened(name, folder, device, dtype, **options)
    result, log_ratio = first_gradient(trainer_of(pipeline, trained_policy(pipeline)))
    assert result.isfinite().all() and result.any()
    assert log_ratio == 0
    return result


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_replay_equals_rollout(name: str, dtype: str, device: str, folder_of: FolderOf) -> None:
    assert largest_log_ratio(name, folder_of(name), device, DTYPES[dtype]) == 0


def test_replay_equals_rollout_on_the_cpu(folder_of: FolderOf) -> None:
    """The same test where there is no GPU: it works."""
    assert largest_log_ratio("sd3", folder_of("sd3"), "cpu", torch.bfloat16) == 0


@gpu
@pytest.mark.parametrize("dtype", COSINES)
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_learns_in_the_direction_of_float32(
    name: str, dtype: str, device: str, folder_of: FolderOf
) -> None:
    exact, low = (gradient(name, folder_of(name), device, DTYPES[kind]) for kind in ("float32", dtype))
    assert cosine(exact, low) > COSINES[dtype]


@gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_learns_in_the_direction_of_float32(name: str, device: str, folder_of: FolderOf) -> None:
    mixed = gradient(name, folder_of(name), device, torch.bfloat16, autocast=torch.bfloat16)
    assert cosine(gradient(name, folder_of(name), device), mixed) > COSINES["bfloat16"]


@gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_networks_give_the_same_gradient(name: str, device: str, folder_of: FolderOf) -> None:
    pipeline = opened(name, folder_of(name), device, memory=Memory(offload="all"))
    assert {parameter.device.type for parameter in pipeline.pipe.text_encoder.parameters()} == {"cpu"}
    assert {parameter.device for parameter in pipeline.denoiser.parameters()} == {pipeline.device}
    offloaded, _ = first_gradient(trainer_of(pipeline, trained_policy(pipeline)))
    assert {parameter.device.type for parameter in pipeline.pipe.vae.parameters()} == {"cpu"}
    torch.testing.assert_close(offloaded, gradient(name, folder_of(name), device), rtol=1e-4, atol=1e-7)


@gpu
@pytest.mark.parametrize("name", ["sd3", "sd15", "flux"])  # diffusers has none for Stable Audio
def test_checkpointing_gives_the_same_gradient(name: str, device: str, folder_of: FolderOf) -> None:
    checkpointed = gradient(name, folder_of(name), device, memory=Memory(checkpointing=True))
    torch.testing.assert_close(checkpointed, gradient(name, folder_of(name), device), rtol=1e-4, atol=1e-7)


@gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_ends_as_an_unbroken_one(name: str, device: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """Up to the order of sums in kernels of a GPU, which may differ between two runs."""

    def session(folder: str) -> Session:
        pipeline = opened(name, folder_of(name), device)
        return Session(tmp_path / folder, trainer_of(pipeline, trained_policy(pipeline)), ScoreLog())

    unbroken, broken, resumed = session("unbroken"), session("broken"), session("broken")
    unbroken.go(2)
    broken.go(1)
    resumed.resume()
    resumed.go(2)
    for one, other in zip(unbroken.trainer.policy.parameters, resumed.trainer.policy.parameters, strict=True):
        assert other.device.type == device
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@gpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_network_learns_as_the_plain_one(device: str, folder_of: FolderOf) -> None:
    pipeline = opened("sd3", folder_of("sd3"), device, compile=True)
    trainer = trainer_of(pipeline, trained_policy(pipeline))
    pipeline.compile_blocks([4])
    compiled, log_ratio = first_gradient(trainer)
    assert log_ratio < 1e-5
    assert cosine(compiled, gradient("sd3", folder_of("sd3"), device)) > 0.999


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="nf4 needs a CUDA device")
def test_a_lora_is_trained_on_an_nf4_base(device: str, folder_of: FolderOf) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra genalign[memory] is not installed")
    quantized = gradient("sd3", folder_of("sd3"), device, torch.bfloat16, memory=Memory(quantization="nf4"))
    assert cosine(quantized, gradient("sd3", folder_of("sd3"), device)) > 0.5  # 4 bits of tiny random weights


@gpu
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="there is one CUDA device")
@pytest.mark.parametrize(("dtype", "shard"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_two_processes_learn_as_one(dtype: str, shard: bool, device: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """By NCCL on two GPUs, each process on its own; with ``shard`` by FSDP2, float32 LoRA on a base of ``dtype``."""
    context, port, model = multiprocessing.get_context("spawn"), free_port(), folder_of("sd3")
    ranks = [
        context.Process(target=as_rank, args=(rank, port, tmp_path, model, device, DTYPES[dtype], shard))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(600)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "error.1").read_text()
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    if device == "cuda":
        assert (first["device"], second["device"]) == ("cuda:0", "cuda:1")
    assert second["on the first GPU"] == 0
    assert max(first["log_ratio"], second["log_ratio"]) == 0
    alone = gradient("sd3", model, device, DTYPES[dtype])
    for rank in (first, second):
        assert cosine(torch.tensor(rank["gradient"], dtype=torch.float64), alone) > (
            0.9999 if dtype == "float32" else 0.98
        )
