import pytest

from tests.data.recall.problems import make


@pytest.mark.parametrize("length", [2, 9, 10])
def test_the_second_half_repeats_the_first_and_is_the_answer(length):
    tokens, weights = make("copying").examples(length, 0, 5)
    half = length // 2
    assert tokens.shape == (5, length + 1)
    assert (tokens[:, -half:] == tokens[:, -2 * half - 1 : -half - 1]).all()
    assert (tokens[:, -half - 1] == 0).all() and (tokens[:, : length + 1 - (2 * half + 1)] == 0).all()
    assert (tokens[:, -half:] > 0).all()
    assert weights.sum(1).tolist() == [half] * 5 and (weights[:, -half:] == 1).all()


def test_a_row_without_room_is_refused():
    with pytest.raises(ValueError, match=r"^length: wanted at least 2, got 1"):
        make("copying").examples(1, 0, 1)
