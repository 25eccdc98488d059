"""Checkpoint folders as downloads leave them: opened, or refused in one line before and by loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from pipelines.checkpoint_files import require_weights
from pipelines.meta_device import outline

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pipelines.tiny_checkpoints import FAMILIES

    return FAMILIES["sd15"].save(tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _rename_to_fp16(copy: Path) -> None:
    for file in copy.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def test_weights_of_a_variant_alone_are_opened(copy: Path) -> None:
    whole = pipelines.load(copy, height=64, width=64)
    _rename_to_fp16(copy)
    require_weights(copy)
    variant = pipelines.load(copy, height=64, width=64)
    assert whole.fingerprint == variant.fingerprint
    first, second = (pipe.encode(["a circle"]).tensors["context"] for pipe in (whole, variant))
    assert torch.equal(first, second)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_parts_are_opened_if_all_are_there(variant: str | None, copy: Path) -> None:
    whole = pipelines.load(copy, height=64, width=64)
    for folder in (copy / "unet", copy / "vae", copy / "text_encoder"):
        for file in folder.glob("*.safetensors"):
            file.unlink()
    for name in ("unet", "vae", "text_encoder"):
        whole.pipe.components[name].save_pretrained(copy / name, max_shard_size="50KB", variant=variant)
    parts = sorted((copy / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1 and pipelines.load(copy, height=64, width=64).fingerprint == whole.fingerprint
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {parts[1].name}: copy all parts"):
        require_weights(copy)


def test_hidden_files_do_not_matter(copy: Path) -> None:
    (copy / "unet" / "._diffusion_pytorch_model.safetensors").write_bytes(b"AppleDouble")
    require_weights(copy)
    assert pipelines.load(copy, height=64, width=64).device.type == "cpu"


def test_a_configuration_that_diffusers_cannot_read_is_named(copy: Path) -> None:
    index = copy / "model_index.json"
    index.write_text(index.read_text(), encoding="utf-8-sig")
    with pytest.raises(OSError, match=r"model_index\.json"):
        pipelines.load(copy, height=64, width=64)


def _pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _index(copy: Path) -> None:
    parts = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (copy / f"{UNET}.index.json").write_text(json.dumps(parts))


def _without_a_weight(copy: Path) -> None:
    tensors = load_file(copy / UNET)
    del tensors["conv_out.weight"]
    save_file(tensors, copy / UNET, metadata={"format": "pt"})


def _parts_without_an_index(copy: Path) -> None:
    (copy / UNET).rename(copy / UNET.replace(".safetensors", "-00001-of-00001.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message", "by_header"),
    [
        (lambda copy: _pointer(copy / UNET), "is a pointer of Git LFS, not the file: run git lfs pull", True),
        (lambda copy: _pointer(copy / "text_encoder" / "model.safetensors"), "is a pointer of Git LFS", True),
        (lambda copy: _half(copy / UNET), "is damaged or incomplete: copy or download it again", True),
        (lambda copy: (copy / UNET).write_bytes(b""), "is damaged or incomplete", True),
        (lambda copy: (copy / UNET).unlink(), "has no weights in unet/: copy", True),
        (_index, "lacks diffusion_pytorch_model-00002-of-00002.safetensors: copy all parts", True),
        (_parts_without_an_index, "without the .safetensors.index.json of all parts: copy it", True),
        (_without_a_weight, "has no weights for conv_out.weight: copy the whole folder", False),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    damage: Callable[[Path], object], message: str, by_header: bool, copy: Path
) -> None:
    damage(copy)
    for check in (require_weights, lambda path: pipelines.load(path, height=64, width=64)):
        if check is require_weights and not by_header:
            check(copy)
            continue
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            check(copy)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("content", [b'{"a"', b"\xff\xfe{\x00", b"\xef\xbb\xbf{}"], ids=["half", "UTF-16", "BOM"])
def test_a_damaged_json_file_of_a_component_is_named(file: str, content: bytes, copy: Path) -> None:
    (copy / file).write_bytes(content)
    for opened in (pipelines.load, outline):
        with pytest.raises(ValueError, match=rf"{file}: not JSON"):
            opened(copy)


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_a_configuration_without_settings_is_named(file: str, content: str, copy: Path) -> None:
    (copy / file).write_text(content)
    for opened in (pipelines.load, outline):
        with pytest.raises(ValueError, match=rf"{file} holds no settings: copy it again$"):
            opened(copy)


def test_a_tokenizer_needs_its_vocabulary(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    for opened in (pipelines.load, outline):
        with pytest.raises(FileNotFoundError, match=r"/tokenizer has no vocabulary: copy tokenizer\.json"):
            opened(copy)


@pytest.mark.parametrize(
    ("file", "settings", "by_header"),
    [
        ("model_index.json", {"unet": ["diffusers", "Nope"]}, True),  # AttributeError
        ("model_index.json", {"unet": ["diffusers"]}, True),  # TypeError
        ("text_encoder/config.json", {"hidden_size": "x"}, True),  # an error of huggingface_hub
        ("text_encoder/config.json", {"hidden_size": 16}, False),  # RuntimeError
        ("scheduler/scheduler_config.json", {"beta_schedule": "nope"}, True),  # NotImplementedError
        ("tokenizer/tokenizer.json", {"added_tokens": None}, False),  # TypeError
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    file: str, settings: dict[str, object], by_header: bool, copy: Path
) -> None:
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    for opened in (pipelines.load, outline) if by_header else (pipelines.load,):
        with pytest.raises(ValueError, match=r"copy cannot be opened \(\w+: |`diffusers` has no class `Nope`|unpack"):
            opened(copy)


def test_an_index_that_is_no_object_is_named(copy: Path) -> None:
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json is no object of components"):
        pipelines.load(copy)
