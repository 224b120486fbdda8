"""Writing text with a model, one token after another.

Letters: B batch, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.base import Model


def generate(
    model: Model,
    params: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues int64 prompts [B, P] by ``max_new_tokens``; returns the new tokens [B, N].

    A model with memory carries its state, of constant size, from token to token; one without reads its whole context
    again for each. temperature: 0 takes the likeliest token, else logits are divided by it. top_k: keep the k
    likeliest tokens (0: all). top_p: keep the likeliest tokens up to this share of the probability.
    generator: where the draws come from, on the device of ``prompt`` (needed unless temperature is 0).
    Raises ValueError for values out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: wanted [batch, tokens] with at least one token, got {tuple(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted at least 1, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "wanted temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got temperature={temperature}, top_p={top_p}, top_k={top_k}"
        )
    if temperature > 0 and generator is None:
        raise ValueError("generator: wanted a torch.Generator to draw from (or temperature=0), got None")
    with torch.no_grad():
        memory = model.init_memory(params, prompt.shape[0])
        stateful = bool(tree.leaves(memory))
        logits, memory = model.apply(params, memory, prompt, aligned=True)
        context = prompt
        new = []
        for i in range(max_new_tokens):
            token = sample(logits[:, -1], temperature, top_k, top_p, generator)
            new.append(token)
            if i == max_new_tokens - 1:
                break
            if stateful:
                logits, memory = model.apply(params, memory, token)
            else:
                context = torch.cat([context, token], 1)
                logits, memory = model.apply(params, memory, context)
    return torch.cat(new, 1)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token [B, 1] from logits [B, V]; the arguments are those of :func:`generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        order = logits.sort(descending=True)
        probabilities = order.values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the likeliest token always stays
        kept = order.values.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter(-1, order.indices, kept)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
