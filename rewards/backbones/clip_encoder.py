"""CLIP checkpoints of open_clip and transformers as frozen encoders of images and texts.

open_clip and transformers are imported when a checkpoint is opened, not before.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign import assets
from genalign.types import Precision
from rewards.backbones.encoders import DualEncoder, Features, read_config

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class ImagePreprocessor:
    """The preprocessing of an image network: resizing and normalization, differentiable.

    ``size`` is (height, width). ``fit`` handles other aspect ratios: "crop" fills the size and cuts the rest off, "pad"
    fits the whole image in with black around it, "squash" distorts.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["crop", "pad", "squash"] = "crop"
    interpolation: Interpolation = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (B, 3, H, W) in [0, 1] as float32 (B, 3, *size). Raises ValueError for another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) in [0, 1], not a tensor of shape {tuple(images.shape)}")
        (height, width), (target_height, target_width) = images.shape[-2:], self.size
        ratios = target_height / height, target_width / width
        match self.fit:
            case "squash":
                size = self.size
            case "crop":
                scale = max(ratios)
                size = max(target_height, int(height * scale)), max(target_width, int(width * scale))
            case "pad":
                scale = min(ratios)
                size = max(1, round(height * scale)), max(1, round(width * scale))
        images = resize(images.float(), size, self.interpolation)
        # Cut or pad with zeros, evenly on both sides.
        extra_height, extra_width = target_height - size[0], target_width - size[1]
        top, left = int(extra_height / 2), int(extra_width / 2)
        images = F.pad(images, (left, extra_width - left, top, extra_height - top))
        mean, std = (
            torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True) for values in (self.mean, self.std)
        )
        return (images - mean) / std


