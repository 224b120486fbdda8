"""Documents as one array of tokens: in memory, or put together from files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from titanfunc.data.parts import Unreadable
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokenizers import IntArray, Tokenizer

Tokens: TypeAlias = IntArray | StoredTokens
"""Ids [N] in memory or in a file."""
Rows: TypeAlias = tuple[list[Callable[[int], bytes | memoryview]], list[int]]
"""Where rows of tokens lie: of each what reads it, given its place, and that place."""


class MappedTokens:
    """Tokens [N] that lie in pieces of several arrays or files; none is copied.

    arrays: any number of tokens each. starts: int64 [P], where each piece begins among the N; sources, offsets:
    int64 [P], its array and where it begins there. size: N.
    """

    def __init__(
        self, arrays: Sequence[Tokens], starts: IntArray, sources: IntArray, offsets: IntArray, size: int
    ) -> None:
        self._arrays = arrays
        self._starts, self._ends, self._size = starts, np.append(starts[1:], size), size
        self._sources, self._shift = sources, offsets - starts
        self.dtype: np.dtype[Any] = arrays[0].dtype

    def __len__(self) -> int:
        return self._size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> IntArray:
        whole = np.empty(self._size, dtype=dtype or self.dtype)
        for start, end, source, shift in zip(self._starts, self._ends, self._sources, self._shift, strict=True):
            data = _read(self._arrays[source], int(start + shift), int(end - start))
            whole[start:end] = np.frombuffer(data, dtype=self.dtype)
        return whole

    def take(self, starts: IntArray, size: int) -> IntArray:
        """Rows of ``size`` tokens from each of ``starts`` [B] (below N) on: int64 [B, size]; after the last token comes
        the first. Raises what ``StoredTokens.read`` does."""
        data = b"".join([self._row(start, size) for start in starts.tolist()])
        return np.frombuffer(data, dtype=self.dtype).astype(np.int64).reshape(len(starts), size)

    def locate(self, starts: IntArray, size: int) -> Rows:
        """The rows of ``take``, for ``read_rows``."""
        pieces = within(self._starts, starts) - 1
        sources = self._sources[pieces]
        readers = np.empty(len(self._arrays), dtype=object)
        for source in np.flatnonzero(np.bincount(sources)).tolist():
            readers[source] = _reader(self._arrays[source], size)
        reads = readers[sources].tolist()
        places = ((starts + self._shift[pieces]) * self.dtype.itemsize).tolist()
        for row in np.flatnonzero(starts + size > self._ends[pieces]).tolist():
            reads[row], places[row] = functools.partial(self._row, size=size), int(starts[row])
        return reads, places

    def _row(self, place: int, size: int) -> bytes:
        """The bytes of a row of ``size`` tokens from ``place`` on, over the ends of pieces."""
        found = []
        piece = int(self._starts.searchsorted(place, side="right")) - 1
        while size:
            count = min(size, int(self._ends[piece]) - place)
            found.append(_read(self._arrays[self._sources[piece]], place + int(self._shift[piece]), count))
            size -= count
            piece = (piece + 1) % len(self._starts)
            place = int(self._starts[piece])
        return b"".join(found)


def within(ends: IntArray, places: IntArray) -> IntArray:
    """How many of the ascending ``ends`` [D] are not beyond each of ``places`` [B]: that which it lies in.

    As ``np.searchsorted`` tells, which takes three times as long for places that are not in order.
    """
    order = places.argsort()
    found = np.empty_like(order)
    found[order] = ends.searchsorted(places[order], side="right")
    return found


def read_rows(rows: Rows, size: int, dtype: np.dtype[Any]) -> IntArray | None:
    """The tokens of located rows, which are of ``dtype``: int64 [B, size].

    None where a file does not give them: ``MappedTokens.take`` then tells why.
    """
    try:
        data = b"".join([read(place) for read, place in zip(*rows, strict=True)])
    except OSError:
        return None
    if len(data) != len(rows[0]) * size * dtype.itemsize:
        return None
    return np.ndarray((len(rows[0]), size), dtype, data).astype(np.int64)


def _read(array: Tokens, first: int, count: int) -> bytes:
    """The bytes of ``count`` tokens from the first on."""
    return array.read(first, count) if isinstance(array, StoredTokens) else array[first : first + count].tobytes()


def _reader(array: Tokens, count: int) -> Callable[[int], bytes | memoryview]:
    """What gives the bytes of ``count`` tokens from a place in bytes on."""
    if isinstance(array, StoredTokens):
        return array.reader(count)
    data, size = np.ascontiguousarray(array).view(np.uint8).data, count * array.dtype.itemsize
    return lambda place: data[place : place + size]


def as_mapped(tokens: IntArray | MappedTokens) -> MappedTokens:
    """Tokens [N] in memory as those of one piece; none is copied."""
    if not isinstance(tokens, np.ndarray):
        return tokens
    zero = np.zeros(1, dtype=np.int64)
    return MappedTokens([tokens], zero, zero, zero, len(tokens))


class TokenArray(NamedTuple):
    """Documents one after another, N tokens and D documents in all.

    tokens: ids [N], in the smallest unsigned type that holds the vocabulary; each document's last is the
    separator. ends: int64 [D], ascending; ``ends[i]`` is the offset in tokens just past document i.
    name: what a document is called.
    """

    tokens: IntArray | MappedTokens
    ends: IntArray
    name: Callable[[int], str] = str


class Shard(NamedTuple):
    """Part of a corpus as tokens: ids [N], ends int64 [D] as in ``TokenArray``, the bytes of text of each document
    int64 [D], and what each is called.
    """

    tokens: Tokens
    ends: IntArray
    sizes: IntArray
    name: Callable[[int], str]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type for ids below ``vocab_size``. Raises ValueError above 2**32.

    >>> token_dtype(256), token_dtype(50257)
    (dtype('uint8'), dtype('uint16'))
    """
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"vocab_size: wanted at most 2**32, got {vocab_size}")


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> TokenArray:
    """Encode every text and end it with the separator: tokens [N], ends [D].

    Raises ValueError if there is no text.
    """
    return TokenArray(*_encode(texts, tokenizer, []))


