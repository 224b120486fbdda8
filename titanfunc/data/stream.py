"""Batches of documents as they are read, once, without keeping tokens.

A batch is a function of (step, rank, world) and the dataset's files, so a resumed run reads what it would have read;
but to come to a step all that stands before it is read and tokenized again, from the first document on. Documents come
in the order of the files. With another number of ranks they meet in other batches: a rank reads files of its own, or
every ``world``-th document. The cache has neither limit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from titanfunc.config.data import DataConfig
from titanfunc.data import corpora, parts
from titanfunc.data.pipeline import Corpus, open_tokenizer
from titanfunc.data.split import held_out_by_name
from titanfunc.data.tokenizers import IntArray, Tokenizer
from titanfunc.data.tokens import TokenArray, select, token_dtype, tokenize_shard
from titanfunc.data.windows import rows_of

_Window = tuple[IntArray, tuple[str, ...]]
_ENCODED = 64  # documents at once


class StreamBatches:
    """Batches int64 [B / world, T + 1] of a stream, the training documents of ``config``; steps are cheap in order."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, rank: int = 0, world: int = 1) -> None:
        self._rows = len(rows_of(config.batch_size, rank, world))
        self._config, self._tokenizer, self._rank, self._world = config, tokenizer, rank, world
        self._names: dict[int, list[str]] = {}
        self._begin()

    def _begin(self) -> None:
        self._coming, self._due = self._windows(), 0

    def batch(self, step: int) -> torch.Tensor:
        """The tokens of one training step [B / world, T + 1]; an earlier one than the last begins anew.

        Raises ValueError where the stream has ended, or a file of it cannot be read.
        """
        if step < self._due:
            self._begin()
        rows = []
        while self._due <= step:
            rows = list(itertools.islice(self._coming, self._rows))
            if len(rows) < self._rows:
                ended, self._due = self._due, 0
                self._begin()
                raise ValueError(
                    f"data.stream: {self._config.path} ends after {ended} steps, and a stream is read once; lower "
                    f"train.steps, or keep its tokens (data.stream=false), which come again"
                )
            self._due += 1
        self._names = {step: list(dict.fromkeys(name for _, names in rows for name in names))}
        return torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))

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
        for name, tokens in _encoded(_training(config, self._rank, self._world), self._tokenizer):
            joined = not config.separate_documents
            tokens, names = (np.concatenate([rest, tokens]), (*names, name)) if joined else (tokens, (name,))
            count = max(len(tokens) - 1, 0) // length
            for i in range(count):
                yield tokens[i * length : (i + 1) * length + 1], names if i == 0 else (name,)
            rest, names = tokens[count * length :], names if not count else (name,)


def open_stream(config: DataConfig, eval_batches: int, rank: int, world: int) -> tuple[StreamBatches, Corpus]:
    """The training batches of a rank ([B / world, T + 1]), and a corpus of the first held-out documents alone: enough
    for ``eval_batches``, the same for every rank.

    Raises ValueError for a dataset that cannot be read, or holds too little to validate on.
    """
    listing = corpora.list_files(config)
    tokenizer = open_tokenizer(config, listing)
    wanted = eval_batches * config.batch_size
    documents = functools.partial(_first_windows, config, tokenizer, wanted)
    shard, _ = tokenize_shard(documents(), tokenizer)
    if not len(shard.ends):
        raise ValueError(f"data.validation_fraction: no document of {config.path} is held out; raise it")
    held_out = select([shard], np.arange(len(shard.ends)))
    empty = TokenArray(np.empty(0, dtype=shard.tokens.dtype), np.empty(0, dtype=np.int64))
    bytes_per_token = int(shard.sizes.sum()) / len(shard.tokens)
    return StreamBatches(config, tokenizer, rank, world), Corpus(empty, held_out, tokenizer, bytes_per_token)


def _first_windows(config: DataConfig, tokenizer: Tokenizer, wanted: int) -> Iterator[tuple[str, str]]:
    """Held-out documents until they hold ``wanted`` windows."""
    listing = corpora.list_files(config)
    for part in parts.whole(listing.files, listing.root, config.column):
        for name, text in parts.read(part):
            if wanted > 0 and held_out_by_name(name, config.validation_fraction, config.seed):
                yield name, text
                wanted -= len(tokenizer.encode(text)) // config.seq_len
            if wanted <= 0:
                return


def _training(config: DataConfig, rank: int, world: int) -> Iterator[tuple[str, str]]:
    for row in corpora.stream_documents(config, rank, world):
        if not held_out_by_name(row["name"], config.validation_fraction, config.seed):
            yield row["name"], row["text"]


def _encoded(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[str, IntArray]]:
    """Each document's name and its ids with the separator [n]."""
    while some := list(itertools.islice(documents, _ENCODED)):
        shard, names = tokenize_shard(some, tokenizer)
        yield from zip(names, np.split(shard.tokens, shard.ends[:-1]), strict=True)
