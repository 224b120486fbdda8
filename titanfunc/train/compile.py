"""Compiling a whole train step, with its state updated in place, into one graph (see fullgraph.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from titanfunc.fullgraph import Backend, Flat, apart, in_graph, kinds_of, own_code
from titanfunc.train.old_values import KEEP_OLD_VALUES

Step = Callable[..., tuple[Any, Any]]
"""(state, batch, *fixed) -> (new state, metrics)."""
Run = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, ...]]
"""(leaves of the state, of the batch, of what is fixed) -> leaves of the metrics."""
State = TypeVar("State")


def compile_step(step: Step, backend: Backend = "inductor", *, cuda_graph: bool = True, **options: Any) -> CompiledStep:
    """``step`` as one graph (``fullgraph``, static shapes), with the state's buffers donated.

    The compiled step writes the new state into the tensors of the state it was given and returns that state: the
    old values are gone, and no second copy is held. Metrics are fresh tensors. State and batch may be any pytrees of
    tensors; another structure, or other shapes, make another graph. A step may take further ones, (state, batch,
    *fixed), which it only reads where they lie, such as the weights of a step that does not train them.
    backend: a torch.compile backend ("inductor", "aot_eager", a function), or None to run eagerly, donated
    all the same; one that ends in inductor by a way of its own has its fault with old values (old_values.py).
    cuda_graph: where all tensors are on a GPU, record the compiled step once it is warm and replay it with one launch;
    for a state, or something fixed, that lies elsewhere in memory it is recorded anew. Every shape of batch has a
    graph, which holds its activations. options: further arguments of torch.compile.

    A call raises ValueError for a leaf that is no tensor, for leaves of the state that share memory, and for a new
    state that is not like the old one (its structure; shape, dtype and device of every leaf). What ``step`` raises
    comes out as it is.
    """
    return CompiledStep(step, backend, cuda_graph, options)


class CompiledStep:
    """(state, batch, *fixed) -> (state, metrics), pytrees of tensors of any shapes; made by :func:`compile_step`."""

    def __init__(self, step: Step, backend: Backend, cuda_graph: bool, options: dict[str, Any]) -> None:
        self._step, self._backend, self._cuda_graph, self._options = step, backend, cuda_graph, options
        self._made: dict[Any, tuple[_Whole, Run]] = {}

    def __call__(self, state: State, batch: Any, *fixed: Any) -> tuple[State, Any]:
        """The state, moved on in its own tensors, and the metrics (leaves of any shapes)."""
        leaves, structure = optree.tree_flatten((state, batch, *fixed))
        _require_tensors(leaves, structure)
        key = structure, kinds_of(leaves)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(structure, all(leaf.is_cuda for leaf in leaves))
        whole, run = made
        own, given, stays = whole.parted(leaves)
        whole.require_apart(own)
        values = whole.run(run, own, given, stays)
        return state, optree.tree_unflatten(whole.outputs.child(1), values)

    def how(self, device: torch.device | str) -> str:
        """How the step runs on a device, in words."""
        if self._backend is None:
            return "eager, its state donated"
        name = self._backend if isinstance(self._backend, str) else getattr(self._backend, "__name__", "a function")
        replayed = self._cuda_graph and torch.device(device).type == "cuda"
        return f"the step as one graph by {name}, its state donated" + ", replayed as a CUDA graph" * replayed

    def forget_graphs(self) -> None:
        """Gives back the memory of all CUDA graphs that were recorded; what is compiled stays."""
        for _, run in self._made.values():
            if isinstance(run, _Replayed):
                run.forget()

    def _make(self, structure: Any, on_gpu: bool) -> tuple[_Whole, Run]:
        whole = _Whole(self._step, structure, self._backend)
        traced, further = in_graph(whole, self._backend, _with_old_values(self._options, self._backend))

        def donated(
            state_leaves: list[Tensor], batch_leaves: list[Tensor], fixed_leaves: list[Tensor]
        ) -> tuple[Tensor, ...]:
            results = traced(*state_leaves, *batch_leaves, *fixed_leaves)
            count = len(state_leaves)
            for old, new in zip(state_leaves, results[:count], strict=True):
                old.copy_(new)
            return results[count:]

        if self._backend is None:
            return whole, donated
        run = torch.compile(own_code(donated), fullgraph=True, dynamic=False, backend=self._backend, **further)
        return whole, _Replayed(run) if self._cuda_graph and on_gpu else run


_PASS = "post_grad_custom_pre_pass"


def _with_old_values(options: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Options of torch.compile, so that inductor keeps what a step hands on of its old state."""
    if backend != "inductor":
        return options
    options, given = dict(options), dict(options.get("options") or {})
    if (mode := options.pop("mode", None)) is not None:  # which are options of inductor's by another name
        if given:
            raise ValueError("compile_step: wanted mode or options of inductor, got both")
        given = torch._inductor.list_mode_options(mode)
    if given.get(_PASS) or getattr(torch._inductor.config, _PASS):
        raise ValueError(f"compile_step: {_PASS}: wanted none, as one of the step's own stands there, got one")
    return {**options, "options": {**given, _PASS: KEEP_OLD_VALUES}}


