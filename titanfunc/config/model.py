"""What a model is: frozen dataclasses, checked when they are made.

No torch here, so that a wrong configuration is refused before torch is even imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from titanfunc.config._check import (
    STEPS,
    is_whole,
    require,
    require_choice,
    require_number,
    require_positive,
    require_whole,
)
from titanfunc.config.rule import WriteRule

FAMILIES = ("mac", "mag", "mal", "lmm", "transformer")
FEED_FORWARDS = ("swiglu", "moe", "cms")
MOE_KERNELS = ("dense", "grouped")
WRITE_ORDERS = ("attention", "input")
CONTEXTS = ("read", "residual", "inclusive")
PRECISIONS = ("fp32", "bf16", "fp8")
FP8_SCALINGS = ("tensor", "row")
ATTENTION_KERNELS = ("sdpa", "softmax")
KERNELS = ("reference", "triton")
REMATERIALIZED = ("none", "layer")
LAYER_CODES = ("each", "shared")
ATTENTION_SIZES = (16, 32, 64, 128)
"""Head sizes that the kernels of attention take."""
WIDEST, DEEPEST, MOST_TOKENS = 2**18, 2**12, 2**28
"""Features of a layer, layers, and tokens (of the vocabulary, or in a row) that a model can have at most."""
FP8_MULTIPLE = 16
"""What has to divide both sides of a weight whose products the kernels take in 8 bits."""


@dataclass(frozen=True)
class MemoryConfig:
    """The neural memory of one layer.

    heads: memory heads, each with weights of its own. head_dim: features per head.
    hidden, depth: hidden features and layers of the SiLU MLP that is the memory.
    bias: whether that MLP has biases. chunk_size: tokens whose inner gradients share one anchor.
    conv_width: taps of the causal depthwise convolution on q, k, v (0: none).
    clip: largest norm of one token's inner gradient (0: no clip).
    max_inner_lr: ceiling of the gate theta before the factor (1 - eta). initial_inner_lr: where theta starts, as a
    share of that ceiling. initial_forget, initial_momentum: where alpha and eta start.
    min_forget, max_momentum: floor of alpha and ceiling of eta, which together bound the weights.
    rule: what is written, when, and what the outer gradient sees of it.
    """

    heads: int = 4
    head_dim: int = 32
    hidden: int = 64
    depth: int = 2
    bias: bool = False
    chunk_size: int = 16
    conv_width: int = 4
    clip: float = 1.0
    max_inner_lr: float = 1.0
    initial_inner_lr: float = 0.1
    initial_forget: float = 0.01
    initial_momentum: float = 0.9
    min_forget: float = 1e-4
    max_momentum: float = 0.99
    rule: WriteRule = field(default_factory=WriteRule)

    def __post_init__(self) -> None:
        require_positive(self, ("heads", "head_dim", "hidden", "chunk_size"), "memory.", WIDEST)
        require_positive(self, ("depth",), "memory.", DEEPEST)
        require_whole(self, ("conv_width",), "memory.", WIDEST)
        numbers = (
            "clip", "max_inner_lr", "initial_inner_lr", "initial_forget", "initial_momentum", "min_forget",
            "max_momentum",
        )  # fmt: skip
        for name in numbers:
            require_number(getattr(self, name), f"memory.{name}")
        require(isinstance(self.bias, bool), "memory.bias", "true or false", self.bias)
        require(self.clip >= 0, "memory.clip", "0 (no clip) or a positive norm", self.clip)
        require(self.max_inner_lr > 0, "memory.max_inner_lr", "a positive number", self.max_inner_lr)
        ok = 0 < self.initial_inner_lr < 1
        require(ok, "memory.initial_inner_lr", "a share in (0, 1)", self.initial_inner_lr)
        require(0 <= self.min_forget < 1, "memory.min_forget", "a number in [0, 1)", self.min_forget)
        ok = self.min_forget < self.initial_forget < 1
        wanted = f"a number between memory.min_forget = {self.min_forget} and 1"
        require(ok, "memory.initial_forget", wanted, self.initial_forget)
        require(0 < self.max_momentum < 1, "memory.max_momentum", "a number in (0, 1)", self.max_momentum)
        ok = 0 < self.initial_momentum < self.max_momentum
        wanted = f"a number between 0 and memory.max_momentum = {self.max_momentum}"
        require(ok, "memory.initial_momentum", wanted, self.initial_momentum)

    @property
    def inner_dim(self) -> int:
        """Features over all memory heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class MACConfig:
    """Memory as context. segment: tokens that attend together. write: what the memory stores.

    ``write="attention"`` stores the attention's output, segment after segment (the paper's order);
    ``write="input"`` stores the block's input, so that all segments attend at once.
    context: what a context token is: "read" (what the memory as it stood before the segment returned, as in the
    paper), "residual" (that, added to the input that asked for it, so that attention finds it where it finds the token
    itself), or "inclusive" (as "residual", from the memory right after the token's own write; needs write="input").
    """

    segment: int = 64
    write: str = "attention"
    context: str = "read"

    def __post_init__(self) -> None:
        require_positive(self, ("segment",), "mac.", MOST_TOKENS)
        require_choice(self.write, "mac.write", WRITE_ORDERS)
        require_choice(self.context, "mac.context", CONTEXTS)
        ok = self.context != "inclusive" or self.write == "input"
        wanted = "read or residual: with mac.write=attention a segment is read before it is written"
        require(ok, "mac.context", wanted, self.context)


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of SwiGLU experts, each with ``ff`` hidden features.

    experts, top_k: how many there are, and to how many a token goes. balance: weight of the load-balancing loss in
    training (0: none). noise: deviation of the noise on the router's logits in training.
    kernel: "dense" (every expert on every token, in any dtype) or "grouped" (torch's grouped product; not in fp32).
    """

    experts: int = 8
    top_k: int = 2
    balance: float = 0.01
    noise: float = 0.1
    kernel: str = "dense"

    def __post_init__(self) -> None:
        require_positive(self, ("experts", "top_k"), "moe.", WIDEST)
        for name in ("balance", "noise"):
            require_number(getattr(self, name), f"moe.{name}")
            require(getattr(self, name) >= 0, f"moe.{name}", "a number of at least 0", getattr(self, name))
        require(self.top_k <= self.experts, "moe.top_k", f"at most moe.experts = {self.experts}", self.top_k)
        require_choice(self.kernel, "moe.kernel", MOE_KERNELS)


@dataclass(frozen=True)
class CMSConfig:
    """The Nested Learning paper's chain of feed-forward blocks. periods: each block's, in optimizer steps.

    Block i learns from the mean gradient of periods[i] steps; together they have ``ff`` hidden features.
    """

    periods: tuple[int, ...] = (1, 4, 16)

    def __post_init__(self) -> None:
        ok = len(self.periods) > 0 and all(is_whole(period, 1, STEPS) for period in self.periods)
        require(ok, "cms.periods", f"a list of whole numbers from 1 to {STEPS}", list(self.periods))


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    family: one of FAMILIES. vocab_size: tokens. dim: features of the residual stream.
    layers, heads, ff: blocks, attention heads, hidden features of the feed-forward.
    feed_forward: "swiglu", "moe" (a mixture of experts) or "cms" (a chain updated at several frequencies).
    memory_layers: which blocks have a memory, from 0 (empty: all of them).
    seq_len: the length it is meant to be trained at, in tokens (it reads any length).
    persistent: learned tokens that every query of an attention sees as keys and values (0 for lmm and transformer).
    window: attention window in tokens of mag, mal and transformer (transformer 0: all that came before); mac attends
    inside its segments and lmm not at all, so theirs is 0.
    tie_embeddings: whether the head shares the embedding's weights.
    precision: "fp32", or "bf16" for activations, matrix products and logits in bfloat16, with parameters, memory
    weights, norms and the loss's reduction in float32; or "fp8": bf16, with the products of attention's projections
    and of the feed-forward (a mixture's experts apart) on 8-bit numbers, forward and backward (``ops/fp8.py``).
    fp8_scaling: what shares a scale there: "tensor", a whole operand, so that a token's result depends, by an 8-bit
    rounding, on the largest number of its batch, later tokens' too; or "row", one token, or one feature of a weight.
    kernels: "reference" (plain torch; it only emulates fp8) or "triton": the memory's writes and reads (MAC's of wide
    memories apart), the attention and fp8's products by hand-written kernels, on a GPU; what they do not take is
    refused.
    attention: "sdpa" (torch's fused kernels where ops/attention.py trusts them) or "softmax" (written out;
    differentiable any number of times).
    remat: what a training step computes once more in its backward pass instead of keeping what it made: "none", or
    "layer", whole blocks with their memories' writes and reads, of which only the inputs are kept.
    layer_code: whether a compiled training step holds the code of "each" block, or one operation a block, whose code
    those that are alike have "shared": it compiles once for all of them. Shared code has no second derivative.
    """

    family: str = "mac"
    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    ff: int = 384
    seq_len: int = 256
    persistent: int = 8
    window: int = 0
    tie_embeddings: bool = True
    precision: str = "fp32"
    fp8_scaling: str = "tensor"
    kernels: str = "reference"
    attention: str = "sdpa"
    remat: str = "none"
    layer_code: str = "each"
    feed_forward: str = "swiglu"
    memory_layers: tuple[int, ...] = ()
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    cms: CMSConfig = field(default_factory=CMSConfig)
    mac: MACConfig = field(default_factory=MACConfig)

    def __post_init__(self) -> None:
        require_choice(self.family, "family", FAMILIES)
        require_choice(self.precision, "precision", PRECISIONS)
        require_choice(self.fp8_scaling, "fp8_scaling", FP8_SCALINGS)
        ok = self.precision == "fp8" or self.fp8_scaling == "tensor"
        require(ok, "fp8_scaling", "its default: without precision=fp8 it does nothing", self.fp8_scaling)
        require_choice(self.kernels, "kernels", KERNELS)
        require_choice(self.attention, "attention", ATTENTION_KERNELS)
        require_choice(self.remat, "remat", REMATERIALIZED)
        require_choice(self.layer_code, "layer_code", LAYER_CODES)
        require_positive(self, ("dim", "heads", "ff"), most=WIDEST)
        require_positive(self, ("layers",), most=DEEPEST)
        require_positive(self, ("vocab_size", "seq_len"), most=MOST_TOKENS)
        require_whole(self, ("persistent", "window"), most=MOST_TOKENS)
        require(isinstance(self.tie_embeddings, bool), "tie_embeddings", "true or false", self.tie_embeddings)
        require_choice(self.feed_forward, "feed_forward", FEED_FORWARDS)
        if self.family == "mac":
            require(self.window == 0, "window", "0 (mac attends inside mac.segment)", self.window)
        elif self.family == "lmm":
            require(self.window == 0, "window", "0 (lmm has no attention)", self.window)
        elif self.family in ("mag", "mal"):
            require(self.window > 0, "window", f"at least 1 token ({self.family} attends in a window)", self.window)
        if self.family in ("lmm", "transformer"):
            require(self.persistent == 0, "persistent", f"0 ({self.family} has no persistent tokens)", self.persistent)
        if self.feed_forward == "cms":
            levels = len(self.cms.periods)
            require(levels <= self.ff, "cms.periods", f"at most ff = {self.ff} blocks", list(self.cms.periods))
        if self.feed_forward == "moe" and self.moe.kernel == "grouped":
            wanted = "dense (grouped needs precision=bf16 or fp8)"
            require(self.precision != "fp32", "moe.kernel", wanted, self.moe.kernel)
        if self.precision == "fp8" and self.feed_forward == "moe":
            wanted = "fp32 or bf16: an lmm has no attention, and a mixture's experts stay in bf16"
            require(self.family != "lmm", "precision", wanted, self.precision)
        if self.kernels == "triton":
            self._check_kernels()
        if self.memory_layers:
            require(self.family != "transformer", "memory_layers", "none (it has no memory)", list(self.memory_layers))
            ok = all(isinstance(i, int) and 0 <= i < self.layers for i in self.memory_layers)
            require(ok, "memory_layers", f"whole numbers from 0 to {self.layers - 1}", list(self.memory_layers))
            ok = list(self.memory_layers) == sorted(set(self.memory_layers))
            require(ok, "memory_layers", "each layer once, in order", list(self.memory_layers))
        require(self.dim % self.heads == 0, "heads", f"a divisor of dim = {self.dim}", self.heads)
        require(
            (self.dim // self.heads) % 2 == 0,
            "heads",
            f"an even head size dim / heads (rotary positions pair features) with dim = {self.dim}",
            self.heads,
        )
        if self.family == "mac":
            require(
                self.mac.segment % self.memory.chunk_size == 0,
                "mac.segment",
                f"a multiple of memory.chunk_size = {self.memory.chunk_size}",
                self.mac.segment,
            )

    def _check_kernels(self) -> None:
        """Raise ValueError for what the kernels do not take."""

        def refuse_unless(ok: bool, name: str, wanted: str, got: object) -> None:
            require(ok, name, f"{wanted} with kernels=triton", got)

        rule, plain, fp8 = self.memory.rule, self.family == "transformer" and not self.window, self.precision == "fp8"
        wanted = "at least 1 token (full attention has no kernel) or precision=fp8"
        refuse_unless(fp8 or not plain, "window", wanted, self.window)
        if fp8:
            refuse_unless(self.dim % FP8_MULTIPLE == 0, "dim", f"a multiple of {FP8_MULTIPLE}, for fp8,", self.dim)
            levels = len(self.cms.periods) if self.feed_forward == "cms" else 1
            fits = self.feed_forward == "moe" or self.ff % (FP8_MULTIPLE * levels) == 0
            refuse_unless(fits, "ff", f"a multiple of {FP8_MULTIPLE * levels}, for fp8,", self.ff)
        refuse_unless(self.attention == "sdpa", "attention", "sdpa", self.attention)
        if self.family != "lmm":
            size = self.dim // self.heads if self.dim % self.heads == 0 else 0
            sizes = ", ".join(map(str, ATTENTION_SIZES))
            refuse_unless(size in ATTENTION_SIZES, "heads", f"a head size dim / heads among {sizes}", self.heads)
        if self.family != "transformer":
            refuse_unless(self.memory.depth <= 2, "memory.depth", "1 or 2", self.memory.depth)
            refuse_unless(not self.memory.bias, "memory.bias", "false", self.memory.bias)
            refuse_unless(rule.optimizer == "gradient", "memory.rule.optimizer", "gradient", rule.optimizer)
            refuse_unless(rule.chunk_clip == 0, "memory.rule.chunk_clip", "0", rule.chunk_clip)
            refuse_unless(rule.objective == "l2", "memory.rule.objective", "l2", rule.objective)
            refuse_unless(rule.loss == "sum", "memory.rule.loss", "sum", rule.loss)

    @property
    def memory_at(self) -> tuple[int, ...]:
        """The blocks that have a memory."""
        if self.family == "transformer":
            return ()
        return self.memory_layers or tuple(range(self.layers))
