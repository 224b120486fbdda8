"""Multi-query associative recall (Zoology, arXiv 2312.04927) with the pairs scattered in noise.

The bytes are split, so that a token's kind shows: keys, values, noise. Letters: L tokens that a row predicts.
"""

from __future__ import annotations

import numpy as np

from titanfunc.config._check import require
from titanfunc.config.recall import MAX_PAIRS, MQARConfig
from titanfunc.data.recall.rows import Maker, Row

KEYS, VALUES, NOISE = (0, MAX_PAIRS), (MAX_PAIRS, 2 * MAX_PAIRS), (2 * MAX_PAIRS, 256)
"""Where the ids of each kind begin and end."""


def mqar(config: MQARConfig) -> Maker:
    """Rows [L + 1] of distinct keys, each followed by its value, at random places in noise; then the queries, each a
    key followed by its value, in random order. Only the values of the queries are answers.
    """

    def train(source: np.random.Generator, length: int) -> Row:
        pairs = int(source.integers(config.min_pairs, config.max_pairs + 1))
        return draw(source, length, pairs, config.queries or pairs)

    def test(source: np.random.Generator, length: int, level: float) -> Row:
        return draw(source, length, int(level), config.queries or int(level))

    return Maker(train, test)


def draw(source: np.random.Generator, length: int, pairs: int, queries: int) -> Row:
    """One row [L + 1]. queries: at most ``pairs`` are asked. Raises ValueError if they do not fit."""
    queries = min(queries, pairs)
    room = length + 1 - 2 * queries
    require(1 <= pairs <= MAX_PAIRS, "pairs", f"from 1 to {MAX_PAIRS}, the keys there are", pairs)
    require(2 * pairs <= room, "length", f"at least {2 * pairs + 2 * queries - 1} for {pairs} pairs", length)
    keys = source.permutation(MAX_PAIRS)[:pairs] + KEYS[0]
    values = source.integers(*VALUES, size=pairs)
    tokens = source.integers(*NOISE, size=length + 1)
    # Each pair is one place among what is left when pairs shrink to a token: every arrangement is equally likely.
    places = np.sort(source.choice(room - pairs, pairs, replace=False)) + np.arange(pairs)
    tokens[places], tokens[places + 1] = keys, values
    asked = source.permutation(pairs)[:queries]
    at = room + 2 * np.arange(queries)
    tokens[at], tokens[at + 1] = keys[asked], values[asked]
    answers = np.zeros(length + 1, dtype=bool)
    answers[at + 1] = True
    return Row(tokens.astype(np.uint8), answers)
