"""Files of adapters: equal weights give equal bytes, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genalign.diffusion.lora import inject_lora, sort_metadata
from genalign.evaluation.folder import adapter_hash
from tests.packages import ROOT

SAVE_BOTH = """
import sys
from pathlib import Path
from genalign.diffusion.lora import save_peft
from genalign.diffusion.policy import Lora, Policy
from pipelines import SD3

model, folder = SD3.load(sys.argv[1]), Path(sys.argv[2])
policy = Policy(model.denoiser, Lora(2, 4))
model.save_lora(folder / "lora", policy.adapter_state(), policy.config)
save_peft(folder / "peft", policy.adapter_state(), policy.config)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_adapter_files(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["", str(tiny_folder), str(here)])
    exec(SAVE_BOTH, {})
    command = [sys.executable, "-c", SAVE_BOTH, str(tiny_folder), str(there)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed})
    ours, theirs = (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
        for folder in (here, there)
    )
    assert ours == theirs and len(ours) == 4
    assert adapter_hash(here / "lora") == adapter_hash(there / "lora")


@pytest.mark.parametrize("attempt", range(4))  # the order of unsorted metadata is drawn anew for every file
def test_sorted_metadata_leaves_the_tensors_as_they_are(tmp_path: Path, attempt: int) -> None:
    file, metadata = tmp_path / "weights.safetensors", {name: f"the value of {name}" for name in "cabé"}
    tensors = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(1, dtype=torch.bfloat16)}
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)
    places = [file.read_bytes().index(f'"{name}":'.encode()) for name in sorted(metadata)]
    assert places == sorted(places)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def _state(*layers: str) -> dict[str, Tensor]:
    return {f"{layer}.lora_{kind}.weight": torch.ones(4, 4) for layer in layers for kind in "AB"}


@pytest.mark.parametrize(("targets", "layers"), [(["0", "1"], ["0"]), (["0"], ["0", "1"])])
def test_weights_that_are_missing_or_left_over_are_refused(targets: list[str], layers: list[str]) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"the adapter does not fit this network, at 1\.lora_A"):
        inject_lora(network, LoraConfig(r=4, target_modules=targets), _state(*layers))


@pytest.mark.filterwarnings("ignore:.*is a no-op:UserWarning")
def test_weights_that_stay_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="2 weights of the adapter were not loaded, such as"):
        inject_lora(network, LoraConfig(r=4, target_modules=["0"]), _state("0"))
