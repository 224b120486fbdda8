"""How a configuration refuses a value: one line that names the field, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def require(condition: bool, field: str, wanted: str, got: Any) -> None:
    """Raise ``ValueError("field: wanted ..., got ...")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{field}: wanted {wanted}, got {got!r}")


def require_positive(owner: object, fields: Iterable[str], prefix: str = "") -> None:
    """Raise ``ValueError`` for the first of ``fields`` on ``owner`` that is not an int of at least 1."""
    for field in fields:
        value = getattr(owner, field)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(ok, prefix + field, "a whole number of at least 1", value)


def require_choice(value: Any, field: str, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    require(value in choices, field, "one of " + ", ".join(choices), value)


def require_whole(owner: object, fields: Iterable[str], prefix: str = "") -> None:
    """Raise ``ValueError`` for the first of ``fields`` on ``owner`` that is not an int of at least 0."""
    for field in fields:
        value = getattr(owner, field)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        require(ok, prefix + field, "a whole number of at least 0", value)


def require_number(value: Any, field: str) -> None:
    """Raise ``ValueError`` unless ``value`` is an int or a float."""
    require(isinstance(value, int | float) and not isinstance(value, bool), field, "a number", value)
