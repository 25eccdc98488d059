"""Two processes on the CPU against one, in the same micro-batches."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genalign.algorithms.interfaces import MetricSums
from genalign.cli import main
from genalign.runtime import distributed
from genalign.runtime.distributed import (
    SINGLE_PROCESS,
    ProcessGroup,
    ProcessGroupError,
    RankShare,
    heartbeat_timeout,
    process_group,
    require_address,
    require_shared,
    seeded,
)
from genalign.runtime.files import load_state
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.training.round_log import flat_numbers
from pipelines import SD3
from tests.genalign import ranks
from tests.genalign.training.toy_runs import require_same_checkpoints, write_config, write_pool
from tests.http_servers import free_port

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


def _start(target: Callable[..., None], errors: Path, *arguments: object) -> list[BaseProcess]:
    """Start two ranks, forked from a process that has imported everything; their errors go to ``errors``/error.RANK."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genalign.cli.train", "pipelines", "peft", "tests.genalign.ranks"])
    port = free_port()
    own = [(rank, port, errors / f"error.{rank}") for rank in range(2)]
    started = [context.Process(target=target, args=(*rank, *arguments)) for rank in own]
    for process in started:
        process.start()
    return started


def _require_success(started: Sequence[BaseProcess], errors: Path) -> None:
    for process in started:
        process.join(1800)
    assert [process.exitcode for process in started] == [0, 0], (errors / "error.0").read_text()


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> SD3:
    return SD3.load(tiny_folder)


@pytest.fixture(scope="module")
def pool(opened: SD3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of groups of three, of which two are drawn, for every prompt."""
    folder = tmp_path_factory.mktemp("pool")
    return write_pool(opened, folder, ranks.PROMPTS.prompts, group_size=3, scores=("one",))


@pytest.fixture(scope="module")
def both(tiny_folder: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the results of two processes."""
    folder = tmp_path_factory.mktemp("both")
    _require_success(_start(ranks.work, folder, tiny_folder, pool, folder), folder)
    return folder


@pytest.fixture(scope="module")
def alone(opened: SD3, pool: Path) -> Iterator[Mapping[str, ranks.Recording]]:
    """The same in one process, on one core as each of the two: the number of cores alone moves the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    offline = {name: case.on_pool(pool) for name, case in ranks.OFFLINE.items()}
    yield {name: ranks.recorded(opened, case) for name, case in {**ranks.CASES, **offline}.items()}
    torch.set_num_threads(before)


def _of(both: Path, name: str) -> list[ranks.Recording]:
    paths = [both / f"{name}.{rank}.safetensors" for rank in range(2)]
    return [ranks.Recording(load_file(path), json.loads(path.with_suffix(".json").read_text())) for path in paths]


def _select(recording: ranks.Recording, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in recording.tensors.items() if name.startswith(prefix)}


def _require_same_run(recording: ranks.Recording, expected: ranks.Recording, uncompared: Sequence[str] = ()) -> None:
    """Require a rank's own batches and the first update of a run on one process, and its rows within rounding."""
    batches = _select(recording, "batch.")
    assert [name for name in batches if not torch.equal(batches[name], expected.tensors[name])] == []
    first, one = _select(recording, "gradient.0."), _select(expected, "gradient.0.")
    ours, theirs = (torch.cat([gradients[name].flatten().double() for name in one]) for gradients in (first, one))
    assert float(theirs.norm()) > 0 and float((ours - theirs).norm() / theirs.norm()) < 1e-6
    for row, other, tolerance in zip(recording.rows, expected.rows, (1e-5, 2e-2), strict=True):  # Adam magnifies it
        same = {name: value for name, value in row.items() if name not in uncompared}
        rest = {name: value for name, value in other.items() if name not in uncompared}
        assert flat_numbers(same) == pytest.approx(flat_numbers(rest), rel=tolerance, abs=1e-7)
        counts = {"samples", "nfe", "calls", "failed_rewards", "skipped_updates"} - set(uncompared)
        assert all(row[name] == other[name] for name in counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ranks.CASES, *ranks.OFFLINE])
def test_two_processes_do_what_one_does(both: Path, alone: Mapping[str, ranks.Recording], name: str) -> None:
    first, second = _of(both, name)
    for rank, recording in enumerate((first, second)):
        numbers = {int(key.split(".")[1]) for key in _select(recording, "batch.")}
        assert numbers == set(range(rank, ranks.BATCHES, 2))
        _require_same_run(recording, alone[name])
    assert first.rows == second.rows
    together = [*_select(first, "gradient."), *_select(first, "head.")]
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in together)


