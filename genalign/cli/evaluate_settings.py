"""The settings of ``genalign evaluate``, and the size of every evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from genalign.cli.generation_settings import RewardChoice, require_positive
from genalign.cli.model_settings import Model
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.benchmarks.benchmark import Judges
from genalign.evaluation.geneval.judge import Judge
from genalign.types import AnyCallable

TEN_STEPS = (
    1.0,
    0.9643,
    0.9231,
    0.875,
    0.8182,
    0.75,
    0.6667,
    0.5625,
    0.4286,
    0.25,
)  # of shapes-sd3: even steps, shifted by 3


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
        """Whether the evaluation runs at all."""
        return True


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
    """The samples of an evaluation, from a model or from a folder, and what is measured on them.

    Args:
        output: Folder of the evaluation.
        model: The generator; null for ``samples``.
        lora: An adapter of the model: the folder of a run, its lora/ folder, a .safetensors file or a Hub id.
        samples: A folder of another program's samples, which are scored instead of a model's. It has GenEval's layout,
            or a prompts.jsonl with a line {"file_name": ..., "prompt": ...} for each sample; or it is the folder of a
            finished evaluation.
        rewards: Named rewards; the report shows the first one first.
        set_rewards: Named scores of the whole set of samples.
        sampling: Sampling settings.
        seeds: Number of initial noises per prompt; the minimum if samples_per_task is set.
        samples_per_task: Number of samples per task, always of the same prompts; null takes all prompts.
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
            raise ValueError(
                "samples is a folder to score, but model and lora generate new samples: give one or the other"
            )
        if self.model is None and self.samples is None:
            raise ValueError(
                "model.path is missing: name a model, as in --model.path shapes-sd3, or a folder of another program's"
                " samples, as in --samples my_images"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatePrompts(Evaluate):
    """An evaluation of any model, or of any samples, on any prompts with any rewards.

    Run the command again to resume it; processes that run it at the same time share the samples.

    Args:
        output: Folder of the evaluation.
        prompts: A prompt file, or a split of a world, whose verifier's scores are also reported; null takes the prompts
            of ``samples``.
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
    sampling: Sampling = field(default_factory=lambda: Sampling(sigmas=TEN_STEPS))
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
        prompts: GenEval's evaluation_metadata.jsonl, or a file in its format; null takes the prompts of ``samples``.
        sampling: Sampling settings.
        judge: The model that decides what is in an image; null is Mask2Former with CLIP.
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
        prompts: One or more files that the benchmark's authors published.
        judges: The models that judge the samples.
    """

    name: str
    prompts: str | list[str]
    judges: Judges = field(default_factory=Judges)


@dataclass(frozen=True)
class GenEvalOriginal:
    """The images of a finished evaluation, scored with the results of GenEval's own evaluate_images.py.

    Args:
        output: Folder of the finished evaluation.
        results: The results file that evaluate_images.py wrote for its images.
        against: Folder of another evaluation with such results, to compare with.
    """

    output: str
    results: str
    against: str | None = None
