"""The order of windows is a permutation, and looks like a random one."""

import numpy as np
import pytest

from titanfunc.data.permutation import hashed, key, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12, 13, 97, 100, 101, 4095, 4097])
def test_every_number_comes_once(size):
    for number in range(4):
        found = permuted(np.arange(size), size, key(number))
        assert sorted(found.tolist()) == list(range(size))


def test_a_number_goes_where_it_goes_alone_too():
    found = permuted(np.arange(1000), 1000, 5)
    assert [int(permuted(np.array([i]), 1000, 5)[0]) for i in (0, 17, 999)] == found[[0, 17, 999]].tolist()


def test_keys_give_different_orders():
    orders = {
        tuple(permuted(np.arange(50), 50, key(seed, epoch)).tolist()) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("size", [4, 5, 10])
def test_every_place_is_as_likely(size):
    """chi-squared of (number, place) pairs over many keys; 6 standard deviations."""
    count = 1500
    seen = np.zeros((size, size))
    for i in range(count):
        seen[np.arange(size), permuted(np.arange(size), size, key(i))] += 1
    expected = count / size
    freedom = (size - 1) ** 2
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_are_scattered():
    size = 10**6
    found = permuted(np.arange(20000), size, 3)
    steps = np.abs(np.diff(found)) / size
    assert abs(steps.mean() - 1 / 3) < 0.01  # of two independent places
    assert abs(np.corrcoef(np.arange(len(found)), found)[0, 1]) < 0.03
    counts = np.histogram(found, bins=100, range=(0, size))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 6 * np.sqrt(2 * 99)


def test_huge_sizes():
    size = 10**13 + 7
    found = permuted(np.arange(size - 1000, size), size, 1)
    assert found.min() >= 0 and found.max() < size and len(np.unique(found)) == 1000


def test_hashes_use_all_bits():
    found = hashed(np.arange(4000), 9)
    ones = np.array([((found >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(ones - 0.5).max() < 0.05
