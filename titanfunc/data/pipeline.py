"""From a configuration to the tokens of both splits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from titanfunc.config.data import DataConfig
from titanfunc.data.corpora import load_documents
from titanfunc.data.split import split_documents
from titanfunc.data.tokenizers import Tokenizer, get_tokenizer
from titanfunc.data.tokens import TokenArray, cache_key, read_cache, tokenize, write_cache


class Corpus(NamedTuple):
    """A corpus, tokenized and split by document.

    train, validation: TokenArray. bytes_per_token: bytes of text a token of the validation documents, their
    separators counted as tokens without text, so that bits per byte = loss / ln 2 / bytes_per_token.
    """

    train: TokenArray
    validation: TokenArray
    tokenizer: Tokenizer
    bytes_per_token: float


def load(config: DataConfig) -> Corpus:
    """Read, split and tokenize the corpus; both splits hold tokens [N] and document ends [D].

    With ``config.cache_dir`` the tokens are kept there, for the same texts, tokenizer and split.
    Raises ValueError if the corpus is missing or unreadable, or has fewer than two documents.
    """
    tokenizer = get_tokenizer(config.tokenizer)
    documents = load_documents(config)["text"]

    def texts(indices: list[int]) -> Iterator[str]:
        return (documents[index] for index in indices)

    sizes = [len(text.encode("utf-8")) for text in documents]
    train, validation = split_documents(sizes, config.validation_fraction, config.seed)
    splits = None
    if config.cache_dir:
        key = cache_key(
            documents,
            tokenizer=config.tokenizer,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )
        splits = read_cache(config.cache_dir, key)
    if splits is None:
        splits = {
            "train": tokenize(texts(train), tokenizer),
            "validation": tokenize(texts(validation), tokenizer),
        }
        if config.cache_dir:
            write_cache(config.cache_dir, key, splits)
    held_out_bytes = sum(sizes[index] for index in validation)
    bytes_per_token = held_out_bytes / len(splits["validation"].tokens)
    return Corpus(splits["train"], splits["validation"], tokenizer, bytes_per_token)
