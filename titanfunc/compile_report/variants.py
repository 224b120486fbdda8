"""The training step of each variant, behind one signature.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from titanfunc import tree
from titanfunc.config.compile_report import ReportPlan
from titanfunc.fullgraph import Flat, compile_function
from titanfunc.models import Model, build
from titanfunc.optim import GradientTransformation, apply_updates, from_config
from titanfunc.train import TrainState, compile_step, init_state, loss_fn, make_train_step

Step = Callable[[dict[str, Tensor]], Tensor]
"""A batch, tokens int64 [B, T + 1], and held_out [K, B, T + 1] where the optimizer learns on it -> the loss, 0-d."""


def make(plan: ReportPlan, variant: str, kernels: str, device: torch.device, nodes: list[int]) -> Step:
    """The step of one of our variants, which carries its state along; nothing is compiled yet.

    nodes: takes the operations of each graph that "aot_eager" compiles.
    """
    config = plan.config
    model = build(dataclasses.replace(plan.model, kernels=kernels))
    tx = from_config(plan.optim, max(1000, config.warm_up + config.steps + 1), model.config)
    state = init_state(model, tx, config.seed, device)
    if variant == "compiled_autograd":
        return _compiled_autograd(model, tx, state, config.accumulate)
    backend = {"eager": None, "aot_eager": counting(nodes)}.get(variant, "inductor")
    replayed = variant == "inductor_cuda_graph"
    compiled = compile_step(make_train_step(model, tx, config.accumulate), backend, cuda_graph=replayed)

    def step(batch: dict[str, Tensor]) -> Tensor:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics["loss"]

    return step


def counting(nodes: list[int]) -> Callable[..., Any]:
    """The backend "aot_eager", which also writes down how many operations each of its graphs has."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    return aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)


def _compiled_autograd(model: Model, tx: GradientTransformation, state: TrainState, parts: int) -> Step:
    """A compiled loss, its ``backward()`` captured by compiled autograd, and the optimizer as a graph of its own.

    A mixture's router draws no noise here, and an optimizer that learns on batches of its own cannot be moved so
    (ValueError when the step is called).
    """
    torch._dynamo.config.compiled_autograd = True
    leaves, structure = optree.tree_flatten(state.params)
    for leaf in leaves:
        leaf.requires_grad_()
    params, opt_state = state.params, state.opt_state

    def minimised(params: Any, tokens: Tensor) -> Tensor:
        loss, metrics = loss_fn(model, params, tokens)
        return loss + metrics["auxiliary_loss"] if "auxiliary_loss" in metrics else loss

    flat = Flat(minimised, optree.tree_structure((params, torch.zeros(()))))
    traced = torch.compiler.allow_in_graph(lambda *given: flat(*given)[0])

    @torch.compile(dynamic=False)
    def pull(leaves: list[Tensor], tokens: Tensor) -> Tensor:
        loss = traced(*leaves, tokens)
        loss.backward()
        return loss.detach()

    def moved(grads: Any, opt_state: Any, params: Any, loss: Tensor) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        return apply_updates(params, updates), opt_state

    move = compile_function(moved)

    def step(batch: dict[str, Tensor]) -> Tensor:
        nonlocal opt_state
        if "held_out" in batch:
            raise ValueError("optim.nested.mode: wanted one that needs no batches of its own with compiled autograd")
        losses = [pull(leaves, part) for part in batch["tokens"].chunk(parts)]
        loss = torch.stack(losses).mean()
        with torch.no_grad():
            grads = optree.tree_unflatten(structure, [leaf.grad / parts for leaf in leaves])
            new, opt_state = move(grads, opt_state, tree.map(torch.Tensor.detach, params), loss)
            for leaf, value in zip(leaves, optree.tree_leaves(new), strict=True):
                leaf.copy_(value)
                leaf.grad = None
        return loss

    return step


def older_way(plan: ReportPlan, benchmarks: Path, device: torch.device, *, fullgraph: bool = False) -> Step:
    """The step of benchmarks/older_way at the plan's sizes, on tokens int64 [B, T + 1] -> the loss, 0-d.

    Raises ValueError for a model without memory, and where the folder is not there.
    """
    if not plan.model.memory_at:
        raise ValueError("older_way: wanted a model with a memory")
    if not (benchmarks / "older_way").is_dir():
        raise ValueError(f"older_way: wanted it in {benchmarks}, where a checkout has it")
    sys.path.insert(0, str(benchmarks))
    older = importlib.import_module("older_way")
    _, step = older.make_step(older.Sizes.of(plan.model), device, fullgraph=fullgraph, lr=plan.optim.lr)
    return lambda batch: step(batch["tokens"])
