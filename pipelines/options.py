"""The options of opening a checkpoint, which all families share."""

from __future__ import annotations

from typing import TypedDict

import torch

from genalign.runtime.hub import HubAccess
from genalign.runtime.memory_options import Memory
from pipelines.checkpoint_files import WeightFormat


class Options(TypedDict, total=False):
    """Options of opening a checkpoint, all of them optional.

    ``height`` and ``width`` of images are in pixels, and ``seconds`` is the duration of audio; by default they are the
    checkpoint's own. ``negative_prompt`` is the text that guidance leads away from; "" is the family's default.
    ``max_sequence_length`` is the maximum number of text tokens, for families that let it be set. ``autocast`` runs the
    denoiser and the VAE under mixed precision of that dtype. ``distilled_guidance`` is the guidance scale that a
    guidance-distilled network takes as an input. With ``compile``, ``compile_blocks`` compiles the denoiser's blocks
    by ``torch.compile``. For ``memory`` see ``genalign.runtime.memory_options.Memory``.

    ``revision`` is a branch, tag or commit of a Hub id, and ``token`` the name of the environment variable that holds
    the Hub's token. ``variant`` is the variant of the weights, such as "fp16"; ``weights`` "bin" reads pickled weights
    instead of safetensors. ``text_cache`` is a folder of text embeddings: the text encoders are then loaded only
    by ``encode_ahead``, for texts that have none yet. ``users`` is a file of users' embeddings, which the denoiser
    then attends to (``genalign.diffusion.user_attention``).
    """

    device: str
    autocast: torch.dtype | None
    height: int | None
    width: int | None
    seconds: float | None
    negative_prompt: str
    max_sequence_length: int | None
    distilled_guidance: float | None
    compile: bool
    memory: Memory
    revision: str | None
    variant: str | None
    token: str | None
    weights: WeightFormat
    text_cache: str | None
    users: str | None


def hub_access(options: Options) -> HubAccess:
    """Return the revision and the token with which the Hub is read."""
    return HubAccess(options.get("revision"), options.get("token"))
