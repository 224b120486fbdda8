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
    x: IntArray = numbers.astype(np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(number)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
    found = np.asarray(numbers).astype(np.uint64)
    found = _shuffle(found, np.uint64(height), np.uint64(width), number)
    while (beyond := found >= size).any():
        found[beyond] = _shuffle(found[beyond], np.uint64(height), np.uint64(width), number)
    return found.astype(np.int64)


def _shuffle(cells: IntArray, height: np.uint64, width: np.uint64, number: int) -> IntArray:
    """A permutation of the cells (uint64 [n]): each coordinate in turn is moved by a hash of the other."""
    row = cells // width
    column = cells - row * width
    for i in range(_ROUNDS):
        row = _moved(row, hashed(column, key(number, 2 * i)), height)
        column = _moved(column, hashed(row, key(number, 2 * i + 1)), width)
    return row * width + column


def _moved(places: IntArray, by: IntArray, size: np.uint64) -> IntArray:
    """(places + by) mod size, without the slow ``%``: places are below size, which is below 2^63."""
    by -= by // size * size
    by += places
    return np.minimum(by, by - size)  # what is below size already becomes huge
