"""Named model sizes: ``mac_tiny``, ``transformer_168m``, ... one table for the library and for hydra."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from titanfunc.config.model import MACConfig, MemoryConfig, ModelConfig

# A chunk's writes add up at one anchor. On a CPU (d 128, 1,024 tokens, hidden 256) theta five times this high
# gave inner losses up to 6.6 and outer gradient norms above 100; near this start they were 0.6-0.9 and 2-3.
GENTLE = MemoryConfig(head_dim=64, chunk_size=64, max_inner_lr=0.25, initial_inner_lr=0.08)

SIZES: dict[str, ModelConfig] = {
    # A byte-level model for a CPU.
    "tiny": ModelConfig(
        dim=128, layers=4, heads=4, ff=384, seq_len=256, persistent=8,
        memory=MemoryConfig(heads=2, head_dim=32, hidden=64, chunk_size=32),
        mac=MACConfig(segment=128, write="input"),
    ),
    # Trains on one 24 GB card.
    "24gb": ModelConfig(
        dim=512, layers=8, heads=8, ff=2048, seq_len=1024, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=4, hidden=128),
        mac=MACConfig(segment=256, write="input"),
    ),
    # 168M parameters with the byte vocabulary.
    "168m": ModelConfig(
        dim=1024, layers=9, heads=16, ff=4096, seq_len=1024, persistent=16, precision="bf16",
        memory=dataclasses.replace(GENTLE, heads=6, hidden=256),
        mac=MACConfig(segment=512, write="input"),
    ),
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    **{f"mac_{size}": config for size, config in SIZES.items()},
    **{
        f"transformer_{size}": dataclasses.replace(config, family="transformer", persistent=0)
        for size, config in SIZES.items()
    },
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration with fields replaced.

    A nested field takes a mapping: ``preset("mac_tiny", vocab_size=256, mac={"write": "input"})``.
    Raises ValueError for an unknown name or field, or a value out of range.

    >>> preset("mac_tiny", layers=2, mac={"write": "input"}).mac.write
    'input'
    """
    if name not in PRESETS:
        raise ValueError(f"preset: wanted one of {', '.join(sorted(PRESETS))}, got {name!r}")
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
