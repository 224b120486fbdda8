"""small_fc_lopt: a small network that reads 39 features of each element and says how it moves.

Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers"
(arXiv 2203.11860), with the features and constants of its reference code, google/learned_optimization
(``adafac_mlp_lopt``), and of PyLO (Janson et al. 2025, arXiv 2506.10315).
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc.optim.base import GradientTransformation, chain
from titanfunc.optim.learned.features import TIMES, Accumulators, small_fc_statistics, time_embedding
from titanfunc.optim.learned.network import (
    Network,
    apply_layers,
    check_network,
    decay_shapes,
    init_layers,
    initial_decays,
    layer_shapes,
    per_parameter,
    width,
)
from titanfunc.optim.schedules import Schedule
from titanfunc.optim.transforms import scale_by_learning_rate

STATISTICS, OUTPUTS = 28, 2
FEATURES = STATISTICS + len(TIMES)


def init_small_fc_lopt(generator: torch.Generator, hidden: int = 32) -> Network:
    """A network that has not learned yet: layers "input" [39, H], "hidden" [H, H] and "output" [H, 2], and "decays".

    The last layer's weights are a tenth of the published ones' (standard deviation 0.1 / sqrt(H)), so that the first
    steps, in directions that mean nothing yet, stay near 0.0005.
    """
    return {
        **init_layers(generator, (FEATURES, hidden, hidden, OUTPUTS), gain=0.1),
        "decays": initial_decays(generator.device),
    }


def small_fc_lopt(
    network: Network,
    *,
    learning_rate: float | Schedule = 1.0,
    step_mult: float = 0.01,
    exp_mult: float = 0.001,
) -> GradientTransformation:
    """p <- p - learning_rate step_mult d exp(exp_mult s), (d, s) by the network for each element; leaves of any shape.

    The network reads 28 statistics of the element, each over its root mean square in the leaf (see
    ``small_fc_statistics``), and tanh(t / 1, 3, 10, ..., 100,000 - 1) for t updates so far. Leaves of more than two
    axes are factored over the two largest; a 0-d leaf is treated as a vector of one element.
    network: as ``init_small_fc_lopt`` or ``load_weights`` give it. A copy of it is the state's ``network``, with
    respect to which an update may be differentiated, and which may be replaced between updates (``with_network``).
    learning_rate: a number or a schedule. step_mult: PyLO's 0.01; google/learned_optimization has 0.001.
    Holds 4 numbers an element, 7 for those of a vector; and 28 and the hidden units of each leaf's elements at work.
    Raises ValueError for a network of other shapes and for values out of range. Metz et al., arXiv 2203.11860.
    """
    check_network(network, {**layer_shapes(FEATURES, width(network), OUTPUTS), **decay_shapes()})

    def step(own: Network, count: Tensor, p: Tensor, g: Tensor, kept: Accumulators) -> Tensor:
        out = apply_layers(own, small_fc_statistics(p, g, kept), time_embedding(count))
        return (out[:, 0] * torch.exp(out[:, 1] * exp_mult) * step_mult).reshape(p.shape)

    return chain(per_parameter(network, step), scale_by_learning_rate(learning_rate))
