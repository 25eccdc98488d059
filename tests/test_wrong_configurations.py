"""Wrong configurations: the exact message of each says what is wrong, where, and what to write; nothing is written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from genalign.cli.error_messages import RENAMED_SETTINGS
from tests.genalign.training.toy_runs import write_config
from tests.packages import folder_of
from tests.pipelines.tiny_checkpoints import FAMILIES

MINE = """
def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)

def shapeless(samples, prompts):
    return samples.mean()

def broken(samples, prompts):
    raise KeyError("color")

def verdict(samples, prompts):
    return (redness(samples, prompts).detach() > 0.5).float()

number = 3

class Needs:
    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, samples, prompts):
        return samples.flatten(1).mean(1)
"""
CLASS = {"prompt": "a heart", "tag": "single_object", "include": [{"class": "heart", "count": 1}]}
FILES = {
    "mine.py": MINE,
    "mine.txt": "a circle\na square\n",
    "broken.jsonl": '{"prompt": "x"}\nno JSON\n',
    "class.jsonl": "".join(json.dumps({**CLASS, "prompt": f"heart {i}"}) + "\n" for i in range(2)),
    "broken.yaml": "a: [1,\n",
    "list.yaml": "- a\n",
    "no.yaml": "rewards: {red: {function: {class_path: mine.Needs, init_args: {folder: no}}}}\n",
    "zero.yaml": "prompts: 0123\n",
    "named.yaml": "rewards: {no: {function: mine.redness}}\n",
}
QUOTES = "put it in quotes, as YAML parses no, 0123 and 12:30 as a boolean and numbers"
TRAIN, PLAN = ("train", "--config", "run.json"), ("plan", "--config", "run.json")
REWARD = (*TRAIN, "--rewards.red.function")
SHAPES = (*REWARD, "rewards.shapes.ShapesReward")
MODEL = (*TRAIN, "--model.path")
NO_MODEL = ("--output", "plan", "--prompts", "mine.txt", "--recipe", "flow_grpo", *REWARD[3:], "mine.redness")
STEER = ("steer", "--output", "found", "--prompts", "shapes:val", "--rewards.red.function", "mine.redness")
SEARCH = (*STEER, "--model.path", "{sd3}", "--strategy")
PRICES = ("prices", "--output", "p.json", "--model.path", "{sd3}", "--prompts", "mine.txt")
EVALUATE = ("evaluate", "shapes", "--output", "evaluation")
GENEVAL = ("evaluate", "geneval", "--output", "evaluation", "--model.path", "{sd3}")
FIRST = "reward 'red' failed on a first batch: ValueError: "
FAMILY_NAMES = ", ".join(family.ours.kind.__name__ for name, family in FAMILIES.items() if name != "sd21")


# fmt: off
TABLE = [  # names, arguments, in which {name} is a checkpoint or the working directory, and messages
    # the command and its files
    ("command", ("trian",), "no command 'trian': did you mean 'train'?"),
    ("no file", ("train", "--config", "none.yaml"), "none.yaml: no such configuration file"),
    ("no YAML", ("train", "--config", "broken.yaml"),
     'Problems parsing config: while parsing a flow node did not find expected node content in "<unicode string>",'
     " line 2, column 1"),
    ("no settings", ("train", "--config", "list.yaml"),
     "the configuration must be a mapping of settings, as in output: runs/mine"),
    ("nothing", ("train",),
     "output, model.path, prompts, recipe are missing: set them in the --config file or as arguments, e.g."
     " --output runs/mine, --model.path shapes-sd3 or stabilityai/stable-diffusion-3.5-medium, --prompts"
     " prompts.txt or shapes:train, --recipe flow_grpo"),
    ("no model", ("plan", *NO_MODEL),
     "model.path is missing: set it in the --config file or as arguments, e.g. --model.path shapes-sd3 or"
     " stabilityai/stable-diffusion-3.5-medium"),
    ("held-out fraction", (*TRAIN, "--held_out_fraction", "1.5"),
     "held_out_fraction must be between 0 and 1, not 1.5"),
    ("no world", ("evaluate",),
     "choose one of prompts, shapes, tones, geneval, geneval-original, benchmark, as in genalign evaluate prompts"),
    ("no such evaluation", ("evaluate", "shape"), "no command 'evaluate shape': did you mean 'shapes'?"),
    ("no demo", ("demo", "bells"), "there is no demo of 'bells': choose from shapes, tones"),
    ("no reward", ("reward",),
     "choose one of check, collect, label, train, evaluate, references, direction, as in genalign reward check"),
    ("no comparison", ("compare",),
     "output, base, runs, seeds are missing: set them in the --config file or as arguments, e.g. --output"
     " runs/mine, --base ..., --runs ..., --seeds ..."),
    # texts that YAML reads as something else
    ("no", (*TRAIN, "--config", "no.yaml"),
     f"rewards.red.function.folder: expected a text for mine.Needs, not False: {QUOTES}"),
    ("octal", (*TRAIN, "--config", "zero.yaml"), f"prompts: expected a text, not 83: {QUOTES}"),
    ("reward named no", (*TRAIN, "--config", "named.yaml"),
     'rewards has the name False, as YAML reads it: put the name in quotes, as in "no":'),
    # spelling
    ("section", (*TRAIN, "--modle.path", "x"), "unknown setting 'modle.path': did you mean 'model.path'?"),
    ("setting", (*TRAIN, "--training.group_sise", "3"),
     "unknown setting 'training.group_sise': did you mean 'training.group_size'?"),
    ("argument of a recipe", (*TRAIN, "--recipe.windw", "3"), 
     "unknown setting 'recipe.windw': did you mean 'recipe.window'?"),
    ("weight", (*TRAIN, "--rewards.red.weigth", "2"), 
     "unknown setting 'rewards.red.weigth': did you mean 'rewards.red.weight'?"),
    ("recipe", (*TRAIN, "--recipe", "genalign.flow_grop"),
     "recipe: genalign has no flow_grop: did you mean 'flow_grpo'?"),
    ("short recipe", (*TRAIN, "--recipe", "flow_grop"),
     "recipe: 'flow_grop' is not an import path: did you mean 'flow_grpo'?"),
    ("no path", (*TRAIN, "--recipe", "mine"), "recipe: 'mine' is not an import path: include its module"),
    ("kernel in place of a recipe", (*TRAIN, "--recipe", "genalign.FlowSDE"),
     "recipe: Import path genalign.FlowSDE does not correspond to a subclass of Recipe"),
    ("bare recipe", (*TRAIN, "--recipe", "genalign.dragon_set"),
     "recipe: genalign.dragon_set needs reward, features: set them under init_args"),
    ("strategy", (*SEARCH, "genalign.search.BestOff"),
     "strategy: genalign.search has no BestOff: did you mean 'BestOfN'?"),
    ("choice", (*TRAIN, "--model.autocast", "bf16"),
     "model.autocast: must be one of float32, bfloat16, float16, not 'bf16': did you mean 'bfloat16'?"),
    ("format", ("export", "--run", "r", "--output", "e", "--format", "peft"),
     "format: must be one of lora, comfy, kohya, genalign, merged, pipeline, not 'peft'"),
    # kinds and ranges
    ("no number", (*TRAIN, "--training.rounds", "many"), "training.rounds: expected int, not many"),
    ("no number or null", (*TRAIN, "--model.height", "tall"),
     "model.height: expected int, not tall"),
    ("no rounds", (*TRAIN, "--training.rounds", "0"), "training.rounds must be at least 1, not 0"),
    ("rate", (*TRAIN, "--training.learning_rate", "-1"), "training.learning_rate must be positive, not -1.0"),
    ("float16 unscaled", (*TRAIN, "--model.dtype", "float16", "--training.loss_scale", "1"),
     "training.loss_scale is 1: float16 loses the gradients of an unscaled loss, so take a power of two such as 65536,"
     " or model.dtype bfloat16"),
    ("autocast unscaled", (*PLAN, "--model.autocast", "float16", "--training.loss_scale", "1"),
     "training.loss_scale is 1: float16 loses the gradients of an unscaled loss, so take a power of two such as 65536,"
     " or model.dtype bfloat16"),
    ("rank", (*TRAIN, "--lora.rank", "0"), "LoRA rank must be at least 1, not 0"),
    ("ema_decay", (*TRAIN, "--ema_decay", "1.5"), "ema_decay must be in [0, 1), not 1.5"),
    ("steps", (*TRAIN, "--sampling.num_steps", "0"), "sampling.num_steps must be at least 1, not 0"),
    ("guidance", (*TRAIN, "--sampling.guidance", "-1"), "sampling.guidance must be 1 for none, or more, not -1.0"),
    ("sigmas", (*TRAIN, "--sampling.sigmas", "[0.3,0.6,1.0]"),
     "sampling.sigmas must fall from the first to a last above 0, not [0.3, 0.6, 1.0]"),
    ("clip range", (*TRAIN, "--recipe.clip_range", "-1"), "clip_range must be in (0, 1), not -1.0"),
    ("window", (*TRAIN, "--recipe.window", "0"),
     "recipe.window must be at least 1 step, not 0; null trains every step"),
    ("draws", (*TRAIN, "--recipe", "genalign.awm", "--recipe.draws", "0"),
     "draws must be at least 1 noise level per update, not 0"),
    ("batches of an evaluation", (*EVALUATE, "--batch_size", "0"), "batch_size must be at least 1, not 0"),
    ("decode batch", (*TRAIN, "--model.memory.decode_batch", "0"), "decode_batch must be at least 1 sample, not 0"),
    # what does not go together
    ("group of one", (*TRAIN, "--training.group_size", "1"),
     "training.group_size is 1: a group needs at least 2 samples to compare; 1 is only for a pool"
     " (training.data) and a recipe that compares none"),
    ("divided groups", (*TRAIN, "--recipe", "genalign.prdp", "--training.batch_size", "3"),
     "training.batch_size 3 must be a multiple of group_size 2, so groups stay whole: try 2"),
    ("uneven updates", (*TRAIN, "--training.prompts_per_round", "3"),
     "training.prompts_per_round 3 does not divide into 2 updates: set training.updates_per_round to 1, or"
     " prompts_per_round to 2"),
    *((f"kernel without noise to {command[0]}", (*command, "--recipe.kernel", "ODE"),
            "ODE(): the kernel has no trainable step on this grid: a trajectory objective needs a stochastic kernel,"
            " such as FlowSDE, CPS or DPMSDE, and more than one step") for command in (TRAIN, PLAN)),
    ("long window", (*PLAN, "--recipe.window", "9"),
     "FlowSDE(noise_level=0.7): recipe.window is 9 steps, but only steps [0] of 3 can be trained: use a smaller"
     " window or more sampling steps"),
    ("held-out reward that is trained", (*TRAIN, "--reward_hacking.rewards", '{{"red": "mine.redness"}}'),
     "reward_hacking.rewards.red is trained on, so it cannot show reward hacking: name another"
     " reward"),
    ("two limits", (*SEARCH, "genalign.BestOfN", "--budget.nfe", "50", "--budget.seconds", "3"),
     "give one positive limit, nfe, cost or seconds, not Budget(nfe=50.0, cost=None, seconds=3.0,"
     " prices=None)"),
    ("small budget", (*SEARCH, "genalign.BestOfN", "--budget.nfe", "5"),
     "candidates=1 costs 20 for each prompt, but the budget is 5: raise the budget, or take fewer candidates or"
     " fewer steps"),
    # rewards
    ("no rewards", (*TRAIN, "--rewards", "{{}}"),
     "rewards is empty: name at least one, as in --rewards.strict.function rewards.shapes.ShapesReward"),
    ("weight 0", (*TRAIN, "--rewards.red.weight", "0"),
     "every reward has weight 0, so nothing would be trained: give at least one a weight"),
    ("no module", (*REWARD, "theirs.redness"),
     "rewards.red.function: no module theirs: it must be installed or in the working directory"),
    ("no function", (*REWARD, "mine.rednes"), "rewards.red.function: mine has no rednes: did you mean 'redness'?"),
    ("no callable", (*REWARD, "mine.number"),
     "rewards.red.function: Type <class 'collections.abc.Callable'> expects a function or a callable class: Unexpected"
     " import object 3. Got value: mine.number"),
    ("missing argument", (*REWARD, "mine.Needs"),
     "rewards.red.function: mine.Needs needs folder: set it under init_args"),
    ("no references", (*REWARD, "rewards.similarity.ReferenceSimilarity"),
     "rewards.red.function: rewards.similarity.ReferenceSimilarity needs features, references: set them under"
     " init_args"),
    ("unknown score", (*SHAPES, "--rewards.red.function.score", "exact"),
     "rewards.red.function.score: must be one of partial, strict, relaxed, not 'exact'"),
    ("one score for all", (*REWARD, "mine.shapeless"),
     "reward 'red' returned shape () for 2 samples: return one score per sample, a tensor of shape (2,)"),
    ("reward raises", (*REWARD, "mine.broken"), "reward 'red' failed on a first batch: KeyError: 'color' (mine.py:9)"),
    ("no gradient", (*REWARD, "mine.verdict", "--recipe", "genalign.draft"),
     "reward 'red' has no gradient: give it weight 0, or choose what needs none, such as the recipe flow_grpo, the"
     " strategies ZeroOrder and Evolution, or the guide DoobGuide"),
    ("no gradient in a combination",
     (*REWARD, "rewards.combine.WorstCase", "--rewards.red.function.rewards", "[mine.redness, mine.verdict]",
      "--recipe", "genalign.draft"),
     "verdict, a part of a combination of rewards, has no gradient: make it a reward of its own with weight 0, or"
     " choose what needs none, such as the recipe flow_grpo"),
    # prompts
    ("unknown split", (*TRAIN, "--prompts", "shapes:nope"),
     "unknown suite 'nope': choose one of train, val, iid, comp, len"),
    ("unknown task", (*TRAIN, "--prompts", "shapes:train:countin"),
     "train has no task countin: choose from single_object, two_object, counting, colors, position, color_attr"),
    ("no prompts", (*PLAN, "--prompts", "none.txt"),
     "no prompt file none.txt: give one of .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ("broken prompts", (*TRAIN, "--prompts", "broken.jsonl"),
     "broken.jsonl, line 2: not JSON (Expecting value: line 1 column 1 (char 0))"),
    ("few prompts", (*PLAN, "--prompts", "mine.txt", "--training.prompts_per_round", "4"),
     "prompts_per_round is 4, but the prompt set 'mine' has 2 different prompts: choose a number between 1 and that"),
    ("no metadata", (*SHAPES, "--prompts", "mine.txt"),
     f"{FIRST}the prompt 'a circle' has no metadata: this reward needs GenEval metadata"),
    ("unknown class", (*SHAPES, "--prompts", "class.jsonl"),
     f"{FIRST}'heart' is not one of this world's shapes: circle, square, triangle, cross, ring, moon"),
    ("held-out prompts", (*TRAIN, "--held_out.every", "1", "--held_out.prompts", "none.txt"),
     "no prompt file none.txt: give one of .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    # checkpoints
    ("no checkpoint", (*MODEL, "nowhere"), "nowhere is neither a folder nor a Hub id (owner/name)"),
    ("file", (*MODEL, "mine.py"), "mine.py is a file: give the diffusers folder (with model_index.json) or a Hub id"),
    ("no pipeline", (*MODEL, "{work}"), "{work} has no model_index.json: give the folder that save_pretrained wrote"),
    ("unknown family", (*MODEL, "{other}"),
     f"{{other}} holds a KolorsPipeline, which genalign has no wrapper for: use one of {FAMILY_NAMES},"
     " or set model.family to the import path of a class of your own"),
    ("no module of a family", (*PLAN, "--model.family", "theirs.Family"),
     "model.family 'theirs.Family' cannot be imported (No module named 'theirs'): write the import path of a class,"
     " as in my_families.AuraFlow, from a module in the working directory or an installed package"),
    *((f"{command[0]} with a family that is no pipeline", (*command, "--model.family", "mine.Needs"),
     "model.family 'mine.Needs' is no pipeline of genalign: give a subclass of pipelines.base.DiffusersPipeline, or of"
     " a family such as pipelines.SD3") for command in (TRAIN, PLAN)),
    ("unfinished family", (*SEARCH, "genalign.BestOfN", "--model.family", "pipelines.flows.FlowPipeline"),
     "model.family 'pipelines.flows.FlowPipeline' does not define encode_texts, longest_conditioning, run_denoiser,"
     " kind: give a subclass of pipelines.base.DiffusersPipeline, or of a family such as pipelines.SD3"),
    ("family of another checkpoint", (*MODEL, "{sd3}", "--model.family", "pipelines.Flux"),
     "{sd3} holds a StableDiffusion3Pipeline, not a FluxPipeline: use the pipeline of that family"),
    ("missing component", (*MODEL, "{half}"),
     "{half} lacks vae/, which its model_index.json names: copy the whole folder that save_pretrained wrote"),
    ("missing weights", (*MODEL, "{bare}"), "{bare} has no weights in transformer/: copy the .safetensors files too"),
    ("gated", (*PLAN, "--model.path", "gated/model"),
     "gated/model is gated: accept its licence at https://huggingface.co/gated/model, then run `hf auth login`, or name"
     " the variable of your token in model.token"),
    ("not cached", (*MODEL, "owner/model"),
     "owner/model is not a folder here, not in the local cache, and the Hub did not give it"
     " (LocalEntryNotFoundError): check the path, or download it once while online"),
    ("kernel of another family", (*PLAN, "--model.path", "{sd15}", "--recipe.kernel", "FlowSDE"),
     "FlowSDE(noise_level=0.7): the kernel is not defined for this step: it needs a flow (alpha = 1 - sigma); on"
     " other paths use DDIM or DPMSDE"),
    ("sigmas of another family", (*PLAN, "--model.path", "{sd15}", "--sampling.sigmas", "[1.0,0.6,0.3]"),
     "the network of this family takes only integer timesteps, so noise levels cannot be set freely: give"
     " sampling.num_steps without sampling.sigmas"),
    ("guidance on a distilled model",
     (*PLAN, "--model.path", "{flux}", "--model.height", "16", "--model.width", "16", "--sampling.guidance",
           "4.5"),
     "this model has guidance distilled into it: set sampling.guidance to 1, not 4.5, and the network's own"
     " guidance by model.distilled_guidance"),
    ("distilled guidance on another", (*PLAN, "--model.distilled_guidance", "3.5"),
     "this model has no guidance distilled into it: leave distilled_guidance out"),
    ("VAE in float16", (*MODEL, "{sd15}", "--model.dtype", "float16", "--recipe", "genalign.ddpo"),
     "the VAE overflowed in float16: open the model in bfloat16, or in float32 with autocast"),
    ("height", (*PLAN, "--model.height", "60"), "height and width must be multiples of 8 for this model, not 60"),
    ("device", (*PLAN, "--model.device", "tpu0"), "model.device 'tpu0' is not a device: use cpu, cuda, cuda:1 or mps"),
    ("layers", (*TRAIN, "--lora.targets", "[nope]"), "this network has no layer named nope: change lora.targets"),
    ("no adapter", (*TRAIN, "--init_lora", "none"),
     "there is no adapter none: give a run's folder, a .safetensors file or a Hub id"),
    ("no adapter to steer", (*SEARCH, "genalign.BestOfN", "--lora", "none"),
     "there is no adapter none: give a run's folder, a .safetensors file or a Hub id"),
    ("no calibration", (*TRAIN, "--recipe.kernel", "genalign.calibrated", "--recipe.kernel.path", "none.json"),
     "no calibration in none.json: write one with genalign calibrate --output none.json"),
    # folders that commands read and write
    ("output is a file", (*TRAIN, "--output", "mine.py"), "mine.py is a file: output must be a folder"),
    ("no run to export", ("export", "--run", "none", "--output", "exported"),
     "none has no config.json: give the output folder of a training run"),
    ("no run named", ("report",),
     "run is missing, as in genalign report runs/mine"),
    ("no run to report", ("report", "none"),
     "none is not a run folder: it has no config.json. Give the output of genalign train or genalign reward train"),
    ("no GenEval prompts", (*GENEVAL, "--prompts", "mine.txt"),
     "mine.txt, prompt 1: the prompt 'a circle' has no metadata: GenEval needs its tag and include clauses"),
    ("calibration", ("calibrate", "--config", "run.json", "--calibration.iterations", "1"),
     "a calibration needs at least 2 iterations, a step in (0, 1), a positive band and ascending positive bounds,"
     " not Calibration(iterations=1, step=0.05, band=1.0, bounds=(0.2, 3.0))"),
]
# fmt: on


@pytest.fixture(scope="session")
def places(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints, whole and broken, and a working directory with everything that the table names."""
    root = tmp_path_factory.mktemp("wrong")
    places = {"sd3": tiny_folder, "work": root / "work"} | {n: FAMILIES[n].save(root / n) for n in ("sd15", "flux")}
    for name in ("half", "bare", "other"):
        places[name] = Path(shutil.copytree(tiny_folder, root / name))
    shutil.rmtree(places["half"] / "vae")
    (places["bare"] / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    index = json.loads((places["other"] / "model_index.json").read_text())
    (places["other"] / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    weights = places["sd15"] / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "decoder.conv_out.weight": tensors["decoder.conv_out.weight"] * 1e6}, weights)
    places["work"].mkdir()
    for name, text in FILES.items():
        (places["work"] / name).write_text(text)
    sections = {"output": "run", "sampling": {"num_steps": 3}, "held_out": {}}
    training = {"rounds": 1, "updates_per_round": 2}
    write_config(places["work"] / "run.json", tiny_folder, "mine.redness", training, **sections)
    return places


