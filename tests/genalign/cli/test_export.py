"""Export of the weights of a run, as a LoRA, a merged network or a pipeline, with a model card."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from huggingface_hub import ModelCard, constants
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from genalign.cli.export import TrainedWeights, trained_weights
from genalign.cli.main import main
from genalign.cli.model_card import guidance_arguments
from genalign.diffusion.policy import Lora, Policy
from genalign.metrics.intervals import Estimate
from genalign.runtime.hub import hub_answers
from genalign.training.best_weights import BestRound
from genalign.training.run_folder import RunFolder
from pipelines import SD3
from tests.http_servers import Answer
from tests.hub_stand_in import StandInHub, stand_in_hub
from tests.pipelines.tiny_checkpoints import FAMILIES

PROMPTS = ["a red circle", "a blue square"]
ESTIMATE = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 12}


@pytest.fixture
def run(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> Path:
    """Write a run folder as training does, with an adapter that changes predictions."""
    policy = Policy(tiny.denoiser, Lora(rank=4))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "run"
    tiny.save_lora(folder / "lora", policy.adapter_state(), policy.config)  # it has one
    reward = {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "strict"}}
    settings = {
        "model": {"path": str(tiny_folder)},
        "recipe": {"class_path": "genalign.flow_grpo", "init_args": {"window": 2}},
        "rewards": {"strict": {"function": reward, "weight": 1.0}},
        **{name: {} for name in ("prompts", "sampling", "training", "lora")},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text('{"torch": "2.9"}')
    (folder / "gain.json").write_text(json.dumps({"gain": {"strict": ESTIMATE}}))
    for name in ("before", "after"):
        summary = {"overall": {"strict": ESTIMATE}, "protocol": {"suite": "comp"}, "protocol_hash": "abc"}
        images = folder / name / "images"
        images.mkdir(parents=True)
        (folder / name / "summary.json").write_text(json.dumps(summary))
        rows = [{"prompt": prompt, "image": f"images/{number}.png"} for number, prompt in enumerate(PROMPTS)]
        for row in rows:
            Image.new("RGB", (4, 4), "red" if name == "after" else "blue").save(folder / name / row["image"])
        (folder / name / "records.jsonl").write_text("\n".join(map(json.dumps, [*rows, *rows])))
    return folder


def _checkpoint(run: Path, rounds: int) -> Path:
    """Write the adapter that training writes beside a checkpoint."""
    folder = run / "checkpoints" / f"round-{rounds:06d}" / "lora"
    shutil.copytree(run / "lora", folder)
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("f", rounds))  # other weights in every round
    return folder


def _export(run: Path, format: str) -> Path:
    output = run.parent / format
    assert main(["export", "--run", str(run), "--output", str(output), "--format", format]) == 0
    return output


def _assert_same_predictions(tiny: SD3, other: SD3) -> None:
    x, conditioning, step = tiny.initial_noise([1, 2]), tiny.encode(PROMPTS), tiny.grid(4)[1]
    with torch.no_grad():
        tuned, exported = (model.predict(x, step, conditioning, 1.0) for model in (tiny, other))
    torch.testing.assert_close(tuned, exported, rtol=0, atol=1e-5 * float(tuned.abs().max()))


def test_a_pipeline_has_the_adapter_in_its_weights(tiny: SD3, run: Path) -> None:
    output = _export(run, "pipeline")
    _assert_same_predictions(tiny, SD3.load(output))
    assert not (output / "lora").exists()


def test_a_merged_network_loads_by_its_class(tiny: SD3, tiny_folder: Path, run: Path) -> None:
    network = SD3Transformer2DModel.from_pretrained(_export(run, "merged"))
    _assert_same_predictions(tiny, SD3(DiffusionPipeline.from_pretrained(tiny_folder, transformer=network)))


def test_a_lora_is_exported_with_a_card(tiny: SD3, tiny_folder: Path, run: Path) -> None:
    output = _export(run, "lora")
    other = SD3.load(tiny_folder)
    other.load_lora(output)
    _assert_same_predictions(tiny, other)
    card = (output / "README.md").read_text()
    assert "| strict | 1 | `ShapesReward(score=strict)` |" in card and "flow_grpo(window=2)" in card
    row = "| strict | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) | +0.500 (+0.400 to +0.600) | 12 |"
    assert row in card and "Protocol abc: suite comp." in card


def test_a_whole_trained_network_has_no_lora_to_export(tiny_folder: Path, run: Path, error: Callable[..., str]) -> None:
    (run / "lora").rename(run / "elsewhere")
    merged = run.parent / "tuned"
    arguments = ["export", "--run", str(run), "--output", str(merged)]
    assert "has no weights yet: wait for its first checkpoint" in error(*arguments)
    changed = SD3.load(tiny_folder)
    with torch.no_grad():
        for parameter in changed.denoiser.parameters():
            parameter.mul_(1.1)
    changed.save_denoiser(run / "denoiser")
    assert "trained the whole network: export it with --format merged or pipeline" in error(*arguments)
    assert main([*arguments, "--format", "pipeline"]) == 0
    _assert_same_predictions(changed, SD3.load(merged))
    assert "exists: choose another output" in error(*arguments, "--format", "pipeline")


def test_the_card_has_the_metadata_of_the_hub_and_samples(run: Path, tiny_folder: Path) -> None:
    output = _export(run, "lora")
    card = ModelCard.load(output / "README.md")
    data = card.data
    assert data.pipeline_tag == "text-to-image" and data.library_name == "diffusers"
    assert {"lora", "text-to-image", "diffusers"} <= set(data.tags) and data.base_model_relation == "adapter"
    assert data.base_model is None and str(tiny_folder.parent) not in card.content  # a path of this machine
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("strict", 0.5, "comp")
    assert [one["text"] for one in data.widget] == PROMPTS
    assert all((output / one["output"]["url"]).is_file() for one in data.widget)
    assert Image.open(output / data.widget[0]["output"]["url"]).getpixel((0, 0)) == (255, 0, 0)
    assert "![before](samples/0-before.png)" in card.content and (output / "samples" / "0-before.png").is_file()


@pytest.mark.parametrize("format", ["lora", "comfy", "merged", "pipeline"])
def test_the_snippet_of_the_card_runs(
    run: Path, tiny_folder: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = _export(run, format)
    monkeypatch.chdir(output.parent)
    snippet = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    here = snippet.replace(f"path/to/{tiny_folder.name}", str(tiny_folder))
    scope: dict[str, Any] = {}
    exec(here, scope)
    assert f'prompt = "{PROMPTS[0]}"' in snippet
    assert scope["image"].size == (64, 64)


def test_the_card_tells_the_kernel_and_diffusers_moves_alike(
    run: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(kernel: Any, output: str) -> str:
        settings = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(settings | {"sampling": {"num_steps": 2, "kernel": kernel}}))
        assert main(["export", "--run", str(run), "--output", str(run.parent / output)]) == 0
        return (run.parent / output / "README.md").read_text()

    text = card({"class_path": "genalign.CPS", "init_args": {"eta": 1.0}}, "consistency")
    assert "sampled with `CPS(eta=1.0)` of genalign; the scheduler above does the same." in text
    monkeypatch.chdir(run.parent)
    scope: dict[str, Any] = {}
    snippet = text.split("```python\n")[1].split("```")[0]
    exec(snippet.replace(f"path/to/{tiny_folder.name}", str(tiny_folder)), scope)
    assert scope["pipe"].scheduler.config.stochastic_sampling
    text = card({"class_path": "genalign.CPS", "init_args": {"eta": 0.5}}, "half")
    assert "stochastic_sampling" not in text and "`CPS(eta=0.5)` of genalign; diffusers has no such sampler." in text
    for number, ode in enumerate((None, {"class_path": "genalign.ODE"})):
        assert "of genalign;" not in card(ode, f"ode-{number}")


def test_the_base_is_named_by_its_own_card(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "elsewhere" / "my-sd3")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: stability\nlicense_link: LICENSE.md\n---\nA card."
    )
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_name_or_path": "stabilityai/sd3"}))
    config = json.loads((run / "config.json").read_text())
    config["model"]["path"] = os.path.relpath(base)
    (run / "config.json").write_text(json.dumps(config))
    card = ModelCard.load(_export(run, "lora") / "README.md")
    assert (card.data.base_model, card.data.license, card.data.license_name) == (
        "stabilityai/sd3",
        "other",
        "stability",
    )
    assert 'from_pretrained("stabilityai/sd3")' in card.content and ".." not in card.content


def _tensors(file: Path) -> dict[str, list[float]]:
    """The numbers of an adapter, whatever its header says."""
    return {name: tensor.flatten().tolist() for name, tensor in load_file(file).items()}


def test_a_checkpoint_is_exported_by_its_round(run: Path, error: Callable[..., str]) -> None:
    early, late = _checkpoint(run, 2), _checkpoint(run, 14)
    arguments = ["export", "--run", str(run)]
    assert main([*arguments, "--output", str(run.parent / "two"), "--round", "2"]) == 0
    name = "pytorch_lora_weights.safetensors"
    assert _tensors(run.parent / "two" / name) == _tensors(early / name) != _tensors(late / name)
    card = (run.parent / "two" / "README.md").read_text()
    assert "Exported after round 2." in card and "not evaluated" in card and "model-index" not in card
    answer = error(*arguments, "--output", str(run.parent / "none"), "--round", "3")
    assert "has no weights after round 3, but after round 2, 14: checkpoint.every and checkpoint.keep control" in answer


def test_a_run_that_was_killed_is_exported_from_its_last_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = _checkpoint(run, 14)
    _checkpoint(run, 2)
    shutil.rmtree(run / "lora")
    output = _export(run, "lora")
    assert "after round 14: the run has not ended" in capsys.readouterr().out
    name = "pytorch_lora_weights.safetensors"
    assert _tensors(output / name) == _tensors(late / name)


def test_a_run_that_was_resumed_is_exported_from_its_newest_weights(run: Path) -> None:
    name, end = "pytorch_lora_weights.safetensors", (run / "lora" / "pytorch_lora_weights.safetensors")
    late = _checkpoint(run, 14)
    os.utime(end, (2e9, 2e9))  # training ended after this checkpoint
    assert trained_weights(run, None) == TrainedWeights(run / "lora")
    os.utime(late / name, (3e9, 3e9))  # and went on
    assert trained_weights(run, None) == TrainedWeights(late, rounds=14)
    end.write_bytes((late / name).read_bytes())  # a copy of a finished run, in whatever order its files were copied
    os.utime(end, (2e9, 2e9))
    assert trained_weights(run, None) == TrainedWeights(run / "lora")


def test_the_adapter_for_peft_is_not_taken_for_one_of_diffusers(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, Lora(rank=4))
    RunFolder(tmp_path).save(policy, tiny)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder)
    with pytest.raises(OSError, match="no file named pytorch_lora_weights"):
        pipe.load_lora_weights(tmp_path / "peft")
    adapted = PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "peft" / "adapter"))
    assert len(get_peft_model_state_dict(adapted)) == len(policy.adapter_state()) > 0
    assert "load nothing" in (tmp_path / "peft" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "guidance", "negative", "expected"),
    [
        ("sd3", 4.5, "dark", {"guidance_scale": 4.5, "negative_prompt": "dark"}),
        ("sd3", 1.0, "", {"guidance_scale": 1.0}),
        ("flux", 1.0, "", {"guidance_scale": 2.5}),
        ("qwen_image21", 4.0, "", {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        ("z_image", 1.0, "", {"guidance_scale": 0.0}),
        ("flux2_klein", 4.0, "dark", {"guidance_scale": 4.0}),
    ],
)
def test_guidance_in_the_snippet_is_as_the_pipeline_takes_it(
    family: str, guidance: float, negative: str, expected: dict[str, Any]
) -> None:
    kind = FAMILIES[family].ours.kind
    model = {"negative_prompt": negative, "distilled_guidance": 2.5 if family == "flux" else None}
    arguments = guidance_arguments(kind.__name__, guidance, model)
    assert arguments == expected and arguments.keys() <= inspect.signature(kind.__call__).parameters.keys()


BEST = BestRound(9, "strict", Estimate(0.5, 0.4, 0.6, 24), "val", evaluations=4)


def test_the_best_weights_are_exported_even_of_a_run_that_went_on(
    run: Path, capsys: pytest.CaptureFixture[str], error: Callable[..., str]
) -> None:
    late, name = _checkpoint(run, 14), "pytorch_lora_weights.safetensors"
    os.utime(late / name, (3e9, 3e9))
    BEST.write(run / "lora")
    BEST.write(run / "after")
    output = _export(run, "lora")
    words = (
        "the weights after round 9, the best of 4 evaluations on held-out prompts (val): strict 0.500 (0.400 to 0.600)"
    )
    assert words in capsys.readouterr().out
    assert _tensors(output / name) == _tensors(run / "lora" / name) != _tensors(late / name)
    card = (output / "README.md").read_text()
    assert words[1:] in card and "| strict | 0.500" in card
    assert trained_weights(run, 9) == TrainedWeights(run / "lora", best=BEST)
    assert trained_weights(run, 14) == TrainedWeights(late, rounds=14)
    missing = error("export", "--run", str(run), "--output", str(run.parent / "none"), "--round", "3")
    assert "no weights after round 3, but after round 9, 14" in missing


def test_an_evaluation_of_other_weights_is_not_on_the_card(run: Path) -> None:
    BEST.write(run / "lora")
    replace(BEST, rounds=4).write(run / "after")  # the run was resumed, found better weights, and has not ended
    card = (_export(run, "lora") / "README.md").read_text()
    assert "not evaluated" in card and "| strict | 0.500" not in card


def test_the_best_whole_network_is_exported(run: Path, tiny: SD3, tiny_folder: Path) -> None:
    shutil.rmtree(run / "lora")
    changed = SD3.load(tiny_folder)
    changed.save_denoiser(run / "denoiser")
    BEST.write(run / "denoiser")
    assert trained_weights(run, None) == TrainedWeights(run / "denoiser", is_adapter=False, best=BEST)


NAME = "someone/my-lora"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with stand_in_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def test_an_export_is_pushed_to_a_new_repository(
    hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    hub.writers = {"hf_writes"}
    output = run.parent / "lora"
    arguments = ["export", "--run", str(run), "--output", str(output), "--push", NAME, "--private", "true"]
    assert main(arguments) == 0
    (created,) = hub.created
    assert created["visibility"] == "private" and f"/{NAME}" in capsys.readouterr().out
    files = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert hub.pushed[NAME] == files and "README.md" in files
    assert f'pipe.load_lora_weights("{NAME}")' in files["README.md"].decode()
    assert b"hf_writes" not in b"".join(files.values())


def test_a_push_that_cannot_succeed_is_refused_before_anything_is_written(
    hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    output = run.parent / "refused"

    def refusal(name: str) -> str:
        message = error("export", "--run", str(run), "--output", str(output), "--push", name)
        assert message.count("\n") == 1
        return message

    assert "'my-lora' is no name on the Hub: write owner/name" in refusal("my-lora")
    assert "needs a token that may write: run `hf auth login`, or set HF_TOKEN" in refusal(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    hub.repositories["someone/taken"] = {"main": run / "lora"}
    assert "someone/taken exists on the Hub: choose another name, or remove it there" in refusal("someone/taken")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    assert f"{NAME} cannot be pushed: the Hub cannot be reached from here" in refusal(NAME)
    assert not output.exists() and not hub.created
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_answers.cache_clear()
    message = refusal(NAME)
    assert f"the Hub refused the push to {NAME} (403): the token may not write there" in message
    assert f"The export is in {output}" in message
    shutil.rmtree(output)
    monkeypatch.setattr(hub, "answer_create", lambda seen: Answer(drop=True))
    assert f"the push to {NAME} failed (" in refusal(NAME)
