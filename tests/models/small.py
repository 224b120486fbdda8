"""Models small enough to check in float64, with memories that have something to remember."""

from __future__ import annotations

import torch

import titanfunc as tf
from titanfunc import tree

VOCAB = 17
ORDERS = ("attention", "input")


def small(order: str = "attention", **changes):
    """(model, params in float64) of a two-layer MAC of 8-token segments and 4-token chunks, or a transformer."""
    sizes = {"dim": 16, "layers": 2, "heads": 2, "ff": 24, "vocab_size": VOCAB, "persistent": 3}
    memory = {"heads": 2, "head_dim": 6, "hidden": 8, "chunk_size": 4}
    if order == "transformer":
        config = tf.models.preset("transformer_tiny", **{**sizes, "persistent": 0, **changes})
    else:
        parts = {"mac": {"segment": 8, "write": order}, "memory": memory}
        config = tf.models.preset("mac_tiny", **{**sizes, **parts, **changes})
    model = tf.models.build(config)
    params = model.init(torch.Generator().manual_seed(0))
    return model, tree.map(lambda leaf: leaf.double(), params)


def draw_tokens(rows: int, length: int, seed: int = 0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
