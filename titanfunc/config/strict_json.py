"""Json from somewhere else: read as data of a bounded size and depth, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 4 * 2**20
MOST_LEVELS = 32


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """What a json file says. Raises ValueError for what ``parse_json`` refuses, a larger file, and one that is a link
    or no file; OSError if it cannot be read."""
    require_plain(path)
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"{path.name}: wanted at most {most_bytes:,} bytes, got more")
    return parse_json(raw, path.name)


def parse_json(raw: bytes, name: str) -> Any:
    """What json says. Raises ValueError, beginning with ``name``, for anything that is not json proper: keys that come
    twice, numbers that are not finite, nesting deeper than MOST_LEVELS, bytes that are not UTF-8."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_once, parse_float=_finite, parse_constant=_refuse_constant
        )
        _require_shallow(value)
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return value


def require_plain(path: Path) -> None:
    """Raise ValueError unless a path is a file of its own: no link, folder, pipe or device."""
    if path.is_symlink():
        raise ValueError(f"{path.name}: wanted a file, got a link")
    if not path.is_file():
        raise ValueError(f"{path.name}: wanted a file, got {'something else' if path.exists() else 'nothing'}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} comes twice")
            seen.add(name)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of json")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS):
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")
