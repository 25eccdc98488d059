"""Adapters in the formats of ComfyUI and kohya, opened by independent readers: outputs are those of the trained one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import pipelines
from genalign.cli.lora_formats import TrainedAdapter
from genalign.cli.main import main
from genalign.diffusion.lora import adapter_file
from genalign.diffusion.policy import Lora, Policy
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES

# the Euler scheduler makes an array of a tensor without NumPy 2's keyword
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning",
    "ignore:.*weight_norm.* is deprecated:FutureWarning",  # diffusers, in the autoencoder of audio
)
PROMPTS = ["a red circle", "two blue squares"]
FORMATS = [
    ("sd3", "comfy"),
    ("flux", "comfy"),
    ("qwen_image", "comfy"),
    ("z_image", "comfy"),
    ("flux2_klein", "comfy"),
    ("sd15", "comfy"),
    ("sd15", "kohya"),
    ("sdxl", "kohya"),
]


TINY = ("sd3", "flux", "qwen_image", "z_image", "flux2_klein", "sd15", "sdxl", "sana", "stable_audio")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: FAMILIES[name].save(folder / name) for name in TINY}


def _output(pipeline: DiffusersPipeline) -> Tensor:
    x, step = pipeline.initial_noise([1, 2]), pipeline.grid(3)[1]
    with torch.no_grad():
        return pipeline.predict(x, step, pipeline.encode(PROMPTS), 1.0)


def _run(base: Path, folder: Path, lora: Lora = Lora(rank=4, alpha=12)) -> Tensor:
    """Write the folder of a run with a trained adapter, and return what its network predicts."""
    pipeline = pipelines.load(base, height=64, width=64)
    _write_run(pipeline, base, folder, lora)
    return _output(pipeline)


def _write_run(pipeline: DiffusersPipeline, base: Path, folder: Path, lora: Lora) -> None:
    policy = Policy(pipeline.denoiser, lora)
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.5)
    pipeline.save_lora(folder / "lora", policy.adapter_state(), policy.config)  # it has one
    settings = {"model": {"path": str(base)}, "recipe": {"class_path": "genalign.flow_grpo", "init_args": {}}}
    settings |= {name: {} for name in ("prompts", "sampling", "training", "lora", "rewards")}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text("{}")


def _export(run: Path, format: str) -> Path:
    output = run.parent / "my-lora"
    assert main(["export", "--run", str(run), "--output", str(output), "--format", format]) == 0
    return output / "my-lora.safetensors"


def _merge_as_comfyui(network: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Add an adapter to the weights as ComfyUI does, and return the entries that it reads.

    It looks up each layer by its name after "transformer." and, for a UNet, by kohya's name; both have an optional
    alpha, without which the scale is 1.
    """
    read = set()
    for layer, module in network.named_modules():
        for name in (f"transformer.{layer}", f"lora_unet_{layer.replace('.', '_')}"):
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if (key := f"{name}.{up}.weight") in state:
                    b, a, alpha = state[key], state[f"{name}.{down}.weight"], state.get(f"{name}.alpha")
                    module.weight.data += (1.0 if alpha is None else alpha.item() / len(a)) * b @ a
                    read |= {key, f"{name}.{down}.weight", f"{name}.alpha"}
    return read


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_an_adapter_is_as_strong_with_every_reader_as_it_was_trained(
    family: str, format: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    expected = _run(checkpoints[family], tmp_path / "run")
    file = _export(tmp_path / "run", format)
    plain, own, merged = (pipelines.load(checkpoints[family], height=64, width=64) for _ in range(3))
    scale = float((expected - _output(plain)).abs().max())
    assert scale > 0.01  # the adapter does something

    own.load_lora(file.parent)
    torch.testing.assert_close(_output(own), expected, rtol=0, atol=1e-4 * scale)
    state = load_file(file)
    assert _merge_as_comfyui(merged.denoiser, state) >= set(state)
    torch.testing.assert_close(_output(merged), expected, rtol=0, atol=1e-4 * scale)
    plain.pipe.load_lora_weights(file.parent, weight_name=file.name)  # diffusers' own
    torch.testing.assert_close(_output(plain), expected, rtol=0, atol=1e-4 * scale)


def test_the_header_says_what_the_file_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    _run(checkpoints["sdxl"], tmp_path / "run")
    file = _export(tmp_path / "run", "kohya")
    with safe_open(file, "pt") as content:
        header = content.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.title"] == "my-lora" and header["modelspec.sai_model_spec"] == "1.0.1"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "12")
    assert (header["ss_sd_model_name"], header["ss_base_model_version"]) == ("sdxl", "sdxl_base_v1-0")
    assert str(checkpoints["sdxl"].parent) not in str(header)  # a path of this machine
    again = file.read_bytes()
    file.unlink()
    (file.parent / "README.md").unlink()
    file.parent.rmdir()
    assert _export(tmp_path / "run", "kohya").read_bytes() == again


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("sd3", "stable-diffusion-3"),
        ("flux2_klein", "Flux.2-klein-4b"),
        ("sana", "sana"),
        ("stable_audio", "stable_audio"),
    ],
)
def test_the_header_of_an_adapter_for_diffusers_or_peft_says_it_too(
    family: str, architecture: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    size = {"seconds": 1.0} if family == "stable_audio" else {"height": 64, "width": 64}
    pipeline = pipelines.load(checkpoints[family], **size)
    run = tmp_path / "run"
    _write_run(pipeline, checkpoints[family], run, Lora(rank=4, alpha=12))
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "my-lora"), "--format", "lora"]) == 0
    file = adapter_file(tmp_path / "my-lora")
    with safe_open(file, "pt") as content:
        header = content.metadata()
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert (header["modelspec.title"], header["ss_sd_model_name"]) == ("my-lora", family)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "12")
    before = load_file(adapter_file(run / "lora"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(file).items())
    pipelines.load(checkpoints[family], **size).load_lora(tmp_path / "my-lora")


def test_a_form_without_names_for_the_family_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, error: Callable[..., str]
) -> None:
    refused = [
        ("sana", "comfy", "--format comfy has no names for the layers of a SanaPipeline, only for those of Stable"),
        (
            "sd3",
            "kohya",
            "--format kohya has no names for the layers of a StableDiffusion3Pipeline, only for those of St",
        ),
    ]
    for family, format, message in refused:
        _run(checkpoints[family], tmp_path / family)
        output = tmp_path / "out"
        assert message in error("export", "--run", str(tmp_path / family), "--output", str(output), "--format", format)
        assert not output.exists()


def test_settings_of_peft_become_a_scale(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    from genalign.diffusion.lora import inject_lora

    def adapter(name: str, **options: Any) -> TrainedAdapter:
        pipeline = pipelines.load(checkpoints["sd3"])
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False, **options)
        inject_lora(pipeline.denoiser, config)
        policy = Policy(pipeline.denoiser, None, has_adapter=True)
        pipeline.save_lora(tmp_path / name, policy.adapter_state(), config)
        return TrainedAdapter.read(tmp_path / name)

    assert set(adapter("rslora", use_rslora=True).alphas.values()) == {16.0}  # 8 / sqrt(4) = 16 / 4
    mixed = adapter("mixed", rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 6})
    scales = {layer.rpartition(".")[2]: (mixed.rank(layer), alpha) for layer, alpha in mixed.alphas.items()}
    assert scales == {"to_q": (4, 8.0), "to_k": (2, 6.0)}
    with pytest.raises(ValueError, match="which other programs have no name for: export it with --format lora or pipe"):
        adapter("dora", use_dora=True)
