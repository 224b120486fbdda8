"""How a configuration refuses a value: one line that names the field, what was wanted and what came."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

SIZE, STEPS, SEED = 2**31 - 1, 2**48, 2**63 - 1
"""The greatest whole numbers that settings take: sizes, unless they say less; steps; seeds."""


def require(condition: bool, field: str, wanted: str, got: Any) -> None:
    """Raise ``ValueError("field: wanted ..., got ...")`` unless ``condition`` holds; None is told as null."""
    if not condition:
        raise ValueError(f"{field}: wanted {wanted}, got {'null' if got is None else repr(got)}")


def is_whole(value: Any, least: int = 0, most: int = SIZE) -> bool:
    """Whether ``value`` is an int from ``least`` to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float, and no int that a float cannot hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_positive(owner: object, fields: Iterable[str], prefix: str = "", most: int = SIZE) -> None:
    """Raise ``ValueError`` for the first of ``fields`` on ``owner`` that is not an int from 1 to ``most``."""
    for field in fields:
        _require_int(getattr(owner, field), prefix + field, 1, most)


def require_whole(owner: object, fields: Iterable[str], prefix: str = "", most: int = SIZE) -> None:
    """Raise ``ValueError`` for the first of ``fields`` on ``owner`` that is not an int from 0 to ``most``."""
    for field in fields:
        _require_int(getattr(owner, field), prefix + field, 0, most)


def _require_int(value: Any, field: str, least: int, most: int) -> None:
    too_great = isinstance(value, int) and value > most
    wanted = f"a whole number of at most {most}" if too_great else f"a whole number of at least {least}"
    require(is_whole(value, least, most), field, wanted, value)


def require_choice(value: Any, field: str, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    require(value in choices, field, "one of " + ", ".join(choices), value)


def require_number(value: Any, field: str) -> None:
    """Raise ``ValueError`` unless ``value`` is an int or a float; infinities and NaN are floats."""
    require(isinstance(value, float) or is_number(value), field, "a number", value)
