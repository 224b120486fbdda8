"""Models small enough to check in float64, with memories that have something to remember."""

from __future__ import annotations

import torch

import titanfunc as tf
from titanfunc import tree

VOCAB = 17
ORDERS = ("attention", "input")
MACS = (*ORDERS, "inclusive")
MEMORIES = (*MACS, "mag", "mal", "lmm")
"""Every model with a memory; a MAC is named by its order, or by its context."""
MODELS = (*MEMORIES, "window", "transformer")
SIZES = {"dim": 16, "layers": 2, "heads": 2, "ff": 24, "vocab_size": VOCAB}
MEMORY = {"heads": 2, "head_dim": 6, "hidden": 8, "chunk_size": 4}


def configuration(name: str = "attention", **changes):
    """Two layers, 4-token chunks; a MAC of 8-token segments, or another model with windows of 5 tokens."""
    sizes = dict(SIZES)
    if name in ("transformer", "window"):
        sizes |= {"persistent": 0, "window": 5 if name == "window" else 0}
        return tf.models.preset("transformer_tiny", **{**sizes, **changes})
    family = "mac" if name in MACS else name
    sizes["memory"] = MEMORY
    if family == "mac":
        sizes |= {"persistent": 3, "mac": {"segment": 8, "write": name}}
        if name == "inclusive":
            sizes["mac"] = {"segment": 8, "write": "input", "context": name}
    elif family != "lmm":
        sizes |= {"persistent": 3, "window": 5}
    return tf.models.preset(f"{family}_tiny", **{**sizes, **changes})


def small(name: str = "attention", **changes):
    """(model, params in float64) of one of MODELS; see ``configuration``."""
    model = tf.models.build(configuration(name, **changes))
    params = model.init(torch.Generator().manual_seed(0))
    return model, tree.map(lambda leaf: leaf.double(), params)


def draw_tokens(rows: int, length: int, seed: int = 0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(i, documents=0):
    """Tokens of a step, 4 x 17, and where documents begin if rows hold any."""
    made = {"tokens": draw_tokens(4, 17, seed=i)}
    if documents:
        made["starts"] = torch.rand(4, 16, generator=torch.Generator().manual_seed(i)) < 0.1
    return made
