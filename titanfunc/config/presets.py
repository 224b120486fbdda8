"""Named model sizes: ``mac_tiny``, ``transformer_168m``, ... one table for the library and for hydra."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from titanfunc.config.model import FAMILIES, MACConfig, MemoryConfig, ModelConfig

# A chunk's writes add up at one anchor. On a CPU (d 128, 1,024 tokens, hidden 256) theta five times this high
# gave inner losses up to 6.6 and outer gradient norms above 100; near this start they were 0.6-0.9 and 2-3.
GENTLE = MemoryConfig(head_dim=64, chunk_size=64, max_inner_lr=0.25, initial_inner_lr=0.08)
LLAMA_VOCAB = 32_000

SIZES: dict[str, ModelConfig] = {
    # A byte-level model for a CPU.
    "tiny": ModelConfig(
        dim=128, layers=4, heads=4, ff=384, seq_len=256, persistent=8,
        memory=MemoryConfig(heads=2, head_dim=32, hidden=64, chunk_size=32),
        mac=MACConfig(segment=128, write="input"),
    ),
    # Two layers that learn to recall: a linear memory that may write a value whole and forgets next to nothing.
    # Eight pairs among 96 tokens (CPU, 200 steps, 2 heads of 32) and then among 768: with writes of at most 1.0,
    # 100 % and 99 %; of at most 0.3, 99 % and 55 %; those with reads before each segment alone, 73 % and 28 %.
    "recall": ModelConfig(
        dim=256, layers=2, heads=4, ff=768, seq_len=1024, persistent=4,
        memory=MemoryConfig(
            heads=4, head_dim=64, depth=1, chunk_size=32, max_inner_lr=1.0, initial_inner_lr=0.15,
            initial_forget=1e-4, min_forget=1e-6,
        ),
        mac=MACConfig(segment=64, write="input", context="inclusive"),
    ),
    # Trains on one 24 GB card.
    "24gb": ModelConfig(
        dim=512, layers=8, heads=8, ff=2048, seq_len=1024, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=4, hidden=128),
        mac=MACConfig(segment=256, write="input"),
    ),
    # 168M parameters with the byte vocabulary. Two memories, as measured on an H200 (200 steps of 16 x 1,024 bytes, one
    # seed; benchmarks/results/h200_168m_memories.json): three end no lower (1.26 and 1.27 nats, by rounding) and take
    # 47.8 ms a step instead of 44.8; three of 6 heads and 256 hidden features end at 1.39 and take 54.6.
    "168m": ModelConfig(
        dim=1024, layers=10, heads=16, ff=4096, seq_len=1024, persistent=16, precision="bf16", memory_layers=(2, 6),
        memory=dataclasses.replace(GENTLE, heads=4, hidden=128),
        mac=MACConfig(segment=512, write="input"), layer_code="shared",
    ),
    # The paper's scales (arXiv 2501.00663, section 5.1), with its 32,000 tokens and 4,096-token sequences.
    "170m": ModelConfig(
        vocab_size=LLAMA_VOCAB, dim=768, layers=12, heads=16, ff=2816, seq_len=4096, persistent=16, precision="bf16",
        tie_embeddings=False, memory=dataclasses.replace(GENTLE, heads=6, hidden=128),
        mac=MACConfig(segment=512, write="input"),
    ),
    "340m": ModelConfig(
        vocab_size=LLAMA_VOCAB, dim=1024, layers=20, heads=16, ff=2816, seq_len=4096, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=8, hidden=128),
        mac=MACConfig(segment=512, write="input"),
    ),
    "400m": ModelConfig(
        vocab_size=LLAMA_VOCAB, dim=1024, layers=24, heads=16, ff=2816, seq_len=4096, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=8, hidden=128),
        mac=MACConfig(segment=512, write="input"),
    ),
    "760m": ModelConfig(
        vocab_size=LLAMA_VOCAB, dim=1536, layers=20, heads=16, ff=4096, seq_len=4096, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=12, hidden=128),
        mac=MACConfig(segment=512, write="input"),
    ),
}  # fmt: skip


def _sibling(size: ModelConfig, family: str) -> ModelConfig:
    """The same sizes in another family: windows of a MAC's segment for MAG and MAL, none elsewhere; and a memory in
    every block of an LMM, which has nothing else that looks back."""
    return dataclasses.replace(
        size,
        family=family,
        persistent=0 if family in ("lmm", "transformer") else size.persistent,
        memory_layers=() if family in ("lmm", "transformer") else size.memory_layers,
        window=size.mac.segment if family in ("mag", "mal") else 0,
    )


def _mixture(config: ModelConfig) -> ModelConfig:
    """With a mixture of eight experts for a feed-forward, each half as wide; two of them read a token."""
    return dataclasses.replace(config, feed_forward="moe", ff=config.ff // 2)


PRESETS: dict[str, ModelConfig] = {
    f"{family}_{name}": _sibling(size, family) for family in FAMILIES for name, size in SIZES.items()
}
PRESETS.update({f"{name}_moe": _mixture(config) for name, config in PRESETS.items()})


def wanted_names(got: Any) -> str:
    """What a preset's name has to be, and the nearest ones to what came: there are too many to list."""
    near = difflib.get_close_matches(str(got), PRESETS, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"FAMILY_SIZE or FAMILY_SIZE_moe, of {', '.join(FAMILIES)} and {', '.join(SIZES)}{hint}"


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration with fields replaced.

    A nested field takes a mapping: ``preset("mac_tiny", vocab_size=256, mac={"write": "input"})``.
    Raises ValueError for an unknown name or field, or a value out of range.

    >>> preset("mac_tiny", layers=2, mac={"write": "input"}).mac.write
    'input'
    """
    if name not in PRESETS:
        raise ValueError(f"preset: wanted {wanted_names(name)}, got {name!r}")
    return override(PRESETS[name], overrides)


def override(config: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """A copy of a dataclass with fields replaced, nested dataclasses by nested mappings.

    Raises ValueError for a field that does not exist, and whatever the dataclass itself refuses.
    """
    known = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"{path}{unknown[0]}: no such field; wanted one of {', '.join(sorted(known))}")
    new = {}
    for key, value in changes.items():
        current = getattr(config, key)
        nested = dataclasses.is_dataclass(current) and isinstance(value, Mapping)
        if dataclasses.is_dataclass(current) and not nested and not isinstance(value, type(current)):
            raise ValueError(f"{path}{key}: wanted a mapping of its fields, got {value!r}")
        new[key] = override(current, value, f"{path}{key}.") if nested else value
    return dataclasses.replace(config, **new)


def offer(store: Any) -> None:
    """Make every preset a choice of the group ``model`` in hydra's ``ConfigStore``: files would say no more."""
    for name in PRESETS:
        node = {"defaults": ["base", "_self_"], "preset": name}
        store.store(group="model", name=name, node=node, provider="titanfunc")
