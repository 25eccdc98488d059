"""The settings of every command."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jsonargparse.typing import Path_fr
from torch import nn

from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Lora
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.benchmarks.benchmark import Judges
from genalign.evaluation.geneval.judge import Judge
from genalign.runtime.media import AudioFormat
from genalign.runtime.memory_options import Memory
from genalign.scoring.budget import Budget
from genalign.search.noise_aware import Distillation
from genalign.search.strategy import Strategy
from genalign.training.checkpointing import Checkpointing
from genalign.training.noise_calibration import Calibration
from genalign.training.reward_hacking import Actions, Limits
from genalign.training.round_log import SampleGrid
from genalign.training.settings import TrainerSettings
from genalign.training.time_budget import TimeBudget
from genalign.types import AnyCallable, Precision

LINEAR_TEN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Model:
    """The generator: which checkpoint is loaded, and how.

    Args:
        path: A diffusers folder, a Hub id (owner/name), or an embedded model (shapes-sd3, tones-audio).
        family: Import path of the class that opens the checkpoint, for a family of your own; null recognizes it.
        dtype: Precision of the weights.
        autocast: Precision of autocast (mixed precision); null runs in ``dtype``.
        device: A torch device: cpu, cuda, cuda:1 or mps.
        height: Height of the images in pixels; null takes the checkpoint's own.
        width: Width of the images in pixels; null takes the checkpoint's own.
        seconds: Length of the audio clips; null takes the checkpoint's own.
        negative_prompt: Text that guidance leads away from, in training, search and evaluation. The empty text takes
            the default of the model's family; any other needs a guidance above 1.
        max_sequence_length: Maximum number of text tokens, for families that let it be set.
        distilled_guidance: Guidance scale that a guidance-distilled model (FLUX.1-dev) receives as an input.
        compiled: Compile the denoiser's blocks by torch.compile. This takes minutes at the start, and again for a
            larger batch or another guidance; many of these end the run. Sampling and training run the same graphs.
        memory: Options that hold less memory.
        revision: Branch, tag or commit of a Hub id; null takes the default branch.
        variant: Variant of the weights, such as fp16; null takes the plain ones, or the only one of a folder.
        token: Name of the environment variable that holds the Hub's token; null takes HF_TOKEN, or the token of
            `hf auth login`.
        weights: "safetensors" reads no other weights; "bin" reads pickled ones.
        text_cache: Folder of text embeddings. All texts of the command are encoded into it before the work, and the
            text encoders are dropped; they are not loaded if all texts are there already. Null keeps the encoders.
    """

    path: str
    family: str | None = None
    dtype: Precision = "float32"
    autocast: Precision | None = None
    device: str = "cpu"
    height: int | None = None
    width: int | None = None
    seconds: float | None = None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    distilled_guidance: float | None = None
    compiled: bool = False
    memory: Memory = field(default_factory=Memory)
    revision: str | None = None
    variant: str | None = None
    token: str | None = None
    weights: Literal["safetensors", "bin"] = "safetensors"
    text_cache: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and (self.token.startswith("hf_") or not self.token.isidentifier()):
            raise ValueError(
                "model.token is the name of an environment variable, as the token itself would be in config.json: set"
                " the variable, and write its name"
            )


@dataclass(frozen=True)
class RewardChoice:
    """A reward and how it is called.

    Args:
        function: Import path of a function, or of a class whose objects are called, as in rewards.clip.ClipReward.
        weight: Weight in the sum of rewards; 0 only reports the score.
        score_batch: Number of samples that are scored in one call; null scores a batch at once.
        timeout: Seconds after which a call has failed; null waits forever.
    """

    function: AnyCallable
    weight: float = 1.0
    score_batch: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class EvaluationSize:
    """The size of an evaluation.

    Args:
        samples_per_task: Number of samples of each task.
        seeds: Smallest number of initial noises per prompt.
        batch_size: Number of samples that are generated at once; null takes training.batch_size.
    """

    samples_per_task: int = 96
    seeds: int = 3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "samples_per_task", "seeds", "batch_size")

    @property
    def is_on(self) -> bool:
        """Whether the evaluation is made."""
        return True


@dataclass(frozen=True)
class HeldOut(EvaluationSize):
    """An evaluation on held-out prompts during training.

    Args:
        prompts: Held-out prompts, a file or a split of a world; null takes ``held_out_fraction`` of the training
            prompts, which are then not trained on.
        every: Number of rounds between two evaluations; 0 turns those by rounds off.
        every_seconds: Seconds of training, without evaluations, between two of them; null makes none by time.
        scorers: Rewards by name, in addition to the verifier of the prompts' world; without either, the rewards of the
            run.
    """

    samples_per_task: int = 32
    seeds: int = 1
    prompts: str | None = None
    every: int = 0
    every_seconds: float | None = None
    scorers: dict[str, AnyCallable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise ValueError(f"held_out.every_seconds must be positive, not {self.every_seconds}; null makes none")

    @property
    def is_on(self) -> bool:
        """Whether the evaluation is made."""
        return bool(self.every or self.every_seconds)


@dataclass(frozen=True)
class BeforeAfter(EvaluationSize):
    """An evaluation before and after training, with the same prompts and noises.

    Args:
        prompts: A prompt file, or a split of a world; null takes ``held_out_fraction`` of the training prompts, which
            are then not trained on.
    """

    prompts: str | None = None


@dataclass(frozen=True)
class Hacking(EvaluationSize):
    """The monitor of reward hacking (``genalign.training.reward_hacking``).

    Args:
        prompts: Prompts of the monitor, a file or a split of a world; null takes ``held_out_fraction`` of the training
            prompts, which are then not trained on.
        every: Number of rounds between two reports; 0 turns them off.
        rewards: Rewards by name that are not trained on; without any, those of the run with weight 0.
        features: A feature extractor for the variety of the samples and their drift.
        diagnostics: Functions of a set of samples and its prompts, which are only reported.
        limits: Limits of the signals, from which a report is amber or red.
        on_red: Reaction to a red report.
    """

    samples_per_task: int = 16
    seeds: int = 2
    prompts: str | None = None
    every: int = 0
    rewards: dict[str, AnyCallable] = field(default_factory=dict)
    features: AnyCallable | None = None
    diagnostics: dict[str, AnyCallable] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    on_red: Actions = field(default_factory=Actions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 2 or self.samples_per_task < 2:
            raise ValueError(
                "reward_hacking.seeds and reward_hacking.samples_per_task must be at least 2, to measure variety"
            )

    @property
    def is_on(self) -> bool:
        """Whether the monitor makes reports."""
        return bool(self.every)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The samples that a command generates and scores.

    Args:
        output: Folder to write.
        model: The generator.
        prompts: A .txt file with one per line, a GenEval .jsonl file, a dataset (hf://datasets/owner/name:split#column),
            or a split of a world, as in shapes:train.
        rewards: Rewards by name.
        sampling: Sampling settings.
    """

    output: str
    model: Model
    prompts: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))


