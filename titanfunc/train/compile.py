"""Compiling a whole train step, with its state updated in place, into one graph (see fullgraph.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from titanfunc.fullgraph import Backend, Flat, own_code
from titanfunc.recorded import kept_by_contents
from titanfunc.train.state import TrainState
from titanfunc.train.step import Batch, Metrics, TrainStep


def compile_step(
    step: TrainStep, backend: Backend = "inductor", *, cuda_graph: bool = True, **options: Any
) -> TrainStep:
    """``step`` as one graph (``fullgraph``, static shapes), with the state's buffers donated.

    The compiled step writes the new state into the tensors of the state it was given and returns that state: the
    old values are gone, and no second copy is held. Metrics are fresh 0-d tensors. State and batch may be
    any pytrees; another structure, or other shapes, make another graph.
    backend: a torch.compile backend ("inductor", "aot_eager", a function), or None to run eagerly, donated
    all the same. cuda_graph: on a GPU, record the compiled step once it is warm and replay it with one
    launch. options: further arguments of torch.compile. Raises ValueError where the step returns a
    state of another structure than it was given.
    """

    def make(structure: Any) -> tuple[Flat, Callable[..., tuple[Tensor, ...]]]:
        flat = Flat(step, structure, backend)
        noted, further = kept_by_contents(flat, backend, options)

        @torch.compiler.allow_in_graph
        def traced(*leaves: Tensor) -> tuple[Tensor, ...]:
            results = noted(traced, leaves)
            if flat.outputs.child(0) != structure.child(0):
                raise ValueError("step: wanted a new state of the old one's structure, got another")
            return results

        def donated(state_leaves: list[Tensor], batch_leaves: list[Tensor]) -> tuple[Tensor, ...]:
            results = traced(*state_leaves, *batch_leaves)
            count = len(state_leaves)
            for old, new in zip(state_leaves, results[:count], strict=True):
                old.copy_(new)
            return results[count:]

        if backend is None:
            return flat, donated
        run = torch.compile(own_code(donated), fullgraph=True, dynamic=False, backend=backend, **further)
        return flat, _Replayed(run) if cuda_graph else run

    made: dict[Any, tuple[Flat, Callable[..., tuple[Tensor, ...]]]] = {}

    def compiled(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        leaves, structure = optree.tree_flatten((state, batch))
        if structure not in made:
            made[structure] = make(structure)
        flat, run = made[structure]
        count = structure.child(0).num_leaves
        values = run(leaves[:count], leaves[count:])
        return state, optree.tree_unflatten(flat.outputs.child(1), values)

    return compiled


class _Replayed:
    """A donated step that is recorded as a CUDA graph after WARM_UP calls on a state in the same buffers.

    The state is updated where it lies; the batch is copied into buffers of the graph's own, and metrics are
    copied out, so that they outlive the next replay. On a CPU it only passes calls on.
    """

    WARM_UP = 3

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.places: tuple[Any, ...] = ()
        self.calls = 0
        self.batch: list[Tensor] = []
        self.results: tuple[Tensor, ...] = ()

    def __call__(self, state: list[Tensor], batch: list[Tensor]) -> tuple[Tensor, ...]:
        if not state[0].is_cuda:
            return self.run(state, batch)
        places = (*(leaf.data_ptr() for leaf in state), *((leaf.shape, leaf.dtype) for leaf in batch))
        if places != self.places:  # another state, or batches of another shape: begin anew
            self.places, self.calls, self.graph = places, 0, None
        if self.calls < self.WARM_UP:
            self.calls += 1
            return self.run(state, batch)
        if self.graph is None:
            self._record(state, batch)
        for static, given in zip(self.batch, batch, strict=True):
            static.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return tuple(result.clone() for result in self.results)

    def _record(self, state: list[Tensor], batch: list[Tensor]) -> None:
        self.results, self.batch = (), [leaf.clone() for leaf in batch]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left over would lie beside the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.run(state, self.batch)
