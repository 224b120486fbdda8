"""Needles in a haystack of real text. Letters: L tokens that a row predicts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from titanfunc.config import phrases
from titanfunc.config.recall import NeedleConfig
from titanfunc.data.recall.haystack import Haystack, Question
from titanfunc.data.recall.rows import Maker, Row


class Needle(NamedTuple):
    """What a needle says: its sentence for the text, and its question with the answer."""

    sentence: str
    question: Question


def needle(config: NeedleConfig, haystack: Haystack) -> Maker:
    """Rows [L + 1] of text with needles in it and questions at the end.

    Training: several needles of any of the kinds at random depths, all of distinct names, asked for in random order;
    at most one is a pass key without a name, as a test has it. Test: one needle at the given depth.
    """

    def train(source: np.random.Generator, length: int) -> Row:
        count = int(source.integers(config.min_needles, config.max_needles + 1))
        kinds = source.choice(config.kinds, size=count).tolist()
        plain = source.random() < 0.5
        needles = []
        for kind, name in zip(kinds, made_up_words(source, count), strict=True):
            nameless = plain and kind == "passkey"
            needles.append(draw_needle(source, kind, "" if nameless else name, config.uuid_digits))
            plain = plain and not nameless
        asked = source.permutation(count)[: config.queries or count]
        sentences = [each.sentence for each in needles]
        depths = np.sort(source.random(count)).tolist()
        return haystack.row(source, length, sentences, depths, [needles[i].question for i in asked])

    def test(source: np.random.Generator, length: int, level: float) -> Row:
        kind = str(source.choice(config.kinds))
        name = "" if kind == "passkey" else made_up_words(source, 1)[0]
        drawn = draw_needle(source, kind, name, config.uuid_digits)
        return haystack.row(source, length, [drawn.sentence], [level], [drawn.question])

    return Maker(train, test)


def draw_needle(source: np.random.Generator, kind: str, name: str, uuid_digits: int) -> Needle:
    """A needle of a kind with a random value; a pass key may go without a name ("")."""
    phrase = phrases.NEEDLES[kind] if name else phrases.PLAIN_PASSKEY
    value = draw_value(source, kind, uuid_digits)
    return Needle(phrase.sentence.format(name=name, value=value), Question(phrase.question.format(name=name), value))


def draw_value(source: np.random.Generator, kind: str, uuid_digits: int) -> str:
    """A random pass key, number, code or word; numbers do not begin with 0."""
    if kind == "word":
        return made_up_words(source, 1)[0]
    if kind == "uuid":
        digits = "".join(f"{digit:x}" for digit in source.integers(0, 16, size=uuid_digits))
        if uuid_digits < phrases.UUID_DIGITS:
            return digits
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    count = phrases.PASSKEY_DIGITS if kind == "passkey" else phrases.NUMBER_DIGITS
    return str(source.integers(10 ** (count - 1), 10**count))


def made_up_words(source: np.random.Generator, count: int) -> list[str]:
    """Distinct words of WORD_SYLLABLES syllables, all pronounceable."""
    base = len(phrases.SYLLABLES)
    numbers = source.choice(base**phrases.WORD_SYLLABLES, size=count, replace=False)
    syllables = numbers[:, None] // base ** np.arange(phrases.WORD_SYLLABLES) % base
    return ["".join(phrases.SYLLABLES[i] for i in word) for word in syllables.tolist()]
