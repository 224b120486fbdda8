"""The train step as one pure function: forward, inner gradients, outer gradient, clipping, optimizer, guards.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.base import Model
from titanfunc.ops.cross_entropy import cross_entropy
from titanfunc.optim.base import GradientTransformation, apply_updates
from titanfunc.optim.transforms import current_learning_rate
from titanfunc.train.state import TrainState

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def loss_fn(model: Model, params: Any, tokens: Tensor) -> tuple[Tensor, Metrics]:
    """Next-token loss in nats (0-d) of int64 tokens [B, T + 1], from fresh memories, and the model's metrics."""
    memory = model.init_memory(params, tokens.shape[0])
    logits, _, metrics = model.apply(params, memory, tokens[:, :-1], aligned=True, with_metrics=True)
    return cross_entropy(logits, tokens[:, 1:]), metrics


def make_train_step(model: Model, tx: GradientTransformation, accumulate: int = 1) -> TrainStep:
    """``step(state, {"tokens": int64 [B, T + 1]}) -> (state, metrics)``, pure.

    accumulate: equal parts of the batch whose gradients are averaged inside the step (B must divide; ValueError).
    A step whose loss or gradient is not finite leaves params and opt_state as they were, and is counted.
    metrics, all 0-d: loss (nats), grad_norm (before clipping), skipped (0 or 1), lr, and the model's own.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: wanted at least 1, got {accumulate}")
    gradient_of = torch.func.grad_and_value(lambda params, tokens: loss_fn(model, params, tokens), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = batch["tokens"]
        if tokens.shape[0] % accumulate:
            raise ValueError(f"tokens: wanted a batch that {accumulate} parts divide, got {tokens.shape[0]} rows")
        parts = [gradient_of(state.params, part) for part in tokens.chunk(accumulate)]
        grads, (loss, metrics) = parts[0]
        for more, (more_loss, more_metrics) in parts[1:]:
            grads, loss, metrics = tree.add(grads, more), loss + more_loss, tree.add(metrics, more_metrics)
        if accumulate > 1:
            grads, loss, metrics = (tree.scale(each, 1 / accumulate) for each in (grads, loss, metrics))
        norm = tree.global_norm(grads)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss)
        rate = current_learning_rate(opt_state)
        skipped = (~finite).to(torch.int64)
        new = TrainState(
            state.step + 1,
            tree.where(finite, apply_updates(state.params, updates), state.params),
            tree.where(finite, opt_state, state.opt_state),
            state.skipped + skipped,
            (state.skipped_in_row + skipped) * skipped,
        )
        reported = {"loss": loss, "grad_norm": norm, "skipped": skipped, **metrics}
        if rate is not None:
            reported["lr"] = rate
        return new, {name: value.detach() for name, value in reported.items()}

    return step


def make_eval_step(model: Model) -> Callable[[Any, Batch], Tensor]:
    """``step(params, {"tokens": int64 [B, T + 1]}) -> loss`` in nats, 0-d, without gradients."""

    def step(params: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            return loss_fn(model, params, batch["tokens"])[0]

    return step
