"""small_fc_lopt: a small network that reads 39 features of each element and says how it moves.

Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers"
(arXiv 2203.11860), with the features and constants of its reference code, google/learned_optimization
(``adafac_mlp_lopt``), and of PyLO (Janson et al. 2025, arXiv 2506.10315).
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc.ops.backend import implementation
from titanfunc.ops.learned_mlp import HIDDEN, learned_mlp_step
from titanfunc.optim.base import GradientTransformation, chain
from titanfunc.optim.learned.features import TIMES, Accumulators, factored_axes, time_embedding
from titanfunc.optim.learned.network import (
    LAYERS,
    Network,
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
    kernels: str = "reference",
) -> GradientTransformation:
    """p <- p - learning_rate step_mult d exp(exp_mult s), (d, s) by the network for each element; leaves of any shape.

    The network reads 28 statistics of the element, each over its root mean square in the leaf (see
    ``small_fc_statistics``), and tanh(t / 1, 3, 10, ..., 100,000 - 1) for t updates so far. Leaves of more than two
    axes are factored over the two largest; a 0-d leaf is treated as a vector of one element.
    network: as ``init_small_fc_lopt`` or ``load_weights`` give it. A copy of it is the state's ``network``, with
    respect to which an update may be differentiated, and which may be replaced between updates (``with_network``).
    learning_rate: a number or a schedule. step_mult: PyLO's 0.01; google/learned_optimization has 0.001.
    Holds 4 numbers an element, 7 for those of a vector; at work 16 features and the hidden units of each leaf's
    elements too, or none of them with kernels="triton" (float32 and bfloat16 leaves, networks of up to 128 units).
    Raises ValueError for a network of other shapes and for values out of range. Metz et al., arXiv 2203.11860.
    """
    check_network(network, {**layer_shapes(FEATURES, width(network), OUTPUTS), **decay_shapes()})
    implementation("learned_mlp", kernels)  # a name that means something
    if kernels == "triton" and width(network) > HIDDEN:
        raise ValueError(f"network: wanted at most {HIDDEN} hidden units with kernels=triton, got {width(network)}")

    def step(own: Network, count: Tensor, p: Tensor, g: Tensor, kept: Accumulators) -> Tensor:
        layers = [own[name][part] for name in LAYERS for part in ("weight", "bias")]
        return learned_mlp_step(
            p, g, kept.momentum, kept.second, kept.factors, factored_axes(p.shape), time_embedding(count), layers,
            step_mult=step_mult, exp_mult=exp_mult, kernels=kernels,
        )  # fmt: skip

    return chain(per_parameter(network, step), scale_by_learning_rate(learning_rate))
