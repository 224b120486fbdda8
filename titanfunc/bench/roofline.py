"""What a step of training has to do at the least: products, attention, and the traffic of its state.

Letters: T tokens of a row, W window, S segment, P persistent tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from titanfunc import tree
from titanfunc.config import ModelConfig
from titanfunc.models import roles

MULTIPLIED = ("attention", "feed_forward", "memory", "head", "gate")
"""Roles of the parameters that every token is multiplied by."""


class Work(NamedTuple):
    """products: FLOPs of the parameters' products, forward and backward: 6 x parameters x tokens, of the parameters
    that tokens are multiplied by. attention: FLOPs of the products of queries, keys and values that see each other,
    nothing of it computed twice. state_bytes: parameters and optimizer state read and written once, gradients read
    once. The memories' writes and reads, and what activations move, are in none of them.
    """

    products: float
    attention: float = 0.0
    state_bytes: float = 0.0


def of_model(config: ModelConfig, params: Any, opt_state: Any, batch: int, tokens: int) -> Work:
    """The work of a step of one of our models; params, opt_state: leaves of any shapes."""
    multiplied = 0.0
    for leaf, role in zip(tree.leaves(params), tree.leaves(roles(params)), strict=True):
        share = config.moe.top_k / config.moe.experts if config.feed_forward == "moe" and role == "feed_forward" else 1
        if role in MULTIPLIED or (role == "embedding" and config.tie_embeddings):
            multiplied += share * leaf.numel()
    moved = sum(leaf.nbytes for leaf in tree.leaves(params))
    kept = sum(leaf.nbytes for leaf in tree.leaves(opt_state))
    return Work(
        6 * multiplied * batch * tokens,
        12.0 * pairs(config, tokens) * config.dim * config.layers * batch,
        3 * moved + 2 * kept,
    )


def pairs(config: ModelConfig, tokens: int) -> float:
    """Queries and the keys that they see, in one row and one block.

    >>> from titanfunc.config import preset
    >>> pairs(preset("transformer_tiny"), 4), pairs(preset("mag_tiny", window=2, persistent=1), 4)
    (10, 11)
    """
    if config.family == "lmm":
        return 0
    if config.family == "mac":  # a segment's own tokens, as many read from the memory, and the persistent ones
        whole, rest = divmod(tokens, config.mac.segment)
        own = whole * math.comb(config.mac.segment + 1, 2) + math.comb(rest + 1, 2)
        return 2 * own + tokens * config.persistent
    window = min(config.window or tokens, tokens)
    return math.comb(window + 1, 2) + (tokens - window) * window + tokens * config.persistent
