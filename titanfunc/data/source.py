"""What a run trains and validates on: windows of a corpus, or rows of a recall task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titanfunc.config.data import DataConfig
from titanfunc.data.pipeline import Corpus, load
from titanfunc.data.recall import RecallTask, Stream, make_task
from titanfunc.data.windows import Windows, validation_batches

Batch = dict[str, Tensor]


class Source(NamedTuple):
    """batches: the batch of a step, tokens [B, T + 1] and, of a recall task, weights [B, T].

    held_out: validation batches, always the same. corpus: where any text is read. task: the recall task as it is
    validated, or None. summary: what a step reads, in words.
    """

    batches: Callable[[int], Batch]
    held_out: list[Batch]
    corpus: Corpus | None
    task: RecallTask | None
    summary: str

    @property
    def bytes_per_token(self) -> float | None:
        """Of the held-out text, to tell bits per byte; None for a recall task, where they would mean nothing."""
        return None if self.task or self.corpus is None else self.corpus.bytes_per_token


def open_source(config: DataConfig, eval_batches: int) -> Source:
    """Read what ``config`` names and lay out its batches (tokens [B, T + 1]), ``eval_batches`` to validate on at most.

    A recall task validates on rows of another stream of its seed, in the text of the held-out documents. Raises
    ValueError for a corpus too small for its windows, or rows too short for their task.
    """
    corpus = load(config) if config.reads_text else None
    if config.task:
        task, other = (
            make_task(config.task, config, corpus and getattr(corpus, stream.name.lower()), stream)
            for stream in (Stream.TRAIN, Stream.VALIDATION)
        )
        summary = f"{config.task}{f' in {config.corpus}' if corpus else ''}: "
        summary += f"a step is {config.batch_size} rows of {config.seq_len} tokens, drawn from seed {config.seed}"
        return Source(task.batch, [other.batch(step) for step in range(eval_batches)], corpus, other, summary)
    assert corpus is not None
    cut, separate = (config.seq_len, config.batch_size), config.separate_documents
    windows = Windows(corpus.train, *cut, seed=config.seed, separate_documents=separate)
    held_out = validation_batches(corpus.validation, *cut, eval_batches, separate_documents=separate)
    summary = (
        f"{config.corpus}: {len(corpus.train.tokens):,} tokens, {len(corpus.validation.tokens):,} held out; "
        f"a step is {config.batch_size} of {windows.windows_per_epoch:,} windows of {config.seq_len}"
    )
    return Source(
        lambda step: {"tokens": windows.batch(step)}, [{"tokens": each} for each in held_out], corpus, None, summary
    )
