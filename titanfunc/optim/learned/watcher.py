"""VeLO's recurrent network: what it reads of each tensor and of the losses, and the controls that it gives.

Metz et al. 2022, arXiv 2211.09760. Letters: L leaves, C = 30 features, R units, B networks in the bank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import rng
from titanfunc.optim.learned.features import Accumulators, wide
from titanfunc.optim.learned.network import Network

LOSS_MEANS, RANKS = 10, 5
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Where in a training the embedding of its progress changes its sign."""
FEATURES = len(FRACTIONS) + (LOSS_MEANS - 1) + 1 + RANKS + 3 + 3


class Losses(NamedTuple):
    """count: losses seen, 0-d int64. means, lowest: their decaying means and the lowest of those [10]. decays [10]."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    means: Tensor
    lowest: Tensor
    decays: Tensor


def init_losses(total_steps: int, device: torch.device | str = "cpu") -> Losses:
    """No losses yet; means [10] whose memory reaches from 10 updates to ``total_steps``, evenly by its logarithm."""
    reach = torch.logspace(1, math.log10(total_steps), LOSS_MEANS)
    zero = torch.zeros(LOSS_MEANS, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Losses(count, zero, zero + 1e12, torch.exp(-1 / reach).to(device))


def update_losses(old: Losses, loss: Tensor) -> Losses:
    """One more loss, 0-d, counted as at most twice the greatest mean [10] so far."""
    loss = loss.to(torch.float32)
    correction = 1 - old.decays ** (old.count + 1)
    greatest = torch.where(old.count == 0, loss, (old.means / correction).max())
    loss = torch.minimum(greatest.abs() * 2, loss)
    means = old.decays * old.means + (1 - old.decays) * loss
    return Losses(old.count + 1, means, torch.minimum(old.lowest, means / correction), old.decays)


def loss_features(losses: Losses) -> Tensor:
    """[9] in [-1, 1]: where each mean lies between its lowest and the next slower mean, less 1; 0 for two updates."""
    means = losses.means / (1 - losses.decays**losses.count)
    slower, means, lowest = means[1:], means[:-1], losses.lowest[:-1]
    place = (means - lowest) / (slower - lowest).clamp(min=1e-8) - 1
    return torch.where(losses.count <= 2, torch.zeros_like(place), place.clamp(-1, 1))


def tensor_features(p: Tensor, kept: Accumulators, done: Tensor, losses: Tensor) -> Tensor:
    """What is read of a leaf p [*S]: [30]. done: the fraction of the training, 0-d. losses: ``loss_features`` [9].

    The embedded fraction (9), the losses (9), the mean of v (1), the number of axes above 1 out of five (5), the
    variances of m (3), and the mean square of v less the mean of m (3): by logarithms, in units of rms(p).
    """
    scale = torch.rsqrt(wide(p).square().mean().clamp(min=1e-9))
    momentum, second = (x.reshape(-1, x.shape[-1]) * scale for x in (kept.momentum, kept.second))
    mean = momentum.mean(0)
    fraction = torch.stack([torch.tanh(10 * (done - place)) for place in FRACTIONS])
    rank = sum(size > 1 for size in p.shape)
    one_hot = (torch.arange(RANKS, device=p.device) == rank).to(scale.dtype)
    spread = (momentum - mean).square().mean(0), (second - mean).square().mean(0)
    logs = [_log(x) for x in (second.mean(0), *spread)]
    return torch.cat([fraction.to(scale.dtype), losses.to(scale.dtype), logs[0], one_hot, logs[1], logs[2]])


def init_watcher(generator: torch.Generator, bank: int, units: int) -> Network:
    """Linear layers "mix" [C, R], "merge" [C, R], "lstm" [2 R, 4 R], "controls" [R, B], "rate" [R, 1], "start" [1, R].

    Weights from N(0, 1 / in), those of the last two layers a tenth of that and less, and their biases such that it
    starts near the mean of the bank, scaled to the size of one network, and near a rate of 1.
    """
    sizes = {"mix": (FEATURES, units), "merge": (FEATURES, units), "lstm": (2 * units, 4 * units)}
    sizes |= {"controls": (units, bank), "rate": (units, 1)}
    gain = {"controls": 0.1 / math.sqrt(bank), "rate": 0.1}
    network: Network = {
        name: {
            "weight": rng.normal(generator, size, gain.get(name, 1.0) / math.sqrt(size[0])),
            "bias": torch.zeros(size[1], device=generator.device),
        }
        for name, size in sizes.items()
    }
    # The mean of B independent networks would be 1 / sqrt(B) as large as one of them.
    network["controls"]["bias"] += math.sqrt(bank) / 100
    network["rate"]["bias"] += 1
    network["start"] = {name: torch.zeros(1, units, device=generator.device) for name in ("hidden", "cell")}
    return network


def watcher_shapes(bank: int, units: int) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of ``init_watcher`` by its path."""
    sizes = {"mix": (FEATURES, units), "merge": (FEATURES, units), "lstm": (2 * units, 4 * units)}
    sizes |= {"controls": (units, bank), "rate": (units, 1)}
    shapes: dict[str, tuple[int, ...]] = {"start.hidden": (1, units), "start.cell": (1, units)}
    for name, size in sizes.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[1:]}
    return shapes


def watch(network: Network, read: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Controls [L, B], rates [L], and the next hidden and cell [L, R] from features [L, C] of every leaf.

    Leaves hear of each other by the greatest of all their "mix" units. The gates lie in the order input, candidate,
    forget, output, and 1 is added to the third before its sigmoid.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ network[name]["weight"].to(x.dtype) + network[name]["bias"].to(x.dtype)

    read = read.to(hidden.dtype)
    x = linear("merge", read) + torch.relu(linear("mix", read)).amax(0, keepdim=True)
    enter, candidate, forget, leave = linear("lstm", torch.cat([x, hidden], -1)).chunk(4, -1)
    cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
    hidden = torch.sigmoid(leave) * torch.tanh(cell)
    return linear("controls", hidden), linear("rate", hidden).squeeze(-1), hidden, cell


def _log(x: Tensor) -> Tensor:
    """Half the logarithm of 10 |x|, kept in [-2.5, 2.5]."""
    return torch.log(1e-8 + (10 * x).abs()).clamp(-5, 5) * 0.5
