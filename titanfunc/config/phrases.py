"""The words and sentences of the recall tasks, as plain text.

They stand on this floor, and not beside the code that draws with them, so that whether a row has room for its task
is told before torch is imported. All of it is ASCII: a letter is a byte is a token.
"""

from __future__ import annotations

from typing import NamedTuple

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
WORD_SYLLABLES = 3
WORD_LETTERS = 2 * WORD_SYLLABLES
"""Made-up words: 70^3 of them, pronounceable, all of one length, and none that a model knows from its text."""


class Phrase(NamedTuple):
    """A needle. sentence: how the text states it. question: what stands before the answer at the end of a row."""

    sentence: str
    question: str


NEEDLES = {
    "passkey": Phrase("The pass key of {name} is {value}. Keep it: {value}.", "The pass key of {name} is "),
    "number": Phrase("The special number of {name} is {value}.", "The special number of {name} is "),
    "uuid": Phrase("The serial code of {name} is {value}.", "The serial code of {name} is "),
    "word": Phrase("The secret word of {name} is {value}.", "The secret word of {name} is "),
}
PLAIN_PASSKEY = Phrase("The pass key is {value}. Keep it: {value}.", "The pass key is ")
PASSKEY_DIGITS, NUMBER_DIGITS, UUID_DIGITS = 5, 7, 32

PEOPLE = ("Anna", "Boris", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo")
# No name begins another, so that an answer's letters say where it ends.
PLACES = ("attic", "barn", "cellar", "garden", "kitchen", "library", "office", "tower")
THINGS = ("apple", "candle", "hammer", "lantern", "mirror", "violin")
MOVES = ("{person} went to the {place}.", "{person} walked into the {place}.", "{person} moved to the {place}.")
TAKES = ("{person} picked up the {thing}.", "{person} took the {thing}.")
DROPS = ("{person} put down the {thing}.", "{person} left the {thing} behind.")
QUESTIONS = {
    "qa1": "Where is {person}? In the ",
    "qa2": "Where is the {thing}? In the ",
    "qa3": "Where had the {thing} been before the {place}? In the ",
}

BETWEEN = 1
"""The blank that follows a sentence in the text."""
AROUND = 2
"""The line break before a question, and the full stop after its answer."""


def value_letters(kind: str, uuid_digits: int) -> int:
    """Letters of a needle's value.

    >>> value_letters("number", 8), value_letters("uuid", 8), value_letters("uuid", 32)
    (7, 8, 36)
    """
    dashes = 4 if uuid_digits == UUID_DIGITS else 0
    return {
        "passkey": PASSKEY_DIGITS,
        "number": NUMBER_DIGITS,
        "uuid": uuid_digits + dashes,
        "word": WORD_LETTERS,
    }[kind]


def needle_letters(kind: str, uuid_digits: int) -> tuple[int, int]:
    """Letters that a named needle takes in the text, and that its question with the answer takes."""
    phrase, letters = NEEDLES[kind], value_letters(kind, uuid_digits)
    name, value = "n" * WORD_LETTERS, "v" * letters
    sentence = len(phrase.sentence.format(name=name, value=value)) + BETWEEN
    return sentence, len(phrase.question.format(name=name)) + letters + AROUND


def fact_letters() -> int:
    """Letters of the longest sentence of the simulated world."""
    longest = {"person": _longest(PEOPLE), "place": _longest(PLACES), "thing": _longest(THINGS)}
    return max(len(text.format(**longest)) for text in (*MOVES, *TAKES, *DROPS)) + BETWEEN


def question_letters(kind: str) -> int:
    """Letters of the longest question of a kind about the simulated world, with its answer."""
    longest = {"person": _longest(PEOPLE), "place": _longest(PLACES), "thing": _longest(THINGS)}
    return len(QUESTIONS[kind].format(**longest)) + len(longest["place"]) + AROUND


def _longest(words: tuple[str, ...]) -> str:
    return max(words, key=len)
