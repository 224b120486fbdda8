"""From a configuration to a recall task, by its name."""

from __future__ import annotations

import dataclasses

from titanfunc.config._check import require_choice
from titanfunc.config.data import DataConfig
from titanfunc.config.recall import TASKS, TESTS, require_room
from titanfunc.data.recall.copying import copying
from titanfunc.data.recall.haystack import Haystack
from titanfunc.data.recall.mqar import mqar
from titanfunc.data.recall.needle import needle
from titanfunc.data.recall.rows import Maker, RecallTask, Stream
from titanfunc.data.recall.world import world
from titanfunc.data.tokens import TokenArray


def make_task(
    name: str, config: DataConfig, text: TokenArray | None = None, stream: Stream = Stream.TRAIN
) -> RecallTask:
    """The task of that name, with the seed, batches [B, T + 1] and settings of ``config``.

    name: one of TASKS or of TESTS ("passkey" is the needle task of that kind alone). text: the documents around
    needles and facts. stream: of the batches; a task for ``Stream.TEST`` gives examples of any length that has room.
    Raises ValueError for an unknown name, a text task without text, or batches of rows too short for what they may
    hold.
    """
    require_choice(name, "task", (*TASKS, *(test for test in TESTS if test not in TASKS)))
    if name in TASKS and stream != Stream.TEST:
        require_room(name, config.recall, config.seq_len)
    return RecallTask(
        make_maker(name, config, text),
        config.seq_len,
        config.batch_size,
        config.seed,
        text_weight=config.recall.text_weight,
        stream=stream,
    )


def make_maker(name: str, config: DataConfig, text: TokenArray | None = None) -> Maker:
    """How rows [L + 1] of a task are drawn; the arguments are those of ``make_task``."""
    recall = config.recall
    task = TESTS.get(name, name)
    if task == "mqar":
        return mqar(recall.mqar)
    if task == "copying":
        return copying()
    if text is None:
        raise ValueError(f"text: wanted the documents that the task {name} is put into, got None")
    if task == "needle":
        needles = recall.needle if name in TASKS else dataclasses.replace(recall.needle, kinds=(name,))
        return needle(needles, Haystack(text))
    questions = recall.world if name in TASKS else dataclasses.replace(recall.world, kinds=(name,))
    return world(questions, Haystack(text))
