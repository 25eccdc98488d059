"""Model cards of exported weights: the Hub's metadata, and what others need to use and to judge them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from genalign import assets
from genalign.diffusion.lora import PEFT_CONFIG, STUDENT_GUIDANCE, adapter_file, student_metadata
from genalign.diffusion.own_adapter import kind_of
from genalign.metrics.intervals import Estimate
from genalign.runtime.files import write_text
from genalign.runtime.media import AUDIO_SUFFIXES
from genalign.training.best_weights import BestRound
from genalign.training.run_folder import RunFolder

_WIDGETS = 4
_TRUE_CFG = {"FluxPipeline", "QwenImagePipeline", "QwenImage21Pipeline"}
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The base checkpoint of a run, as far as its files are on this machine.

    Args:
        path: Its path, Hub id or embedded name in the run's configuration.
        revision: Its revision on the Hub; None for the default branch.
    """

    path: str
    revision: str | None = None

    @property
    def hub_id(self) -> str | None:
        """The checkpoint's name on the Hub: its path, or the origin that its own files name."""
        if self._folder() is None:
            return self.path if self.path.count("/") == 1 and not os.path.exists(self.path) else None
        names = (part for part in Path(self.path).absolute().parts if part.startswith("models--"))  # the Hub's cache
        origin = next(names, "").removeprefix("models--").replace("--", "/") or str(self.index.get("_name_or_path", ""))
        return origin if origin.count("/") == 1 and not origin.startswith(("/", ".")) else None

    @property
    def name(self) -> str:
        """The checkpoint's name for readers on other machines, where a local path means nothing."""
        return self.hub_id or Path(self.path).name

    @property
    def code(self) -> str:
        """Python that names the checkpoint, as the arguments of ``from_pretrained``."""
        revision = f', revision="{self.revision}"' if self.revision else ""
        name = f'"{self.hub_id or f"path/to/{self.name}"}"{revision}'
        return f'assets.resolve("{self.path}")' if self.is_embedded else name

    @property
    def is_embedded(self) -> bool:
        """Whether the checkpoint is one of genalign's own."""
        return self.path in assets.names()

    @property
    def index(self) -> dict[str, Any]:
        """The checkpoint's model_index.json; empty if it is not on this machine."""
        file = self._file("model_index.json")
        return _read(file) if file else {}

    @property
    def component(self) -> str:
        """The name of the network in a pipeline of diffusers."""
        return "unet" if "unet" in self.index else "transformer"

    @property
    def license(self) -> dict[str, Any]:
        """The entries on the license in the checkpoint's own card; empty without one."""
        file = self._file("README.md")
        metadata = (metadata_load(file) if file else None) or {}
        return {name: metadata[name] for name in _LICENSE if metadata.get(name)}

    def _folder(self) -> Path | None:
        path = Path(assets.resolve(self.path)) if self.is_embedded else Path(self.path)
        return path if path.is_dir() else None

    def _file(self, name: str) -> Path | None:
        """Find a file of the checkpoint in its folder or in the Hub's cache."""
        folder = self._folder()
        if folder is None and self.hub_id is not None:
            cached = try_to_load_from_cache(self.hub_id, name, revision=self.revision)
            return Path(cached) if isinstance(cached, str) else None
        return folder / name if folder and (folder / name).is_file() else None


@dataclass(frozen=True)
class Sample:
    """A prompt with the files of its first samples, after training and, if there is one, before."""

    prompt: str
    after: Path
    before: Path | None


def base_of(run: Path) -> Base:
    """The base checkpoint of the run in a folder."""
    model = _read(run / "config.json")["model"]
    return Base(model["path"], model.get("revision"))


def method_of(run: Path) -> str:
    """The recipe of the run in a folder, as a call."""
    return _as_call(_read(run / "config.json")["recipe"])


