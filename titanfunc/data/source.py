"""What a run trains and validates on: windows of a corpus, or rows of a recall task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from titanfunc.config.data import DataConfig
from titanfunc.config.failures import Damaged, reading
from titanfunc.data.pipeline import Corpus, load, load_held_out
from titanfunc.data.recall import RecallTask, Stream, make_task
from titanfunc.data.stream import StreamBatches
from titanfunc.data.windows import Windows, rows_of, validation_batches

Batch = dict[str, Tensor]
NAMED = 8
"""Documents that an error names, at most."""


class Source(NamedTuple):
    """batches: the batch of a step, tokens [B, T + 1] and, of a recall task, weights [B, T]; of several ranks, the rows
    of this one.

    held_out: validation batches, always the same. corpus: where any text is read. task: the recall task as it is
    validated, or None. summary: what a step reads, in words. documents: what the documents are called that a step's
    batch was cut from; of a recall task, its rows.
    """

    batches: Callable[[int], Batch]
    held_out: list[Batch]
    corpus: Corpus | None
    task: RecallTask | None
    summary: str
    documents: Callable[[int], list[str]]

    @property
    def bytes_per_token(self) -> float | None:
        """Of the held-out text, to tell bits per byte; None for a recall task, where they would mean nothing."""
        return None if self.task or self.corpus is None else self.corpus.bytes_per_token


def open_source(config: DataConfig, eval_batches: int, *, rank: int = 0, world: int = 1, commit: str = "") -> Source:
    """Read what ``config`` names and lay out its batches (tokens [B / world, T + 1]), ``eval_batches`` of B rows to
    validate on at most, the same for every rank.

    Rank r makes rows r * B / world to (r + 1) * B / world of a step's batch; put together they are the same for any
    number of ranks, but for a stream. A recall task validates on rows of another stream of its seed, in the text of
    the held-out documents. commit: of a dataset on the hub, in the place of the newest of ``data.revision``.
    Raises ValueError for a corpus too small for its windows, rows too short for their task, or ranks that do not
    divide the batch, and what ``pipeline.load`` does; a batch raises Damaged for an id that is no token.
    """
    rows_of(config.batch_size, rank, world)
    if config.task:
        return _open_task(config, eval_batches, rank, world, commit)
    cut, separate = (config.seq_len, config.batch_size), config.separate_documents
    if config.stream:
        corpus = load_held_out(config, eval_batches * config.batch_size, commit)
        stream = StreamBatches(config, corpus.tokenizer, rank, world, corpus.identity.commit)
        batch, documents = stream.batch, stream.documents
        whole = f"{config.path}: read once as a stream"
        of = "windows"
    else:
        corpus = load(config, commit)
        windows = Windows(corpus.train, *cut, config.seed, separate, rank=rank, world=world)
        batch, documents = windows.batch, windows.documents
        name = config.path if config.corpus in ("files", "hub") else config.corpus
        name += f" at {corpus.identity.commit[:12]}" if corpus.identity.commit else ""
        whole = f"{name}: {len(corpus.train.tokens):,} tokens"
        of = f"of {windows.windows_per_epoch:,} windows"
    with reading():
        held_out = validation_batches(corpus.validation, *cut, eval_batches, separate_documents=separate)
    tokens = corpus.tokenizer.vocab_size
    place = config.cache_dir or config.path
    may_exceed = np.iinfo(corpus.validation.tokens.dtype).max >= tokens
    for each in held_out:
        _require_tokens(each, tokens, lambda: f"{place}: documents to validate on")
    held = f"{len(corpus.validation.tokens):,} held out"
    by = f" (tokenizer {corpus.tokenizer_file})" if corpus.tokenizer_file else ""
    summary = f"{whole}, {held}{by}; a step is {config.batch_size} {of} of {config.seq_len}"
    texts = [{"tokens": each} for each in held_out]

    def batches(step: int) -> Batch:
        made = batch(step)
        if may_exceed:
            _require_tokens(made, tokens, lambda: f"{place}: one of {', '.join(documents(step)[:NAMED])}")
        return {"tokens": made}

    return Source(batches, texts, corpus, None, summary, documents)


def _require_tokens(batch: Tensor, tokens: int, name: Callable[[], str]) -> None:
    """Raise Damaged where a batch [B, T + 1] holds an id that is no token and has no embedding."""
    most = int(batch.max())
    if most >= tokens:
        raise Damaged(
            f"{name()}: wanted ids below {tokens}, which the tokenizer has, got {most}: the tokens kept in "
            f"data.cache_dir are damaged; delete them, and the next run makes them anew"
        )


def _open_task(config: DataConfig, eval_batches: int, rank: int, world: int, commit: str) -> Source:
    corpus = load(config, commit) if config.reads_text else None
    task, other = (
        make_task(config.task, config, corpus and getattr(corpus, stream.name.lower()), stream)
        for stream in (Stream.TRAIN, Stream.VALIDATION)
    )
    rows = rows_of(config.batch_size, rank, world)

    def batches(step: int) -> Batch:
        return {name: values[rows.start : rows.stop] for name, values in task.batch(step).items()}

    def documents(step: int) -> list[str]:
        first = step * config.batch_size
        return [f"{config.task} row {first + row}" for row in rows]

    summary = f"{config.task}{f' in {config.corpus}' if corpus else ''}: "
    summary += f"a step is {config.batch_size} rows of {config.seq_len} tokens, drawn from seed {config.seed}"
    return Source(batches, [other.batch(step) for step in range(eval_batches)], corpus, other, summary, documents)
