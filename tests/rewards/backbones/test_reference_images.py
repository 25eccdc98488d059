from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from genalign.types import Prompt
from rewards.backbones.reference_audio import AudioFolder
from rewards.backbones.reference_images import ImageFolder, ImageTensor, ReferencePool, ReferencesByPrompt
from tests.rewards.gray_images import grays

RED, BLUE = Prompt("a red circle"), Prompt("a blue ring")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(folder: Path, names: dict[str, int], size: tuple[int, int] = (6, 4)) -> None:
    for name, level in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (level,) * 3).save(folder / name)


def by_prompt(levels: dict[str, tuple[float, ...]]) -> ReferencesByPrompt:
    """Build one reference of each gray level for each text."""
    images = ImageTensor(grays(*[level for texts in levels.values() for level in texts]))
    return ReferencesByPrompt(images, [text for text, texts in levels.items() for _ in texts])


def test_references_by_prompt_draw_only_those_of_the_prompt() -> None:
    references = by_prompt({RED.text: (0.1, 0.2), BLUE.text: (0.9,)})
    drawn = references.images.load(references.choose([RED, BLUE] * 50, seeded()))[:, 0, 0, 0]
    assert {round(v, 3) for v in drawn[::2].tolist()} == {0.1, 0.2}
    assert {round(v, 3) for v in drawn[1::2].tolist()} == {0.9}
    assert references.images.load(references.rows(RED)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"no reference for the prompt 'a blue ring'.* or use ReferencePool"):
        by_prompt({RED.text: (0.5,)}).choose([RED, BLUE], seeded())


def test_a_pool_draws_any_reference_for_any_prompt() -> None:
    pool = ReferencePool(ImageTensor(grays(0.1, 0.2, 0.3)))
    drawn = pool.images.load(pool.choose([RED] * 60, seeded()))
    assert drawn.shape == (60, 3, 4, 4)
    assert len(drawn[:, 0, 0, 0].unique()) == 3
    assert list(pool.rows(BLUE)) == [0, 1, 2]


@pytest.mark.parametrize(
    "references", [ReferencePool(ImageTensor(grays(0.1, 0.2, 0.3))), by_prompt({RED.text: (0.1, 0.2, 0.3)})]
)
def test_draws_follow_the_generator(references: ReferencePool | ReferencesByPrompt) -> None:
    first, again, other = (references.images.load(references.choose([RED] * 30, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_with_substructure_and_prompts(tmp_path: Path) -> None:
    write(tmp_path, {"red/1.png": 51, "red/2.JPG": 102, "blue/1.jpeg": 204})
    rows = [("red/1.png", RED), ("red/2.JPG", RED), ("blue/1.jpeg", BLUE)]
    lines = [json.dumps({"file_name": name, "prompt": prompt.text}) for name, prompt in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / ".hidden").write_text("x")
    references = ReferencesByPrompt.read(tmp_path)
    assert references.images.load(references.rows(BLUE)).shape == (1, 3, 4, 6)
    torch.testing.assert_close(
        references.images.load(references.choose([BLUE], seeded())).mean(), torch.tensor(0.8), atol=0.01, rtol=0
    )
    torch.testing.assert_close(references.images.load(references.rows(RED))[:, 0, 0, 0], torch.tensor([0.2, 0.4]))
    assert ImageFolder(tmp_path).names == ("blue/1.jpeg", "red/1.png", "red/2.JPG")


def test_images_and_prompts_must_match(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": 51, "b.png": 204})
    row = {name: json.dumps({"file_name": f"{name}.png", "prompt": RED.text}) for name in "abc"}
    (tmp_path / "prompts.jsonl").write_text(row["a"])
    with pytest.raises(ValueError, match=r"1 images .* have no prompt, such as b\.png.*ReferencePool"):
        ReferencesByPrompt.read(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n".join(row.values()))
    with pytest.raises(ValueError, match=r"1 files that have a prompt are not in .*, such as c\.png"):
        ReferencesByPrompt.read(tmp_path)


def test_missing_or_broken_prompts_are_explained(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": 51})
    with pytest.raises(FileNotFoundError, match=r"prompts\.jsonl is missing: .* or use ReferencePool"):
        ReferencesByPrompt.read(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(ValueError, match=r'line 1: expected an object with "file_name" and "prompt"'):
        ReferencesByPrompt.read(tmp_path)


def test_different_sizes_need_a_size(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": 51})
    write(tmp_path, {"b.png": 51}, size=(8, 8))
    with pytest.raises(ValueError, match=r"different sizes \(b\.png is not 6 x 4\): give size="):
        ImageFolder(tmp_path).load([0, 1])
    assert ImageFolder(tmp_path, size=(5, 7)).load([0, 1]).shape == (2, 3, 5, 7)


@pytest.mark.parametrize(
    ("read", "kind", "formats"),
    [(ImageFolder, "images", "PNG, JPEG or WebP"), (lambda folder: AudioFolder(folder, 8000), "audio", "WAV or FLAC")],
    ids=["images", "audio"],
)
def test_folders_with_other_files_are_refused(read: Callable, kind: str, formats: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"is not a folder: give the folder of the reference {kind}"):
        read(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"has no {kind}: put {formats} references there"):
        read(tmp_path)
    for name in ("a.mp3", "b.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"expected {kind} \({formats}\) in .*, found a\.mp3 and 1 more files of"):
        read(tmp_path)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"fake\.png cannot be read as an image"):
        ImageFolder(tmp_path).load([0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"must be floats \(N, 3, H, W\) in \[0, 1\], not torch\.uint8"),
        (torch.zeros(2, 1, 400), r"of shape \(2, 1, 400\)"),
        (torch.zeros(0, 3, 4, 4), "no reference images"),
    ],
)
def test_tensors_are_checked(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTensor(images)


def test_every_reference_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="2 reference images have 1 prompts"):
        ReferencesByPrompt(ImageTensor(grays(0.1, 0.2)), ["one"])
