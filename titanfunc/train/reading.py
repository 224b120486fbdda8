"""The batches of a run's steps, and the names of what they were cut from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titanfunc.data import Source

Batches = Callable[[int], Any]


def naming_documents(source: Source) -> Source:
    """The same, but that its batches hold ``documents`` too, the names of those that they were cut from."""
    return source._replace(
        batches=lambda step: {**source.batches(step), "documents": source.documents(step)}  # type: ignore[dict-item]
    )


class Remembered:
    """Batches of ``naming_documents``, wherever they are made, without the names.

    Those of the last ``kept`` are remembered here: a stream would be read again from its beginning to name them later.
    """

    def __init__(self, batches: Batches, kept: int) -> None:
        self._batches, self._kept = batches, kept
        self._names: dict[int, list[str]] = {}

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step (tensors of any shapes)."""
        batch = dict(self._batches(step))
        self._names[step] = batch.pop("documents")
        while len(self._names) > self._kept:
            del self._names[next(iter(self._names))]
        return batch

    def documents(self, step: int) -> list[str]:
        """The names of a step's documents; none if they are not remembered."""
        return self._names.get(step, [])
