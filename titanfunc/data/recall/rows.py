"""Rows of a recall task, and how they become batches.

A row of length L has L + 1 tokens and predicts the last L of them. Letters: B batch, T the length of training rows,
N rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titanfunc.config._check import require
from titanfunc.data.tokenizers import IntArray


class Row(NamedTuple):
    """One row. tokens: bytes [L + 1]. answers: bool [L + 1], which of them the loss and the accuracy are about."""

    tokens: IntArray
    answers: IntArray


class Maker(NamedTuple):
    """How a task draws a row of a length, from a numpy generator alone.

    train(source, length): as dense in answers as it was configured. test(source, length, level): a single question
    whose evidence stands at the depth ``level`` of the row, from 0 (its start) to 1 (right before the question); for
    mqar ``level`` is the number of pairs, for copying it means nothing.
    """

    train: Callable[[np.random.Generator, int], Row]
    test: Callable[[np.random.Generator, int, float], Row]


class Stream(enum.IntEnum):
    """What rows are for; a seed draws different ones for each."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class RecallTask:
    """Batches of a task: row r of a stream is a pure function of (seed, stream, r), and step s takes B in a row.

    maker: of the rows. seq_len: T, in predicted tokens. batch_size: B. seed: at least 0. text_weight: weight in the
    loss of tokens that are no part of an answer. stream: of ``batch``; ``examples`` have one of their own.
    Raises ValueError if a number is out of range.
    """

    def __init__(
        self,
        maker: Maker,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        *,
        text_weight: float = 0.0,
        stream: Stream = Stream.TRAIN,
    ) -> None:
        require(seq_len >= 1, "seq_len", "a whole number of at least 1", seq_len)
        require(batch_size >= 1, "batch_size", "a whole number of at least 1", batch_size)
        require(seed >= 0, "seed", "a whole number of at least 0", seed)
        self.maker, self.seq_len, self.batch_size, self.seed = maker, seq_len, batch_size, seed
        self.text_weight, self.stream = text_weight, stream

    def batch(self, step: int) -> dict[str, Tensor]:
        """``{"tokens": int64 [B, T + 1], "weights": float32 [B, T]}`` of a step; ``weights[:, t]`` weighs the
        prediction of ``tokens[:, t + 1]``. Any step, in any order. Raises ValueError for a negative one.
        """
        require(step >= 0, "step", "a whole number of at least 0", step)
        first = step * self.batch_size
        rows = [
            self.maker.train(np.random.default_rng([self.seed, self.stream, row]), self.seq_len)
            for row in range(first, first + self.batch_size)
        ]
        tokens, weights = stack(rows, self.text_weight)
        return {"tokens": tokens, "weights": weights}

    def examples(self, length: int, level: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` test rows of one length: tokens int64 [N, L + 1] and weights [N, L], 1 where an answer is.

        level: the depth in [0, 1], or the number of pairs; see ``Maker``. The same rows, however many are asked for.
        """
        rows = [self.maker.test(np.random.default_rng([seed, Stream.TEST, row]), length, level) for row in range(count)]
        return stack(rows)


def stack(rows: Sequence[Row], text_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of one length as tokens int64 [N, L + 1] and weights float32 [N, L] of the predictions."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
    answers = torch.from_numpy(np.stack([row.answers for row in rows])[:, 1:])
    return tokens, torch.where(answers, 1.0, text_weight)
