"""Writing text with a model, one token after another, with a state of constant size.

Letters: B batch, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.folding import Folded, fold
from titanfunc.fullgraph import Backend, kinds_of
from titanfunc.models.base import Memory, Model
from titanfunc.train.compile import CompiledStep, compile_step


def _contiguous(memory: Memory) -> Memory:
    """A copy, laid out as every other memory is: a compiled step would compile again for other strides."""
    return tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), memory)


class DecodeStep(NamedTuple):
    """One token more.

    run(params, memory, token, seed) -> (next token, memory): for int64 tokens [B, 1] and a 0-d int64 seed; the token is
    a fresh one, and a compiled step moves the memory on in the tensors that it is given, as compile_step does with a
    state: they should be from ``take``.
    temperature, top_k, top_p: how it draws.
    take(memory) -> memory: a copy to go on with, for a compiled step in tensors that it keeps. They are there once: the
    next call writes them over, or gives them back if its memory has other shapes, so such a step serves one batch of
    texts at a time.
    read(params, memory, token) -> what ``run`` may be given in place of params: parameters as they are now, for
    memories and tokens of these shapes. A compiled step joins and rounds parameters (matrices, under precision bf16)
    here instead of at each token, in tensors that it keeps likewise: it takes what it read last alone. Logits are those
    of params, but for the order in which a compiler adds.
    """

    run: Callable[[Any, Memory, Tensor, Tensor], tuple[Tensor, Memory]]
    temperature: float
    top_k: int
    top_p: float
    take: Callable[[Memory], Memory] = _contiguous
    read: Callable[[Any, Memory, Tensor], Any] = lambda params, memory, token: params


LOOK_EVERY = 16
"""Tokens between two looks at whether every row has stopped: each look waits for the device."""


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Without gradients; nor in torch.inference_mode, whose tensors could not be written over by a call outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def make_decode_step(
    model: Model,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: Backend = None,
    cuda_graph: bool = True,
) -> DecodeStep:
    """A step that reads one int64 token [B, 1] and draws the next.

    temperature: 0 takes the likeliest token, else logits are divided by it. top_k: keep the k likeliest tokens (0:
    all). top_p: keep the likeliest tokens up to this share of the probability. seed: 0-d int64, another at each step;
    the same seed draws the same. backend: a torch.compile backend makes the step one graph (None: eager), to be used
    for any number of calls of :func:`generate`; every shape of them is compiled. cuda_graph: on a GPU, replay the
    compiled step as a CUDA graph, as :func:`titanfunc.train.compile_step` does; there is one at a time, of the shape
    that came last. Raises ValueError for values out of range.
    """
    _check_sampling(temperature, top_k, top_p)

    def step(
        memory: Memory, given: tuple[Tensor, Tensor], params: Any, apply: Callable[..., Any] = model.apply
    ) -> tuple[Memory, Tensor]:
        token, seed = given
        logits, memory = apply(params, memory, token)
        return memory, sample(logits[:, -1], seed, temperature, top_k, top_p)

    if backend is None:

        @_plain()
        def plain(params: Any, memory: Memory, token: Tensor, seed: Tensor) -> tuple[Tensor, Memory]:
            memory, token = step(memory, (token, seed), params)
            return token, _contiguous(memory)

        return DecodeStep(plain, temperature, top_k, top_p)
    compiled = _Compiled(model, step, lambda each: compile_step(each, backend, cuda_graph=cuda_graph))
    return DecodeStep(compiled.run, temperature, top_k, top_p, compiled.take, compiled.read)


def _kind(value: Tensor | None) -> Any:
    return None if value is None else kinds_of([value])


class _Read:
    """Parameters as ``step`` reads them: ``values``, which it takes in their place."""

    def __init__(self, step: CompiledStep, values: list[Tensor]) -> None:
        self.step, self.values = step, values


class _Compiled:
    """A compiled step, and where its memory and what it reads of parameters lie while it is at work.

    Both lie where the last ones of the same shapes lay, so that the CUDA graph which was recorded there is replayed at
    once.
    """

    def __init__(self, model: Model, step: Callable[..., Any], make: Callable[..., CompiledStep]) -> None:
        self.model, self.step, self.make = model, step, make
        self.whole = make(step)
        self.parts: dict[Any, tuple[Folded, CompiledStep]] = {}
        self.memory: Memory = ()
        self.kind: Any = None
        self.made: list[Tensor | None] = []
        self.last: weakref.ref[_Read] | None = None

    @_plain()
    def run(self, params: Any, memory: Memory, token: Tensor, seed: Tensor) -> tuple[Tensor, Memory]:
        """(next token [B, 1], memory); see DecodeStep."""
        if isinstance(params, _Read):
            if self.last is None or params is not self.last():
                raise ValueError("params: wanted what this step read last, or parameters, got what was read before")
            memory, token = params.step(memory, (token, seed), params.values)
        else:
            memory, token = self.whole(memory, (token, seed), params)
        return token, memory

    @_plain()
    def take(self, memory: Memory) -> Memory:
        """A copy of a memory (leaves of any shapes)."""
        leaves, structure = optree.tree_flatten(memory)
        kind = structure, kinds_of(leaves)
        if kind != self.kind:
            self.memory, self.kind = (), None
            for step in (self.whole, *(step for _, step in self.parts.values())):
                step.forget_graphs()
            self.memory, self.kind = _contiguous(memory), kind
        else:
            tree.map(Tensor.copy_, self.memory, memory)
        return self.memory

    @_plain()
    def read(self, params: Any, memory: Memory, token: Tensor) -> _Read:
        """What a step reads of parameters (any shapes)."""
        for place, leaf in zip(optree.tree_accessors(params), optree.tree_leaves(params), strict=True):
            if not isinstance(leaf, Tensor):
                raise ValueError(f"{place.codify('params')}: wanted a tensor, got {type(leaf).__name__}")
        leaves, structure = optree.tree_flatten((params, memory, token))
        key = structure, kinds_of(leaves), tuple(leaf.stride() for leaf in optree.tree_leaves(params))
        if key not in self.parts:
            self.parts[key] = self._parted(params, memory, token)
        folded, step = self.parts[key]
        values = list(folded.before(*optree.tree_leaves(params)))
        made = [value if is_made else None for value, is_made in zip(values, folded.made, strict=True)]
        if [_kind(value) for value in made] == [_kind(value) for value in self.made]:
            for i, kept in enumerate(self.made):
                values[i] = values[i] if kept is None else kept.copy_(values[i])
        else:
            self.made = made
        read = _Read(step, values)
        self.last = weakref.ref(read)
        return read

    def _parted(self, params: Any, memory: Memory, token: Tensor) -> tuple[Folded, CompiledStep]:
        folded = fold(self.model.apply, params, memory, token)

        def step(memory: Memory, given: tuple[Tensor, Tensor], values: list[Tensor]) -> tuple[Memory, Tensor]:
            return self.step(memory, given, values, folded)

        return folded, self.make(step)


def generate(
    model: Model,
    params: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    decode: DecodeStep | None = None,
) -> Tensor:
    """Continues int64 prompts [B, P] by at most ``max_new_tokens``; returns the new tokens [B, N].

    A model carries its state, of constant size, from token to token; a transformer without a window a cache of
    P + max_new_tokens. temperature, top_k, top_p: as in :func:`make_decode_step`. stop_token: a row that drew it goes
    on with nothing else, and N ends where every row has. generator: where the seed of the draws comes from
    (needed unless temperature is 0). decode: a step from :func:`make_decode_step`, compiled if you like; it says how
    tokens are drawn, the first one too. Raises ValueError for values out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: wanted [batch, tokens] with at least one token, got {tuple(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted at least 1, got {max_new_tokens}")
    decode = decode or make_decode_step(model, temperature=temperature, top_k=top_k, top_p=top_p)
    given, drawn = (temperature, top_k, top_p), (decode.temperature, decode.top_k, decode.top_p)
    if given not in (drawn, (1.0, 0, 1.0)):
        raise ValueError(f"decode: wanted a step made for temperature, top_k, top_p = {given}, got one for {drawn}")
    temperature, top_k, top_p = drawn
    if temperature > 0 and generator is None:
        raise ValueError("generator: wanted a torch.Generator to draw from (or temperature=0), got None")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token: wanted a token from 0 to {model.config.vocab_size - 1}, got {stop_token}")
    start = 0
    if generator is not None and temperature > 0:
        start = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    seeds = start + torch.arange(max_new_tokens, device=prompt.device)
    with _plain():
        memory = _start(model, params, prompt, max_new_tokens)
        logits, memory = model.apply(params, memory, prompt, aligned=True)
        memory = decode.take(memory)
        token = sample(logits[:, -1], seeds[0], temperature, top_k, top_p)
        read = decode.read(params, memory, token) if max_new_tokens > 1 else params
        stopped = torch.zeros_like(token, dtype=torch.bool) if stop_token is None else token == stop_token
        new = [token]
        for i in range(1, max_new_tokens):
            if stop_token is not None and i % LOOK_EVERY == 0 and bool(stopped.all()):
                break
            token, memory = decode.run(read, memory, token, seeds[i])
            if stop_token is not None:
                token = torch.where(stopped, stop_token, token)
                stopped = stopped | (token == stop_token)
            new.append(token)
        tokens = torch.cat(new, 1)
        if stop_token is not None:  # up to the first stop of the row that stopped last
            going = (tokens != stop_token).sum(1).max()
            tokens = tokens[:, : int(going) + 1]
    return tokens


def sample(logits: Tensor, seed: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token [B, 1] from logits [B, V], a pure function of them and the 0-d int64 ``seed``."""
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
    noisy = logits + rng.gumbel(seed, tuple(logits.shape))
    return noisy.masked_fill(logits == float("-inf"), float("-inf")).argmax(-1, keepdim=True)


def _start(model: Model, params: Any, prompt: Tensor, max_new_tokens: int) -> Memory:
    if model.config.family == "transformer" and not model.config.window:
        return model.init_memory(params, prompt.shape[0], context=prompt.shape[1] + max_new_tokens)
    return model.init_memory(params, prompt.shape[0])


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "wanted temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
            f"got temperature={temperature}, top_p={top_p}, top_k={top_k}"
        )
