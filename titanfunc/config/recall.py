"""What the recall tasks draw: frozen dataclasses, checked when they are made, and the room that a row needs.

A row of length L has L + 1 tokens (bytes) and predicts L of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from titanfunc.config import phrases
from titanfunc.config._check import require, require_choice, require_number, require_positive, require_whole

TASKS = ("mqar", "needle", "world", "copying")
"""What ``data.task`` can be."""
WITHOUT_TEXT = ("mqar", "copying")
"""Tasks whose rows hold no text of a corpus."""
TESTS = {
    "mqar": "mqar",
    **dict.fromkeys(phrases.NEEDLES, "needle"),
    **dict.fromkeys(phrases.QUESTIONS, "world"),
    "copying": "copying",
}
"""What an evaluation asks for, and the task that it belongs to."""
LEVELS = {"mqar": "pairs", "needle": "depth", "world": "depth", "copying": ""}
"""What a test of a task varies besides the length."""
MAX_PAIRS = 96


@dataclass(frozen=True)
class MQARConfig:
    """Associative recall: key-value pairs scattered in noise, then keys that ask for their values.

    min_pairs, max_pairs: distinct pairs a row. queries: how many are asked for (0: all), in random order.
    """

    min_pairs: int = 4
    max_pairs: int = 32
    queries: int = 0

    def __post_init__(self) -> None:
        place = "data.recall.mqar."
        require_positive(self, ("min_pairs", "max_pairs"), place)
        require_whole(self, ("queries",), place)
        ok = self.min_pairs <= self.max_pairs <= MAX_PAIRS
        wanted = f"from min_pairs = {self.min_pairs} to {MAX_PAIRS}, the keys there are"
        require(ok, place + "max_pairs", wanted, self.max_pairs)


@dataclass(frozen=True)
class NeedleConfig:
    """Needles in a haystack of real text; a training row holds many, a test row one.

    kinds: drawn from for each needle. min_needles, max_needles: needles a training row, all names distinct.
    queries: how many are asked for at its end (0: all). uuid_digits: hexadecimal digits of a uuid's value; 32 are
    written with dashes, 8-4-4-4-12.
    """

    kinds: tuple[str, ...] = tuple(phrases.NEEDLES)
    min_needles: int = 2
    max_needles: int = 6
    queries: int = 0
    uuid_digits: int = 8

    def __post_init__(self) -> None:
        place = "data.recall.needle."
        _require_kinds(self.kinds, place + "kinds", phrases.NEEDLES)
        require_positive(self, ("min_needles", "max_needles", "uuid_digits"), place)
        require_whole(self, ("queries",), place)
        ok = self.min_needles <= self.max_needles
        require(ok, place + "max_needles", f"at least min_needles = {self.min_needles}", self.max_needles)
        ok = self.uuid_digits <= phrases.UUID_DIGITS
        require(ok, place + "uuid_digits", f"at most {phrases.UUID_DIGITS}", self.uuid_digits)


@dataclass(frozen=True)
class WorldConfig:
    """Questions about a simulated world whose facts are scattered in real text.

    kinds: of the questions: qa1 (one supporting fact), qa2 (two), qa3 (three). min_facts, max_facts: facts a row.
    queries: questions at the end of a training row, at most; a test row has one.
    """

    kinds: tuple[str, ...] = tuple(phrases.QUESTIONS)
    min_facts: int = 6
    max_facts: int = 12
    queries: int = 4

    def __post_init__(self) -> None:
        place = "data.recall.world."
        _require_kinds(self.kinds, place + "kinds", phrases.QUESTIONS)
        require_positive(self, ("min_facts", "max_facts", "queries"), place)
        require(self.min_facts >= 3, place + "min_facts", "at least 3, which qa3 rests on", self.min_facts)
        ok = self.min_facts <= self.max_facts
        require(ok, place + "max_facts", f"at least min_facts = {self.min_facts}", self.max_facts)


@dataclass(frozen=True)
class RecallConfig:
    """The recall tasks; the one named by ``data.task`` is trained on (copying has no settings).

    text_weight: weight in the loss of a token that is no part of an answer, in [0, 1); an answer's tokens have 1.
    """

    text_weight: float = 0.0
    mqar: MQARConfig = field(default_factory=MQARConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self) -> None:
        require_number(self.text_weight, "data.recall.text_weight")
        ok = 0 <= self.text_weight < 1
        require(ok, "data.recall.text_weight", "a number in [0, 1)", self.text_weight)


def least_length(task: str, recall: RecallConfig) -> int:
    """The shortest row, in tokens that it predicts, which holds all that a training row of the task may draw.

    >>> least_length("mqar", RecallConfig(mqar=MQARConfig(max_pairs=8)))
    31
    """
    require_choice(task, "data.task", TASKS)
    if task == "mqar":
        return least_test_length("mqar", recall, recall.mqar.max_pairs)
    if task == "needle":
        needle = recall.needle
        sizes = [phrases.needle_letters(kind, needle.uuid_digits) for kind in needle.kinds]
        asked = min(needle.queries or needle.max_needles, needle.max_needles)
        return needle.max_needles * max(size for size, _ in sizes) + asked * max(size for _, size in sizes)
    if task == "world":
        question = max(phrases.question_letters(kind) for kind in recall.world.kinds)
        return recall.world.max_facts * phrases.fact_letters() + recall.world.queries * question
    return least_test_length("copying", recall)


def least_test_length(test: str, recall: RecallConfig, pairs: int = 0) -> int:
    """The shortest row of a test: one needle, or one question, or this many ``pairs``. Keys: see TESTS.

    Text tasks leave at least one token to the text around them.
    """
    require_choice(test, "tasks", TESTS)
    if test == "mqar":
        return 2 * pairs + 2 * min(recall.mqar.queries or pairs, pairs) - 1
    if TESTS[test] == "needle":
        return sum(phrases.needle_letters(test, recall.needle.uuid_digits))
    if TESTS[test] == "world":
        return recall.world.max_facts * phrases.fact_letters() + phrases.question_letters(test)
    return 2


def require_room(task: str, recall: RecallConfig, seq_len: int) -> None:
    """Raise ValueError unless rows of ``seq_len`` predicted tokens hold what the task may draw."""
    least = least_length(task, recall)
    smaller = {"mqar": "mqar.max_pairs", "needle": "needle.max_needles", "world": "world.max_facts"}.get(task)
    way_out = f"; or lower data.recall.{smaller}" if smaller else ""
    require(seq_len >= least, "data.seq_len", f"at least {least}, for data.task={task}{way_out}", seq_len)


def _require_kinds(kinds: tuple[str, ...], name: str, choices: Collection[str]) -> None:
    ok = isinstance(kinds, tuple) and len(kinds) > 0 and all(kind in tuple(choices) for kind in kinds)
    require(ok and len(set(kinds)) == len(kinds), name, f"a list of some of {', '.join(choices)}", kinds)
