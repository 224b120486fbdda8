"""Batches of documents as they are read, once, without keeping tokens.

A batch is a function of (step, rank, world) and the dataset's files, so a resumed run reads what it would have read;
but to come to a step all that stands before it is read and tokenized again, from the first document on. Documents come
in the order of the files. With another number of ranks they meet in other batches: a rank reads files of its own, or
every ``world``-th document. The cache has neither limit.

Held out is each document by the chance ``validation_fraction``, whatever its size, as the bytes of the whole are not
known; the first of them are validated on (``pipeline.load_held_out``), and none is trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from titanfunc.config._check import require
from titanfunc.config.data import DataConfig
from titanfunc.data import corpora
from titanfunc.data.split import held_out_by_name
from titanfunc.data.tokenizers import IntArray, Tokenizer
from titanfunc.data.tokens import token_dtype, tokenize_shard
from titanfunc.data.windows import rows_of

_Window = tuple[IntArray, tuple[str, ...]]
_ENCODED = 64  # documents at once


class StreamBatches:
    """Batches int64 [B / world, T + 1] of a stream, the training documents of ``config``; steps are cheap in order.

    commit: of a dataset on the hub, in the place of the newest of ``data.revision``: it may move on while
    the stream is read.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, rank: int = 0, world: int = 1, commit: str = ""
    ) -> None:
        self._rows = len(rows_of(config.batch_size, rank, world))
        self._config, self._tokenizer, self._rank, self._world = config, tokenizer, rank, world
        self._commit = commit
        self._names: dict[int, list[str]] = {}
        self._begin()

    def _begin(self) -> None:
        self._coming, self._due = self._windows(), 0

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of one training step [B / world, T + 1]; an earlier one than the last begins anew.

        Raises ValueError where the stream has ended, or a file of it cannot be read.
        """
        require(step >= 0, "step", "a whole number of at least 0", step)
        if step < self._due:
            self._begin()
        rows: list[_Window] = []
        while self._due <= step:
            rows = self._next_rows()
            self._due += 1
        self._names = {step: list(dict.fromkeys(name for _, names in rows for name in names))}
        return torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))

    def _next_rows(self) -> list[_Window]:
        try:
            rows = list(itertools.islice(self._coming, self._rows))
        except BaseException:
            self._begin()  # a generator that raised is at its end: the next call reads anew
            raise
        if len(rows) == self._rows:
            return rows
        ended = self._due
        self._begin()
        config = self._config
        if not ended:
            of = f"not one batch of {self._rows} windows of {config.seq_len} tokens"
            raise ValueError(f"data.stream: {config.path} has {of}; lower data.batch_size or data.seq_len")
        raise ValueError(
            f"data.stream: {config.path} ends after {ended} step{'s' if ended > 1 else ''}, and a stream is read once; "
            f"keep its tokens (data.stream=false), which come again, or end the run there, with train.steps={ended}"
        )

    def documents(self, step: int) -> list[str]:
        """What the documents are called that a step's batch was cut from; the latest one's are at hand."""
        if step not in self._names:
            self.batch(step)
        return self._names[step]

    def _windows(self) -> Iterator[_Window]:
        """Windows of T + 1 tokens of this rank's documents, T apart."""
        config, length = self._config, self._config.seq_len
        rest: IntArray = np.empty(0, dtype=token_dtype(self._tokenizer.vocab_size))
        names: tuple[str, ...] = ()
        for name, tokens in _encoded(self._training(), self._tokenizer):
            joined = not config.separate_documents
            tokens, names = (np.concatenate([rest, tokens]), (*names, name)) if joined else (tokens, (name,))
            count = max(len(tokens) - 1, 0) // length
            for i in range(count):
                yield tokens[i * length : (i + 1) * length + 1], names if i == 0 else (name,)
            rest, names = tokens[count * length :], names if not count else (name,)

    def _training(self) -> Iterator[tuple[str, str]]:
        config = self._config
        for row in corpora.stream_documents(config, self._rank, self._world, self._commit):
            if not held_out_by_name(row["name"], config.validation_fraction, config.seed):
                yield row["name"], row["text"]


def _encoded(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[str, IntArray]]:
    """Each document's name and its ids with the separator [n]."""
    while some := list(itertools.islice(documents, _ENCODED)):
        shard, names = tokenize_shard(some, tokenizer)
        yield from zip(names, np.split(shard.tokens, shard.ends[:-1]), strict=True)