@pytest.mark.slow
def test_survivors_were_uneven(both: Path) -> None:
    scores = [[t for name, t in rank.tensors.items() if name.endswith(".scores")] for rank in _of(both, "seldom")]
    first, second = (sum(float(batch.std()) > 0 for batch in own) for own in scores)
    assert first != second


@pytest.mark.slow
def test_an_adversarial_head_is_that_of_one_process(both: Path, alone: Mapping[str, ranks.Recording]) -> None:
    metrics = _of(both, "adversarial")[0].rows[0]["metrics"]
    assert metrics == pytest.approx(alone["adversarial"].rows[0]["metrics"], rel=1e-6) and metrics["one/version"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["thrice", "twice"])  # how often a block is made whole: for reference and both passes
@pytest.mark.parametrize("name", ranks.SHARDED)
def test_a_sharded_network_trains_like_an_unsharded_one(
    both: Path, alone: Mapping[str, ranks.Recording], name: str, kept: str
) -> None:
    counted = ("nfe", "calls") if name == "seldom matched" else ()  # also for processes that keep others company
    for recording in _of(both, f"{name}.{kept}"):
        _require_same_run(recording, alone[name], counted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.WHOLE)
def test_a_sharded_network_is_trained_whole_like_an_unsharded_one(both: Path, opened: SD3, name: str) -> None:
    expected = ranks.recorded(opened, ranks.WHOLE[name])
    for recording in _of(both, name):
        _require_same_run(recording, expected)


@pytest.mark.slow
def test_a_whole_network_is_saved_from_its_shards(both: Path, opened: SD3, tmp_path: Path) -> None:
    ranks.saved_whole(opened, tmp_path)
    ours, theirs = (load_file(path / "samples.safetensors") for path in (both / "whole", tmp_path))
    for name in ("average", "reference"):
        assert torch.allclose(ours[name], theirs[name], atol=2e-4)
    assert not torch.allclose(ours["average"], ours["reference"], atol=1e-3)
    loaded = copy.deepcopy(opened)
    loaded.load_denoiser(both / "whole" / "denoiser")
    state, expected = loaded.denoiser.state_dict(), load_file(tmp_path / WEIGHTS)
    assert state.keys() >= expected.keys()
    assert all(torch.allclose(state[key], tensor, atol=2e-4) for key, tensor in expected.items())
    configs = [json.loads((path / "denoiser" / "config.json").read_text()) for path in (both / "whole", tmp_path)]
    assert configs[0]["_class_name"] == configs[1]["_class_name"] == "SD3Transformer2DModel"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "divided", "whole", "offline"])
def test_two_processes_resume_exactly(both: Path, kind: str) -> None:
    unbroken, broken = (both / kind / run / "latest" for run in ("unbroken", "broken"))
    require_same_checkpoints(unbroken, broken)
    assert not torch.equal(*load_state(unbroken / "state.safetensors")[0]["generators.torch"])


@pytest.mark.slow
def test_the_adapter_of_a_sharded_network_loads(both: Path, tiny: SD3) -> None:
    tiny.load_lora(both / "lora")
    names = [name for name, _ in tiny.denoiser.named_parameters() if "lora_" in name]
    assert len(names) == len(load_file(both / "lora" / "pytorch_lora_weights.safetensors")) > 0


@pytest.mark.slow
def test_a_rank_ends_when_another_has_ended_and_the_run_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    training = {"rounds": 3, "prompts_per_round": 4}
    config = write_config(tmp_path / "run.json", tiny_folder, "tests.genalign.ranks.deadly", training)
    arguments, metrics = ["--config", str(config), "--resume"], tmp_path / "run" / "metrics.jsonl"

    def rounds() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    for done, death, message in (1, signal.SIGKILL, "another process"), (2, signal.SIGSTOP, "has been silent"):
        first, second = _start(ranks.train, tmp_path, arguments, [death])
        while rounds() < done and first.is_alive():
            time.sleep(0.2)
        start = time.monotonic()
        first.join(900)
        assert first.exitcode == 1 and time.monotonic() - start < 60
        assert message in (tmp_path / "error.0").read_text()
        second.kill()
        second.join(60)
    _require_success(_start(ranks.train, tmp_path, arguments, []), tmp_path)
    assert rounds() == 3


