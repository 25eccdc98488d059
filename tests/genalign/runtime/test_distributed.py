"""Two processes on the CPU against one, in the same micro-batches."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genalign.algorithms.interfaces import MetricSums
from genalign.cli import main
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, RankShare, process_group
from genalign.runtime.files import load_state
from genalign.runtime.fsdp import Sharding, require_sharded, sharding_from_environment
from genalign.training.settings import TrainerSettings
from pipelines import SD3
from tests.genalign import ranks


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _context() -> ForkServerContext:
    """Of processes that are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genalign.cli.main", "torch", "tests.genalign.ranks"])
    return context


@pytest.fixture(scope="module")
def both(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did."""
    folder, port = tmp_path_factory.mktemp("both"), _port()
    context = _context()
    started = [context.Process(target=ranks.work, args=(rank, port, tiny_folder, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(1800)
    assert [process.exitcode for process in started] == [0, 0], (folder / "said.0").read_text()
    return folder


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> SD3:
    return SD3.load(tiny_folder)


@pytest.fixture(scope="module")
def alone(opened: SD3) -> Iterator[Mapping[str, ranks.Recording]]:
    """The same in one process, on one core as each of the two: the number of cores alone moves the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: ranks.recorded(opened, case) for name, case in ranks.CASES.items()}
    torch.set_num_threads(before)


def _of(both: Path, name: str) -> list[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    paths = [both / f"{name}.{rank}.safetensors" for rank in range(2)]
    return [(load_file(path), json.loads(path.with_suffix(".json").read_text())) for path in paths]


def _gradient(tensors: Mapping[str, Tensor], update: int) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in _named(tensors, f"gradient.{update}.")])