@pytest.fixture
def work(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to the working directory, without a Hub, and forget what was imported from it."""
    monkeypatch.chdir(places["work"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("genalign.runtime.hub.hf_hub_download", _no_hub)
    yield places["work"]
    sys.modules.pop("mine", None)


def _no_hub(repository: str, file: str, **_: object) -> str:
    if repository.startswith("gated/"):
        raise GatedRepoError.__new__(GatedRepoError)
    raise LocalEntryNotFoundError("offline")


@pytest.mark.parametrize(("arguments", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_wrong_configuration_gets_its_exact_message(
    arguments: tuple[str, ...], message: str, places: dict[str, Path], work: Path, error: Callable[..., str]
) -> None:
    before = sorted(work.rglob("*"))
    written = error(*(argument.format(**places) for argument in arguments))
    assert written == f"error: {message.format(**places)}\n"
    assert sorted(work.rglob("*")) == before


NUMBER = ("--rewards.red.function", "mine.number")
COMMANDS = [
    *((command, "--config", "run.json", *NUMBER) for command in ("train", "plan", "calibrate")),
    (*STEER, "--strategy", "genalign.BestOfN", *NUMBER),
    (*PRICES, *NUMBER),
    ("serve", "mine:number"),
    ("reward", "check", "mine:number"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_every_command_imports_modules_of_the_working_directory(
    arguments: tuple[str, ...], work: Path, error: Callable[..., str]
) -> None:
    assert "Unexpected import object 3. Got value: mine.number" in error(*arguments)


def test_a_used_output_is_refused_before_the_model_is_opened(
    work: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    choices = f"resume it (genalign train --resume {tmp_path}), choose another output, or remove it"
    expected = f"error: {tmp_path} holds a run already: {choices}\n"
    assert error(*TRAIN, "--output", str(tmp_path), "--model.path", "nowhere") == expected


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [
        ("recipe", "genalign.recipes.flow_grpo", "genalign.flow_grpo"),
        ("recipe.kernel", "genalign.dynamics.FlowSDE", "genalign.FlowSDE"),
        ("rewards.judge.function", "rewards.judges.GradedJudge", "rewards.remote.vlm_judges.GradedJudge"),
        ("rewards.set.function", "rewards.sets.FrechetTo", "rewards.set_rewards.FrechetReward"),
    ],
)
def test_an_import_path_of_0_1_0_is_refused_with_its_new_name(
    option: str, old: str, new: str, work: Path, error: Callable[..., str]
) -> None:
    recipe = [] if option == "recipe" else ["--recipe", "genalign.flow_grpo"]
    message = error("train", "--output", "runs/x", *recipe, f"--{option}", old)
    assert f"{old} was renamed in genalign 0.2.0: write {new}\n" in message and not (work / "runs").exists()


def test_every_renamed_path_exists_now() -> None:
    table = files("genalign.cli").joinpath("renamed_paths.txt").read_text(encoding="utf-8").splitlines()
    for line in table[1:]:
        module, _, name = line.split()[1].rpartition(".")
        if not hasattr(importlib.import_module(module), name):
            assert importlib.util.find_spec(line.split()[1]), line


@pytest.mark.parametrize("section", ["", "training.", "hacking."])
@pytest.mark.parametrize(("old", "new"), RENAMED_SETTINGS.items())
def test_a_setting_of_0_1_0_is_refused_with_its_new_name(
    old: str, new: str, section: str, work: Path, error: Callable[..., str]
) -> None:
    now = section.replace("hacking", "reward_hacking") + new
    expected = f"error: setting '{section}{old}' was renamed in genalign 0.2.0: write {now!r}\n"
    assert expected in error("train", "--output", "runs/x", f"--{section}{old}", "1")
    assert not (work / "runs").exists()


SHADOWED = "{work}/rewards/__init__.py is imported as 'rewards' instead of genalign's package"
HIDDEN = "rewards.red.function: rewards has no mine: 'rewards' was imported from {own}, genalign's"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "path", "message"),
    [(["-m"], "", SHADOWED), (["-P", "-m"], "{work}", SHADOWED), (["-P", "-m"], "", HIDDEN)],
    ids=["a folder hides ours", "an installed package hides ours", "ours hides a folder"],
)
def test_a_package_of_the_same_name_as_ours_is_explained(
    options: list[str], path: str, message: str, tmp_path: Path
) -> None:
    places = {"work": tmp_path, "own": folder_of("rewards")}
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    (tmp_path / "rewards" / "mine.py").write_text("def redness(samples, prompts): ...")
    arguments = ["--output", "run", "--prompts", "p.txt", "--model.path", "m", "--recipe", "genalign.flow_grpo"]
    arguments += ["--rewards.red.function", "rewards.mine.redness"]
    command = [sys.executable, *options, "genalign", "plan", *arguments]
    environment = {**os.environ, **({"PYTHONPATH": path.format(**places)} if path else {})}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and f"error: {message.format(**places)}" in result.stderr
    assert "my_rewards" in result.stderr and str(tmp_path) in result.stderr
