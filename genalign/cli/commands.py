"""The table of commands, used by help, completion, dispatch and the check of settings before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from genalign.assets import preset, presets


@dataclass(frozen=True)
class Command:
    """A command of ``genalign``; nothing is imported until it is used.

    Args:
        name: The words that select it, such as "evaluate shapes".
        help: One line of help.
        function: The location of its function, as in "genalign.cli.train:train_command", which takes the command
            context and the words after the name, and returns the exit status.
        settings: The location of its settings dataclass, as in "genalign.cli.train_settings:Train".
        positional: The setting that may be given by position, before the others.
    """

    name: str
    help: str
    function: str
    settings: str
    positional: str = ""

    def run(self, context: object, arguments: Sequence[str]) -> int:
        """Import the command's module, and run it with ``arguments``."""
        status: int = imported(self.function)(context, arguments)
        return status


def imported(place: str) -> Any:
    """Import the object at a location such as "genalign.cli.train_settings:Train"."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


_CLI = "genalign.cli"
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "fine-tune a model on a reward, or resume a run (--resume RUN)",
            f"{_CLI}.train:train_command",
            f"{_CLI}.train_settings:Train",
        ),
        Command(
            "init",
            "write a commented configuration for your model, prompts and reward",
            f"{_CLI}.init:init_command",
            f"{_CLI}.init:Init",
        ),
        Command(
            "plan",
            "dry run: validate a configuration, estimate memory and cost; loads no weights",
            f"{_CLI}.plan:plan_command",
            f"{_CLI}.plan:Plan",
        ),
        Command(
            "demo",
            "train an embedded model in minutes: genalign demo [shapes | tones]",
            f"{_CLI}.demo:demo_command",
            f"{_CLI}.train_settings:Train",
            "world",
        ),
        Command(
            "collect",
            "collect a pool of scored samples to learn from: training.data",
            f"{_CLI}.collect:collect_command",
            f"{_CLI}.collect:Collect",
        ),
        Command(
            "steer",
            "search for the best sample of each prompt",
            f"{_CLI}.steer:steer_command",
            f"{_CLI}.steer:Steer",
        ),
        Command(
            "evaluate prompts",
            "evaluate any model, or another program's samples, on any prompts with any rewards",
            f"{_CLI}.evaluate:prompts_command",
            f"{_CLI}.evaluate_settings:EvaluatePrompts",
        ),
        Command(
            "evaluate shapes",
            "the same, with the shapes world's model, prompts and verifier",
            f"{_CLI}.evaluate:shapes_command",
            f"{_CLI}.evaluate_settings:EvaluateShapes",
        ),
        Command(
            "evaluate tones",
            "the same, with the tones world's model, prompts and verifier",
            f"{_CLI}.evaluate:tones_command",
            f"{_CLI}.evaluate_settings:EvaluateTones",
        ),
        Command(
            "evaluate geneval",
            "the same, on GenEval's prompts, by GenEval's rules",
            f"{_CLI}.evaluate:geneval_command",
            f"{_CLI}.evaluate_settings:EvaluateGenEval",
        ),
        Command(
            "evaluate geneval-original",
            "score an evaluation's images with the results of GenEval's own script",
            f"{_CLI}.evaluate:original_command",
            f"{_CLI}.evaluate_settings:GenEvalOriginal",
        ),
        Command(
            "evaluate benchmark",
            "the same, on another benchmark's own files, by its rules: genalign evaluate benchmark NAME",
            f"{_CLI}.evaluate:benchmark_command",
            f"{_CLI}.evaluate_settings:EvaluateBenchmark",
            "name",
        ),
        Command(
            "compare-evaluations",
            "compare two finished evaluations pairwise: genalign compare-evaluations BEFORE AFTER",
            f"{_CLI}.compare_evaluations:compare_evaluations_command",
            f"{_CLI}.compare_evaluations:CompareEvaluations",
            "before",
        ),
        Command(
            "compare",
            "train several recipes at equal budget and compare them",
            f"{_CLI}.compare:compare_command",
            f"{_CLI}.compare:Compare",
            "config",
        ),
        Command(
            "report",
            "write the report page of a run: RUN/report.html",
            f"{_CLI}.report:report_command",
            f"{_CLI}.report:Report",
            "run",
        ),
        Command(
            "export",
            "export the weights of a run as a LoRA, a merged network or a pipeline",
            f"{_CLI}.export:export_command",
            f"{_CLI}.export:Export",
        ),
        Command(
            "soup",
            "mix LoRAs of one base model, and plot the front between two of them",
            f"{_CLI}.soup:soup_command",
            f"{_CLI}.soup:Soup",
        ),
        Command(
            "reward check",
            "test a reward function against the reward contract",
            f"{_CLI}.reward:reward_check_command",
            f"{_CLI}.reward:RewardCheck",
            "reward",
        ),
        Command(
            "reward collect",
            "sample pairs of each prompt to be judged, from one model or several",
            f"{_CLI}.reward_collect:reward_collect_command",
            f"{_CLI}.reward_collect:RewardCollect",
        ),
        Command(
            "reward label",
            "judge collected pairs: on a page in the browser, or with rewards or judges (--by)",
            f"{_CLI}.reward_label:reward_label_command",
            f"{_CLI}.reward_label:RewardLabel",
            "folder",
        ),
        Command(
            "reward train",
            "train a reward on judgments of samples",
            f"{_CLI}.reward_train:reward_train_command",
            f"{_CLI}.reward_train:RewardTrain",
        ),
        Command(
            "reward evaluate",
            "measure how far a reward can be trusted, on preferences or on samples with ground truth",
            f"{_CLI}.reward_evaluate:reward_evaluate_command",
            f"{_CLI}.reward_evaluate:RewardEvaluate",
            "reward",
        ),
        Command(
            "reward references",
            "score samples of the model before training, for rewards that compare with them",
            f"{_CLI}.reward_references:reward_references_command",
            f"{_CLI}.reward_references:RewardReferences",
        ),
        Command(
            "reward direction",
            "learn D2-Align's direction from samples of the model before training",
            f"{_CLI}.reward_direction:reward_direction_command",
            f"{_CLI}.reward_direction:RewardDirection",
        ),
        Command(
            "learn-users",
            "learn people's tastes from their comparisons: a reward for each, or embeddings that condition a model",
            f"{_CLI}.learn_users:learn_users_command",
            f"{_CLI}.learn_users:LearnUsers",
        ),
        Command(
            "serve",
            "serve a reward over HTTP, for rewards.remote.RemoteReward",
            f"{_CLI}.reward:serve_command",
            f"{_CLI}.reward:Serve",
            "reward",
        ),
        Command(
            "calibrate",
            "tune the exploration noise of each sampling step",
            f"{_CLI}.calibrate:calibrate_command",
            f"{_CLI}.calibrate:Calibrate",
        ),
        Command(
            "prices",
            "measure the cost of NFE, decoding and rewards on this machine",
            f"{_CLI}.prices:prices_command",
            f"{_CLI}.prices:Prices",
        ),
        Command(
            "train-noise-aware",
            "train a reward to score noisy previews",
            f"{_CLI}.train_noise_aware:train_noise_aware_command",
            f"{_CLI}.train_noise_aware:TrainNoiseAware",
        ),
    )
}
"""Every command by its name, in the order of ``genalign --help``."""

GROUPS = {
    "evaluate": "evaluate a model, or samples of another program",
    "reward": "collect and label preferences, train, measure and test a reward",
}
"""First words that several commands share, with one line of help."""


def split_command(words: Sequence[str]) -> tuple[Command | None, Sequence[str]]:
    """Split the words of a command line into the command that they name, if any, and its arguments.

    The names of presets, as in --config preset:sdxl-80gb, are replaced by their files; unknown names stay.
    """
    for count in (2, 1):
        if command := COMMANDS.get(" ".join(words[:count])):
            files = {f"preset:{name}": str(preset(name)) for name in presets()}
            files |= {f"--config={name}": f"--config={file}" for name, file in files.items()}
            return command, [files.get(word, word) for word in words[count:]]
    return None, words