def _encode(texts: Iterable[str], tokenizer: Tokenizer, lengths: list[int]) -> tuple[IntArray, IntArray]:
    """Tokens and ends of all texts; each one's length is appended to ``lengths`` as soon as it is encoded."""
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype=dtype)
    pieces = []
    for ids in tokenizer.encode_all(texts):
        pieces += [ids.astype(dtype, copy=False), separator]
        lengths.append(len(ids) + 1)
    if not pieces:
        raise ValueError("texts: wanted at least one document, got none")
    return np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64)


def tokenize_shard(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> tuple[Shard, list[str]]:
    """(name, text) pairs as a shard (ids [N]; no documents: N = D = 0) and the names.

    Raises ValueError, naming the document, for one that the tokenizer refuses.
    """
    names: list[str] = []
    sizes: list[int] = []
    lengths: list[int] = []

    def texts() -> Iterable[str]:
        for name, text in documents:
            names.append(name)
            sizes.append(len(text.encode("utf-8")))
            yield text

    try:
        tokens, ends = _encode(texts(), tokenizer, lengths)
    except Unreadable:
        raise
    except ValueError as error:
        if not names:
            empty = np.empty(0, dtype=np.int64)
            return Shard(empty.astype(token_dtype(tokenizer.vocab_size)), empty, empty, str), []
        refused = names[len(lengths)] if len(lengths) < len(names) else names[-1]
        raise ValueError(f"{refused}: {error}") from None
    return Shard(tokens, ends, np.array(sizes, dtype=np.int64), names.__getitem__), names


def select(shards: Sequence[Shard], documents: IntArray) -> TokenArray:
    """Those documents [D], ascending numbers among all of the shards', as one array of tokens [N], nothing copied."""
    lengths = np.concatenate([np.diff(shard.ends, prepend=0) for shard in shards])
    counts = np.array([len(shard.ends) for shard in shards], dtype=np.int64)
    first_document = np.cumsum(counts) - counts
    mine = lengths[documents]
    ends = np.cumsum(mine)
    # A piece begins where a document does not follow the one before it, or lies in another shard.
    source = np.searchsorted(first_document + counts, documents, side="right")
    begins = np.flatnonzero((np.diff(documents, prepend=-2) != 1) | (np.diff(source, prepend=-1) != 0))
    within = np.concatenate([shard.ends for shard in shards]) - lengths
    starts = (ends - mine)[begins]
    tokens = MappedTokens(
        [shard.tokens for shard in shards], starts, source[begins], within[documents[begins]], int(ends[-1])
    )

    names, last = [shard.name for shard in shards], first_document + counts

    def name(document: int) -> str:
        number = int(documents[document])
        shard = int(np.searchsorted(last, number, side="right"))
        return names[shard](number - int(first_document[shard]))

    return TokenArray(tokens, ends, name)
