"""Documents as one array of tokens: in memory, or put together from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from titanfunc.data.parts import Unreadable
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokenizers import IntArray, Tokenizer

Tokens: TypeAlias = IntArray | StoredTokens
"""Ids [N] in memory or in a file."""
Row: TypeAlias = tuple[Callable[[int, int], bytes], int, int]
"""Where a row of tokens lies: what reads from a first token on so many, that first token, and its place among all."""


class MappedTokens:
    """Tokens [N] that lie in pieces of several arrays or files; none is copied.

    arrays: any number of tokens each. starts: int64 [P], where each piece begins among the N; sources, offsets:
    int64 [P], its array and where it begins there. size: N.
    """

    def __init__(
        self, arrays: Sequence[Tokens], starts: IntArray, sources: IntArray, offsets: IntArray, size: int
    ) -> None:
        self._reads = [_reader(array) for array in arrays]
        self._starts, self._ends, self._size = starts, np.append(starts[1:], size), size
        self._sources, self._shift = sources, offsets - starts
        self.dtype: np.dtype[Any] = arrays[0].dtype

    def __len__(self) -> int:
        return self._size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> IntArray:
        whole = np.empty(self._size, dtype=dtype or self.dtype)
        for start, end, source, shift in zip(self._starts, self._ends, self._sources, self._shift, strict=True):
            data = self._reads[source](int(start + shift), int(end - start))
            whole[start:end] = np.frombuffer(data, dtype=self.dtype)
        return whole

    def locate(self, starts: IntArray, size: int) -> list[Row]:
        """Rows of ``size`` tokens from each of ``starts`` [B] (below N) on; after the last token comes the first."""
        pieces = self._starts.searchsorted(starts, side="right") - 1
        firsts = (starts + self._shift[pieces]).tolist()
        reads = [self._reads[source] for source in self._sources[pieces].tolist()]
        for row in np.flatnonzero(starts + size > self._ends[pieces]).tolist():
            reads[row], firsts[row] = self._read_on, int(starts[row])
        return [*zip(reads, firsts, starts.tolist(), strict=True)]

    def _read_on(self, place: int, size: int) -> bytes:
        """The bytes of a row of ``size`` tokens from ``place`` on, over the ends of pieces."""
        found = []
        piece = int(self._starts.searchsorted(place, side="right")) - 1
        while size:
            count = min(size, int(self._ends[piece]) - place)
            found.append(self._reads[self._sources[piece]](place + int(self._shift[piece]), count))
            size -= count
            piece = (piece + 1) % len(self._starts)
            place = int(self._starts[piece])
        return b"".join(found)


def _reader(array: Tokens) -> Callable[[int, int], bytes]:
    """What gives the bytes of the tokens from a first one on, so many."""
    if isinstance(array, StoredTokens):
        return array.read
    data, width = np.ascontiguousarray(array).view(np.uint8).data, array.dtype.itemsize
    return lambda first, count: bytes(data[first * width : (first + count) * width])


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


def read_rows(rows: Sequence[Row], size: int, dtype: np.dtype[Any]) -> IntArray:
    """The tokens of located rows, which are of ``dtype``: int64 [B, size]. Raises what ``StoredTokens.read`` does."""
    data = b"".join([read(first, size) for read, first, _ in rows])
    return np.frombuffer(data, dtype=dtype).astype(np.int64).reshape(len(rows), size)