def resize(images: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize images (B, C, H, W) in [0, 1] to ``size`` (height, width), antialiased as in Pillow."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True).clamp(0, 1)


def read_preprocessor(model: str) -> ImagePreprocessor:
    """Read the preprocessing of a checkpoint whose image processor resizes to a fixed height and width."""
    from PIL.Image import Resampling
    from transformers import AutoImageProcessor

    images = AutoImageProcessor.from_pretrained(model)
    size = int(images.size["height"]), int(images.size["width"])
    interpolation: Interpolation = "bilinear" if int(images.resample) == Resampling.BILINEAR else "bicubic"
    return ImagePreprocessor(size, tuple(images.image_mean), tuple(images.image_std), "squash", interpolation)


class ClipEncoder(DualEncoder):
    """A frozen text and image encoder; ``forward`` is the image embedding."""

    def __init__(self, model: Any, prepare: ImagePreprocessor, dtype: Precision) -> None:
        logit_scale = float(model.logit_scale.detach().exp())
        super().__init__(model, dtype)
        self.prepare, self.logit_scale = prepare, logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Compute projected embeddings (B, d) of images (B, 3, H, W) in [0, 1], not normalized; differentiable."""
        return self.embed(self.prepare(images))

    def embed(self, pixels: Tensor) -> Tensor:
        """Compute the embeddings of ``forward`` from prepared ``pixels`` (B, 3, *size)."""
        return self._embed(pixels.to(self.dtype)).float()

    def features(self, images: Tensor) -> Features:
        """Compute embeddings, and patch tokens after the last norm by the same projection; differentiable."""
        embedding, patches = self._features(self.prepare(images).to(self.dtype))
        return Features(embedding.float(), patches.float())

    @abstractmethod
    def _embed(self, pixels: Tensor) -> Tensor:
        """Compute embeddings (B, d) of pixels of the weights' dtype."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute embeddings (B, d) and patches (B, n, d) of pixels of the weights' dtype."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks of the visual transformer, first to last."""


class OpenClipEncoder(ClipEncoder):
    """A model of open_clip with the tokenizer of ``name``: "local-dir:" and a folder, or an architecture."""

    def __init__(self, model: Any, name: str, dtype: Precision = "float32") -> None:
        import open_clip

        config = model.visual.preprocess_cfg
        size: int | Sequence[int] = config["size"]
        fits: dict[str, Literal["crop", "pad", "squash"]] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
        prepare = ImagePreprocessor(
            (size, size) if isinstance(size, int) else (size[0], size[1]),
            tuple(config["mean"]),
            tuple(config["std"]),
            fits[config["resize_mode"]],
            "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        )
        super().__init__(model, prepare, dtype)
        self.tokenizer = open_clip.get_tokenizer(name)
        self._is_transformer = isinstance(model.visual, open_clip.transformer.VisionTransformer)

    def _embed(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.model.encode_image(pixels)
        return embedding

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self._vision_transformer()
        output = tower.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        patches = output["image_intermediates"][0]
        return output["image_features"], patches if tower.proj is None else patches @ tower.proj

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self._vision_transformer().transformer.resblocks
        return blocks

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.model.visual,)

    def encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts).to(self.device, non_blocking=True)
        embedding: Tensor = self.model.encode_text(tokens)
        return embedding

    def _vision_transformer(self) -> Any:
        if not self._is_transformer:
            raise ValueError(
                f"the visual tower of this model is a {type(self.model.visual).__name__}: patch tokens and blocks need"
                " a vision transformer, such as open_clip's ViT-B-32"
            )
        return self.model.visual


class TransformersClipEncoder(ClipEncoder):
    """A transformers CLIP folder or Hub id; ``processor`` holds its tokenizer and image processor."""

    def __init__(self, model: str, processor: str, dtype: Precision = "float32") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        config = read_config(model, "CLIP")
        images = AutoImageProcessor.from_pretrained(processor)  # its resampling is bicubic for every CLIP
        size = images.crop_size if images.do_center_crop else images.size
        prepare = ImagePreprocessor(
            (int(size["height"]), int(size["width"])),
            tuple(images.image_mean),
            tuple(images.image_std),
            "crop" if images.do_center_crop else "squash",
        )
        super().__init__(CLIPModel.from_pretrained(model, dtype=torch.float32), prepare, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(processor)
        self.context = int(config.text_config.max_position_embeddings)

    def _embed(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return embedding

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision, project = self.model.vision_model, self.model.visual_projection
        output = vision(pixels)
        patches = vision.post_layernorm(output.last_hidden_state[:, 1:])
        return project(output.pooler_output), project(patches)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.model.vision_model.encoder.layers
        return blocks

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return self.model.vision_model, self.model.visual_projection


def load_clip(model: str, processor: str | None = None, dtype: Precision = "float32") -> ClipEncoder:
    """Load the CLIP encoder of an embedded name ("shapes-clip"), an open_clip folder, a transformers folder or Hub id.

    It is opened once per process and ``dtype``, and shared. ``processor`` is the folder or Hub id of the tokenizer and
    image processor of a transformers checkpoint that has none next to its weights, such as PickScore. Raises
    ValueError for a folder of another kind.
    """
    return _opened(assets.resolve(model), processor, dtype)


@functools.cache
def _opened(model: str, processor: str | None, dtype: Precision) -> ClipEncoder:
    path = Path(model)
    is_open_clip = (path / "open_clip_config.json").is_file()
    if is_open_clip and processor is not None:
        raise ValueError(f"{path} is an open_clip folder, which holds its own tokenizer: leave processor out")
    if not is_open_clip and path.exists() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither an open_clip_config.json nor a config.json: give the folder that open_clip's"
            " push_to_hf_hub or CLIPModel.save_pretrained wrote"
        )
    with torch.random.fork_rng(devices=[]):  # opening draws random numbers, and only the first call opens
        if is_open_clip:
            import open_clip

            name = f"local-dir:{path}"
            return OpenClipEncoder(open_clip.create_model(name), name, dtype)
        return TransformersClipEncoder(model, processor or model, dtype)
