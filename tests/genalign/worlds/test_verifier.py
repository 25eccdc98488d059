"""The verifier of the shapes world against the renderer's truth, corrupted truth, and near misses."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from genalign.types import Metadata
from genalign.worlds.shapes import detection, matching
from genalign.worlds.shapes.geometry import BACKGROUND, PALETTE, REJECTS, SHAPES, SIZE, STRANGERS, Array
from genalign.worlds.shapes.prompts import color_attr, colors, counting, position, prompts, single_object, two_object
from genalign.worlds.shapes.scenes import Item, Scene, jittered, relations, render, sample_scene
from genalign.worlds.shapes.verifier import Detection, Verdict, detect, judge, verify

Corruption = Callable[[Tensor, np.random.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    scene: Scene
    metadata: Metadata


# ---------------------------------------------------------------------------------------------------- corruptions


def untouched(images: Tensor, rng: np.random.Generator) -> Tensor:
    return images


def blurred(images: Tensor, rng: np.random.Generator, sigma: float = 1.0) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def noisy(images: Tensor, rng: np.random.Generator, std: float = 0.1) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    return (images + std * noise).clamp(0, 1)


def jpeg(images: Tensor, rng: np.random.Generator, quality: int = 75) -> Tensor:
    """Compressed with 4:2:0 chroma and read back."""
    out = []
    for image in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
        with Image.open(buffer) as compressed:
            out.append(np.asarray(compressed))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2) / 255


def warped(images: Tensor, rng: np.random.Generator, pixels: float = 0.5) -> Tensor:
    """Moved by a smooth random field with a standard deviation of ``pixels``."""
    out = images.numpy().copy()
    grid = np.mgrid[:SIZE, :SIZE]
    for image in out:
        field = ndimage.gaussian_filter(rng.standard_normal((2, SIZE, SIZE)), (0, 4, 4), mode="wrap")
        where = grid + pixels * field / field.std()
        for channel in image:
            channel[:] = ndimage.map_coordinates(channel.copy(), where, order=1, mode="nearest")
    return torch.from_numpy(out)


def generated(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Like a small generator's picture: bent, soft, of another brightness, mottled, grainy, and compressed."""
    soft = blurred(warped(images, rng), rng, 0.7)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (len(images), 1, 1, 1))).float()
    mottle = ndimage.gaussian_filter(rng.normal(0, 0.06, images.shape), (0, 0, 1, 1))
    return jpeg(noisy(soft * gain + torch.from_numpy(mottle).float(), rng, 0.02), rng, 85)


# ---------------------------------------------------------------------------------------------------------- scenes


def true_cases(per_task: int, seed: int) -> list[Case]:
    """Scenes for seen and held-out prompts of each task, in equal numbers per task."""
    rng = np.random.default_rng(seed)
    cases = []
    seen, held_out = prompts("iid").by_task(), prompts("comp").by_task()
    for task, group in seen.items():
        pool = [prompt.metadata for prompt in (*group, *held_out.get(task, ()))]
        for index in rng.integers(len(pool), size=per_task):
            cases.append(Case(sample_scene(pool[index], rng, hold_out=False), pool[index]))
    return cases


def with_another(scene: Scene, shape: str, rng: np.random.Generator) -> Scene | None:
    """``scene`` and one more small ``shape`` at some distance, or None where 200 draws found no room."""
    color = list(PALETTE)[rng.integers(len(PALETTE))]
    for _ in range(200):
        x, y = rng.uniform(10.6, SIZE - 10.6, 2)
        item = Item(shape, color, float(x), float(y), 8.0, jittered(color, rng))
        if all(np.hypot(item.x - other.x, item.y - other.y) > 1.2 * (8 + other.r) * 1.25 for other in scene.items):
            return replace(scene, items=(*scene.items, item))
    return None


def another(choices: Iterator[str] | list[str], avoid: set[str], rng: np.random.Generator) -> str:
    left = [choice for choice in choices if choice not in avoid]
    return left[rng.integers(len(left))]


def near_misses(case: Case, rng: np.random.Generator) -> Iterator[tuple[str, Scene]]:
    """Every single edit of a true scene that makes it false, by the edit's name."""
    scene, items = case.scene, case.scene.items
    asked = {clause["class"] for clause in case.metadata["include"]}
    k = int(rng.integers(len(items)))
    one, rest = items[k], items[:k] + items[k + 1 :]
    yield "shape", replace(scene, items=(*rest, replace(one, shape=another(list(SHAPES), {one.shape}, rng))))
    yield "drop", replace(scene, items=rest)
    for name, shape in (("add", one.shape), ("distractor", another(list(SHAPES), asked, rng))):
        crowded = with_another(scene, shape, rng)
        if crowded is not None:
            yield name, crowded
    if case.metadata["tag"] in ("colors", "color_attr"):
        color = another(list(PALETTE), {one.color}, rng)
        yield "color", replace(scene, items=(*rest, replace(one, color=color, rgb=jittered(color, rng))))
    if case.metadata["tag"] == "color_attr":
        a, b = items
        yield "swap", replace(scene, items=(replace(a, color=b.color, rgb=b.rgb), replace(b, color=a.color, rgb=a.rgb)))
    if case.metadata["tag"] == "position":
        horizontal = case.metadata["include"][1]["position"][0] in ("left of", "right of")
        mirrored = [replace(i, x=SIZE - i.x) if horizontal else replace(i, y=SIZE - i.y) for i in items]
        yield "mirror", replace(scene, items=tuple(mirrored))


def alone(shape: str, count: int, seed: int) -> list[Scene]:
    """Scenes of a single object, colours in turn."""
    rng = np.random.default_rng(seed)
    scenes = []
    for index in range(count):
        color = list(PALETTE)[index % len(PALETTE)]
        r = rng.uniform(8, 12)
        x, y = rng.uniform(1.2 * r + 1, SIZE - 1.2 * r - 1, 2)
        scenes.append(Scene((Item(shape, color, float(x), float(y), float(r), jittered(color, rng)),)))
    return scenes


def verdicts(cases: list[Case], corruption: Corruption, seed: int = 0) -> list[Verdict]:
    images = corruption(render([case.scene for case in cases]), np.random.default_rng(seed))
    return verify(images, [case.metadata for case in cases])


def strict_rate(cases: list[Case], corruption: Corruption) -> float:
    return float(np.mean([verdict.strict for verdict in verdicts(cases, corruption)]))


def wilson_upper(successes: int, total: int, z: float = 1.96) -> float:
    share = successes / total
    spread = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return float((share + z**2 / (2 * total) + spread) / (1 + z**2 / total))
