"""The rate of a round: which operations are counted and grouped how, that the round is repeated, and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import SD3
from scripts.benchmarks import round_benchmark
from scripts.benchmarks.round_benchmark import RoundWorker, checked_out, measurements
from scripts.benchmarks.round_worker import GROUPS, RepeatedRound, RoundCounter, group_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::bmm", "batched products"),
        ("aten::_softmax_backward_data", "attention"),
        ("genalign::attention", "attention"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::convolution_backward", "matrix products"),
        ("aten::gelu_backward", "gelu"),
        ("aten::copy_", "copies"),
        ("aten::cat", "copies"),
        ("aten::native_layer_norm", "norms"),
        ("aten::mul", "elementwise"),
        ("aten::silu", "elementwise"),
        ("aten::sum", "elementwise"),
        ("aten::transpose", "everything else"),
        ("aten::t", "everything else"),
        ("AddmmBackward0", "everything else"),
        ("autograd::engine::evaluate_function: MulBackward0", "everything else"),
        ("aten::normal_", "everything else"),
    ],
)
def test_an_operation_is_in_the_group_of_its_kind(name: str, group: str) -> None:
    assert group_of(name) == group


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


@pytest.fixture
def repeated(small: SD3) -> RepeatedRound:
    policy = Policy(small.denoiser, Lora(rank=4, alpha=8))
    settings = TrainerSettings(rounds=9, prompts_per_round=2, group_size=2, updates_per_round=1, learning_rate=1e-3)
    recipe = flow_grpo(FlowSDE(0.9), window=1, shared_noise=False)
    return RepeatedRound(
        Trainer(small, policy, redness, ["a circle", "a moon"], recipe, settings, Sampling(2, (1.0, 0.5)))
    )


def test_every_measurement_runs_the_same_round(repeated: RepeatedRound) -> None:
    assert repeated.seconds() > 0
    weights = [parameter.detach().clone() for parameter in repeated.trainer.policy.parameters]
    flops, shares = repeated.flops(), repeated.profile()
    assert repeated.trainer.rounds_done == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, repeated.trainer.policy.parameters, strict=True))
    assert repeated.trainer.sampler.settings.overlap_scoring
    assert tuple(shares) == GROUPS and sum(shares.values()) == pytest.approx(1)
    assert all(shares[group] > 0 for group in ("attention", "matrix products", "gelu", "copies", "elementwise"))
    assert flops == repeated.flops() and 0 < flops["attention"] < flops["all"]


def test_attention_is_counted_by_its_products(repeated: RepeatedRound) -> None:
    """Of four calls of the network two sample, one measures the KL and one learns, which runs backward, too.

    A call makes two products, and its backward pass five, where the kernel computes the scores again.
    """
    pipeline = repeated.trainer.pipeline.pipeline
    config, text = pipeline.denoiser.config, pipeline.encode(["a circle"]).tensors["context"].shape[1]
    tokens, width = (8 // config.patch_size) ** 2 + text, config.num_attention_heads * config.attention_head_dim
    assert repeated.flops()["attention"] == 4 * 2 * tokens**2 * width * config.num_layers * (4 * 2 + 5)


def test_attention_by_plain_products_counts_as_much() -> None:
    query = torch.randn(3, 2, 5, 8, requires_grad=True)
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with RoundCounter() as counter, sdpa_kernel(backend):
            torch.autograd.backward(F.scaled_dot_product_attention(query, query, query).square().sum())
        counts.append((counter.get_total_flops(), counter.attention))
    product = 2 * 3 * 2 * 5 * 5 * 8
    assert counts == [(7 * product, 7 * product), (6 * product, 6 * product)]  # the kernel computes the scores again
    with RoundCounter() as counter:
        F.linear(query.transpose(1, 2).flatten(2)[:, :4], torch.randn(7, 16))
    assert (counter.get_total_flops(), counter.attention) == (2 * 3 * 4 * 16 * 7, 0)


def test_a_worker_answers_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import os, sys\nfor line in sys.stdin:\n    print(len(line) if line != 'x\\n' else exit(1))\n")
    script.write_text(script.read_text().replace("))\n", "), flush=True)\n"))
    monkeypatch.setattr(round_benchmark, "WORKER", script)
    with RoundWorker(tmp_path) as worker:
        assert worker.ask("seconds") == 8
        with pytest.raises(RuntimeError, match="ended: its error is above"):
            worker.ask("x")
    assert worker.process.returncode == 1


def test_a_commit_is_written_to_a_folder_of_its_own() -> None:
    with checked_out("HEAD") as folder:
        assert (folder / "genalign/assets/demo.yaml").is_file() and folder != round_benchmark.ROOT
    assert not folder.exists()


def test_rates_are_flops_over_seconds_with_and_without_attention() -> None:
    flops = {"now": {"all": 4 * 10**11, "attention": 10**11}, "before": {"all": 3 * 10**11, "attention": 10**11}}
    shares = {name: dict.fromkeys(GROUPS, 1 / 7) for name in flops}
    seconds = {"now": [2.0, 4.0], "before": [4.0, 4.0]}
    rows = measurements({"now": "nft", "before": "nft"}, flops, seconds, shares)
    values = {name: [row.value for row in rows if row.name == name] for name in {row.name for row in rows}}
    assert values["now.rate"] == [200, 100] and values["now.rate_outside_attention"] == [150, 75]
    assert values["before.rate"] == [75, 75] and values["speedup"] == [2, 1]
    assert values["speedup.rate"] == pytest.approx([200 / 75, 100 / 75])
    assert values["now.flops"] == [400] and values["now.matrix_products"] == [1 / 7]


def test_rounds_of_different_recipes_are_compared_by_their_rates_alone() -> None:
    flops = {"now": {"all": 4 * 10**11, "attention": 0}, "before": {"all": 10**11, "attention": 0}}
    shares = {name: dict.fromkeys(GROUPS, 1 / 7) for name in flops}
    rows = measurements({"now": "nft", "before": "flow_grpo"}, flops, {"now": [2.0], "before": [1.0]}, shares)
    assert "speedup" not in {row.name for row in rows}
    assert [row.value for row in rows if row.name == "speedup.rate"] == [2]
    assert {row.metric for row in rows if row.name == "before.seconds"} == {"seconds of a round of flow_grpo"}
