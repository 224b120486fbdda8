"""Questions and answers as a person reads them."""

import re

import pytest

from tests.data.recall.problems import make
from tests.evals.oracle import PARAMS, oracle
from titanfunc.config.recall import MQARConfig, RecallConfig
from titanfunc.evals import show_answers


def lines(name, **recall):
    task = make(name, seq_len=700, **recall)
    return show_answers(oracle(), PARAMS, task, name, RecallConfig(**recall), rows=3).splitlines()


def test_pairs_by_number():
    shown = lines("mqar", mqar=MQARConfig(min_pairs=2))
    assert len(shown) == 3
    assert all(re.fullmatch(r"key \d+ -> \d+ \(right\)", line) for line in shown)


@pytest.mark.parametrize(("name", "question"), [("needle", "The .* is"), ("world", "Where .* In the")])
def test_questions_in_words_and_what_was_wanted_instead(name, question):
    for line in lines(name):
        assert re.fullmatch(rf"{question} -> .* \((right|wrong: [0-9a-z-]+)\)", line, flags=re.DOTALL)
    assert any("wrong" in line for line in lines(name))


def test_a_long_answer_is_cut():
    (line, *_) = lines("copying")
    assert re.fullmatch(r"again ->( \d+){16} \(wrong:( \d+){16}\)", line)
