"""Associative recall: distinct keys, pairs somewhere in noise, answers at the end."""

import numpy as np
import pytest

from tests.data.recall.problems import make
from titanfunc.config.recall import MQARConfig
from titanfunc.data.recall.mqar import draw


def parts(tokens, queries):
    """(pairs that the context states in order, [key, value] rows of the queries)."""
    context, tail = tokens[: -2 * queries], tokens[-2 * queries :].reshape(-1, 2)
    at = np.flatnonzero(context < 96)
    return {int(context[i]): int(context[i + 1]) for i in at}, tail


@pytest.mark.parametrize("queries", [0, 3])
def test_every_query_asks_for_a_stated_pair_and_only_its_value_counts(queries):
    task = make("mqar", seq_len=60, batch_size=40, mqar=MQARConfig(min_pairs=3, max_pairs=9, queries=queries))
    batch = task.batch(0)
    counts = set()
    for tokens, weights in zip(batch["tokens"].numpy(), batch["weights"].numpy(), strict=True):
        asked = int(weights.sum())
        stated, tail = parts(tokens, asked)
        counts.add(len(stated))
        assert asked == (queries or len(stated))
        assert len(set(tail[:, 0])) == asked  # nothing is asked twice
        assert all(stated[key] == value for key, value in tail)
        places = np.flatnonzero(weights) + 1
        np.testing.assert_array_equal(places, 61 - 2 * asked + 1 + 2 * np.arange(asked))
        context = tokens[: -2 * asked]
        assert ((context < 96).sum(), ((context >= 96) & (context < 192)).sum()) == (len(stated), len(stated))
    assert counts == set(range(3, 10))


def test_pairs_lie_anywhere_and_never_overlap():
    source = np.random.default_rng(0)
    firsts = set()
    for _ in range(300):
        row = draw(source, 14, 3, 1)
        keys = np.flatnonzero(row.tokens[:13] < 96)
        assert len(keys) == 3 and (np.diff(keys) >= 2).all()
        firsts |= set(keys.tolist())
    assert firsts == set(range(12))


def test_a_full_row_has_no_noise():
    row = draw(np.random.default_rng(0), 4 * 5 - 1, 5, 5)
    assert row.tokens.max() < 192 and row.answers.sum() == 5
    with pytest.raises(ValueError, match=r"^length: wanted at least 19 for 5 pairs, got 18"):
        draw(np.random.default_rng(0), 18, 5, 5)
    with pytest.raises(ValueError, match=r"^pairs: wanted from 1 to 96, the keys there are, got 97"):
        draw(np.random.default_rng(0), 999, 97, 1)


def test_a_test_row_has_as_many_pairs_as_asked_for():
    tokens, weights = make("mqar").examples(200, 32, 3)
    assert (tokens[:, :-64] < 96).sum(1).tolist() == weights.sum(1).tolist() == [32] * 3
