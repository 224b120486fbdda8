"""What a row of scripts/bench_step.py is, from its text; checked without torch.

mac_168m:kernels=triton,remat=layer     a preset of ours, with overrides
mac_168m@4x2048:kernels=triton          at a batch and a length of its own
titans_pytorch_mac                      titans-pytorch's MemoryAsContextTransformer, at the sizes of TitansMAC
titans_pytorch_mac:memory=[2,5]         the same with memories in two layers (memory=none: without)
torch_transformer:transformer_168m      a torch module of a preset's sizes (torch_transformer.py)
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from titanfunc.bench.common import configuration, parsed
from titanfunc.config import ModelConfig, OptimConfig, override
from titanfunc.config._check import require, require_choice, require_positive

TITANS, TORCH = "titans_pytorch_mac", "torch_transformer"
TORCH_MUON = "torch_muon"
BYTES = 256  # tokens of the text


class StepRow(NamedTuple):
    """A model's text, an optimizer's, and rows x tokens of a step. Peers have torch's AdamW, whatever is asked."""

    text: str
    optimizer: str
    batch: int
    seq_len: int

    @property
    def kind(self) -> str:
        """TITANS, TORCH, or "ours"."""
        return _kind(self.model)

    @property
    def model(self) -> str:
        """The text without its batch and length."""
        return re.sub(_SIZES, "", self.text, count=1)

    @property
    def name(self) -> str:
        """What tells it from the others, for people and for files."""
        return self.text if self.optimizer == "adamw" or self.kind != "ours" else f"{self.text}, {self.optimizer}"


_SIZES = r"@(\d+)x(\d+)"


@dataclass(frozen=True)
class TitansMAC:
    """Sizes of titans-pytorch's model. memory: which layers have one, from 1 as it counts them; "all", or "none"."""

    num_tokens: int = 32000
    dim: int = 512
    depth: int = 6
    segment_len: int = 128
    heads: int = 8
    dim_head: int = 64
    memory: str | list[int] = "all"

    def __post_init__(self) -> None:
        require_positive(self, [each.name for each in dataclasses.fields(self) if each.name != "memory"])
        if isinstance(self.memory, list):
            ok = all(isinstance(layer, int) and 1 <= layer <= self.depth for layer in self.memory)
            require(ok, "memory", f"all, none, or layers from 1 to {self.depth}, as in [2,5]", self.memory)
        else:
            require_choice(self.memory, "memory", ("all", "none"))

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Which layers have a memory, from 1."""
        if isinstance(self.memory, list):
            return tuple(self.memory)
        return tuple(range(1, self.depth + 1)) if self.memory == "all" else ()


def rows_of(models: list[str], optims: list[str], batch: int | None, seq_len: int | None) -> list[StepRow]:
    """Every model with every optimizer; a peer once. Raises ValueError for a text that means nothing.

    batch, seq_len: of the texts that name none (None: 16 x 1024, and 4 x 2048 of titans-pytorch's).
    """
    for optim in optims:
        optimizer_of(optim, 6e-4, 100)
    found: list[StepRow] = []
    for text in models:
        plain = (4, 2048) if _kind(text) == TITANS else (16, 1024)
        given = re.search(_SIZES, text)
        sizes = (int(given[1]), int(given[2])) if given else (batch or plain[0], seq_len or plain[1])
        rows = [StepRow(text, optim, *sizes) for optim in (optims if _kind(text) == "ours" else optims[:1])]
        ok = "@" not in rows[0].model and min(sizes) > 0
        require(ok, "--models", "BATCHxLENGTH after an @, once, as in mac_168m@4x2048", text)
        _check(rows[0])
        found += rows
    return found


def optimizer_of(text: str, lr: float, steps: int) -> OptimConfig:
    """The OptimConfig that an optimizer's text means; of torch's Muon, that of ours with the same rates."""
    name, overrides = parsed(text)
    if name == TORCH_MUON:
        require(not overrides, "--optims", f"no settings for {TORCH_MUON}", text)
        name = "muon"
    plain = OptimConfig(lr=lr, warmup_steps=steps // 10)
    found: OptimConfig = override(plain, {"name": name, **overrides})
    require(found.held_out == 0, "--optims", "an optimizer that needs no batches of its own", text)
    return found


def sizes_of(row: StepRow) -> ModelConfig:
    """The ModelConfig of a row of ours, and of a torch transformer; ValueError for what this one is not."""
    if row.kind == "ours":
        return configuration(row.model)
    name, _, changes = row.model.partition(":")[2].partition(",")
    config = configuration(f"{name}:{changes}")
    wanted = f"{TORCH}: wanted the preset of a plain transformer (without window or fp8, reference kernels)"
    plain = ("transformer", 0, "swiglu", "reference")
    if (config.family, config.window, config.feed_forward, config.kernels) != plain or config.precision == "fp8":
        raise ValueError(f"{wanted}, got {row.text!r}")
    return config


def titans_of(row: StepRow) -> TitansMAC:
    """The sizes that a text gives titans-pytorch's model."""
    found: TitansMAC = override(TitansMAC(), parsed(row.model)[1])
    return found


def _kind(text: str) -> str:
    name = re.split("[:@]", text)[0]
    return name if name in (TITANS, TORCH) else "ours"


def _check(row: StepRow) -> None:
    sizes: Any = titans_of(row) if row.kind == TITANS else sizes_of(row)
    vocabulary = sizes.num_tokens if row.kind == TITANS else sizes.vocab_size
    require(vocabulary >= BYTES, row.text, f"a vocabulary of at least {BYTES}: the text is bytes", vocabulary)
