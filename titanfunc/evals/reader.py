"""Reading rows of any length with a model, piece by piece, and keeping what each prediction was worth.

Letters: N rows, L tokens that a row predicts, P tokens of a piece, R rows that are read at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import tree
from titanfunc.config import ModelConfig
from titanfunc.fullgraph import Backend, compile_function
from titanfunc.models.base import Model


class Reading(NamedTuple):
    """What a model made of every token, on the CPU. loss: nats, float32 [N, L]. right: bool [N, L], whether the
    likeliest token was the one that came: over a whole answer, whether greedy generation would have given it.
    """

    loss: Tensor
    right: Tensor


Reader = Callable[[Any, Tensor], Reading]


def make_reader(
    model: Model, *, write: bool = True, piece: int = 4096, rows: int = 8, backend: Backend = None
) -> Reader:
    """``reader(params, tokens) -> Reading`` for int64 tokens [N, L + 1] on any device, without gradients.

    A model that carries a state reads P tokens after another, so that memory use does not grow with L; one without
    (a transformer that attends to all that came before) reads each row at once. No logits are kept.
    write: False switches the memory's writes off, all else as it is. piece: P, rounded to whole segments and chunks.
    rows: R; the last rows are filled up to it. backend: of torch.compile, one graph for each shape, or None.
    Raises ValueError unless ``piece`` and ``rows`` are positive.
    """
    for name, value in (("piece", piece), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    switched = {} if write else {"write": False}

    def predict(params: Any, memory: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Any]:
        logits, memory = model.apply(params, memory, tokens[:, :-1], aligned=True, **switched)
        wide, targets = logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:]
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return loss.float(), wide.argmax(-1) == targets, _settle(memory)

    compiled = compile_function(predict, backend)
    size = piece_length(model.config, piece)

    def read(params: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        memory = _settle(model.init_memory(params, tokens.shape[0]))
        length = tokens.shape[1] - 1
        step = size if tree.leaves(memory) else length
        losses, rights = [], []
        for start in range(0, length, step):
            loss, right, memory = compiled(params, memory, tokens[:, start : start + step + 1].contiguous())
            losses.append(loss.cpu())
            rights.append(right.cpu())
        return torch.cat(losses, 1), torch.cat(rights, 1)

    def reader(params: Any, tokens: Tensor) -> Reading:
        if tokens.ndim != 2 or tokens.shape[1] < 2 or not tokens.shape[0]:
            raise ValueError(f"tokens: wanted rows of at least 2 tokens, got {tuple(tokens.shape)}")
        device, count = tree.leaves(params)[0].device, tokens.shape[0]
        together = min(rows, count)
        parts = []
        with torch.no_grad():
            for start in range(0, count, together):
                part = tokens[start : start + together]
                filled = part.repeat(-(-together // len(part)), 1)[:together]  # of one shape: no other graph
                loss, right = read(params, filled.to(device))
                parts.append((loss[: len(part)], right[: len(part)]))
        return Reading(*(torch.cat(each) for each in zip(*parts, strict=True)))

    return reader


def piece_length(config: ModelConfig, wanted: int) -> int:
    """The multiple of the model's segments and chunks that is nearest below ``wanted`` tokens, but at least one.

    >>> piece_length(ModelConfig(), 4096), piece_length(ModelConfig(), 100), piece_length(ModelConfig(), 1)
    (4096, 64, 64)
    """
    unit = math.lcm(config.mac.segment, config.memory.chunk_size)
    return max(wanted // unit, 1) * unit


def _settle(memory: Any) -> Any:
    """The state with every leaf [R, ...] in buffers of its own: fresh states share them, and a graph would tell."""
    return tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), memory)
