"""Tokenizers: text to ids and back, as plain functions in a NamedTuple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from titanfunc.config.data import VOCAB_SIZES, vocab_size

IntArray: TypeAlias = npt.NDArray[Any]
"""A numpy array of whole numbers."""


class Tokenizer(NamedTuple):
    """A tokenizer: ids lie in ``[0, vocab_size)`` and ``separator`` is the id that ends a document.

    encode: text to ids [N], without separator. decode: ids [N] to text, unreadable bytes replaced.
    """

    name: str
    vocab_size: int
    separator: int
    encode: Callable[[str], IntArray]
    decode: Callable[[Sequence[int] | IntArray], str]


def byte_tokenizer() -> Tokenizer:
    """The bytes of UTF-8 as ids, 256 in all; byte 0, which text does not hold, ends a document.

    >>> byte_tokenizer().encode("né").tolist()
    [110, 195, 169]
    """
    return Tokenizer("bytes", VOCAB_SIZES["bytes"], 0, _encode_bytes, _decode_bytes)


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, one of ``titanfunc.config.data.VOCAB_SIZES``.

    Raises ValueError for an unknown name.
    """
    vocab_size(name)
    return _TOKENIZERS[name]()


def _encode_bytes(text: str) -> IntArray:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def _decode_bytes(ids: Sequence[int] | IntArray) -> str:
    array = np.asarray(ids)
    if array.size and not (array.min() >= 0 and array.max() < 256):
        raise ValueError(f"ids: wanted bytes in [0, 256), got values from {array.min()} to {array.max()}")
    return array.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": byte_tokenizer}
