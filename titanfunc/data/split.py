"""Which documents are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from titanfunc.config._check import require


def split_documents(sizes: Sequence[int], validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation documents, each ascending: a pure function.

    sizes: bytes of each document, in corpus order. Documents are visited in an order drawn from ``seed`` and
    go to validation whenever that brings its bytes closer to ``validation_fraction`` of the whole, so one
    huge document does not swallow the training text. Each side gets at least one.

    Raises ValueError for fewer than two documents or a fraction outside (0, 1).

    >>> split_documents([100, 100, 100, 100], validation_fraction=0.25, seed=0)
    ([0, 1, 3], [2])
    """
    ok = 0 < validation_fraction < 1
    require(ok, "data.validation_fraction", "a number between 0 and 1", validation_fraction)
    if len(sizes) < 2:
        raise ValueError(
            "corpus: wanted at least 2 documents with text (one to train on, one to validate), "
            f"got {len(sizes)}; cut the text into several files"
        )
    target = validation_fraction * sum(sizes)
    order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    taken, held_out = 0, set[int]()
    for document in order:
        size = sizes[document]
        if len(held_out) < len(sizes) - 1 and abs(taken + size - target) < abs(taken - target):
            held_out.add(document)
            taken += size
    if not held_out:
        held_out.add(min(order, key=lambda document: sizes[document]))
    train = [document for document in range(len(sizes)) if document not in held_out]
    return train, sorted(held_out)
