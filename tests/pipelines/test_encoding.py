"""Samples are encoded to the latents that the same pipeline decodes, on a tiny checkpoint of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pipelines
from genalign.types import EncodesSamples
from pipelines.family import most_likely
from tests.pipelines.tiny_checkpoints import FAMILIES, FolderOf

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "audio_ldm2"])
def test_what_the_encoder_gives_is_what_the_decoder_gets(
    family: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaling of the latents, their statistics or a batch normalization, is undone."""
    pipeline = pipelines.load(folder_of(family), **FAMILIES[family].options)
    assert isinstance(pipeline, EncodesSamples)
    vae, seen = pipeline.pipe.vae, dict[str, Tensor]()
    encode, decode = vae.encode, vae.decode

    def encoding(samples: Tensor, *args: Any, **options: Any) -> Any:
        encoded = encode(samples, *args, **options)
        seen["encoded"] = most_likely(encoded)
        return encoded

    def decoding(latents: Tensor, *args: Any, **options: Any) -> Any:
        seen["decoded"] = latents
        return decode(latents, *args, **options)

    monkeypatch.setattr(vae, "encode", encoding)
    monkeypatch.setattr(vae, "decode", decoding)
    low = -1.0 if pipeline.sample_rate else 0.0
    generator = torch.Generator().manual_seed(0)
    samples = low + (1 - low) * torch.rand(2, *pipeline.sample_shape, generator=generator)
    latents = pipeline.encode_samples(samples)
    assert latents.shape[1:] == pipeline.latent_shape and latents.dtype == torch.float32
    pipeline.decode(latents)
    torch.testing.assert_close(seen["decoded"], seen["encoded"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pipeline.encode_samples(samples[1:]), latents[1:], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="bring them to its size first"):
        pipeline.encode_samples(samples[..., :-1])


def test_a_family_without_a_way_back_says_so(folder_of: FolderOf) -> None:
    pipeline = pipelines.load(folder_of("audio_ldm2"), **FAMILIES["audio_ldm2"].options)
    with pytest.raises(ValueError, match="AudioLDM 2 decodes spectrograms"):
        pipeline.encode_samples(torch.zeros(1, *pipeline.sample_shape))
