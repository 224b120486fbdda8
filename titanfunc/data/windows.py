"""Fixed-length windows of tokens, in an order that is a pure function of (seed, step).

B is the batch size, T the sequence length, N the tokens of a split, W the windows of an epoch.
"""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from titanfunc.config._check import require
from titanfunc.data.tokenizers import IntArray
from titanfunc.data.tokens import TokenArray

_logger = logging.getLogger(__name__)


class Windows:
    """Training batches: windows of T + 1 tokens, T apart, so that the targets tile the text.

    An epoch has the same number W of windows every time, in a permutation drawn from (seed, epoch), and so
    has where the first window of each document begins: anywhere in what is left over when W whole windows
    are cut from it. Step s takes rows s * B .. (s + 1) * B of all epochs one after another; a batch may
    reach over the end of an epoch. There is no position to save: resuming is asking for the next step.

    tokens: TokenArray with tokens [N]. seq_len: T, in tokens. batch_size: B. seed: at least 0.
    separate_documents: windows stay within a document, and documents shorter than T + 1 tokens are left
    out. Otherwise windows run over all N tokens as one ring, from a random place on.

    Raises ValueError if a number is out of range or not even one window fits.
    """

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        separate_documents: bool = True,
    ) -> None:
        _require_sizes(seq_len, batch_size)
        require(seed >= 0, "seed", "a whole number of at least 0", seed)
        self.tokens = np.asarray(tokens.tokens)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.separate_documents = separate_documents
        if separate_documents:
            lengths = _lengths(tokens.ends)
            # Windows a document, and the tokens by which they can be moved.
            self._counts, self._slack = np.divmod(np.maximum(lengths - 1, 0), seq_len)
            self._base = _starts(tokens.ends, self._counts, seq_len)
        else:
            fits = len(self.tokens) > seq_len
            self._base = np.arange(len(self.tokens) // seq_len if fits else 0, dtype=np.int64) * seq_len
        _require_windows(len(self._base), tokens, seq_len, separate_documents)
        used = self.windows_per_epoch * seq_len / len(self.tokens)
        if used < 0.5:
            _logger.warning(
                "data.seq_len: %.0f%% of the tokens are in no window, as documents of %d tokens or fewer "
                "are left out; make it smaller or set data.separate_documents=false",
                100 * (1 - used),
                seq_len,
            )
        # Two, because a batch may reach over the end of an epoch.
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def windows_per_epoch(self) -> int:
        """W: the windows of one epoch, the same in each."""
        return len(self._base)

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of one training step: int64 [B, T + 1]; inputs are [:, :-1] and targets [:, 1:].

        Any step may be asked for, in any order. Raises ValueError for a negative step.
        """
        require(step >= 0, "step", "a whole number of at least 0", step)
        first = step * self.batch_size
        epochs, rows = np.divmod(np.arange(first, first + self.batch_size), self.windows_per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            now = epochs == epoch
            starts[now] = self._epoch_starts(epoch)[rows[now]]
        return _gather(self.tokens, starts, self.seq_len)

    def _draw_epoch(self, epoch: int) -> IntArray:
        """Where each window of the epoch begins [W], in the order in which they are taken."""
        generator = np.random.default_rng([self.seed, epoch])
        if self.separate_documents:
            starts = self._base + np.repeat(generator.integers(0, self._slack + 1), self._counts)
        else:
            starts = self._base + generator.integers(0, len(self.tokens))
        return generator.permutation(starts)


def validation_batches(
    tokens: TokenArray,
    seq_len: int,
    batch_size: int,
    limit: int,
    *,
    separate_documents: bool = True,
) -> list[torch.Tensor]:
    """At most ``limit`` batches, int64 [B, T + 1], of windows spread evenly over the documents.

    The same every time, no window twice, and every batch full. tokens, seq_len (T, in tokens), batch_size (B)
    and separate_documents as for ``Windows``. Raises ValueError if there are fewer windows than one batch.
    """
    _require_sizes(seq_len, batch_size)
    require(limit >= 1, "limit", "at least 1 batch", limit)
    ends = tokens.ends if separate_documents else tokens.ends[-1:]
    starts = _starts(ends, np.maximum(_lengths(ends) - 1, 0) // seq_len, seq_len)
    _require_windows(len(starts), tokens, seq_len, separate_documents)
    batches = min(limit, len(starts) // batch_size)
    if batches == 0:
        raise ValueError(
            f"data.batch_size: wanted at most the {len(starts)} windows that the validation documents hold, "
            f"got {batch_size}; lower data.batch_size or data.seq_len, or raise data.validation_fraction"
        )
    count = batches * batch_size
    chosen = starts[(2 * np.arange(count) + 1) * len(starts) // (2 * count)]
    return [_gather(np.asarray(tokens.tokens), rows, seq_len) for rows in chosen.reshape(batches, batch_size)]


def _lengths(ends: IntArray) -> IntArray:
    """Tokens of each document [D]."""
    return np.diff(ends, prepend=0)


def _starts(ends: IntArray, counts: IntArray, seq_len: int) -> IntArray:
    """Where windows begin [W] when ``counts`` [D] of them are laid end to end from each document's start."""
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum(), dtype=np.int64) - np.repeat(first, counts)
    starts: IntArray = np.repeat(ends - _lengths(ends), counts) + within * seq_len
    return starts


def _gather(tokens: IntArray, starts: IntArray, seq_len: int) -> torch.Tensor:
    """The windows that begin at ``starts`` [B], on the ring: int64 [B, T + 1]."""
    places = starts[:, None] + np.arange(seq_len + 1)
    return torch.from_numpy(tokens.take(places, mode="wrap").astype(np.int64))


def _require_sizes(seq_len: int, batch_size: int) -> None:
    require(seq_len >= 1, "seq_len", "a whole number of at least 1", seq_len)
    require(batch_size >= 1, "batch_size", "a whole number of at least 1", batch_size)


def _require_windows(windows: int, tokens: TokenArray, seq_len: int, separate_documents: bool) -> None:
    if windows:
        return
    total = len(tokens.tokens)
    longest = int(_lengths(tokens.ends).max()) if separate_documents else total
    have = "the longest document has" if separate_documents else "all documents together have"
    way_out = ", or data.separate_documents=false" if separate_documents and total > seq_len else ""
    raise ValueError(
        f"data.seq_len: wanted at most {longest - 1} ({have} {longest} tokens, a window takes seq_len + 1)"
        f"{way_out}, got {seq_len}"
    )
