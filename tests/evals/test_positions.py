import itertools

import pytest
import torch

from titanfunc.evals import buckets, by_position


@pytest.mark.parametrize("octave", [1, 2, 3])
def test_buckets_cover_every_position_once(octave):
    for length in range(1, 200):
        found = buckets(length, octave)
        assert found[0][0] == 1 and found[-1][1] == length
        assert all(first <= last for first, last in found)
        assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(found))
    assert len(buckets(2**14, octave)) <= 14 * octave + 1
    with pytest.raises(ValueError, match="length: wanted at least 1, got 0"):
        buckets(0)


def test_the_last_bucket_is_not_a_mere_rest():
    (first, last) = buckets(1024)[-1]
    assert last - first > 200


def test_means_are_over_rows_and_positions():
    loss = torch.arange(14.0).reshape(2, 7)
    found = by_position(loss)
    assert [(bucket.first, bucket.last) for bucket in found] == buckets(7)
    for bucket in found:
        part = loss[:, bucket.first - 1 : bucket.last]
        assert bucket.loss == pytest.approx(part.mean().item()) and bucket.tokens == part.numel()


def test_answers_alone():
    loss = torch.arange(14.0).reshape(2, 7)
    weights = torch.zeros(2, 7)
    weights[0, 6] = weights[1, 5] = 1
    weights[0, 0] = 0.5
    assert by_position(loss, weights) == [(4, 7, (6 + 12) / 2, 2)]
