"""Real text with sentences put between its words, and questions at its end.

Letters: N tokens of the text, L tokens that a row predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from titanfunc.data.recall.rows import Row
from titanfunc.data.tokenizers import IntArray
from titanfunc.data.tokens import TokenArray

NEWLINE, SEPARATOR = ord("\n"), 0
BLANKS = np.frombuffer(b" \n\t\r", dtype=np.uint8)


class Question(NamedTuple):
    """A question and its answer, which ends where the question's full stop stands. text ends with a blank."""

    text: str
    answer: str


class Haystack:
    """The text of all documents, one after another as a ring (a longer row comes round again).

    tokens: bytes [N] with separators, which become line breaks. Raises ValueError if it has no blank.
    """

    def __init__(self, text: TokenArray) -> None:
        tokens = np.asarray(text.tokens)
        self.text = np.where(tokens == SEPARATOR, NEWLINE, tokens).astype(np.uint8)
        self._starts = np.flatnonzero(np.isin(self.text, BLANKS)) + 1
        if not len(self._starts):
            raise ValueError("data.path: wanted text with blanks between its words, got none")

    def cut(self, source: np.random.Generator, size: int) -> IntArray:
        """``size`` bytes [size] from a random place, the last of them a blank."""
        end = int(source.choice(self._starts))
        return self.text.take(np.arange(end - size, end), mode="wrap")

    def row(
        self,
        source: np.random.Generator,
        length: int,
        sentences: Sequence[str],
        depths: Sequence[float],
        questions: Sequence[Question],
    ) -> Row:
        """A row [L + 1]: text with ``sentences`` between its words, then a line for each question with its answer.

        depths: where each sentence stands in the text, from 0 (its start) to 1 (its end), ascending; it goes to the
        nearest start of a word. Raises ValueError if no byte is left for the text.
        """
        needles = [f"{sentence} ".encode("ascii") for sentence in sentences]
        tail, answers = _ask(questions)
        size = length + 1 - len(tail) - sum(map(len, needles))
        if size < 1:
            raise ValueError(f"length: wanted at least {length + 1 - size} for these sentences, got {length}")
        text = self.cut(source, size)
        starts = np.concatenate([[0], np.flatnonzero(np.isin(text, BLANKS)) + 1])
        pieces, done = [], 0
        for needle, depth in zip(needles, depths, strict=True):
            place = _nearest(starts, depth * size)
            pieces += [text[done:place], np.frombuffer(needle, dtype=np.uint8)]
            done = place
        tokens = np.concatenate([*pieces, text[done:], tail])
        return Row(tokens, np.concatenate([np.zeros(len(tokens) - len(tail), dtype=bool), answers]))


def _ask(questions: Sequence[Question]) -> tuple[IntArray, IntArray]:
    """The lines at a row's end, as bytes [n] and which of them are answers [n]."""
    lines = [(f"\n{question.text}", question.answer) for question in questions]
    text = "".join(f"{before}{answer}." for before, answer in lines)
    mask = np.concatenate([np.repeat([False, True, False], [len(before), len(answer), 1]) for before, answer in lines])
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8), mask


def _nearest(places: IntArray, wanted: float) -> int:
    """The one of the ascending ``places`` [n] that is nearest to ``wanted``."""
    after = min(int(np.searchsorted(places, wanted)), len(places) - 1)
    before = max(after - 1, 0)
    return int(places[before] if wanted - places[before] < places[after] - wanted else places[after])
