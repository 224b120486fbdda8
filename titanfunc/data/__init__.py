"""Text to batches: corpora, tokenizers, tokens kept on disk, the split by document, windows in a reproducible
order, streams, and recall tasks.

>>> corpus = load(DataConfig(corpus="sotu"))  # doctest: +SKIP
>>> windows = Windows(corpus.train, seq_len=256, batch_size=8, seed=0)  # doctest: +SKIP
>>> tokens = windows.batch(step=0)  # int64 [8, 257]  # doctest: +SKIP
"""

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