class _Whole(Flat):
    """A step for states and batches of one structure."""

    def __init__(self, step: Step, structure: Any, backend: Backend) -> None:
        super().__init__(step, structure, backend)
        self.count = structure.child(0).num_leaves
        self._fixed_from = self.count + structure.child(1).num_leaves
        self._names = [each.codify("state") for each in optree.treespec_accessors(structure.child(0))]
        self._places: list[int] = []
        if not self.count:
            raise ValueError("state: wanted at least one tensor, got none")

    def parted(self, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The leaves (any shapes) of the state, of the batch, and of what is fixed."""
        return leaves[: self.count], leaves[self.count : self._fixed_from], leaves[self._fixed_from :]

    def finish(self, leaves: Sequence[Tensor], results: Sequence[Any]) -> tuple[Tensor, ...]:
        """The new state's leaves, each like the old one's, and the metrics'; none in memory of another old leaf, which
        is written over."""
        old = self.inputs.child(0)
        if self.outputs.type is not tuple or self.outputs.num_children != 2 or self.outputs.child(0) != old:
            raise ValueError("step: wanted (a new state of the old one's structure, metrics), got another")
        results = super().finish(leaves, results)
        for name, before, after in zip(self._names, leaves, results, strict=False):
            if kinds_of([before]) != kinds_of([after]):
                raise ValueError(f"step: {name}: wanted {_kind(before)}, as the old one, got {_kind(after)}")
        whole = list(results)
        changed = [i for i, result in enumerate(results) if i >= self.count or result is not leaves[i]]
        for i, result in zip(changed, apart([results[i] for i in changed], leaves), strict=True):
            whole[i] = result
        return tuple(whole)

    def require_apart(self, leaves: Sequence[Tensor]) -> None:
        """Raises ValueError where two leaves of a state share memory; one that lies where the last one did does not."""
        places = [leaf.data_ptr() for leaf in leaves]
        if places == self._places:
            return
        end, last = 0, ""
        for place, leaf, name in sorted(zip(places, leaves, self._names, strict=True), key=lambda each: each[0]):
            if not leaf.numel():
                continue
            if place < end:
                raise ValueError(f"state: wanted tensors in memory of their own, got {last} and {name} that overlap")
            reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True)) + 1
            end, last = place + reach * leaf.element_size(), name
        self._places = places


def _require_tensors(leaves: Sequence[Any], structure: Any) -> None:
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            first, *rest = optree.treespec_accessors(structure)[i]
            root = ("state", "batch")[first.entry] if first.entry < 2 else f"fixed[{first.entry - 2}]"
            name = optree.PyTreeAccessor(rest).codify(root)
            raise ValueError(f"{name}: wanted a tensor, got {type(leaf).__name__}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


class _Replayed:
    """A donated step on a GPU that is recorded as a CUDA graph after WARM_UP calls on tensors in the same places.

    The state is updated, and what is fixed is read, where it lies; the batch is copied into buffers of the graph's own,
    and metrics are copied out, so that they outlive the next replay.
    """

    WARM_UP = 3

    def __init__(self, run: Run) -> None:
        self.run = run
        self.forget()

    def forget(self) -> None:
        """Begins anew, without a graph and what it holds."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.places: tuple[tuple[int, ...], ...] = ()
        self.calls = 0
        self.batch: list[Tensor] = []
        self.results: tuple[Tensor, ...] = ()

    def __call__(self, state: list[Tensor], batch: list[Tensor], fixed: list[Tensor]) -> tuple[Tensor, ...]:
        places = tuple((leaf.data_ptr(), *leaf.stride()) for leaf in itertools.chain(state, fixed))
        if places != self.places:  # other tensors
            self.forget()
            self.places = places
        if self.calls < self.WARM_UP:
            self.calls += 1
            return self.run(state, batch, fixed)
        if self.graph is None:
            self.graph = self._record(state, batch, fixed)
        for static, given in zip(self.batch, batch, strict=True):
            static.copy_(given)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)

    def _record(self, state: list[Tensor], batch: list[Tensor], fixed: list[Tensor]) -> torch.cuda.CUDAGraph:
        self.batch = [leaf.clone() for leaf in batch]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up left over would lie beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.results = self.run(state, self.batch, fixed)
        return graph
