"""Fixed-length windows of tokens, in an order that is a pure function of (seed, step).

B is the batch size, T the sequence length, N the tokens of a split, W the windows of an epoch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from titanfunc.config._check import require
from titanfunc.data.permutation import hashed, key, permuted
from titanfunc.data.tokenizers import IntArray
from titanfunc.data.tokens import Rows, TokenArray, as_mapped, read_rows, within

_BLOCK = 4096
_logger = logging.getLogger(__name__)


class Windows:
    """Training batches: windows of T + 1 tokens, T apart, so that the targets tile the text.

    An epoch has the same number W of windows every time, in an order that belongs to (seed, epoch), and so
    has where the first window of each document begins: anywhere in what is left over when W whole windows
    are cut from it. Step s takes rows s * B .. (s + 1) * B of all epochs one after another; a batch may
    reach over the end of an epoch. There is no position to save: resuming is asking for the next step. Neither
    is there a list of an epoch's windows: the place of a row is computed from its number (``permutation``).

    tokens: TokenArray with tokens [N]. seq_len: T, in tokens. batch_size: B, of all ranks together. seed: at least 0.
    separate_documents: windows stay within a document, and documents shorter than T + 1 tokens are left
    out. Otherwise windows run over all N tokens as one ring, from a random place on.
    rank, world: of B rows, those from rank * B / world on are made, B / world of them.

    Raises ValueError if a number is out of range, ranks do not divide B, or not even one window fits.
    """

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        separate_documents: bool = True,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _require_sizes(seq_len, batch_size)
        require(seed >= 0, "seed", "a whole number of at least 0", seed)
        self.rows = rows_of(batch_size, rank, world)
        self.tokens, self._tokens = tokens, as_mapped(tokens.tokens)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.separate_documents = separate_documents
        total = len(tokens.tokens)
        if separate_documents:
            lengths = _lengths(tokens.ends)
            # Windows a document, and the tokens by which they can be moved.
            counts, self._slack = np.divmod(np.maximum(lengths - 1, 0), seq_len)
            self._windows = np.cumsum(counts)
            self._first = tokens.ends - lengths - (self._windows - counts) * seq_len
            self.windows_per_epoch = int(self._windows[-1])
        else:
            self.windows_per_epoch = total // seq_len if total > seq_len else 0
        _require_windows(self.windows_per_epoch, tokens, seq_len, separate_documents)
        used = self.windows_per_epoch * seq_len / total
        if used < 0.5:
            _logger.warning(
                "data.seq_len: %.0f%% of the tokens are in no window, as documents of %d tokens or fewer "
                "are left out; make it smaller or set data.separate_documents=false",
                100 * (1 - used),
                seq_len,
            )
        # _BLOCK rows are located at once; a batch may reach over the end of a block, and of an epoch.
        self._located = functools.lru_cache(maxsize=4)(self._locate)

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of one training step: int64 [B / world, T + 1]; inputs are [:, :-1] and targets [:, 1:].

        Any step may be asked for, in any order. Raises ValueError for a negative step.
        """
        reads, places = [], []
        for epoch, block, mine in self._blocks(step):
            rows = self._located(epoch, block)
            reads += rows[0][mine]
            places += rows[1][mine]
        found = read_rows((reads, places), self.seq_len + 1, self._tokens.dtype)
        return torch.from_numpy(self._tokens.take(self._starts(step), self.seq_len + 1) if found is None else found)

    def documents(self, step: int) -> list[str]:
        """What the documents are called that a step's batch was cut from, in the order of its rows, each once."""
        ends, total = self.tokens.ends, len(self.tokens.tokens)
        found: dict[int, None] = {}
        for start in self._starts(step).tolist():
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, min(start + self.seq_len, total - 1), side="right"))
            found.update(dict.fromkeys(range(first, last + 1)))
            if start + self.seq_len >= total:
                found.update(
                    dict.fromkeys(range(int(np.searchsorted(ends, start + self.seq_len - total, "right")) + 1))
                )
        return [self.tokens.name(document) for document in found]

    def _starts(self, step: int) -> IntArray:
        """Where the step's windows begin [B / world]."""
        return np.concatenate([self._starts_of_block(epoch, block)[mine] for epoch, block, mine in self._blocks(step)])

    def _blocks(self, step: int) -> Iterator[tuple[int, int, slice]]:
        """The epoch and block, and which of its rows, of one part of the step's windows after the other."""
        require(step >= 0, "step", "a whole number of at least 0", step)
        row, end = step * self.batch_size + self.rows.start, step * self.batch_size + self.rows.stop
        while row < end:
            epoch, number = divmod(row, self.windows_per_epoch)
            block, first = divmod(number, _BLOCK)
            last = min(first + end - row, _BLOCK, first + self.windows_per_epoch - number)
            yield epoch, block, slice(first, last)
            row += last - first

    def _locate(self, epoch: int, block: int) -> Rows:
        return self._tokens.locate(self._starts_of_block(epoch, block), self.seq_len + 1)

    def _starts_of_block(self, epoch: int, block: int) -> IntArray:
        """Where the windows begin of the epoch's rows from block * _BLOCK on."""
        rows = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.windows_per_epoch))
        windows = permuted(rows, self.windows_per_epoch, key(self.seed, epoch))
        moved = key(self.seed, epoch, 1)
        if not self.separate_documents:
            total = len(self.tokens.tokens)
            return (windows * self.seq_len + moved % total) % total
        document = within(self._windows, windows)
        shift = hashed(document, moved) % (self._slack[document] + 1).astype(np.uint64)
        places: IntArray = self._first[document] + windows * self.seq_len + shift.astype(np.int64)
        return places


def rows_of(batch_size: int, rank: int, world: int) -> range:
    """The rows of a batch that a rank makes. Raises ValueError for a rank that is none, or ranks that do not divide it.

    >>> rows_of(8, rank=1, world=4)
    range(2, 4)
    """
    require(world >= 1 and 0 <= rank < world, "rank", f"from 0 to world - 1 = {world - 1}", rank)
    require(batch_size % world == 0, "data.batch_size", f"a multiple of the {world} ranks", batch_size)
    each = batch_size // world
    return range(rank * each, (rank + 1) * each)


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
    found = torch.from_numpy(as_mapped(tokens.tokens).take(chosen, seq_len + 1))
    return [*found.reshape(batches, batch_size, seq_len + 1)]


def _lengths(ends: IntArray) -> IntArray:
    """Tokens of each document [D]."""
    return np.diff(ends, prepend=0)


def _starts(ends: IntArray, counts: IntArray, seq_len: int) -> IntArray:
    """Where windows begin [W] when ``counts`` [D] of them are laid end to end from each document's start."""
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum(), dtype=np.int64) - np.repeat(first, counts)
    starts: IntArray = np.repeat(ends - _lengths(ends), counts) + within * seq_len
    return starts


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
