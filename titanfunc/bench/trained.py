"""What a row trains: one of our presets, by our optimizer or by torch's.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import titanfunc as tf
from titanfunc import tree
from titanfunc.bench import roofline
from titanfunc.bench.step_row import TORCH_MUON, StepRow, optimizer_of, sizes_of
from titanfunc.bench.torch_optim import muon_and_adamw
from titanfunc.device import require_kernels_run, require_optimizer_runs
from titanfunc.train.step import loss_fn

PIECE = 16_384  # tokens that the eager reference reads at once, if a row is not longer


class Trained(NamedTuple):
    """A training run, one step at a time.

    step: tokens int64 [B, T + 1] -> their loss, 0-d, before the step. reference: the same tokens -> the loss that the
    first step has to have, by plain eager torch; None where there is no other implementation. work: see roofline.py.
    skipped: steps that moved nothing.
    """

    step: Callable[[Tensor], Tensor]
    parameters: int
    precision: str
    vocabulary: int
    work: roofline.Work
    reference: Callable[[Tensor], float] | None = None
    skipped: Callable[[], int] = lambda: 0


class How(NamedTuple):
    """What all rows of a table share."""

    device: torch.device
    steps: int
    lr: float
    backend: str | None
    cuda_graph: bool


def ours(row: StepRow, how: How) -> Trained:
    """A preset, its whole step compiled; with torch's Muon its gradients alone."""
    config, optim = sizes_of(row), optimizer_of(row.optimizer, how.lr, how.steps)
    require_kernels_run(config, how.device, "kernels")
    require_optimizer_runs(optim, how.device)
    model = tf.models.build(config)
    make = _by_torch if row.optimizer == TORCH_MUON else _by_ours
    step, params, opt_state, skipped = make(model, optim, how)
    plain = tf.models.build(tf.config.override(config, {"kernels": "reference"}))
    return Trained(
        step, tree.size(params), config.precision, config.vocab_size,
        roofline.of_model(config, params, opt_state, row.batch, row.seq_len),
        lambda tokens: in_pieces(tf.train.make_eval_step(plain), params, tokens), skipped,
    )  # fmt: skip


def in_pieces(loss: Callable[..., Tensor], params: Any, tokens: Tensor) -> float:
    """The mean loss of tokens [B, T + 1], whose rows do not see each other, of a few rows at a time; params: leaves of
    any shapes."""
    pieces = tokens.split(max(1, PIECE // (tokens.shape[1] - 1)))
    return math.fsum(loss(params, {"tokens": piece}).item() * len(piece) for piece in pieces) / len(tokens)


def _by_ours(model: tf.models.Model, optim: tf.config.OptimConfig, how: How) -> tuple[Any, ...]:
    tx = tf.optim.from_config(optim, how.steps, model.config)
    state = tf.train.init_state(model, tx, seed=0, device=how.device)
    compiled = tf.train.compile_step(tf.train.make_train_step(model, tx), how.backend, cuda_graph=how.cuda_graph)

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        state, metrics = compiled(state, {"tokens": tokens})
        return metrics["loss"]

    return step, state.params, state.opt_state, lambda: int(state.skipped)


def _by_torch(model: tf.models.Model, optim: tf.config.OptimConfig, how: How) -> tuple[Any, ...]:
    start = tree.map(lambda leaf: leaf.to(how.device), model.init(tf.rng.generator(0)))
    mover = muon_and_adamw(start, lr=optim.lr, adam_lr=optim.lr * optim.muon.adam_ratio, weight_decay=0.1)
    params = mover.params

    def objective(params: Any, tokens: Tensor) -> Tensor:
        return loss_fn(model, params, tokens)[0]

    gradient_of = tf.train.compile_function(torch.func.grad_and_value(objective), how.backend)

    def step(tokens: Tensor) -> Tensor:
        grads, loss = gradient_of(params, tokens)
        mover.give(grads, optim.clip_norm)
        mover.step()
        found: Tensor = loss
        return found

    # Muon keeps one number a parameter, AdamW two; which parameter is whose makes no difference worth counting.
    return step, params, [params], lambda: 0
