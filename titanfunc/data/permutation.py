"""Random numbers that are looked up instead of drawn one after another: hashes, and a permutation without a table."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from titanfunc.data.tokenizers import IntArray

_ROUNDS = 4


def key(*numbers: int) -> int:
    """64 random bits that belong to these whole numbers, such as (seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def hashed(numbers: IntArray, number: int) -> IntArray:
    """uint64 [n]: random bits for each of the whole numbers [n] under a key (the finalizer of SplitMix64)."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(numbers: IntArray, size: int, number: int) -> IntArray:
    """Where each of ``numbers`` int64 [n], from 0 to size - 1, goes in a random order of all ``size`` of them.

    The order is that of the key ``number``, and no list of it is made: a Feistel network permutes the cells of an
    a x b rectangle, the smallest nearly square one with ``size`` cells, and a number that lands beyond ``size`` is
    permuted again until it does not (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains).

    >>> sorted(permuted(np.arange(10), 10, 7).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    found = np.asarray(numbers, dtype=np.int64)
    found = _shuffle(found, height, width, number)
    while (beyond := found >= size).any():
        found[beyond] = _shuffle(found[beyond], height, width, number)
    return found


def _shuffle(cells: IntArray, height: int, width: int, number: int) -> IntArray:
    """A permutation of the cells: each coordinate in turn is moved by a hash of the other."""
    row, column = cells // width, cells % width
    for i in range(_ROUNDS):
        row = (row + (hashed(column, key(number, 2 * i)) % np.uint64(height)).astype(np.int64)) % height
        column = (column + (hashed(row, key(number, 2 * i + 1)) % np.uint64(width)).astype(np.int64)) % width
    return row * width + column