@pytest.mark.slow
def test_the_command_trains_a_whole_network_in_shards_and_observes_it_together(
    tiny_folder: Path, tmp_path: Path
) -> None:
    size = {"prompts": "shapes:val", "samples_per_task": 2, "batch_size": 4}
    monitor = {**size, "every": 1, "rewards": {"blue": "tests.genalign.training.toy_runs.redness"}}
    sections = {
        "lora": None,
        "held_out": {**size, "every": 1},
        "reward_hacking": monitor,
        "before_after": {**size, "seeds": 1},
        "sample_grid": {"every": 1},
    }
    reward = "tests.genalign.training.toy_runs.redness"
    names = ["one", "two"]
    configs = [
        write_config(tmp_path / f"{name}.json", tiny_folder, reward, {"rounds": 2}, **sections) for name in names
    ]
    assert main.main(["train", "--config", str(configs[0])]) == 0
    _require_success(_start(ranks.train, tmp_path, ["--config", str(configs[1])], [], FSDP), tmp_path)
    one, two = ([json.loads(row) for row in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in names)
    for row, other, tolerance in zip(two, one, (1e-4, 5e-2), strict=True):
        for name in ("reward", "held_out", "reward_hacking"):
            ours, theirs = (flat_numbers({name: r[name]}) for r in (row, other))
            assert ours and ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    files = [{str(path.relative_to(tmp_path / n)) for path in (tmp_path / n).rglob("*")} for n in names]
    assert files[0] == files[1] - {path for path in files[1] if "process-1" in path or path.endswith("scores-1.jsonl")}
    weights = [load_file(tmp_path / name / WEIGHTS) for name in names]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=0.1) for key in weights[0])


@pytest.mark.slow
def test_sigterm_of_one_rank_ends_all_after_the_round(tiny_folder: Path, tmp_path: Path) -> None:
    training = {"rounds": 3, "prompts_per_round": 4}
    config = write_config(tmp_path / "run.json", tiny_folder, "tests.genalign.ranks.deadly", training)
    arguments = ["--config", str(config), "--resume"]
    started = _start(ranks.train, tmp_path, arguments, [signal.SIGTERM])
    for process in started:
        process.join(900)
    assert [process.exitcode for process in started] == [143, 143], (tmp_path / "error.0").read_text()
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert done < 3 and (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"round-{done:06d}"
    _require_success(_start(ranks.train, tmp_path, arguments, []), tmp_path)


def test_one_process_is_itself() -> None:
    with process_group({}) as processes:
        assert processes == SINGLE_PROCESS and processes.is_main
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(SINGLE_PROCESS.all_gather(rows), rows[None])
    assert torch.equal(SINGLE_PROCESS.interleaved([rows[:1], rows[1:]], [1, 2]), rows)
    assert SINGLE_PROCESS.all_gather_object({"a": 1}) == [{"a": 1}]
    assert torch.equal(SINGLE_PROCESS.broadcast({"rows": rows})["rows"], rows)


def test_shares_are_whole_and_equal_in_step() -> None:
    shares = [RankShare(rank, 3) for rank in range(3)]
    assert sorted(number for share in shares for number in share.indices(8)) == list(range(8))
    for in_step, expected in (True, [[0, 3], [1, 4], [2, 5]]), (False, [[0, 3], [1], [2]]):
        groups = [ProcessGroup(rank, 3, in_step=in_step) for rank in range(3)]
        assert [list(group.batch_numbers(4)) for group in groups] == expected
    with pytest.raises(ValueError, match="rank 2 of 2 processes"):
        ProcessGroup(2, 2)
    assert RankShare.from_environment({"RANK": "2", "WORLD_SIZE": "5"}) == RankShare(2, 5)
    with pytest.raises(ValueError, match="set both RANK and WORLD_SIZE"):
        RankShare.from_environment({"RANK": "1"})


def test_a_single_process_under_accelerate_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), process_group({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}):
        assert "use torchrun instead" in caplog.text


def test_metric_sums_of_several_ranks_are_merged() -> None:
    one, two = MetricSums(log_ratio_max=0.5), MetricSums(log_ratio_max=0.1)
    one.add("loss", torch.tensor([1.0, 2.0]))
    two.add("kl", torch.tensor([4.0]))
    two.add("loss", torch.tensor([6.0]))
    found = MetricSums.merge([one.as_dict(), two.as_dict()])
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


