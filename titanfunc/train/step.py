"""The train step as one pure function: forward, inner gradients, outer gradient, clipping, optimizer, guards.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanfunc import tree
from titanfunc.memory.slots import Documents
from titanfunc.models.base import Model
from titanfunc.ops.cross_entropy import cross_entropy, total_weight
from titanfunc.optim.base import GradientTransformation, apply_updates, metrics_of
from titanfunc.optim.nested import HeldOut
from titanfunc.optim.transforms import current_learning_rate
from titanfunc.train.state import TrainState

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def loss_fn(
    model: Model,
    params: Any,
    tokens: Tensor,
    weights: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Metrics]:
    """Next-token loss in nats (0-d) of int64 tokens [B, T + 1], from fresh memories, and the model's metrics.

    weights: [B, T], of the predictions of tokens[:, 1:]; then the metrics hold ``accuracy``. seed: 0-d int64, for a
    model that draws noise in training; None, as in evaluation, draws none. documents: where documents begin in
    tokens[:, :-1], each of which is then read with a fresh memory.
    """
    memory = model.init_memory(params, tokens.shape[0])
    # A model of someone's own need not know the keywords that it has no use for.
    extra = {name: value for name, value in (("seed", seed), ("documents", documents)) if value is not None}
    logits, _, metrics = model.apply(params, memory, tokens[:, :-1], aligned=True, with_metrics=True, **extra)
    targets = tokens[:, 1:]
    if weights is not None:
        if weights.shape != targets.shape:
            raise ValueError(f"weights: wanted {tuple(targets.shape)}, one a prediction, got {tuple(weights.shape)}")
        metrics = {**metrics, "accuracy": accuracy(logits.detach(), targets, weights)}
    return cross_entropy(logits, targets, weights), metrics


def accuracy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The share, 0-d, of answers (predictions of weight 1 or more) whose likeliest token is right.

    logits [B, T, V], targets and weights [B, T].
    """
    answers = _answers(weights)
    return ((logits.argmax(-1) == targets) * answers).sum() / answers.sum().clamp_min(1)


def _answers(weights: Tensor) -> Tensor:
    """1 where a prediction is part of an answer, else 0 (less weight: text around it)."""
    return (weights >= 1).to(torch.float32)


class _Part(NamedTuple):
    """An equal part of a batch. shares: what its loss and its accuracy count for in the mean over parts (0-d each), or
    None for one as each of the others."""

    tokens: Tensor
    weights: Tensor | None
    starts: Tensor | None
    shares: tuple[Tensor, Tensor] | None


