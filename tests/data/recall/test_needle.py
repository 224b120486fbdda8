"""Needles: stated once each, asked for by name, answered by what was stated."""

import re

import numpy as np
import pytest

from tests.data.recall.problems import answers, decode, make, split_row
from titanfunc.config import phrases
from titanfunc.config.recall import NeedleConfig
from titanfunc.data.recall.needle import draw_value, made_up_words

ASKED = re.compile(r"The ([a-z ]+?)(?: of ([a-z]+))? is ([0-9a-z-]+)\.")
VALUES = {
    "passkey": r"[1-9]\d{4}",
    "number": r"[1-9]\d{6}",
    "uuid": r"[0-9a-f]{8}",
    "word": r"([bdfgklmnprstvz][aeiou]){3}",
}
NAMES = {"pass key": "passkey", "special number": "number", "serial code": "uuid", "secret word": "word"}


def read(tokens):
    """({(kind, name): value} of what the text states, [(kind, name, value)] of the questions)."""
    body, questions = split_row(tokens, {"": ASKED})
    return [found.groups() for found in ASKED.finditer(body)], [found for _, found in questions]


@pytest.mark.parametrize("kinds", [(kind,) for kind in phrases.NEEDLES] + [tuple(phrases.NEEDLES)])
@pytest.mark.parametrize("queries", [0, 2])
def test_training_rows_state_distinct_names_and_ask_for_what_they_state(kinds, queries):
    config = NeedleConfig(kinds=kinds, min_needles=1, max_needles=6, queries=queries)
    batch = make("needle", batch_size=40, needle=config).batch(0)
    counts, seen, plain = set(), set(), 0
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        stated, asked = read(tokens)
        counts.add(len(stated))
        names = [(kind, name) for kind, name, _ in stated]
        given = [name for _, name in names if name is not None]
        assert len(set(given)) == len(given) >= len(names) - 1  # one may be a pass key without a name
        plain += len(names) - len(given)
        assert len(asked) == min(queries or len(stated), len(stated)) and set(asked) <= set(stated)
        assert answers(tokens, weights) == [value for _, _, value in asked]
        for kind, _, value in stated:
            seen.add(NAMES[kind])
            assert re.fullmatch(VALUES[NAMES[kind]], value)
    assert counts == {1, 2, 3, 4, 5, 6} and seen == set(kinds)
    assert (plain > 0) == ("passkey" in kinds)


@pytest.mark.parametrize("kind", phrases.NEEDLES)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_test_row_has_one_needle_at_its_depth_and_one_question(kind, depth):
    tokens, weights = make(kind).examples(600, depth, 8)
    for row, weight in zip(tokens, weights, strict=True):
        stated, asked = read(row)
        assert len(stated) == 1 and asked == stated
        assert (stated[0][1] is None) == (kind == "passkey")  # the plain form
        assert answers(row, weight) == [stated[0][2]]
        body, _ = split_row(row, {"": ASKED})
        sentence = re.search(r"The [a-z ]+ is [0-9a-z-]+\.( Keep it: \d+\.)? ", body)
        size = len(body) - len(sentence[0])
        assert abs(sentence.start() - depth * size) < 10


def test_a_pass_key_is_stated_twice_in_its_sentence():
    tokens, _ = make("passkey").examples(300, 0.5, 1)
    key = re.search(r"The pass key is (\d{5})\. Keep it: (\d{5})\. ", decode(tokens[0]))
    assert key[1] == key[2]


def test_a_whole_uuid_has_dashes():
    source = np.random.default_rng(0)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", draw_value(source, "uuid", 32))
    tokens, weights = make("uuid", needle=NeedleConfig(uuid_digits=32)).examples(300, 0.5, 1)
    assert len(answers(tokens[0], weights[0])[0]) == 36


def test_made_up_words_are_distinct_and_of_one_length():
    words = made_up_words(np.random.default_rng(0), 2000)
    assert len(set(words)) == 2000 and {len(word) for word in words} == {phrases.WORD_LETTERS}
    assert {word[:2] for word in words} == set(phrases.SYLLABLES) == {word[-2:] for word in words}


def test_values_have_the_letters_that_the_configuration_counts_with():
    source = np.random.default_rng(0)
    for kind in phrases.NEEDLES:
        for digits in (8, 32):
            assert len(draw_value(source, kind, digits)) == phrases.value_letters(kind, digits)
