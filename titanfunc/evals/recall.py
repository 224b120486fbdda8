"""Recall as a share of answers. An answer is a run of predictions of weight 1 or more in a row.

Letters: N rows, B of a batch, L (T) tokens that a row predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.evals.reader import Reading


class Score(NamedTuple):
    """answers: how many there were. accuracy: the share of them that is right as a whole. token_accuracy: the share
    of their tokens that is right. loss: nats a token of an answer.
    """

    answers: int
    accuracy: float
    token_accuracy: float
    loss: float


def score(reading: Reading, weights: Tensor) -> Score:
    """The score over all answers of rows that were read; weights [N, L]. Raises ValueError if there is no answer."""
    inside = (weights >= 1).cpu()
    if not inside.any():
        raise ValueError("weights: wanted an answer (a weight of 1) in the rows, got none")
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0)[inside.flatten()] - 1  # of the answer that a token belongs to
    right = reading.right[inside]
    mistakes = torch.zeros(int(number[-1]) + 1, dtype=torch.int64).index_add(0, number, (~right).long())
    return Score(
        len(mistakes),
        (mistakes == 0).double().mean().item(),
        right.double().mean().item(),
        reading.loss[inside].double().mean().item(),
    )


def evaluate_answers(
    step: Callable[[Any, dict[str, Tensor]], Mapping[str, Tensor]], params: Any, batches: Iterable[dict[str, Tensor]]
) -> dict[str, float]:
    """``{"loss": nats a weight, "accuracy": of the answers' tokens}`` over batches with weights [B, T], as one.

    step: ``(params, {"tokens": int64 [B, T + 1], "weights": [B, T]}) -> {"loss", "accuracy"}``, 0-d means. The device
    is read once, at the end. Raises ValueError if there is no batch.
    """
    device = tree.leaves(params)[0].device
    rows, totals = [], []
    for batch in batches:
        values = step(params, {name: leaf.to(device) for name, leaf in batch.items()})
        rows.append(torch.stack([values["loss"], values["accuracy"]]).float())
        totals.append(torch.stack([batch["weights"].sum(), (batch["weights"] >= 1).sum()]))
    if not rows:
        raise ValueError("batches: wanted at least 1, got none")
    shares = torch.stack(totals).to(device)
    loss, accuracy = ((torch.stack(rows) * shares).sum(0) / shares.sum(0).clamp_min(1e-30)).tolist()
    return {"loss": loss, "accuracy": accuracy}
