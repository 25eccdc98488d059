"""Embeddings of texts on disk: encoded before the work, and read memory-mapped by every later command.

The files are safetensors, of one text each. A file is written once, and keeps the bits of the batch in which its text
was encoded; so a resumed run reads what it began with.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genalign.runtime.distributed import RankShare
from genalign.runtime.files import load_state, save_state
from genalign.runtime.hub import HubAccess
from genalign.runtime.progress import Progress
from genalign.types import Conditioning
from pipelines.checkpoint_files import component_file, damage, one_line_errors
from pipelines.text_embeddings import BATCH, Encode, TextEmbeddings

_SAMPLED = 512  # bytes of each tensor of a text encoder that its fingerprint reads


class TextCache(TextEmbeddings):
    """Embeddings in the files of ``folder``, in place of those in memory, and the text encoders that were dropped."""

    def __init__(self, folder: Path, encoders: DroppedEncoders) -> None:
        super().__init__()
        self.folder, self.encoders = folder, encoders

    def conditioning(self, prompts: Sequence[str], needed: Collection[str], encode: Encode) -> Conditioning:
        """Read the embeddings of prompts (P, ...); ``needed`` and ``encode`` are those of ``encode_ahead``."""
        rows = {text: self._read(text) for text in dict.fromkeys(prompts)}
        names = rows[prompts[0]]
        return Conditioning({name: pad_sequence([rows[text][name] for text in prompts], True) for name in names})

    def on_device(self, text: str, device: torch.device) -> Mapping[str, Tensor]:
        """Return the embedding of a text on ``device``, where it stays."""
        if text not in self._embeddings:
            self._embeddings[text] = self._read(text)
        return super().on_device(text, device)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """List the texts that have no file, sorted. Raises ValueError for a file that is damaged."""
        absent = []
        for text in sorted(set(texts)):
            file = self._file(text)
            if not file.is_file():
                absent.append(text)
            elif damage(file):
                raise ValueError(f"{file} of the text cache is damaged or incomplete: delete it, and start again")
        return absent

    def encode_ahead(
        self,
        texts: Iterable[str],
        encoders: Callable[[], contextlib.AbstractContextManager[Encode]],
        share: RankShare,
        wait: Callable[[], None],
        progress: Progress,
    ) -> None:
        """Write the embeddings of the texts that have none, without loading the encoders if there is no such text.

        Args:
            texts: The texts.
            encoders: Loads the text encoders, and drops them at the end of the context.
            share: This rank's share of the batches.
            wait: Waits until all ranks have arrived. Processes that cannot wait for each other encode the batches that
                others have not written when their own are done.
            progress: Shows the texts.
        """
        missing = self.missing(texts)
        batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
        own = share.indices(len(batches))
        others = [number for number in range(len(batches)) if number not in own]
        wait()  # so that all ranks have the same batches
        with contextlib.ExitStack() as stack, progress.phase("encoding texts", len(missing), "texts") as advance:
            encode: Encode | None = None
            for numbers in (own, others):
                for batch in (batches[number] for number in numbers):
                    if self.missing(batch):
                        encode = encode or stack.enter_context(encoders())
                        self._write(batch, encode(batch))
                    advance(len(batch))
                if numbers is own:
                    wait()

    def _file(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, text: str) -> dict[str, Tensor]:
        file = self._file(text)
        if not file.is_file():
            raise ValueError(
                f"the text {text!r} is not in the text cache {self.folder}, and the text encoders are not loaded: leave"
                " model.text_cache out"
            )
        return load_state(file)[0]

    def _write(self, texts: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Write embeddings (P, ...), but none of a text that another process has written by now."""
        for place, text in enumerate(texts):
            file = self._file(text)
            temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
            save_state(temporary, {name: tensor[place] for name, tensor in tensors.items()}, {"text": text})
            try:
                os.link(temporary, file)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(temporary, file)
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class DroppedEncoders:
    """The text encoders that a checkpoint was opened without.

    Args:
        source: The checkpoint.
        names: The components.
        arguments: The arguments of ``from_pretrained`` that the checkpoint was opened with.
    """

    source: str | Path
    names: Sequence[str]
    arguments: Mapping[str, Any]

    @contextlib.contextmanager
    def loaded(self, pipe: DiffusionPipeline, device: torch.device) -> Iterator[None]:
        """Load the encoders into an open pipeline, on ``device``, within the context."""
        others = {name: part for name, part in pipe.components.items() if name not in self.names}
        with one_line_errors(self.source):
            whole = type(pipe).from_pretrained(self.source, **self.arguments, **others)
        encoders = {name: whole.components[name].requires_grad_(False).eval().to(device) for name in self.names}
        del whole
        try:
            pipe.register_modules(**encoders)
            yield
        finally:
            encoders.clear()
            pipe.register_modules(**dict.fromkeys(self.names))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def cache_folder(root: Path, source: str | Path, skipped: Collection[str], access: HubAccess, settings: object) -> Path:
    """Return the folder for the embeddings of one checkpoint under settings that change them, as JSON types.

    Args:
        root: The folder of the embeddings of all models.
        source: The checkpoint: a folder, known by its files, or a Hub id, known by its commit.
        skipped: Components of the checkpoint without an effect on embeddings.
        access: The access to the Hub.
        settings: The settings.
    """
    if Path(source).is_dir():
        name, state = Path(source).resolve().name, _fingerprint(Path(source), skipped)
    else:
        index = component_file(source, ".", "model_index.json", access)
        name, state = str(source).replace("/", "--"), f"{source}@{index.resolve().parent.name}"
    key = hashlib.sha256(json.dumps([state, settings], sort_keys=True).encode()).hexdigest()[:16]
    return root / f"{name}-{key}"


def _fingerprint(folder: Path, skipped: Collection[str]) -> str:
    """Hash a checkpoint's files but those of ``skipped`` components; of the weights, the beginning of each tensor."""
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and part.name not in skipped]
    for file in (file for part in parts for file in sorted(part.rglob("[!.]*")) if file.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        if file.suffix != ".safetensors":
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
            continue
        with file.open("rb") as content:
            header = content.read(length := int.from_bytes(content.read(8), "little"))
            digest.update(header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    content.seek(8 + length + first)
                    digest.update(content.read(min(_SAMPLED, last - first)))
    return digest.hexdigest()
