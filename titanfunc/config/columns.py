"""Whether a table has the column that holds the text, told by its first row before anything slow is imported."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from titanfunc.config._check import require

_LINE_BYTES = 16 << 20


def require_column(path: Path, column: str) -> None:
    """Raise ValueError for a .jsonl or .parquet file without ``column``.

    What cannot be read, or is no table, is not judged here: whoever reads all of it names the line.
    """
    names = _parquet_columns(path) if path.name.endswith(".parquet") else _first_keys(path)
    if names is not None:
        require(column in names, "data.column", f"one that {path} has ({', '.join(names)[:300]})", column)


def _first_keys(path: Path) -> list[str] | None:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            line = b"\n"
            while line.isspace():
                line = file.readline(_LINE_BYTES)
        row: Any = json.loads(line.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None
    return list(row) if isinstance(row, dict) else None


def _parquet_columns(path: Path) -> list[str] | None:
    import pyarrow
    from pyarrow.parquet import read_schema

    try:
        return list(read_schema(path).names)
    except (pyarrow.ArrowException, OSError, MemoryError):
        return None
