"""The simulated world, checked against a reader that knows only the sentences."""

import re

import numpy as np
import pytest

from tests.data.recall.problems import answers, make, split_row
from titanfunc.config import phrases
from titanfunc.config.recall import WorldConfig
from titanfunc.data.recall.world import simulate

PATTERN = {
    action: re.compile("|".join(re.sub(r"\\{(\w+)\\}", r"(\\w+)", re.escape(form)) for form in forms))
    for action, forms in (("move", phrases.MOVES), ("take", phrases.TAKES), ("drop", phrases.DROPS))
}
QUESTION = {
    kind: re.compile(re.sub(r"\\{(\w+)\\}", r"(\\w+)", re.escape(form)) + r"(\w+)\.")
    for kind, form in phrases.QUESTIONS.items()
}
FACT = re.compile("|".join(f"(?:{p.pattern})" for p in PATTERN.values()))


def parse(fact):
    for action, pattern in PATTERN.items():
        if found := pattern.fullmatch(fact):
            return action, *(word for word in found.groups() if word)
    raise AssertionError(fact)


def follow(facts):
    """(person -> place, thing -> places it was in, thing -> carrier), by the sentences alone."""
    at, been, carrier = {}, {}, {}
    for action, who, what in map(parse, facts):
        if action == "move":
            assert at.get(who) != what
            at[who] = what
            for thing in (t for t, c in carrier.items() if c == who):
                been[thing].append(what)
        elif action == "take":
            assert what not in carrier
            assert what not in been or been[what][-1] == at[who]
            been.setdefault(what, [at[who]])
            carrier[what] = who
        else:
            assert carrier.pop(what) == who
    return at, been, carrier


def true_answer(facts, kind, words):
    at, been, _ = follow(facts)
    if kind == "qa1":
        return at[words[0]]
    if kind == "qa2":
        return been[words[0]][-1]
    assert been[words[0]].count(words[1]) == 1
    return been[words[0]][been[words[0]].index(words[1]) - 1]


def read_row(tokens):
    body, questions = split_row(tokens, QUESTION)
    facts = [found[0] for found in FACT.finditer(body)]
    return facts, [(kind, words[:-1], words[-1]) for kind, words in questions]


@pytest.mark.parametrize("seed", range(40))
def test_a_story_is_possible_and_every_question_is_answered_by_its_last_fact(seed):
    story = simulate(np.random.default_rng(seed), 14)
    assert len(story.facts) == 14
    for kind, all_asked in story.asked.items():
        for asked in all_asked:
            words = QUESTION[kind].fullmatch(f"{asked.question.text}{asked.question.answer}.").groups()[:-1]
            assert true_answer(story.facts, kind, words) == asked.question.answer
            # The rest of the story changes nothing, and without the last fact the answer is not known yet.
            until = story.facts[: asked.last + 1]
            assert true_answer(until, kind, words) == asked.question.answer
            assert words[0] in until[-1] or parse(until[-1])[1] == follow(until)[2].get(words[0])


def test_stories_answer_every_kind():
    stories = [simulate(np.random.default_rng(seed), 10) for seed in range(60)]
    for kind in phrases.QUESTIONS:
        assert sum(bool(story.asked[kind]) for story in stories) > 20


@pytest.mark.parametrize("kinds", [("qa1",), ("qa2",), ("qa3",), ("qa1", "qa2", "qa3")])
def test_training_rows_tell_their_story_in_order_and_ask_true_questions(kinds):
    config = WorldConfig(kinds=kinds, min_facts=5, max_facts=9, queries=3)
    batch = make("world", batch_size=30, world=config).batch(0)
    counts, seen, questions = set(), set(), set()
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        facts, asked = read_row(tokens)
        counts.add(len(facts))
        questions.add(len(asked))
        assert len(set(asked)) == len(asked)
        assert answers(tokens, weights) == [answer for *_, answer in asked]
        for kind, words, answer in asked:
            seen.add(kind)
            assert true_answer(facts, kind, words) == answer
    assert counts == {5, 6, 7, 8, 9} and seen == set(kinds) and max(questions) == 3


@pytest.mark.parametrize("kind", phrases.QUESTIONS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_in_a_test_row_all_evidence_was_read_by_its_depth(kind, depth):
    tokens, weights = make(kind).examples(900, depth, 10)
    for row, weight in zip(tokens, weights, strict=True):
        facts, asked = read_row(row)
        ((asked_kind, words, answer),) = asked
        assert asked_kind == kind and answers(row, weight) == [answer]
        body, _ = split_row(row, QUESTION)
        # Of the text alone, how much stands before each fact.
        places, removed = [], 0
        for found in FACT.finditer(body):
            places.append(found.start() - removed)
            removed += len(found[0]) + 1
        size = len(body) - removed
        sure = [
            i
            for i in range(len(facts))
            if abs(places[i] - depth * size) < 10 and _answered(facts[: i + 1], kind, words) == answer
        ]
        assert sure, (places, size)


def _answered(facts, kind, words):
    try:
        return true_answer(facts, kind, words)
    except (KeyError, AssertionError, ValueError):
        return None
