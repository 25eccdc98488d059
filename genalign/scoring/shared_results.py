"""Results of a batch that several rewards share, so a detector or a judge runs once for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from genalign.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class _Result(Generic[T]):
    source: object
    place: tuple[Any, ...]
    prompts: tuple[Prompt, ...]
    value: T


class SharedResults(Generic[T]):
    """The results of the latest batch of samples, by what computed them and for which part of the batch and prompts.

    A batch is known by the tensor itself, not by its values: as long as the tensor lives and is not written to, the
    parts of ``torch.split`` are parts of it. It is not kept alive. Results are those of equal ``source`` objects.
    """

    def __init__(self) -> None:
        self._batch: Callable[[], Tensor | None] = lambda: None
        self._version: int | None = None
        self._results: list[_Result[T]] = []

    def __call__(self, source: object, samples: Tensor, prompts: Sequence[Prompt], compute: Callable[[], T]) -> T:
        """Return the result for samples (B, ...) and their prompts, by ``compute`` where it is not known.

        Args:
            source: What the result depends on beside them, such as a judge, which is compared by ``==``.
            samples: The samples.
            prompts: The prompts, which are compared by identity, since equal texts may differ in their metadata.
            compute: Computes the result.
        """
        whole = samples if samples._base is None else samples._base
        version = None if samples.is_inference() else samples._version
        place = samples.storage_offset(), samples.shape, samples.stride(), samples.dtype
        if self._batch() is not whole or self._version != version:
            self._batch, self._version, self._results = weakref.ref(whole), version, []
        results = self._results
        for result in results:
            same = result.place == place and len(result.prompts) == len(prompts) and result.source == source
            if same and all(one is other for one, other in zip(result.prompts, prompts, strict=True)):
                return result.value
        value = compute()
        results.append(_Result(source, place, tuple(prompts), value))
        return value
