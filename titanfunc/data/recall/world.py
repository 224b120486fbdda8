"""Questions about a small simulated world whose facts are scattered in real text.

People walk between places, pick things up, carry them and put them down. After bAbI's first three tasks and BABILong's
setting (arXiv 2406.10149), with a world and sentences of our own: results compare with neither. Letters: L tokens that
a row predicts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from titanfunc.config import phrases
from titanfunc.config.recall import WorldConfig
from titanfunc.data.recall.haystack import Haystack, Question
from titanfunc.data.recall.rows import Maker, Row

Item = TypeVar("Item")
CAST, PROPS = 4, 3
"""People and things of one story."""


class Asked(NamedTuple):
    """A question that a story answers. last: the last of the facts that it rests on."""

    question: Question
    last: int


class Story(NamedTuple):
    """facts: sentences in order. asked: what may be asked when all of them have happened, by kind."""

    facts: list[str]
    asked: dict[str, list[Asked]]


class Visit(NamedTuple):
    """Someone or something came to a place by the fact of that number."""

    place: str
    fact: int


def world(config: WorldConfig, haystack: Haystack) -> Maker:
    """Rows [L + 1] of text with a story's facts in it, in order, and questions at the end; an answer is a place.

    Training: facts at random depths, several questions. Test: one question, and the last fact that it rests on stands
    at the given depth, the others before and after it as the story goes: by that depth all of the evidence was read.
    """

    def train(source: np.random.Generator, length: int) -> Row:
        story, first = _tell(source, config)
        rest = [each for kind in config.kinds for each in story.asked[kind] if each != first]
        more = source.permutation(len(rest))[: config.queries - 1]
        asked = [first, *(rest[i] for i in more)]
        questions = [asked[i].question for i in source.permutation(len(asked))]
        depths = np.sort(source.random(len(story.facts))).tolist()
        return haystack.row(source, length, story.facts, depths, questions)

    def test(source: np.random.Generator, length: int, level: float) -> Row:
        story, asked = _tell(source, config)
        before = np.sort(source.uniform(0, level, asked.last)).tolist()
        after = np.sort(source.uniform(level, 1, len(story.facts) - asked.last - 1)).tolist()
        return haystack.row(source, length, story.facts, [*before, level, *after], [asked.question])

    return Maker(train, test)


def _tell(source: np.random.Generator, config: WorldConfig) -> tuple[Story, Asked]:
    """A story and a question about it of a random one of the kinds. Stories that answer none of that kind are left."""
    kind = _pick(source, config.kinds)
    while True:
        story = simulate(source, int(source.integers(config.min_facts, config.max_facts + 1)))
        if story.asked[kind]:
            return story, _pick(source, story.asked[kind])


def simulate(source: np.random.Generator, count: int) -> Story:
    """``count`` facts about some people and things, and every question of each kind that they answer.

    A thing is first known to be where somebody picks it up. qa1 rests on a person's last walk; qa2 on the walk of who
    has the thing (or left it) and on the taking (or leaving); qa3 on the taking and the walks to both of the places.
    """
    people = source.permutation(phrases.PEOPLE)[:CAST].tolist()
    things = source.permutation(phrases.THINGS)[:PROPS].tolist()
    at: dict[str, Visit] = {}  # of people
    visits: dict[str, list[Visit]] = {}  # of things
    holder: dict[str, str] = {}
    touched: dict[str, int] = {}  # the last fact that says where a thing is
    facts: list[str] = []

    def say(forms: tuple[str, ...], **words: str) -> None:
        facts.append(_pick(source, forms).format(**words))

    for fact in range(count):
        takes = [
            (person, thing)
            for person in people
            for thing in things
            if person in at
            and thing not in holder
            and (thing not in visits or visits[thing][-1].place == at[person].place)
        ]
        chance = source.random()
        if holder and chance < 0.15:
            thing = _pick(source, list(holder))
            say(phrases.DROPS, person=holder.pop(thing), thing=thing)
            touched[thing] = fact
        elif takes and chance < 0.5:
            person, thing = _pick(source, takes)
            say(phrases.TAKES, person=person, thing=thing)
            holder[thing], touched[thing] = person, fact
            if thing not in visits:
                visits[thing] = [Visit(at[person].place, fact)]
        else:
            person = _pick(source, people)
            place = _pick(source, [p for p in phrases.PLACES if person not in at or p != at[person].place])
            say(phrases.MOVES, person=person, place=place)
            at[person] = Visit(place, fact)
            for thing in (thing for thing, carrier in holder.items() if carrier == person):
                visits[thing].append(at[person])
                touched[thing] = fact
    return Story(facts, _questions(at, visits, touched))


def _questions(at: dict[str, Visit], visits: dict[str, list[Visit]], touched: dict[str, int]) -> dict[str, list[Asked]]:
    """Everything that can be asked at a story's end; qa3 only about a place where the thing came just once."""
    form = phrases.QUESTIONS
    where = [Asked(Question(form["qa1"].format(person=who), visit.place), visit.fact) for who, visit in at.items()]
    which = [
        Asked(Question(form["qa2"].format(thing=thing), been[-1].place), touched[thing])
        for thing, been in visits.items()
    ]
    before = [
        Asked(Question(form["qa3"].format(thing=thing, place=here.place), earlier.place), here.fact)
        for thing, been in visits.items()
        for earlier, here in itertools.pairwise(been)
        if [visit.place for visit in been].count(here.place) == 1
    ]
    return {"qa1": where, "qa2": which, "qa3": before}


def _pick(source: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of them; numpy's own choice would make an array of them first."""
    return items[int(source.integers(len(items)))]
