"""Sentences between the words of real text."""

import numpy as np
import pytest

from tests.data.recall.problems import decode, text
from titanfunc.data.recall import Haystack
from titanfunc.data.recall.haystack import Question
from titanfunc.data.tokens import TokenArray

ASK = [Question("Who? ", "me"), Question("Where? ", "there")]
QUESTIONS = "\nWho? me.\nWhere? there."


def row(haystack, depths, sentences=None, length=400, seed=0):
    sentences = sentences or ["NEEDLE." for _ in depths]
    return haystack.row(np.random.default_rng(seed), length, sentences, depths, ASK)


def test_a_row_is_text_then_questions_with_their_answers():
    drawn = row(Haystack(text()), [0.5])
    assert drawn.tokens.shape == drawn.answers.shape == (401,)
    shown = bytes(drawn.tokens.tolist()).decode()
    body, questions = shown[: -len(QUESTIONS)], shown[-len(QUESTIONS) :]
    assert questions == QUESTIONS
    assert bytes(drawn.tokens[drawn.answers].tolist()) == b"methere"
    before, after = body.split("NEEDLE. ")
    assert before[-1] in " \n" and after[-1] in " \n"
    whole = bytes(Haystack(text()).text.tolist()).decode()
    assert before + after in whole + whole  # nothing else was touched (the text is a ring)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_sentence_stands_at_its_depth_at_a_words_start(depth):
    haystack = Haystack(text())
    for seed in range(20):
        shown = decode(row(haystack, [depth], seed=seed).tokens)[: -len(QUESTIONS)]
        place, size = shown.index("NEEDLE. "), len(shown) - len("NEEDLE. ")
        assert abs(place - depth * size) <= len("congress ") / 2 + 1  # half of the longest word
        assert place == 0 or shown[place - 1] in " \n"
        if depth in (0.0, 1.0):
            assert place == depth * size


def test_sentences_keep_their_order_even_at_one_place():
    shown = decode(row(Haystack(text()), [0.3, 0.3, 0.3], ["A.", "B.", "C."]).tokens)
    assert "A. B. C. " in shown


def test_documents_are_joined_and_a_long_row_comes_round():
    haystack = Haystack(TokenArray(np.frombuffer(b"one two\0three\0", dtype=np.uint8), np.array([8, 14])))
    cut = haystack.cut(np.random.default_rng(0), 50)
    shown = bytes(cut.tolist()).decode()
    assert len(cut) == 50 and shown[-1] in " \n"
    assert "one two\nthree\none" in shown


def test_refusals():
    with pytest.raises(ValueError, match=r"^data.path: wanted text with blanks between its words, got none"):
        Haystack(TokenArray(np.frombuffer(b"oneword", dtype=np.uint8), np.array([7])))
    least = len("NEEDLE. ") + len(QUESTIONS)  # and a byte of text; the first token is not predicted
    assert len(row(Haystack(text()), [0.5], length=least).tokens) == least + 1
    with pytest.raises(ValueError, match=rf"^length: wanted at least {least} for these sentences, got {least - 1}"):
        row(Haystack(text()), [0.5], length=least - 1)
