"""The split takes whole documents, about the fraction asked for, and the same ones every time."""

import numpy as np
import pytest

from titanfunc.data.split import held_out_by_name
from titanfunc.data.split import split_documents as split_arrays

SIZES = np.random.default_rng(0).integers(100, 5000, size=200).tolist()


def split_documents(sizes, fraction, seed):
    return tuple(side.tolist() for side in split_arrays(sizes, fraction, seed))


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_every_document_is_on_one_side(fraction, seed):
    train, validation = split_documents(SIZES, fraction, seed)
    assert sorted(train + validation) == list(range(len(SIZES)))
    assert train == sorted(train)
    assert validation == sorted(validation)
    held_out = sum(SIZES[document] for document in validation)
    assert abs(held_out / sum(SIZES) - fraction) < max(SIZES) / 2 / sum(SIZES)


def test_it_depends_on_the_seed_alone():
    assert split_documents(SIZES, 0.1, 3) == split_documents(SIZES, 0.1, 3)
    assert split_documents(SIZES, 0.1, 3) != split_documents(SIZES, 0.1, 4)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [[5, 5], [1, 1000], [1000, 1, 1]])
@pytest.mark.parametrize("seed", range(4))
def test_no_side_is_empty(sizes, fraction, seed):
    train, validation = split_documents(sizes, fraction, seed)
    assert train
    assert validation


@pytest.mark.parametrize("seed", range(8))
def test_one_huge_document_stays_in_training(seed):
    assert 1 in split_documents([50, 10_000, 50], 0.1, seed)[0]


@pytest.mark.parametrize("sizes", [[], [7]])
def test_too_few_documents_are_refused(sizes):
    with pytest.raises(ValueError, match=rf"^sizes: wanted at least 2 documents .*, got {len(sizes)}$"):
        split_documents(sizes, 0.1, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"^data.validation_fraction: wanted a number between 0 and 1, got"):
        split_documents([1, 1], fraction, 0)


def one_by_one(sizes, fraction, seed):
    """The definition: each document in turn is taken if that brings the bytes closer to the target."""
    order, taken, held_out = np.random.default_rng(seed).permutation(len(sizes)).tolist(), 0, []
    target = fraction * sum(sizes)
    for document in order:
        if len(held_out) < len(sizes) - 1 and abs(taken + sizes[document] - target) < abs(taken - target):
            held_out.append(document)
            taken += sizes[document]
    return sorted(held_out or [min(order, key=lambda document: sizes[document])])


@pytest.mark.parametrize("largest", [2, 100, 10**6])
def test_documents_are_taken_as_one_by_one(largest):
    for seed in range(200):
        source = np.random.default_rng(seed)
        sizes = source.integers(1, largest, size=source.integers(2, 60)).tolist()
        fraction = float(source.choice([0.01, 0.1, 0.5, 0.9, 0.99]))
        assert split_documents(sizes, fraction, seed)[1] == one_by_one(sizes, fraction, seed)


def test_by_name():
    names = [f"file.parquet:{i}" for i in range(4000)]
    held_out = [name for name in names if held_out_by_name(name, 0.1, 0)]
    assert abs(len(held_out) / len(names) - 0.1) < 0.02
    assert held_out == [name for name in names if held_out_by_name(name, 0.1, 0)]
    assert held_out != [name for name in names if held_out_by_name(name, 0.1, 1)]
