"""How good a model is: perplexity and bits per byte."""

from titanfunc.evals.perplexity import evaluate

__all__ = ["evaluate"]
