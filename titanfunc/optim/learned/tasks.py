"""Small tasks to learn an optimizer on: families of problems, each drawn by a seed, and so many at once by ``vmap``.

Letters: N examples a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import rng
from titanfunc.optim.base import Tree

INPUTS, HIDDEN, CLASSES, EXAMPLES = 8, 16, 4, 32
ROWS, COLUMNS = 8, 4


class Task(NamedTuple):
    """A family of problems, as pure functions of seeds (0-d int64).

    draw(seed) -> (data, params): one problem, and where its training begins; nested dicts of float32 tensors.
    loss(params, data, seed) -> 0-d: on a batch that the seed draws, fresh at each step.
    """

    draw: Callable[[Tensor], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Tensor], Tensor]


def _draw_quadratic(seed: Tensor) -> tuple[Tree, Tree]:
    size = ROWS * COLUMNS
    rotation = rng.gaussian(seed, (size, size), 0) / math.sqrt(size)
    # Curvatures over up to four orders of magnitude, and losses of different sizes.
    span, level = 2 * rng.uniform(seed, (2,), 0)
    places = torch.arange(size, device=seed.device) / size
    data = {
        "map": rotation * (10 ** (-span * places)).unsqueeze(1) * 10 ** (level - 1),
        "optimum": rng.gaussian(seed, (ROWS, COLUMNS), 1),
    }
    return data, {"point": rng.gaussian(seed, (ROWS, COLUMNS), 2)}


def _quadratic_loss(params: Tree, data: Tree, seed: Tensor) -> Tensor:
    """The same at every step: it has no batch."""
    return 0.5 * (data["map"] @ (params["point"] - data["optimum"]).reshape(-1)).square().mean()


def _draw_regression(seed: Tensor) -> tuple[Tree, Tree]:
    return {"teacher": _perceptron(seed, 1, 3)}, _perceptron(seed, 1, 0)


def _regression_loss(params: Tree, data: Tree, seed: Tensor) -> Tensor:
    x = rng.gaussian(seed, (EXAMPLES, INPUTS), 0)
    return 0.5 * (_apply(params, x) - 3 * _apply(data["teacher"], x)).square().mean()


def _draw_classification(seed: Tensor) -> tuple[Tree, Tree]:
    return {"centres": 1.5 * rng.gaussian(seed, (CLASSES, INPUTS), 3)}, _perceptron(seed, CLASSES, 0)


def _classification_loss(params: Tree, data: Tree, seed: Tensor) -> Tensor:
    # A product with one-hot rows: an index would be a gather over tasks.
    labels = (rng.uniform(seed, (EXAMPLES, 1), 0) * CLASSES).floor()
    one_hot = (labels == torch.arange(CLASSES, device=seed.device)).to(torch.float32)
    x = one_hot @ data["centres"] + rng.gaussian(seed, (EXAMPLES, INPUTS), 0)
    return -(one_hot * F.log_softmax(_apply(params, x), -1)).sum(-1).mean()


TASKS = {
    "quadratic": Task(_draw_quadratic, _quadratic_loss),
    "regression": Task(_draw_regression, _regression_loss),
    "classification": Task(_draw_classification, _classification_loss),
}
"""By name: a quadratic bowl of 32 weights, badly conditioned; a perceptron taught by another; Gaussian clusters."""


def _perceptron(seed: Tensor, outputs: int, stream: int) -> dict[str, Any]:
    """Weights [in, out] and biases of two layers."""
    return {
        "in": rng.gaussian(seed, (INPUTS, HIDDEN), stream) / math.sqrt(INPUTS),
        "shift": 0.1 * rng.gaussian(seed, (HIDDEN,), stream + 1),
        "out": rng.gaussian(seed, (HIDDEN, outputs), stream + 2) / math.sqrt(HIDDEN),
    }


def _apply(params: Tree, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["in"] + params["shift"]) @ params["out"]
