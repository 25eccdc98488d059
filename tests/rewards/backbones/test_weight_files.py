from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewards.backbones.weight_files import AffineHead, locate, read_tensors


class Planted:
    """What an attacker could put into a pickle."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


def mlp(width: int) -> nn.Sequential:
    """The published heads' layers: linear ones at 0, 2, 4, 6 and 7."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, 9), nn.Dropout(), nn.Linear(9, 8), nn.Dropout(), nn.Linear(8, 7), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(7, 5), nn.Linear(5, 1)).eval()


def test_tensors_are_read_from_either_format(tmp_path: Path) -> None:
    tensors = {"weight": torch.rand(1, 3), "bias": torch.rand(1)}
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "checkpoint.pt")
    torch.save(tensors, tmp_path / "bare.pth")
    save_file(tensors, tmp_path / "head.safetensors")
    for name in ("checkpoint.pt", "bare.pth", "head.safetensors"):
        read = read_tensors(tmp_path / name)
        assert set(read) == set(tensors) and all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Planted()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"not a file of tensors alone.* convert it to safetensors"):
        read_tensors(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""
    torch.save([torch.rand(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_tensors(tmp_path / "list.pt")


def test_local_files_and_hub_addresses_are_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: requests.append(names) or str(tmp_path / "x"))
    assert locate("hf://owner/repository/folder/file.pt") == tmp_path / "x"
    assert requests == [("owner/repository", "folder/file.pt")]
    with pytest.raises(ValueError, match="names no file: give hf://owner/repository/file"):
        locate("hf://owner/repository")
    with pytest.raises(FileNotFoundError, match="is not a file: give a path, or hf://"):
        locate(tmp_path / "absent.pt")


def test_an_mlp_without_activations_is_one_affine_map() -> None:
    network = mlp(6)
    head = AffineHead.of({f"mlp.layers.{name}": value for name, value in network.state_dict().items()}, "mlp.")
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(head(features), network(features)[:, 0], rtol=0, atol=1e-6)
    assert float(head(torch.eye(6)[:1])) == pytest.approx(head.bias + float(head.weight[0]))
    assert float(head(torch.zeros(1, 6))) == pytest.approx(head.bias)


def test_a_linear_head_is_read_as_it_is() -> None:
    head = AffineHead.of({"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([0.5])})
    assert head(torch.tensor([[1.0, 0.0], [0.6, 0.8]])).tolist() == pytest.approx([3.5, 5.5])


def test_heads_of_another_kind_are_refused() -> None:
    relu = {f"layers.{i}.{kind}": torch.rand(1, 1) for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="nothing but dropout between them; the file has layers 0, 10, 3, 6, 8"):
        AffineHead.of(relu)
    with pytest.raises(ValueError, match="the file has layers of other names"):
        AffineHead.of({"fc.weight": torch.rand(1, 2)})
    with pytest.raises(ValueError, match="has one output, not 2"):
        AffineHead.of({"weight": torch.rand(2, 3), "bias": torch.rand(2)})
    with pytest.raises(ValueError, match=r"for features \(B, 3\), not \(2, 4\)"):
        AffineHead.of({"weight": torch.rand(1, 3), "bias": torch.rand(1)})(torch.rand(2, 4))