@dataclass(frozen=True, kw_only=True)
class Train(Generation):
    """A training run.

    `genalign train --resume RUN` continues the run in that folder, and `--resume` alone the run in ``output``.

    Args:
        output: Folder of the run.
        prompts: Training prompts: a .txt file with one per line, a GenEval .jsonl file, a dataset
            (hf://datasets/owner/name:split#column), or a split of a world, as in shapes:train.
        recipe: Training method, as in genalign.flow_grpo.
        sampling: Sampling of the training samples.
        evaluation: Sampling of all evaluations; null takes ``sampling``.
        training: Geometry of a round, optimizer, and reaction to faults.
        max_seconds: Seconds of training, without evaluations, with whose round the run ends, if that comes first; null
            for no limit.
        time_budget: Time to which the number of rounds is fitted, where ``training.rounds`` is null.
        lora: The adapter that is trained; null trains the whole network.
        init_lora: An adapter to continue from, with its own rank and layers, in place of a new one.
        ema_decay: Decay of the exponential moving average of the weights, which is evaluated and exported.
        held_out: Evaluations on held-out prompts during training.
        reward_hacking: Monitor of reward hacking.
        before_after: Evaluation before and after training; null for none.
        held_out_fraction: Fraction of the training prompts, in each task, for evaluations without prompts of their own.
        sample_grid: Pictures of what the model generates during training.
        trackers: Experiment trackers that receive the metrics.
        checkpoint: Checkpoints of the run.
    """

    recipe: Recipe
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Sampling | None = None
    training: TrainerSettings = field(default_factory=TrainerSettings)
    max_seconds: float | None = None
    time_budget: TimeBudget = field(default_factory=TimeBudget)
    lora: Lora | None = field(default_factory=Lora)
    init_lora: str | None = None
    ema_decay: float = 0.9
    held_out: HeldOut = field(default_factory=HeldOut)
    reward_hacking: Hacking = field(default_factory=Hacking)
    before_after: BeforeAfter | None = None
    held_out_fraction: float = 0.2
    sample_grid: SampleGrid = field(default_factory=SampleGrid)
    trackers: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = field(default_factory=list)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, not {self.max_seconds}; null sets no limit")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be between 0 and 1, not {self.held_out_fraction}")
        _require_rewards(self.rewards)
        weighted = [name for name, reward in self.rewards.items() if reward.weight]
        if not weighted:
            raise ValueError("every reward has weight 0: nothing would be trained; give one a weight")
        if trained := [name for name in self.reward_hacking.rewards if name in weighted]:
            raise ValueError(
                f"reward_hacking.rewards.{trained[0]} is trained on, and would see nothing: name another reward"
            )

    def evaluation_prompts(self) -> dict[str, str | None]:
        """Return the prompt sources of all evaluations before, during and after training, by their sections' names."""
        sections = {
            "held_out": self.held_out,
            "reward_hacking": self.reward_hacking,
            "before_after": self.before_after,
        }
        return {name: section.prompts for name, section in sections.items() if section and section.is_on}