def test_a_run_that_cannot_have_fsdp_writes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "run.json", tiny_folder, "tests.genalign.ranks.redness", {"rounds": 1})
    assert main.main(["train", "--config", str(config)]) == 2
    assert "there is one: start more" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_ends_the_wait_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "_COLLECTIVE_TIMEOUT", timedelta(seconds=1))
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = "not all 2 processes came to 127.0.0.1:.* within 0:00:01: start each of them with this MASTER_ADDR"
    with (
        caplog.at_level("INFO", "genalign"),
        pytest.raises(ProcessGroupError, match=message),
        process_group(variables),
    ):
        pass
    assert "process 0 waits for all 2 processes at 127.0.0.1:" in caplog.text


NODES = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def _resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: found)


def test_a_host_name_that_stands_for_loopback_is_refused_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve(monkeypatch, "127.0.1.1", "::1")
    with pytest.raises(ValueError, match=r"of this node stands for 127\.0\.1\.1, .*: set GLOO_SOCKET_IFNAME"):
        process_group(NODES).__enter__()
    require_address(NODES | {"GLOO_SOCKET_IFNAME": "eth0"})
    require_address(NODES | {"LOCAL_WORLD_SIZE": "4"})  # one node
    _resolve(monkeypatch, "127.0.1.1", "10.0.0.7")
    require_address(NODES)


@pytest.mark.parametrize("value", ["soon", "5", "nan", "inf"])
def test_the_heartbeat_timeout_is_a_number_of_seconds(value: str) -> None:
    assert heartbeat_timeout({}) == 45 and heartbeat_timeout({"GENALIGN_HEARTBEAT_TIMEOUT": "600"}) == 600
    with pytest.raises(ValueError, match=f"GENALIGN_HEARTBEAT_TIMEOUT is '{value}': give a number of seconds"):
        process_group(NODES | {"GENALIGN_HEARTBEAT_TIMEOUT": value}).__enter__()


@pytest.mark.parametrize("sees", [True, False])
def test_an_output_that_other_nodes_do_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sees: bool
) -> None:
    monkeypatch.setattr(distributed, "_VISIBLE_WITHIN", 0.0)
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda self, value: [value, None if sees else "node2"])
    folder = tmp_path / "new" / "run"
    if sees:
        require_shared(folder, ProcessGroup(0, 2))
        assert list(folder.iterdir()) == []
        return
    message = f"{folder} is not shared: 1 of 2 processes do not see the files of process 0 there, the first on node2"
    with pytest.raises(ValueError, match=message):
        require_shared(folder, ProcessGroup(0, 2))
    assert not folder.exists()
    with pytest.raises(ValueError, match="is not shared"):  # as the other rank, which has a disk of its own
        monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda self, value: [".shared-0", value])
        require_shared(folder, ProcessGroup(1, 2))


def test_gradients_are_reduced_in_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET", 10)
    reduced: list[Tensor] = []

    def all_reduce(tensor: Tensor) -> None:  # of two ranks with the same tensors
        reduced.append(tensor.clone())
        tensor.add_(tensor.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    tensors = [torch.rand(2, 3), torch.rand(4), torch.rand(11), torch.ones(2, dtype=torch.int32)]
    before = [tensor.clone() for tensor in tensors]
    ProcessGroup(0, 2).all_reduce_(tensors)
    assert [(len(piece), piece.dtype) for piece in reduced] == [
        (10, torch.float32),
        (11, torch.float32),
        (2, torch.int32),
    ]
    assert all(torch.equal(tensor, 2 * old) for tensor, old in zip(tensors, before, strict=True))


def test_nccl_is_bound_to_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, object] = {}

    def join(backend: str, **options: object) -> None:
        arguments.update(options, backend=backend)
        raise ProcessGroupError("enough")

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    for name in ("is_available", "current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 3)
    with pytest.raises(ProcessGroupError, match="enough"):
        process_group(NODES | {"LOCAL_RANK": "3", "GLOO_SOCKET_IFNAME": "eth0"}).__enter__()
    assert arguments["backend"] == "cpu:gloo,cuda:nccl" and arguments["device_id"] == torch.device("cuda:3")


def test_a_seeded_context_restores_the_generator_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    fork = Mock(return_value=contextlib.nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(distributed, "current_gpu", lambda: 3)
    with seeded(5):
        fork.assert_called_once_with(devices=[3])
    torch.set_rng_state(before)


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("0", "two"), ("-1", "2")])
def test_ranks_are_numbers(rank: str, size: str) -> None:
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must be whole numbers"):
        RankShare.from_environment({"RANK": rank, "WORLD_SIZE": size})