def _named(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    found = [name for name in tensors if name.startswith(prefix)]
    return sorted(found, key=lambda name: (len(name), name))


def _require_same_update(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    one, two = _gradient(expected, 0), _gradient(found, 0)
    assert float(one.norm()) > 0
    assert float((one - two).norm() / one.norm()) < 1e-6


def _require_same_row(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            _require_same_row(found[name], value, tolerance)
        elif isinstance(value, float) and not math.isnan(value):
            assert found[name] == pytest.approx(value, rel=tolerance, abs=1e-7), name
        else:
            assert found[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_do_what_one_does(both: Path, alone: Mapping[str, ranks.Recording], name: str) -> None:
    expected, found = alone[name], _of(both, name)
    for rank, (tensors, _) in enumerate(found):
        own = _named(tensors, "batch.")
        assert {int(key.split(".")[1]) for key in own} == set(range(rank, ranks.BATCHES, 2))
        assert [key for key in own if not torch.equal(tensors[key], expected.tensors[key])] == []
        _require_same_update(tensors, expected.tensors)
    (first, rows), (second, other_rows) = found
    assert rows == other_rows
    together = _named(first, "gradient.") + _named(first, "head.")
    assert all(torch.equal(first[key], second[key]) for key in together)
    _require_same_row(rows[0], expected.rows[0], 1e-5)
    _require_same_row(rows[1], expected.rows[1], 2e-2)  # after two of Adam's updates, which magnify rounding


@pytest.mark.slow
def test_survivors_were_uneven(both: Path) -> None:
    live = [
        sum(float(tensors[key].std()) > 0 for key in tensors if key.endswith(".scores"))
        for tensors, _ in _of(both, "seldom")
    ]
    assert live[0] != live[1]


@pytest.mark.slow
def test_an_adversarial_head_is_that_of_one_process(both: Path, alone: Mapping[str, ranks.Recording]) -> None:
    found = _of(both, "adversarial")[0][1][0]["metrics"]
    assert found == pytest.approx(alone["adversarial"].rows[0]["metrics"], rel=1e-6)
    assert found["one/version"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["thrice", "twice"])  # how often a block is made whole: for reference and both passes
@pytest.mark.parametrize("name", ranks.SHARDED)
def test_a_sharded_network_trains_like_an_unsharded_one(
    both: Path, alone: Mapping[str, ranks.Recording], name: str, kept: str
) -> None:
    expected = alone[name]
    for tensors, rows in _of(both, f"{name}.{kept}"):
        own = _named(tensors, "batch.")
        assert [key for key in own if not torch.equal(tensors[key], expected.tensors[key])] == []
        _require_same_update(tensors, expected.tensors)
        billed = ("nfe", "calls") if name == "seldom matched" else ()  # also for processes that keep others company
        for found, row, tolerance in zip(rows, expected.rows, (1e-5, 2e-2), strict=True):
            _require_same_row(found | {key: row[key] for key in billed}, row, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "divided"])
def test_two_processes_resume_exactly(both: Path, kind: str) -> None:
    paths = [both / kind / run / "latest" for run in ("unbroken", "broken")]
    first, second = (load_state(path / "state.safetensors")[0] for path in paths)
    assert first.keys() == second.keys()
    own = ("generators.python", "generators.numpy")  # seeded by the system, and drawn from by nothing here
    assert [key for key in first if not torch.equal(first[key], second[key]) and key not in own] == []
    assert not torch.equal(*first["generators.torch"])
    numbers = [json.loads((path / "state.json").read_text())["parts"]["trainer"] for path in paths]
    assert numbers[0] | {"seconds": 0} == numbers[1] | {"seconds": 0}


@pytest.mark.slow
def test_the_adapter_of_a_sharded_network_loads(both: Path, tiny: SD3) -> None:
    tiny.load_lora(both / "lora")
    names = [name for name, _ in tiny.denoiser.named_parameters() if "lora_" in name]
    assert len(names) == len(load_file(both / "lora" / "pytorch_lora_weights.safetensors")) > 0


VICTIM = """
import os
import signal
import sys

from genalign.cli import main
from genalign.runtime import distributed


def train(rank, port, said, arguments, death, silence):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    joined = distributed.process_group
    from genalign.cli import train as training
    training.process_group = lambda variables: joined(variables, silence / 4, silence)
    if rank == 1:
        dying.signal = death
    raise SystemExit(main.main(arguments))


class dying:
    signal, calls = None, 0


def redness(samples, prompts):
    dying.calls += 1
    if dying.signal is not None and dying.calls == 4:
        os.kill(os.getpid(), dying.signal)
    return samples[:, 0].flatten(1).mean(1)
"""

CONFIG = """
output: {output}
model: {{path: {model}}}
prompts: "shapes:train"
recipe: {{class_path: genalign.algorithms.recipes.flow_grpo, init_args: {{window: 1}}}}
rewards: {{red: {{function: victim_rank.redness}}}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
training: {{rounds: 3, prompts_per_round: 4, group_size: 2, batch_size: 2, learning_rate: 0.01}}
lora: {{rank: 2}}
held_out: {{every: 2, prompts: "shapes:val", samples_per_task: 1}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("death", "told"), [(signal.SIGKILL, "another process"), (signal.SIGSTOP, "has been silent")])
def test_a_rank_ends_when_another_has_ended(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: signal.Signals, told: str
) -> None:
    (tmp_path / "victim_rank.py").write_text(VICTIM)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run.yaml").write_text(CONFIG.format(output=tmp_path / "run", model=tiny_folder))
    import victim_rank  # what was written above

    context, arguments = _context(), ["train", "--config", str(tmp_path / "run.yaml")]

    def start(signal: int | None, *extra: str) -> list[Any]:
        port = _port()
        started = [
            context.Process(
                target=victim_rank.train,
                args=(rank, port, str(tmp_path / f"said.{rank}"), [*arguments, *extra], signal, 20.0),
            )
            for rank in range(2)
        ]
        for process in started:
            process.start()
        return started

    first, second = start(int(death))
    while not (tmp_path / "run" / "metrics.jsonl").exists() and first.is_alive():
        time.sleep(0.2)
    began = time.monotonic()
    first.join(900)
    assert first.exitcode == 1 and time.monotonic() - began < 60
    assert told in (tmp_path / "said.0").read_text()
    if death == signal.SIGSTOP:
        os.kill(second.pid, signal.SIGKILL)
    second.join(60)
    again = start(None, "--resume")
    for process in again:
        process.join(900)
    assert [process.exitcode for process in again] == [0, 0], (tmp_path / "said.0").read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    sys.modules.pop("victim_rank", None)


def test_one_process_is_itself() -> None:
    with process_group({}) as processes:
        assert processes == SINGLE_PROCESS and processes.is_main
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(SINGLE_PROCESS.all_gather(rows), rows[None])
    assert torch.equal(SINGLE_PROCESS.interleaved(rows, 1), rows)
    assert SINGLE_PROCESS.all_gather_object({"a": 1}) == [{"a": 1}]
    assert [SINGLE_PROCESS.any_rank(flag) for flag in (True, False)] == [True, False]
    assert torch.equal(SINGLE_PROCESS.broadcast({"rows": rows})["rows"], rows)


def test_shares_are_whole_and_equal_in_step() -> None:
    shares = [RankShare(rank, 3) for rank in range(3)]
    assert sorted(number for share in shares for number in share.indices(8)) == list(range(8))
    assert [list(share.padded_indices(4)) for share in shares] == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="rank 2 of 2 processes"):
        ProcessGroup(2, 2)


def test_a_single_process_under_accelerate_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), process_group({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}):
        assert "use torchrun instead" in caplog.text


def test_batches_that_do_not_divide_are_refused() -> None:
    TrainerSettings(prompts_per_round=8, group_size=2, batch_size=4).require_shares(2)
    with pytest.raises(ValueError, match="an update's 2 batches of 4 samples do not divide among 3 processes"):
        TrainerSettings(prompts_per_round=8, group_size=2, batch_size=4).require_shares(3)


def test_metric_sums_of_several_ranks_are_merged() -> None:
    one, two = MetricSums(log_ratio_max=0.5), MetricSums(log_ratio_max=0.1)
    one.add("loss", torch.tensor([1.0, 2.0]))
    two.add("kl", torch.tensor([4.0]))
    two.add("loss", torch.tensor([6.0]))
    found = MetricSums.merge([vars(one), vars(two)])
    assert found.means() == {"loss": 3.0, "kl": 4.0} and found.log_ratio_max == 0.5


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "processes", "expected"),
    [
        ({}, 2, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        (FSDP, 2, Sharding(2)),
        (FSDP, 4, Sharding(4, reshard_after_forward=True)),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, 2, Sharding(2, reshard_after_forward=False)),
    ],
)
def test_fsdp_settings_of_accelerate(variables: dict[str, str], processes: int, expected: Sharding | None) -> None:
    assert sharding_from_environment(variables, processes) == expected


@pytest.mark.parametrize(
    ("variables", "processes", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 2, "zero2.yaml shards as ZeRO-2 does"),
        ({"ACCELERATE_USE_FSDP": "true"}, 2, "set fsdp_version: 2"),
        (FSDP, 1, "there is one: start more"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, 2, "fsdp_offload_params"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 2, "set model.autocast"),
    ],
)
def test_unsupported_accelerate_settings_are_refused(variables: dict[str, str], processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding_from_environment(variables, processes)


def test_a_run_whose_weights_are_not_sharded_stops() -> None:
    with pytest.raises(ValueError, match="FSDP is configured, but 1 of 1 trained tensors are not sharded"):
        require_sharded([torch.zeros(2)])


def test_a_run_that_cannot_have_fsdp_writes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    text = CONFIG.format(output=tmp_path / "run", model=tiny_folder).replace("victim_rank", "tests.genalign.ranks")
    (tmp_path / "run.yaml").write_text(text)
    assert main.main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "there is one: start more" in capsys.readouterr().err and not (tmp_path / "run").exists()
