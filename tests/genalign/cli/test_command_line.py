"""Help and completion, from the tables of commands and settings."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec

import pytest

from genalign.algorithms import credit, multi_reward_credit, step_credit
from genalign.cli.command_line import command_help, completion, named_help
from genalign.cli.commands import COMMANDS, imported
from genalign.cli.parsing import _parser
from genalign.cli.structure import settings_of, settings_table


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_words(name: str) -> None:
    settings = settings_of(COMMANDS[name].settings)
    assert settings and [one["name"] for one in settings if len(one["help"].split()) < 2] == []


@pytest.mark.parametrize("kind", ["recipe", "kernel", "strategy", "credit", "reward"])
def test_every_setting_of_what_a_setting_names_has_words(kind: str) -> None:
    named = {**settings_table()["named"], **settings_table()["by_path"]}[kind]
    assert len(named) > 5
    for name, about in named.items():
        assert about["help"], name
        assert [one["name"] for one in about["settings"] if len(one["help"].split()) < 2] == [], name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_has_the_settings_that_the_parser_takes(name: str) -> None:
    place = COMMANDS[name].settings
    table = {setting["name"] for setting in settings_of(place)}
    actions = {action.dest for action in _parser(imported(place), name)._actions}
    assert {dest for dest in actions if not dest.endswith(".help")} - table <= {"help", "config", "print_config"}


def test_help_is_short_and_says_what_a_setting_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = {name: command_help(command, ["--help"]) or "" for name, command in COMMANDS.items()}
    assert all(text.startswith(f"usage: genalign {name}") for name, text in texts.items())
    assert len(texts["train-noise-aware"].splitlines()) < 200
    train = " ".join(texts["train"].split())
    assert "Training method, as in genalign.flow_grpo. with_credit changes" in train
    assert "lists the rules. One of adv_grpo, align_prop, awm" in train
    assert "(also --lr) (float or auto, default: auto)" in train
    assert "reward_hacking.limits.statistics.amber" in train and "default: 0.25)" in train
    assert "--run RUN" in texts["report"] and "(required, text)" in texts["report"]


def test_the_help_of_a_name_explains_its_own_settings() -> None:
    assert "--recipe.clip_range CLIP_RANGE" in (command_help(COMMANDS["plan"], ["--recipe.help", "flow_grpo"]) or "")
    assert "--recipe.kernel.eta" in (command_help(COMMANDS["plan"], ["--recipe.kernel.help", "genalign.DDIM"]) or "")
    assert "FKSteering" in (command_help(COMMANDS["steer"], ["--strategy.help"]) or "")
    assert command_help(COMMANDS["train"], ["--recipe.help", "mine.recipe"]) is None  # the parser imports it
    assert command_help(COMMANDS["train"], ["--recipe", "flow_grpo"]) is None
    assert "candidates" in named_help("strategy", "BestOfN", "strategy")


def test_the_help_of_training_finds_every_credit_and_every_reward() -> None:
    train = COMMANDS["train"]
    text = " ".join((command_help(train, ["--help"]) or "").split())
    assert "--recipe.credit.help lists" in text and "--rewards.NAME.function.help lists" in text
    credits = command_help(train, ["--recipe.credit.help"]) or ""
    for module in (credit, multi_reward_credit, step_credit):
        own = [name for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__]
        for name in own:
            if not name.startswith("_") and "__call__" in vars(vars(module)[name]):
                assert f"{module.__name__}.{name} " in credits, name
    rewards = command_help(train, ["--rewards.mine.function.help"]) or ""
    for name in ("combine.WeightedSum", "combine.HarmonicMean", "constrained.Constrained", "shaped.PreferenceAsReward"):
        assert f"rewards.{name} " in rewards
    path = "genalign.algorithms.credit.BestOfNCredit"
    assert "--recipe.credit.n N" in (command_help(train, ["--recipe.credit.help", path]) or "")


@pytest.mark.skipif(find_spec("shtab") is None, reason="shtab is not installed")
def test_bash_completes_commands_settings_and_choices() -> None:
    script = completion("bash")

    def completed(*words: str) -> list[str]:
        program = (
            f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_genalign;"
            ' echo "${COMPREPLY[@]}"'
        )
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert completed("genalign", "tra") == ["train", "train-noise-aware"]
    assert completed("genalign", "evaluate", "sh") == ["shapes"]
    assert completed("genalign", "train", "--training.ro") == ["--training.rounds"]
    assert completed("genalign", "train", "--recipe", "flow") == ["flow_bp", "flow_dppo", "flow_grpo"]
    assert completed("genalign", "train", "--model.dtype", "bf") == ["bfloat16"]


def test_zsh_is_completed_too() -> None:
    assert "#compdef genalign" in completion("zsh")
