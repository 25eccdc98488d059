"""Checkpoints of the Hub by revision, variant and token, read from a local stand-in of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pipelines
from genalign.cli.model_settings import Model
from genalign.diffusion.policy import Lora, Policy
from genalign.runtime.hub import HubAccess
from pipelines.checkpoint_files import model_index, require_weights
from pipelines.meta_device import outline
from tests.hub_stand_in import StandInHub, stand_in_hub
from tests.pipelines.tiny_checkpoints import FolderOf

NAME = "someone/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with stand_in_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture
def sd15(folder_of: FolderOf) -> Path:
    return folder_of("sd15")


def test_a_checkpoint_is_opened_by_its_revision_and_token(
    hub: StandInHub, sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = {"v1": sd15}  # there is no main
    hub.tokens[NAME] = "hf_mine"
    monkeypatch.setenv("MY_TOKEN", "hf_mine")
    model = pipelines.load(NAME, revision="v1", token="MY_TOKEN")
    assert model.fingerprint == pipelines.load(sd15).fingerprint
    assert outline(NAME, revision="v1", token="MY_TOKEN").pipeline.latent_shape == model.latent_shape
    asked = {seen.headers.get("authorization") for seen in hub.seen if NAME in seen.path}
    assert asked == {"Bearer hf_mine"}


def test_a_repository_that_gives_nothing_is_refused_in_one_line(
    hub: StandInHub, sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories = {NAME: {"main": sd15}, "someone/gated": {"main": sd15}, "someone/private": {"main": sd15}}
    hub.gated, hub.tokens = {"someone/gated"}, {"someone/private": "hf_mine"}
    refused = [
        (NAME, {"revision": "v9"}, "someone/tiny has no revision 'v9': give a branch, tag or commit"),
        ("someone/none", {}, "the Hub has no such model, or a private one: check the name, or run `hf auth login`"),
        ("someone/private", {}, "the Hub has no such model, or a private one"),
        ("someone/gated", {}, "is gated: accept its licence at .*, or name the variable of your token in model.token"),
        (NAME, {"token": "NOT_SET"}, "model.token names the environment variable NOT_SET, which is not set"),
        (str(sd15), {"revision": "v9"}, "is a folder, which has no revision 'v9': leave model.revision out"),
    ]
    for name, options, message in refused:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            pipelines.load(name, **options)
        assert "\n" not in str(caught.value)
    for token in ("hf_abcdef", "my token"):
        with pytest.raises(ValueError, match=r"model\.token must be the name of an environment variable"):
            Model(NAME, token=token)


def test_a_revision_that_is_cached_is_opened_offline(
    hub: StandInHub, sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from genalign.runtime.hub import hub_answers

    hub.repositories[NAME] = {"v1": sd15}
    assert model_index(NAME, HubAccess("v1"))["_class_name"] == "StableDiffusionPipeline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    count = len(hub.seen)
    assert model_index(NAME, HubAccess("v1"))["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(
        FileNotFoundError, match=r"not in the local cache at revision 'v2', and the Hub did not give it"
    ):
        model_index(NAME, HubAccess("v2"))
    assert len(hub.seen) == count


def _pickled(folder: Path, copy: Path) -> Path:
    """Copy a checkpoint with its weights as .bin files alone."""
    shutil.copytree(folder, copy)
    from safetensors.torch import load_file

    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
    for component, name in names.items():
        (file,) = (copy / component).glob("*.safetensors")
        torch.save(load_file(file), copy / component / f"{name}.bin")
        file.unlink()
    return copy


def test_pickled_weights_are_read_only_when_they_are_asked_for(hub: StandInHub, sd15: Path, tmp_path: Path) -> None:
    folder = _pickled(sd15, tmp_path / "pickled")
    hub.repositories[NAME] = {"main": folder}
    for source in (str(folder), NAME):
        with pytest.raises(
            ValueError, match=r"has only pickled weights \(\.bin\).*ask for these by model\.weights bin"
        ):
            pipelines.load(source)
        assert pipelines.load(source, weights="bin").fingerprint == pipelines.load(sd15).fingerprint
    with pytest.raises(FileNotFoundError, match=r"has no weights in text_encoder/, unet/, vae/: copy the \.bin files"):
        require_weights(sd15, "bin")


def test_code_in_pickled_weights_is_not_run(sd15: Path, tmp_path: Path) -> None:
    folder = _pickled(sd15, tmp_path / "pickled")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "was-run",))

    for component in ("unet", "text_encoder"):
        (file,) = (folder / component).glob("*.bin")
        content = file.read_bytes()
        torch.save({"weight": Evil()}, file)
        with pytest.raises((ValueError, OSError), match=r"more than tensors|Unable to load weights") as caught:
            pipelines.load(folder, weights="bin")
        assert not (tmp_path / "was-run").exists()
        assert "\n" not in str(caught.value)
        file.write_bytes(content)


def test_a_variant_is_read_by_its_name(hub: StandInHub, sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(sd15, folder)
    changed = pipelines.load(sd15)
    with torch.no_grad():
        for parameter in changed.denoiser.parameters():
            parameter.mul_(1.5)
    changed.denoiser.save_pretrained(folder / "unet", variant="ema")
    hub.repositories[NAME] = {"main": folder}
    plain = pipelines.load(sd15).fingerprint
    for source in (str(folder), NAME):
        assert pipelines.load(source).fingerprint == plain
        assert pipelines.load(source, variant="ema").fingerprint != plain
        with pytest.raises((ValueError, OSError), match="variant") as caught:
            pipelines.load(source, variant="fp8")
        assert "\n" not in str(caught.value)


def test_an_adapter_of_the_hub_is_opened_by_the_token_of_its_model(
    hub: StandInHub, sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = pipelines.load(sd15)
    policy = Policy(trained.denoiser, Lora(rank=2))
    assert policy.config is not None
    trained.save_lora(tmp_path / "lora", policy.adapter_state(), policy.config)
    hub.repositories = {"someone/lora": {"main": tmp_path / "lora"}}
    hub.tokens["someone/lora"] = "hf_mine"
    with pytest.raises(FileNotFoundError, match="no such model, or a private one"):
        pipelines.load(sd15).load_lora("someone/lora")
    monkeypatch.setenv("MY_TOKEN", "hf_mine")
    model = pipelines.load(sd15, token="MY_TOKEN")
    model.load_lora("someone/lora")
    adapted = Policy(model.denoiser, None, has_adapter=True).adapter_state()
    assert adapted.keys() == policy.adapter_state().keys()