def write_model_card(run: Path, output: Path, format: str, rounds: int | None = None, name: str | None = None) -> None:
    """Write README.md, and samples of the run's evaluations beside it, into the folder of an export.

    Args:
        run: The folder of the run, with its config.json and environment.json.
        output: The folder of the exported weights.
        format: The exported format: lora, comfy, kohya, genalign, merged or pipeline.
        rounds: The number of rounds of an export from the middle of a run, to which its evaluations do not apply.
        name: The name by which the weights are loaded; None for the folder's name.
    """
    settings, base = _read(run / "config.json"), base_of(run)
    best, measured = RunFolder(run).best_round(), BestRound.read(run / "after")
    is_measured = best is None or (measured is not None and measured.same_weights(best))
    evaluated = rounds is None and is_measured and (run / "gain.json").is_file()
    samples = list(_samples(run)) if evaluated else []
    is_audio = _is_audio(base, samples)
    task = "text-to-audio" if is_audio else "text-to-image"
    data = ModelCardData(
        base_model=base.hub_id,
        pipeline_tag=task,
        widget=[{"text": one.prompt, "output": {"url": _copied(output, one.after, "after")}} for one in samples]
        or None,
        model_name=output.name,
        eval_results=list(_results(run, task)) if evaluated else None,
        **_kind_of_weights(format, task),
        **base.license,
    )
    after = f" Exported after round {rounds}." if rounds is not None else f" The weights after {best}." if best else ""
    sections = {
        "Use": _use(base, settings, output, format, samples, name or output.name),
        "Samples": _gallery(output, samples) if samples and not is_audio else "",
        "Rewards": _rewards(settings["rewards"]),
        "Evaluation": _figures(run) if evaluated else "These weights were not evaluated by the run.",
        "Training settings": _training(settings, _read(run / "environment.json")),
        "License": _license(base),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items() if body)
    title = f"# {output.name}\n\nTrained from `{base.name}` on rewards by genalign: `{method_of(run)}`.{after}"
    write_text(output / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{text}\n")))


def _kind_of_weights(format: str, task: str) -> dict[str, Any]:
    """The entries of a card's header on the kind of weights in an export, and on the library that loads them."""
    is_network, library = format in ("merged", "pipeline"), "genalign" if format == "genalign" else "diffusers"
    tags = [task, *([] if format == "genalign" else ["diffusers"]), *([] if is_network else ["lora"])]
    return {
        "base_model_relation": "finetune" if is_network else "adapter",
        "library_name": library,
        "tags": [*tags, "reinforcement-learning", "genalign"],
    }


def _use(base: Base, settings: Mapping[str, Any], output: Path, format: str, samples: list[Sample], name: str) -> str:
    """Python that loads the exported weights by ``name``, and notes for its readers."""
    if format == "genalign":
        code = _genalign_snippet(base, settings, samples, name)
        note = (
            f"\n\nThis is {kind_of(adapter_file(output))}, not a plain LoRA: it acts differently on each sample. If its"
            " matrices were loaded as a LoRA by diffusers or another program, samples would be wrong, so its file uses"
            " names that they reject."
        )
    else:
        code, note = _snippet(base, settings, output, format, samples, name), _sampler(base, _evaluated(settings))
    text = f"```python\n{code}\n```{note}"
    if student := _student_guidance(output, base):
        text += (
            f"\n\nA few-step student: guidance {student:g} is distilled into its weights. Sample at guidance 1, in"
            f" about {_evaluated(settings).get('num_steps')} steps."
        )
    return text


def _snippet(
    base: Base, settings: Mapping[str, Any], output: Path, format: str, samples: list[Sample], name: str
) -> str:
    """Python that loads the exported weights by ``name`` and generates a sample."""
    is_audio = _is_audio(base, samples)
    prompt = samples[0].prompt if samples else "a bell" if is_audio else "a photo of a cat"
    opened = f"pipe = DiffusionPipeline.from_pretrained({base.code})"
    imports, lines = ["from diffusers import DiffusionPipeline"], [opened]
    network = f"pipe.{base.component}"
    if format == "pipeline":
        lines = [f'pipe = DiffusionPipeline.from_pretrained("{name}")']
    elif format == "merged":
        kind = _read(output / "config.json")["_class_name"]
        imports = [f"from diffusers import DiffusionPipeline, {kind}"]
        lines.append(f'{network} = {kind}.from_pretrained("{name}")')
    elif (output / PEFT_CONFIG).is_file():  # diffusers cannot load the adapters of every family
        imports.append("from peft import PeftModel")
        lines.append(f'{network} = PeftModel.from_pretrained({network}, "{name}")')
    else:
        file = "" if format == "lora" else f', weight_name="{output.name}.safetensors"'
        lines.append(f'pipe.load_lora_weights("{name}"{file})')
    if base.is_embedded and format != "pipeline":
        imports.append("from genalign import assets")
    sampling = _evaluated(settings)
    options = {"num_inference_steps": sampling.get("num_steps")}
    options |= guidance_arguments(str(base.index.get("_class_name")), sampling.get("guidance"), settings["model"])
    options |= {side: settings["model"].get(side) for side in ("height", "width")}
    call = "".join(f", {key}={value!r}" for key, value in options.items() if value is not None)
    if _renoises(base, sampling):
        lines.append("config, kind = pipe.scheduler.config, type(pipe.scheduler)")
        lines.append("pipe.scheduler = kind.from_config(config, stochastic_sampling=True)")
    result = (
        f"audio = pipe(prompt=prompt{call}).audios[0]" if is_audio else f"image = pipe(prompt=prompt{call}).images[0]"
    )
    return "\n".join([*imports, "", *lines, f"prompt = {json.dumps(prompt, ensure_ascii=False)}", result])


def _genalign_snippet(base: Base, settings: Mapping[str, Any], samples: list[Sample], name: str) -> str:
    """Python that loads an adapter other than a plain LoRA by ``name``, and generates a sample."""
    prompt = samples[0].prompt if samples else "a bell" if _is_audio(base, samples) else "a photo of a cat"
    arguments = {key: value for key, value in _evaluated(settings).items() if value not in (None, {})}
    kernel, model = arguments.pop("kernel", None), settings["model"]
    sampling = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    names = ["Sampling", *(["assets"] if base.is_embedded else [])]
    if kernel is not None:
        names, sampling = [_as_call(kernel).split("(")[0], *names], f"{sampling}, kernel={_as_call(kernel)}"
    sizes = ("height", "width", "seconds", "negative_prompt", "max_sequence_length", "distilled_guidance")
    options = "".join(f", {key}={model[key]!r}" for key in sizes if model.get(key))
    lines = [
        "import pipelines",
        f"from genalign import {', '.join(names)}",
        "from genalign.diffusion.rollout import generate",
        "",
        f"model = pipelines.load({base.code}{options})",
        f'model.load_lora("{name}")',
        f"sampling = Sampling({sampling})",
        "grid, guidance = sampling.grid(model), sampling.guidance_scale(model)",
        f"prompts = [{json.dumps(prompt, ensure_ascii=False)}]",
        f"(samples,) = generate(model, prompts, [0], grid, guidance, 1{', sampling.kernel' if kernel else ''})",
    ]
    return "\n".join(lines)


def _student_guidance(output: Path, base: Base) -> float | None:
    """The guidance scale that is distilled into exported weights of a few-step student; None for any other."""
    networks = [output / "config.json", output / base.component / "config.json"]
    for config in filter(Path.is_file, networks):
        stored = _read(config).get("_student_guidance")
        return None if stored is None else float(stored)
    stored = student_metadata(adapter_file(output)).get(STUDENT_GUIDANCE)
    return None if stored is None else float(stored)


def _evaluated(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sampling settings of a run's evaluations."""
    sampling: Mapping[str, Any] = settings.get("evaluation") or settings.get("sampling") or {}
    return sampling


def guidance_arguments(kind: str, guidance: float | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a guidance scale as the arguments of diffusers' pipeline class ``kind``."""
    negative = {"negative_prompt": model["negative_prompt"]} if model.get("negative_prompt") else {}
    if kind in _TRUE_CFG:  # their guidance_scale is an input of the network
        scale = model.get("distilled_guidance")
        guided = {} if guidance is None or guidance <= 1 else {"true_cfg_scale": guidance, "negative_prompt": " "}
        return ({} if scale is None else {"guidance_scale": scale}) | guided | (negative if guided else {})
    if guidance is None:
        return {}
    if kind == "ZImagePipeline" and guidance <= 1:  # at 1 it is guided as others at 2
        return {"guidance_scale": 0.0}
    return {"guidance_scale": guidance, **(negative if guidance > 1 and kind != "Flux2KleinPipeline" else {})}


def _renoises(base: Base, sampling: Mapping[str, Any]) -> bool:
    """Whether the run samples a flow with ``CPS(1.0)``, which its scheduler in diffusers calls stochastic sampling."""
    kernel, scheduler = sampling.get("kernel") or {}, base.index.get("scheduler") or ()
    is_consistency = _as_call(kernel) == "CPS(eta=1.0)"
    return is_consistency and "FlowMatchEulerDiscreteScheduler" in scheduler


def _sampler(base: Base, sampling: Mapping[str, Any]) -> str:
    """Name the kernel with which the weights are sampled, unless it is the ODE of every scheduler."""
    kernel = sampling.get("kernel")
    if not kernel or _as_call(kernel).startswith("ODE("):
        return ""
    same = "the scheduler above does the same" if _renoises(base, sampling) else "diffusers has no such sampler"
    return f"\n\nThese weights are sampled with `{_as_call(kernel)}` of genalign; {same}."


def _rewards(rewards: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {one['weight']:g} | `{_as_call(one['function'])}` |" for name, one in rewards.items()]
    return "\n".join(["| reward | weight | function |", "|---|---|---|", *rows])


def _training(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    training = {key: settings[key] for key in ("prompts", "recipe", "sampling", "training", "lora")}
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if isinstance(value, str | int))
    return f"```json\n{json.dumps(training, indent=2)}\n```\n\nEnvironment: {versions}."


def _license(base: Base) -> str:
    if "license" not in base.license:
        return f"The same as for `{base.name}`, whose card was not available: read it before you share these weights."
    return f"The same as for `{base.name}`: {base.license.get('license_name', base.license['license'])}."


def _as_call(setting: Any) -> str:
    """Write a configured object as a call, and a group of settings as a call without a name."""
    if not isinstance(setting, dict):
        return str(setting)
    arguments = setting.get("init_args", {}) if "class_path" in setting else setting
    text = ", ".join(f"{key}={_as_call(value)}" for key, value in arguments.items())
    return f"{setting.get('class_path', '').rsplit('.', 1)[-1]}({text})"


def _results(run: Path, task: str) -> Iterator[EvalResult]:
    """Yield the scores after training as the Hub's metadata, which cannot hold intervals: those are in the text."""
    after = _read(run / "after" / "summary.json")
    for name, value in after["overall"].items():
        if math.isfinite(mean := value["mean"]):
            suite = after["protocol"]["suite"]
            yield EvalResult(task, suite, suite, name, round(mean, 4), metric_name=name, dataset_revision=None)


def _figures(run: Path) -> str:
    """Tabulate the scores before and after with their gains, and name the protocol of the evaluations."""
    before, after = (_read(run / name / "summary.json") for name in ("before", "after"))
    lines = ["| score | before (95% interval) | after | gain | prompts |", "|---|---|---|---|---|"]
    for name, gained in _read(run / "gain.json")["gain"].items():
        old, new = (Estimate.from_dict(evaluation["overall"][name]) for evaluation in (before, after))
        gain = Estimate.from_dict(gained)
        lines.append(f"| {name} | {old.text('.3f')} | {new.text('.3f')} | {gain.text('+.3f')} | {gain.n} |")
    protocol = ", ".join(f"{key} {value}" for key, value in after["protocol"].items() if key != "sigmas")
    return "\n".join([*lines, "", f"Protocol {after['protocol_hash']}: {protocol}."])


def _samples(run: Path) -> Iterator[Sample]:
    """Find the first samples, with the same noise before and after, of up to four prompts of the run's evaluations."""
    before = {row["prompt"]: row["image"] for row in reversed(_records(run / "before"))}
    after = {row["prompt"]: row["image"] for row in reversed(_records(run / "after"))}
    prompts = [prompt for prompt in reversed(after) if after[prompt] and (run / "after" / after[prompt]).is_file()]
    for prompt in prompts[:: max(1, len(prompts) // _WIDGETS)][:_WIDGETS]:
        old = run / "before" / before[prompt] if before.get(prompt) else None
        yield Sample(prompt, run / "after" / after[prompt], old if old and old.is_file() else None)


def _records(evaluation: Path) -> list[dict[str, Any]]:
    path = evaluation / "records.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _copied(output: Path, sample: Path, side: str) -> str:
    """Copy a sample beside the card, and return its relative path."""
    target = output / "samples" / f"{sample.stem}-{side}{sample.suffix}"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(sample, target)
    return target.relative_to(output).as_posix()


def _gallery(output: Path, samples: list[Sample]) -> str:
    lines = ["From the same noise:", "", "| prompt | before | after |", "|---|---|---|"]
    for one in samples:
        old = f"![before]({_copied(output, one.before, 'before')})" if one.before else ""
        lines.append(f"| {one.prompt} | {old} | ![after]({_copied(output, one.after, 'after')}) |")
    return "\n".join(lines)


def _is_audio(base: Base, samples: list[Sample]) -> bool:
    if samples:
        return samples[0].after.suffix in AUDIO_SUFFIXES
    kind = str(base.index.get("_class_name", ""))
    return "Audio" in kind or "ACEStep" in kind or base.path == "tones-audio"


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
