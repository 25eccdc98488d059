"""The setting ``model`` of every command: which checkpoint is loaded, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from genalign.runtime.memory_options import Memory
from genalign.types import Precision


@dataclass(frozen=True)
class Model:
    """The generator: which checkpoint is loaded, and how.

    Args:
        path: A diffusers folder, a Hub id (owner/name), or an embedded model (shapes-sd3, tones-audio).
        family: Import path of the class that loads the checkpoint, for your own family; null detects it.
        dtype: Precision of the weights.
        autocast: Precision of autocast (mixed precision); null runs in ``dtype``.
        device: A torch device: cpu, cuda, cuda:1 or mps.
        height: Height of the images in pixels; null takes the checkpoint's own.
        width: Width of the images in pixels; null takes the checkpoint's own.
        seconds: Length of the audio clips; null takes the checkpoint's own.
        negative_prompt: Text that guidance leads away from, in training, search and evaluation. The empty text is the
            default of the model's family; any other needs a guidance above 1.
        max_sequence_length: Maximum number of text tokens, for families that let it be set.
        distilled_guidance: Guidance scale that a guidance-distilled model (FLUX.1-dev) receives as an input.
        compile: Compile the denoiser's blocks with torch.compile. This takes minutes at the start, and again for a
            larger batch or another guidance; too many recompilations end the run. Sampling and training use the same
            graphs.
        memory: Memory-saving options.
        revision: Branch, tag or commit of a Hub id; null takes the default branch.
        variant: Variant of the weights, such as fp16; null takes the plain ones, or the only variant in a folder.
        token: Name of the environment variable that holds the Hub's token; null takes HF_TOKEN, or the token of
            `hf auth login`.
        weights: "safetensors" reads only safetensors; "bin" reads pickled weights.
        text_cache: Folder of text embeddings. All texts of the command are encoded into it at the start, and the text
            encoders are dropped; they are not even loaded if it has all texts already. Null keeps the encoders.
        users: File of the users that condition the denoiser.
    """

    path: str
    family: str | None = None
    dtype: Precision = "float32"
    autocast: Precision | None = None
    device: str = "cpu"
    height: int | None = None
    width: int | None = None
    seconds: float | None = None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    distilled_guidance: float | None = None
    compile: bool = False
    memory: Memory = field(default_factory=Memory)
    revision: str | None = None
    variant: str | None = None
    token: str | None = None
    weights: Literal["safetensors", "bin"] = "safetensors"
    text_cache: str | None = None
    users: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and (self.token.startswith("hf_") or not self.token.isidentifier()):
            raise ValueError(
                "model.token must be the name of an environment variable, as the token itself would be written into"
                " config.json: set the variable, and give its name"
            )


def model_of(plain: Mapping[str, Any]) -> Model:
    """Read the model from the config.json of a run."""
    return Model(**{**plain["model"], "memory": Memory(**plain["model"].get("memory", {}))})


def require_device(name: str) -> None:
    """Raise ValueError if torch does not know the device ``name``, or this machine has no such CUDA device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device {name!r} is not a device: use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here: use"
            " --model.device cpu, or install the torch build for your GPU"
        )
