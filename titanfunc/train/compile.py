"""Compiling a whole step into one graph, its state updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.train.state import TrainState
from titanfunc.train.step import Batch, Metrics, TrainStep


def compile_step(step: TrainStep, backend: str | Callable[..., Any] | None = "inductor", **options: Any) -> TrainStep:
    """``step`` as one graph (``fullgraph``, static shapes), with the state's buffers donated.

    The compiled step writes the new state into the tensors of the state it was given and returns that state: the
    old values are gone, and no second copy is held. Metrics are fresh 0-d tensors.
    The step is traced as JAX traces: run once on tensors without data, its operations recorded (its Python
    runs at tracing only, so it must be pure). torch.compile's reading of bytecode, which takes minutes for
    a step of this size, only sees the call; its guards on shapes and dtypes and its backends stay.
    backend: a torch.compile backend ("inductor", "aot_eager", a function), or None to run eagerly, donated
    all the same. options: further arguments of torch.compile.
    """
    traced = _Traced(step)

    @torch.compiler.allow_in_graph
    def flat_step(*leaves: Tensor) -> tuple[Tensor, ...]:
        return traced(leaves)

    def donated(*leaves: Tensor) -> tuple[Tensor, ...]:
        results = flat_step(*leaves)
        for i in range(traced.state_leaves):
            leaves[i].copy_(results[i])
        return results[traced.state_leaves :]

    run = donated
    if backend is not None:
        run = torch.compile(donated, fullgraph=True, dynamic=False, backend=backend, **options)

    def compiled(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        leaves = traced.flatten(state, batch)
        values = run(*leaves)
        return state, dict(zip(traced.metric_names, values, strict=True))

    return compiled


class _Traced:
    """A step as a function from the leaves of (state, batch) to those of the new state, then the metrics."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.structure: Any = None
        self.state_leaves = 0
        self.metric_names: list[str] = []

    def flatten(self, state: TrainState, batch: Batch) -> list[Tensor]:
        leaves, self.structure = optree.tree_flatten((state, batch))
        self.state_leaves = len(leaves) - len(tree.leaves(batch))
        return leaves

    def __call__(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state, batch = optree.tree_unflatten(self.structure, leaves)
        new, metrics = self.step(state, batch)
        if optree.tree_structure(new) != optree.tree_structure(state):
            raise ValueError("step: wanted a new state with the structure of the old one, got another")
        self.metric_names = list(metrics)
        return (*tree.leaves(new), *metrics.values())
