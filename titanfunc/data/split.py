"""Which documents are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from titanfunc.config._check import require
from titanfunc.data.tokenizers import IntArray


def split_documents(
    sizes: Sequence[int] | IntArray, validation_fraction: float, seed: int
) -> tuple[IntArray, IntArray]:
    """Numbers of the training [D1] and of the validation documents [D2], each ascending: a pure function.

    sizes: bytes of each document, in corpus order. Documents are visited in an order drawn from ``seed`` and
    go to validation whenever that brings its bytes closer to ``validation_fraction`` of the whole, so one
    huge document does not swallow the training text. Each side gets at least one.

    Raises ValueError for fewer than two documents or a fraction outside (0, 1).

    >>> [side.tolist() for side in split_documents([100, 100, 100, 100], validation_fraction=0.25, seed=0)]
    [[0, 1, 3], [2]]
    """
    ok = 0 < validation_fraction < 1
    require(ok, "data.validation_fraction", "a number between 0 and 1", validation_fraction)
    require(len(sizes) > 1, "sizes", "at least 2 documents (one to train on, one to validate)", len(sizes))
    sizes = np.asarray(sizes, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen = _take(sizes[order], validation_fraction * int(sizes.sum()))[: len(sizes) - 1]
    held_out = np.zeros(len(sizes), dtype=bool)
    held_out[order[chosen] if len(chosen) else order[np.argmin(sizes[order])]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _take(sizes: IntArray, target: float) -> IntArray:
    """Places, ascending, of those that are taken when each of ``sizes`` [D] in turn is if it brings the sum nearer to
    ``target``. Those in a row that are taken, or left, are found at once.
    """
    taken: list[IntArray] = []
    start, total = 0, 0
    while start < len(sizes):
        rest = sizes[start:]
        before = total + np.cumsum(rest) - rest
        nearer = np.abs(before + rest - target) < np.abs(before - target)
        run = len(rest) if nearer.all() else int(np.argmin(nearer))
        taken.append(np.arange(start, start + run))
        total += int(rest[:run].sum())
        start += run
        fits = np.abs(total + sizes[start:] - target) < abs(total - target)
        if not fits.any():
            break
        start += int(np.argmax(fits))
    return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)


def held_out_by_name(name: str, validation_fraction: float, seed: int) -> bool:
    """Whether a document of that name is held out: by chance, the same wherever and whenever it is met."""
    digest = hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < validation_fraction * 2**64
