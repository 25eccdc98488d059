"""Everything that is wrong with a configuration is said at once, in full names; short names are understood."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from genalign.cli.parsing import ConfigurationError, parse
from genalign.cli.steer import Steer
from genalign.cli.train_settings import Train

OWN = """
class Untyped:
    def __init__(self, k):
        self.k = k

    def __call__(self, samples, prompts):
        return samples.flatten(1).mean(1)


class Failing(Untyped):
    def __init__(self, k: int = 1):
        raise TypeError("k is not what it seems")
"""
WORDS = [
    "--output",
    "run",
    "--model",
    "shapes-sd3",
    "--prompts",
    "shapes:val",
    "--rewards.a.function",
    "rewards.jpeg.compressibility",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_untyped.py").write_text(OWN)
    (tmp_path / "five.txt").write_text("\n".join(f"a circle {number}" for number in range(5)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("own_untyped", None)


def problems(settings: type[Any], words: Sequence[str]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse(settings, words, "train")
    return caught.value.problems


WRONG = {
    "output": "run",
    "model": {"path": "shapes-sd3", "device": "tpu0", "dtype": "bf16"},
    "prompts": "five.txt",
    "recipe": {"class_path": "flow_grpo", "init_args": {"window": 0}},
    "rewards": {"a": {"function": "rewards.jpeg.compresibility"}, "b": {"function": "theirs.reward"}},
    "sampling": {"num_steps": 0},
    "training": {"rounds": "many", "batch_size": "few"},
    "lora": {"rank": 0},
    "held_out": {"every": 1, "prompts": "none.txt", "seeds": 0},
    "before_after": {"prompts": "nothing.csv"},
    "trackers": ["wandb", "tensorbord"],
    "checkpoint": {"evry": 1},
    "held_out_fraction": 2,
}
SAID = [
    "unknown setting 'checkpoint.evry': did you mean 'checkpoint.every'?",
    "model.dtype: must be one of float32, bfloat16, float16, not 'bf16': did you mean 'bfloat16'?",
    "recipe.window must be at least 1 step, not 0; null trains every step",
    "rewards.a.function: rewards.jpeg has no compresibility: did you mean 'compressibility'?",
    "rewards.b.function: no module theirs: it must be installed or in the working directory",
    "sampling.num_steps must be at least 1, not 0",
    "training.rounds: expected int, not many",
    "training.batch_size: expected int, not few",
    "LoRA rank must be at least 1, not 0",
    "held_out.seeds must be at least 1, not 0",
    "trackers: must be one of tensorboard, wandb, trackio, swanlab, not 'tensorbord'",
    "held_out_fraction must be between 0 and 1, not 2.0",
    "no prompt file nothing.csv",
]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_everything_that_is_wrong_is_said_at_once(command: str, folder: Path, error: Callable[..., str]) -> None:
    (folder / "wrong.yaml").write_text(yaml.safe_dump(WRONG))
    lines = error(command, "--config", "wrong.yaml").splitlines()
    assert [said for said in SAID if not any(line.startswith(f"error: {said}") for line in lines)] == []
    assert lines[-1] == f"{len(SAID)} errors: nothing was loaded" and len(lines) == len(SAID) + 1
    assert not (folder / "run").exists()


@pytest.mark.parametrize("command", ["train", "plan"])
def test_checks_that_need_several_settings_are_made_before_loading(
    command: str, folder: Path, error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genalign.cli.checks.find_spec", lambda name: None)
    settings = "--training.prompts_per_round 16 --before_after.prompts none.txt --trackers tensorboard,wandb"
    lines = error(
        *(command, *WORDS, *settings.split(), "--prompts", "five.txt", "--recipe", "awm", "--model.device", "cuda:99"),
        *("--recipe.anchor", "0", "--reward_hacking.on_red.raise_kl", "0.1"),
    )
    said = [
        "model.device is 'cuda:99', but torch sees",
        "trackers tensorboard, wandb are not installed: pip install tensorboard wandb",
        "no prompt file none.txt",
    ]
    assert [one for one in said if f"error: {one}" not in lines] == []
    sizes = error(*(command, *WORDS, "--prompts", "five.txt", "--recipe", "awm", "--training.prompts_per_round", "16"))
    assert "prompts_per_round is 16" in sizes and not (folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--training.lr 1", "unknown setting 'training.lr': did you mean 'training.learning_rate'?"),
        ("--training.steps 1", "unknown setting 'training.steps': did you mean 'training.rounds'?"),
        ("--lora.r 1", "unknown setting 'lora.r': did you mean 'lora.rank'?"),
        ("--recipe.noise_level 1", "unknown setting 'recipe.noise_level': did you mean 'recipe.kernel.noise_level'?"),
        (
            "--recipe.kernel.noise_level 1",
            "recipe.kernel.noise_level is a setting of recipe.kernel: name that",
        ),
        ("--recipe.kernel FlowSDE --recipe.kernel.level 1", "did you mean 'recipe.kernel.noise_level'?"),
        ("--rewards.b.function ClipReward", "did you mean 'rewards.clip.ClipReward'?"),
        ("--rewards.b.function clip.ClipReward", "did you mean 'rewards.clip.ClipReward'?"),
        (
            "--rewards.b.function own_untyped.Untyped",
            "rewards.b.function: own_untyped.Untyped: annotate the parameter k, as in k: float",
        ),
        ("--rewards.b.function own_untyped.Failing", "k is not what it seems"),
        ("--training.rounds 2.5", "training.rounds: expected int, not 2.5"),
        ("--model.path ./nomodel --training.rounds x", "training.rounds: expected int, not x"),
    ],
)
def test_a_message_names_the_whole_setting_and_what_to_write(words: str, said: str) -> None:
    lines = problems(Train, [*WORDS, "--recipe", "flow_grpo", *words.split()])
    assert len(lines) == 1 and said in lines[0]


DOUBLING = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
NESTED = {
    "a mapping within itself": ("mine: &m {path: *m}\n", "nested.yaml is nested too deeply: remove YAML aliases"),
    "a list within itself": ("output: &o [*o]\n", "nested.yaml is nested too deeply"),
    "aliases that double": (DOUBLING, "nested.yaml is nested too deeply: remove YAML aliases"),
    "without aliases": (f"output: {'[' * 3000}{']' * 3000}\n", "nested.yaml is nested too deeply"),
}


@pytest.mark.parametrize(("text", "message"), NESTED.values(), ids=NESTED)
def test_a_file_that_is_nested_without_end_is_refused(
    text: str, message: str, folder: Path, error: Callable[..., str]
) -> None:
    (folder / "nested.yaml").write_text(text)
    answer = error("train", "--config", "nested.yaml", *WORDS, "--recipe", "flow_grpo")
    assert answer.startswith("error: ") and answer.count("\n") == 1
    assert message in answer


PATHS = ("output", "model.path", "prompts", "init_lora", "held_out.prompts", "before_after.prompts")


@pytest.mark.parametrize(("command", "names"), [(Train, PATHS), (Steer, ("output", "model.path", "prompts", "lora"))])
def test_every_path_is_expanded(command: type[Any], names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    own = ["--recipe", "flow_grpo"] if command is Train else ["--strategy", "BestOfN"]
    words = [word for name in names for word in (f"--{name}", "~/there")]
    _, plain = parse(command, [*WORDS, *own, *words], "")
    for name in names:
        section, _, last = name.rpartition(".")
        assert (plain[section] if section else plain)[last] == "/home/me/there", name


@pytest.mark.parametrize("file", [True, False])
def test_an_offload_that_is_true_is_told_what_it_may_be(file: bool, folder: Path) -> None:
    (folder / "old.yaml").write_text("model: {path: shapes-sd3, memory: {offload: true}}")
    words = ["--config", "old.yaml"] if file else ["--model.memory.offload", "true"]
    (line,) = problems(Train, [*WORDS, "--recipe", "flow_grpo", *words])
    assert line.startswith("model.memory.offload") and "must be one of none, text, all" in line


def test_a_file_named_like_a_package_of_genalign_is_explained(folder: Path) -> None:
    (folder / "rewards.py").write_text("def sharpness(samples, prompts): ...")
    (line,) = problems(Train, [*WORDS, "--recipe", "flow_grpo", "--rewards.b.function", "rewards.sharpness"])
    assert "'rewards' is genalign's own package" in line
    assert line.endswith("rename that file, e.g. to my_rewards.py, and write my_rewards.sharpness")


SHORT = "--recipe flow_grpo --recipe.kernel DDIM --rounds 3 --lr 1e-5 --rank 4 --batch_size 24 --trackers tensorboard"


def test_short_names_are_those_of_the_whole_settings() -> None:
    short, plain = parse(Train, [*WORDS, *SHORT.split()], "train")
    whole = (
        "--recipe genalign.flow_grpo --recipe.kernel genalign.DDIM --training.rounds 3 --training.learning_rate 1e-5"
        " --lora.rank 4 --training.batch_size 24 --trackers [tensorboard]"
    )
    assert parse(Train, [*WORDS, *whole.split()], "train")[1] == plain
    assert (short.lora.rank, short.training.rounds, short.model.path) == (4, 3, "shapes-sd3")
    assert plain["recipe"]["class_path"] == "genalign.flow_grpo"
    steer, _ = parse(Steer, [*WORDS, "--strategy", "BestOfN", "--batch_size", "3"], "steer")
    assert type(steer.strategy).__name__ == "BestOfN" and steer.batch_size == 3


def test_evaluations_are_made_on_request_of_the_users_own_prompts() -> None:
    words = [*WORDS, "--recipe", "flow_grpo"]
    assert parse(Train, words, "train")[0].evaluation_prompts() == {}
    asked = "--held_out.every 1 --reward_hacking.every 1 --before_after.seeds 2"
    sources = parse(Train, [*words, *asked.split()], "train")[0].evaluation_prompts()
    assert sources == dict.fromkeys(["held_out", "reward_hacking", "before_after"])  # null: a split of them


@pytest.mark.parametrize(
    "text",
    [
        "recipe: flow_grpo\ntrackers: tensorboard\n",
        "recipe: {class_path: flow_grpo, init_args: {kernel: DDIM}}\n",
        "recipe:\n  class_path: 'flow_grpo' # ours\n  init_args:\n    kernel:\n      class_path: DDIM\n",
        json.dumps({"recipe": {"class_path": "flow_grpo", "init_args": {"kernel": "DDIM"}}}),
    ],
)
def test_short_names_are_understood_in_files(text: str, folder: Path) -> None:
    (folder / "short.yaml").write_text(text)
    settings, plain = parse(Train, ["--config", "short.yaml", *WORDS], "train")
    assert plain["recipe"]["class_path"] == "genalign.flow_grpo"
    assert ("DDIM" in text) == (type(settings.recipe.kernel).__name__ == "DDIM")
    assert settings.trackers == (["tensorboard"] if "trackers" in text else [])


def test_print_config_explains_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Train, [*WORDS, "--recipe", "flow_grpo", "--print_config"], "train")
    printed = capsys.readouterr().out
    assert "# Number of rounds between two evaluations; 0 evaluates only by time, or never." in printed
    assert yaml.safe_load(printed)["model"]["path"] == "shapes-sd3"
