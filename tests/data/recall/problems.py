"""Text and tasks for the tests of recall rows."""

import re

import numpy as np

from titanfunc.config.data import DataConfig
from titanfunc.config.recall import RecallConfig
from titanfunc.data.recall import make_task
from titanfunc.data.tokenizers import byte_tokenizer
from titanfunc.data.tokens import tokenize

WORDS = ("the", "session", "of", "congress", "began", "and", "members", "came", "from", "every", "state", "to", "hear")


def text(seed: int = 0, words: int = 4000):
    """Two documents of lower-case words, so that a capital letter marks what a task put in."""
    drawn = np.random.default_rng(seed).choice(WORDS, size=words).tolist()
    half = words // 2
    return tokenize([" ".join(drawn[:half]), " ".join(drawn[half:])], byte_tokenizer())


def make(name: str, seq_len: int = 700, batch_size: int = 4, seed: int = 0, **recall):
    config = DataConfig(task="", seq_len=seq_len, batch_size=batch_size, seed=seed, recall=RecallConfig(**recall))
    return make_task(name, config, text())


def decode(tokens) -> str:
    return bytes(tokens.tolist()).decode("ascii")


def answers(tokens, weights) -> list[str]:
    """The text of every run of weighted predictions of a row [L + 1]."""
    inside, found = False, []
    for token, weight in zip(tokens[1:].tolist(), weights.tolist(), strict=True):
        if weight:
            found = [*found, ""] if not inside else found
            found[-1] += chr(token)
        inside = bool(weight)
    return found


def split_row(tokens, patterns: dict[str, re.Pattern]):
    """A row's text, and its questions as (name of the pattern that the line matches, the pattern's groups)."""
    *body, last = decode(tokens).split("\n")  # the text may hold a line break too, where documents meet
    questions = []
    while found := [(name, match.groups()) for name, pattern in patterns.items() if (match := pattern.fullmatch(last))]:
        questions = [found[0], *questions]
        *body, last = body
    return "\n".join([*body, last]), questions