def require_positive(settings: object, *names: str) -> None:
    """Raise ValueError for a setting of these names that is neither null nor at least 1."""
    for name in names:
        value = vars(settings)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _require_rewards(rewards: Mapping[str, RewardChoice]) -> None:
    if not rewards:
        raise ValueError(
            "rewards is empty: name at least one, as in --rewards.strict.function rewards.shapes.ShapesReward"
        )
    if wrong := [name for name in rewards if not isinstance(name, str)]:  # YAML reads no as False, and 1 as a number
        raise ValueError(f'rewards has the name {wrong[0]}, as YAML reads it: put the name in quotes, as in "no":')


@dataclass(frozen=True)
class SetScore:
    """A score of all samples of an evaluation at once, such as a Frechet distance or the Vendi score.

    Args:
        features: Features of samples, as in rewards.backbones.image_features.ClipFeatures.
        reward: Score of the features of all samples, as in rewards.set_rewards.VendiReward.
    """

    features: AnyCallable
    reward: AnyCallable


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The samples that an evaluation makes, or finds on disk, and what is measured on them.

    Args:
        output: Folder of the evaluation.
        model: The generator; null for ``samples``.
        lora: An adapter of the model: the folder of a run, its lora/ folder, a .safetensors file or a Hub id.
        samples: A folder of another program's samples, which are scored in place of a model's. They have GenEval's
            layout, or a prompts.jsonl with a line {"file_name": ..., "prompt": ...} for each; or the folder of a
            finished evaluation.
        rewards: Rewards by name; the first one leads on the page.
        set_rewards: Scores of all samples at once, by name.
        sampling: Sampling settings.
        seeds: Number of initial noises per prompt.
        samples_per_task: Number of samples of each task, always of the same prompts; null takes all prompts.
        batch_size: Number of samples that are generated and scored at once.
        device: Torch device on which ``samples`` are scored.
        against: Folder of another model's evaluation to compare with.
    """

    output: str
    model: Model | None = None
    lora: str | None = None
    samples: str | None = None
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    set_rewards: dict[str, SetScore] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(40))
    seeds: int = 4
    samples_per_task: int | None = None
    batch_size: int = 4
    device: str = "cpu"
    against: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "samples_per_task", "batch_size")
        own = self.__dataclass_fields__["model"]
        preset = own.default_factory() if callable(own.default_factory) else None
        if self.samples is not None and (self.lora is not None or self.model not in (None, preset)):
            raise ValueError("samples are another program's, and model and lora make new ones: leave one of them out")
        if self.model is None and self.samples is None:
            raise ValueError(
                "model.path is missing: name a model, as in --model.path shapes-sd3, or a folder of another program's"
                " samples, as in --samples my_images"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatePrompts(Evaluate):
    """An evaluation of any model, or of any samples, on any prompts by any rewards.

    Run the command again to resume it; processes that run it at the same time share the samples.

    Args:
        output: Folder of the evaluation.
        prompts: A prompt file, or a split of a world, whose verifier's scores are reported, too; null takes the
            prompts of ``samples``.
    """

    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is None and self.samples is None:
            raise ValueError(
                "prompts is missing: name a prompt file or a split of a world, as in --prompts prompts.txt or"
                " --prompts shapes:comp"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateShapes(EvaluatePrompts):
    """An evaluation of a model, or of images on disk, in the shapes world.

    Args:
        output: Folder of the evaluation.
        model: The generator.
        prompts: Split of the world's prompts: shapes:val, shapes:iid, shapes:comp or shapes:len.
        sampling: Sampling settings.
    """

    model: Model = field(default_factory=lambda: Model("shapes-sd3"))
    prompts: str = "shapes:comp"
    sampling: Sampling = field(default_factory=lambda: Sampling(sigmas=LINEAR_TEN))
    seeds: int = 3
    samples_per_task: int = 96
    batch_size: int = 96


@dataclass(frozen=True, kw_only=True)
class EvaluateTones(EvaluateShapes):
    """An evaluation of a model, or of WAV and FLAC files on disk, in the tones world.

    Args:
        output: Folder of the evaluation.
        model: The generator.
        prompts: Split of the world's prompts: tones:val, tones:iid, tones:comp or tones:len.
        sampling: Sampling settings.
    """

    model: Model = field(default_factory=lambda: Model("tones-audio"))
    prompts: str = "tones:comp"
    sampling: Sampling = field(default_factory=lambda: Sampling(50))


@dataclass(frozen=True, kw_only=True)
class EvaluateGenEval(Evaluate):
    """An evaluation of a model, or of images in GenEval's layout, on a GenEval prompt file.

    Run the command again to resume it; processes that run it at the same time share the samples.

    Args:
        output: Folder of the evaluation.
        prompts: GenEval's evaluation_metadata.jsonl, or a file of the same format; null takes the prompts of
            ``samples``.
        sampling: Sampling settings.
        judge: Decides what is in an image; null is Mask2Former with CLIP.
    """

    prompts: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(40))
    judge: Judge | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is None and self.samples is None:
            raise ValueError("prompts is missing: name GenEval's file, as in --prompts evaluation_metadata.jsonl")


@dataclass(frozen=True, kw_only=True)
class EvaluateBenchmark(Evaluate):
    """An evaluation of a model, or of samples on disk, on a benchmark's own files, by its own rules.

    Run the command again to resume it; processes that run it at the same time share the samples.

    Args:
        name: The benchmark, as in dpg; docs/benchmarks.md lists them.
        output: Folder of the evaluation.
        prompts: A file that the benchmark's authors published, or a list of them.
        judges: The models that judge the samples.
    """

    name: str
    prompts: str | list[str]
    judges: Judges = field(default_factory=Judges)


@dataclass(frozen=True)
class GenEvalOriginal:
    """The images of a finished evaluation, scored by the results of GenEval's own evaluate_images.py.

    Args:
        output: Folder of the finished evaluation.
        results: The results file that evaluate_images.py wrote for its images.
        against: Folder of another evaluation by such results, to compare with.
    """

    output: str
    results: str
    against: str | None = None


@dataclass(frozen=True)
class CompareEvaluations:
    """Two finished evaluations with equal protocols, compared sample by sample.

    Args:
        before: Folder of the first model's evaluation.
        after: Folder of the second model's evaluation, in which comparison.json and report.html are written.
    """

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Plan(Train):
    """A training run whose size, calls and memory are printed.

    Args:
        processes: Number of processes of the run, each on a GPU of its own.
    """

    processes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "processes")


@dataclass(frozen=True, kw_only=True)
class Calibrate(Train):
    """A training configuration for which the noise level of each sampling step is calibrated.

    Args:
        output: JSON file to write.
        calibration: Settings of the calibration.
    """

    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True, kw_only=True)
class Steer:
    """A search for the best sample of every prompt.

    Args:
        output: Folder of the samples and the report.
        model: The generator.
        prompts: A file of prompts, or a split of a world, as in shapes:val; or give ``prompt``.
        prompt: Texts to search for, in place of ``prompts``; --prompt TEXT may be repeated.
        strategy: Search strategy, as in genalign.BestOfN.
        rewards: Rewards by name; the search maximizes their weighted sum.
        sampling: Sampling settings.
        budget: Limit of NFE, cost or seconds per prompt.
        lora: An adapter of the model.
        batch_size: Largest number of samples in one call of the network.
        seed: Seed of all noises.
        limit: Number of prompts that are searched, from the first; null for all.
        audio: File format of audio clips.
    """

    output: str
    model: Model
    prompts: str | None = None
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    prompt: list[str] = field(default_factory=list)
    strategy: Strategy
    budget: Budget | None = None
    lora: str | None = None
    batch_size: int = 32
    seed: int = 0
    limit: int | None = None
    audio: AudioFormat = "wav"

    def __post_init__(self) -> None:
        if (self.prompts is None) != bool(self.prompt):
            raise ValueError("give either prompts, a file as in --prompts prompts.txt, or texts, as in --prompt TEXT")
        _require_rewards(self.rewards)
        require_positive(self, "batch_size", "limit")


@dataclass(frozen=True, kw_only=True)
class TrainNoiseAware(Generation):
    """Training of a reward's own network to predict the reward of the clean sample from noisy previews of it.

    Args:
        output: Folder of the recordings and the trained network.
        model: The generator whose trajectories are recorded.
        prompts: Prompts of the recorded trajectories.
        held_out: Prompts of the trajectories for validation.
        student: The network that is made of the reward and trained, as in rewards.noise_aware.SelfDistilled.
        rewards: The reward, one by its name.
        steps: Network evaluations at which a trajectory is recorded.
        count: Number of trajectories of each prompt.
        limit: Number of prompts.
        distillation: Optimizer settings.
        batch_size: Number of samples in one batch.
        seed: Seed of all noises.
    """

    held_out: str
    student: Callable[[AnyCallable], nn.Module]
    steps: tuple[int, ...] = (2, 4, 6, 8, 10, 13, 16)
    count: int = 8
    limit: int = 512
    distillation: Distillation = field(default_factory=Distillation)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _require_rewards(self.rewards)
        if len(self.rewards) > 1:
            raise ValueError(
                f"a student predicts one reward, not {', '.join(self.rewards)}: give one, and train a student of each"
            )
        require_positive(self, "count", "limit", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Prices(Generation):
    """A measurement of what NFE, decoding and each reward cost on this machine, in seconds per sample.

    Args:
        output: JSON file to write.
        prompts: Prompts, as in training; the first ``batch_size`` are used.
        batch_size: Number of samples in one batch.
        repeats: Number of measurements, of which the median counts.
        gradients: Measure backward passes too, which ReNO, DNO and guides make; they need the memory of a gradient.
    """

    batch_size: int = 32
    repeats: int = 5
    gradients: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "repeats")


@dataclass(frozen=True)
class Compare:
    """Recipes side by side: each is trained on the base configuration, with settings of its own and with every seed.

    Args:
        output: Folder of all runs and of the comparison.
        base: A training configuration; its path is relative to the file of the comparison.
        runs: The settings of each run that replace those of the base, by the name of the run.
        seeds: Seeds of the training runs.
        once: Names of runs that are trained with the first seed only.
        budgets: "equal" refuses runs with different training.rounds, training.max_nfe, max_seconds or time_budget;
            "own" trains them, without standings at equal cost.
        variants: Settings by name that replace those of every run: each run is trained with each of them, as RUN-NAME.
    """

    output: str
    base: Path_fr
    runs: dict[str, dict[str, Any]]
    seeds: list[int]
    once: list[str] = field(default_factory=list)
    budgets: Literal["equal", "own"] = "equal"
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError("a comparison needs at least one entry in runs and one in seeds")
        if wrong := [name for name in (*self.runs, *self.variants) if not re.fullmatch(r"[\w+-][\w .+-]*", name)]:
            raise ValueError(f"runs has a name that is no folder's: {wrong[0]!r}; use letters, digits, _, -, + and .")
        if unknown := set(self.once) - set(self.runs):
            raise ValueError(f"once names {', '.join(sorted(unknown))}, which runs does not have")

    def require_equal_budgets(self, settings: Mapping[str, Train]) -> None:
        """Raise ValueError that names the runs and their budgets if these are not equal, but must be.

        Args:
            settings: The settings of every run by its name.
        """
        for name in ("training.rounds", "training.max_nfe", "max_seconds", "time_budget"):
            section, _, key = name.rpartition(".")
            values: dict[Any, list[str]] = {}
            for run, own in settings.items():
                values.setdefault(vars(getattr(own, section) if section else own)[key], []).append(run)
            if len(values) > 1 and self.budgets == "equal":
                parts = (f"{', '.join(runs)} {'has' if len(runs) == 1 else 'have'} {v}" for v, runs in values.items())
                raise ValueError(
                    f"the runs have unequal budgets: of {name}, {', and '.join(parts)}. Give all the same, or set"
                    " budgets: own to train them without standings at equal cost"
                )

    def jobs(self) -> list[tuple[str, int]]:
        """List every (run, seed), seed by seed, so that an unfinished comparison has as many seeds of each run."""
        names = {run: [f"{run}-{name}" for name in self.variants] or [run] for run in self.runs}
        return [
            (name, seed)
            for place, seed in enumerate(self.seeds)
            for run in self.runs
            if place == 0 or run not in self.once
            for name in names[run]
        ]


@dataclass(frozen=True)
class Report:
    """A page on a run, finished or not: RUN/report.html.

    Args:
        run: Folder of the run.
    """

    run: str


@dataclass(frozen=True)
class Export:
    """An export of the weights of a run, with a model card.

    Args:
        run: Folder of the run.
        output: Folder to write.
        form: "lora" is the adapter alone, for diffusers; "comfy" for ComfyUI, at full strength; "kohya" for programs
            that read kohya's names (SD 1.5 and SDXL). "merged" is the network with the adapter in its weights,
            "pipeline" a whole diffusers folder.
        round: Export the checkpoint after so many rounds; null exports the end of the run, or the last checkpoint of
            one that has not ended.
        push: Name of a new repository of the Hub (owner/name) that the export is uploaded to; needs a token.
        private: Make that repository private.
    """

    run: str
    output: str
    form: Literal["lora", "comfy", "kohya", "merged", "pipeline"] = "lora"
    round: int | None = None
    push: str | None = None
    private: bool = False


def model_of(plain: Mapping[str, Any]) -> Model:
    """Read the model from the config.json of a run."""
    return Model(**{**plain["model"], "memory": Memory(**plain["model"].get("memory", {}))})


def require_device(name: str) -> None:
    """Raise ValueError if torch does not know the device ``name``, or this machine has no such CUDA device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device {name!r} is no device: give cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here: give"
            " --model.device cpu, or install the torch of your GPU"
        )
