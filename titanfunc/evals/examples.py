"""A few questions of a recall task with what a model generates as answers, to be read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titanfunc import tree
from titanfunc.config.recall import LEVELS, RecallConfig
from titanfunc.data.recall import RecallTask
from titanfunc.generation import generate
from titanfunc.models.base import Model


def show_answers(
    model: Model, params: Any, task: RecallTask, name: str, recall: RecallConfig, *, rows: int = 4, longest: int = 16
) -> str:
    """A line for the first question of each of some test rows: question, greedy answer, and what was wanted if wrong.

    name: of the task, one of TASKS; its needle or evidence stands half-way, and mqar has ``min_pairs``. Rows have the
    task's training length. longest: tokens that are generated at most.
    """
    level = {"depth": 0.5, "pairs": recall.mqar.min_pairs, "": 0}[LEVELS[name]]
    device = tree.leaves(params)[0].device
    lines = []
    for tokens, weights in zip(*task.examples(task.seq_len, level, rows, task.seed), strict=True):
        begin = int(weights.argmax()) + 1
        length = int(weights[begin - 1 :].cumprod(0).sum())
        wanted = tokens[begin : begin + min(length, longest)]
        prompt = tokens[:begin].unsqueeze(0).to(device)
        given = generate(model, params, prompt, len(wanted), temperature=0)[0].cpu()
        if LEVELS[name] == "depth":
            question, show = _text(prompt[0].tolist()).rpartition("\n")[2].strip(), _text
        else:
            question, show = f"key {int(tokens[begin - 1])}" if name == "mqar" else "again", _ids
        mark = "right" if given.equal(wanted) else f"wrong: {show(wanted.tolist())}"
        lines.append(f"{question} -> {show(given.tolist())} ({mark})")
    return "\n".join(lines)


def _text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))
