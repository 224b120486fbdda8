"""titanfunc: Titans-style language models as pure functions over parameter pytrees.

``import titanfunc as tf`` costs nothing: each part is imported when it is first used
(``tf.memory``, ``tf.models``, ``tf.optim``, ``tf.train``, ...).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PARTS = (
    "config",
    "data",
    "evals",
    "generation",
    "memory",
    "models",
    "nn",
    "ops",
    "optim",
    "report",
    "rng",
    "train",
    "tree",
)


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"titanfunc.{name}")
    if name == "generate":
        return importlib.import_module("titanfunc.generation").generate
    raise AttributeError(f"module 'titanfunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PARTS, "generate"]
