"""The split takes whole documents, about the fraction asked for, and the same ones every time."""

import numpy as np
import pytest

from titanfunc.data.split import split_documents

SIZES = np.random.default_rng(0).integers(100, 5000, size=200).tolist()


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
    with pytest.raises(ValueError, match=rf"^corpus: wanted at least 2 documents .* got {len(sizes)}; cut"):
        split_documents(sizes, 0.1, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"^data.validation_fraction: wanted a number between 0 and 1, got"):
        split_documents([1, 1], fraction, 0)
