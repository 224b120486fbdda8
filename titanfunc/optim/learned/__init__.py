"""Optimizers that have been learned: small networks that say how each element moves, with live weights."""

from titanfunc.optim.learned.features import (
    Accumulators,
    small_fc_statistics,
    time_embedding,
    velo_statistics,
)
from titanfunc.optim.learned.network import LearnedState, network_of, with_network
from titanfunc.optim.learned.small_fc import init_small_fc_lopt, small_fc_lopt
from titanfunc.optim.learned.velo import VeLOState, init_velo, init_velo_mlp, velo, velo_mlp
from titanfunc.optim.learned.weights import load_weights, save_weights

__all__ = [
    "Accumulators", "LearnedState", "VeLOState", "init_small_fc_lopt", "init_velo", "init_velo_mlp", "load_weights",
    "network_of", "save_weights", "small_fc_lopt", "small_fc_statistics", "time_embedding", "velo", "velo_mlp",
    "velo_statistics", "with_network",
]  # fmt: skip