def make_train_step(model: Model, tx: GradientTransformation, accumulate: int = 1, *, documents: int = 0) -> TrainStep:
    """``step(state, {"tokens": int64 [B, T + 1]}) -> (state, metrics)``, pure.

    The batch may hold "weights" [B, T] of the predictions. accumulate: equal parts of the batch whose gradients are
    averaged inside the step, by their weights (B must divide; ValueError). documents: with a number, rows hold up to
    so many packed documents, the batch holds "starts" (bool [B, T], where tokens[:, :-1] begin one), and each document
    is read with a fresh memory and sees no other. A model's ``auxiliary_loss`` is minimised too, beside the loss. A
    step whose loss or gradient is not finite leaves params and opt_state as they were, and is counted. A batch may
    bring "held_out", int64 [K, B, T + 1], K batches for an optimizer that learns on them (``optim.nested``).
    metrics, all 0-d: loss (nats), grad_norm (before clipping), skipped (0 or 1), lr, accuracy of the answers where
    there are weights, the model's own and the optimizer's.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: wanted at least 1, got {accumulate}")
    draws_noise = getattr(model.config, "feed_forward", "") == "moe"

    def objective(params: Any, part: _Part, seed: Tensor | None) -> tuple[Tensor, tuple[Tensor, Metrics]]:
        packed = None if part.starts is None else Documents(part.starts, documents)
        loss, metrics = loss_fn(model, params, part.tokens, part.weights, seed=seed, documents=packed)
        if part.shares is not None:
            loss = loss * part.shares[0]
            metrics = {**metrics, "accuracy": metrics["accuracy"] * part.shares[1]}
        minimised = loss + metrics["auxiliary_loss"] if "auxiliary_loss" in metrics else loss
        return minimised, (loss, metrics)

    gradient_of = torch.func.grad(objective, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = batch["tokens"].shape[0]
        if rows % accumulate:
            raise ValueError(f"tokens: wanted a batch that {accumulate} parts divide, got {rows} rows")
        if ("starts" in batch) != bool(documents):
            wanted = f"a batch with them, for documents={documents}" if documents else "none (documents=0)"
            raise ValueError(f"starts: wanted {wanted}, got a batch of {', '.join(batch)}")
        totals: Any = None
        for i, part in enumerate(_split(batch, accumulate)):
            seed = state.step * accumulate + i if draws_noise else None
            found = gradient_of(state.params, part, seed)
            totals = found if totals is None else tree.add(totals, found)
        if accumulate > 1:
            totals = tree.scale(totals, 1 / accumulate)
        grads, (loss, metrics) = totals
        norm = tree.global_norm(grads)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        extra = {"held_out": _held_out(objective, batch["held_out"])} if "held_out" in batch else {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss, **extra)
        rate = current_learning_rate(opt_state)
        opt_state = tree.where(finite, opt_state, state.opt_state)
        skipped = (~finite).to(torch.int64)
        new = TrainState(
            state.step + 1,
            tree.where(finite, apply_updates(state.params, updates), state.params),
            opt_state,
            state.skipped + skipped,
            (state.skipped_in_row + skipped) * skipped,
        )
        reported = {"loss": loss, "grad_norm": norm, "skipped": skipped, **metrics, **metrics_of(opt_state)}
        if rate is not None:
            reported["lr"] = rate
        return new, {name: value.detach() for name, value in reported.items()}

    return step


def _held_out(objective: Callable[..., Any], batches: Tensor) -> HeldOut:
    """Batches [K, B, T + 1] for an optimizer, with the loss that the step minimises, without a router's noise."""

    def loss(params: Any, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            return objective(params, _Part(tokens, None, None, None), None)[0]

    return HeldOut(loss, list(batches))


def make_eval_step(model: Model) -> Callable[[Any, Batch], Tensor]:
    """``step(params, {"tokens": int64 [B, T + 1]}) -> loss`` in nats, 0-d, without gradients."""

    def step(params: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            return loss_fn(model, params, batch["tokens"])[0]

    return step


def make_answer_step(model: Model) -> Callable[[Any, Batch], Metrics]:
    """``step(params, {"tokens": [B, T + 1], "weights": [B, T]}) -> {"loss", "accuracy"}``, 0-d, without gradients."""

    def step(params: Any, batch: Batch) -> Metrics:
        with torch.no_grad():
            loss, metrics = loss_fn(model, params, batch["tokens"], batch["weights"])
        return {"loss": loss, "accuracy": metrics["accuracy"]}

    return step


def _split(batch: Batch, parts: int) -> list[_Part]:
    """Equal parts of a batch.

    A part's loss is a mean by its own weights, and its accuracy one over its own answers: the shares, which are 1 on
    average, are what these count for in the mean over parts, so that it equals that of the whole batch.
    """

    def cut(name: str) -> list[Any]:
        return list(batch[name].chunk(parts)) if name in batch else [None] * parts

    shares: list[Any] = [None] * parts
    if "weights" in batch and parts > 1:
        split = batch["weights"].chunk(parts)
        sums, counts = (torch.stack([each.sum() for each in some]) for some in (split, [_answers(w) for w in split]))
        loss_shares, accuracy_shares = (parts * each / total_weight(each) for each in (sums, counts))
        shares = list(zip(loss_shares.unbind(), accuracy_shares.unbind(), strict=True))
    return [_Part(*each) for each in zip(cut("tokens"), cut("weights"), cut("starts"), shares, strict=True)]
