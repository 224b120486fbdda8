"""Copying: random bytes, a separator, and the same bytes again. Letters: L tokens that a row predicts."""

from __future__ import annotations

import numpy as np

from titanfunc.config._check import require
from titanfunc.data.recall.rows import Maker, Row

SEPARATOR = 0


def copying() -> Maker:
    """Rows [L + 1] of L // 2 bytes from 1 to 255, the separator, and the bytes again, which are the answer.

    A row of odd length begins with one more separator.
    """

    def train(source: np.random.Generator, length: int) -> Row:
        require(length >= 2, "length", "at least 2", length)
        half = length // 2
        tokens = np.full(length + 1, SEPARATOR, dtype=np.uint8)
        tokens[-half:] = source.integers(1, 256, size=half)
        tokens[-2 * half - 1 : -half - 1] = tokens[-half:]
        answers = np.zeros(length + 1, dtype=bool)
        answers[-half:] = True
        return Row(tokens, answers)

    return Maker(train, lambda source, length, level: train(source, length))
