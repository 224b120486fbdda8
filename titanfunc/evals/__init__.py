"""How good a model is: perplexity and bits per byte, recall against length, loss by position."""

from titanfunc.evals.examples import show_answers
from titanfunc.evals.perplexity import evaluate
from titanfunc.evals.positions import buckets, by_position
from titanfunc.evals.reader import Reader, Reading, make_reader
from titanfunc.evals.recall import Score, evaluate_answers, score

__all__ = [
    "Reader",
    "Reading",
    "Score",
    "buckets",
    "by_position",
    "evaluate",
    "evaluate_answers",
    "make_reader",
    "score",
    "show_answers",
]
