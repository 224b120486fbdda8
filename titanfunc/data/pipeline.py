"""From a configuration to the tokens of both splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titanfunc.config.data import DataConfig
from titanfunc.config.failures import reading
from titanfunc.config.files import expanded
from titanfunc.data import corpora, parts
from titanfunc.data.cache import locked, open_cache
from titanfunc.data.progress import progress
from titanfunc.data.shards import write_file
from titanfunc.data.split import held_out_by_name, split_documents
from titanfunc.data.tokenizers import Tokenizer, from_definition, get_tokenizer, train_bpe
from titanfunc.data.tokens import Shard, TokenArray, select, tokenize_shard

_STREAM_WINDOWS = 64  # of a stream that is only to be validated on


class Corpus(NamedTuple):
    """A corpus, tokenized and split by document.

    train, validation: TokenArray; of a stream, train is empty. bytes_per_token: bytes of text a token of the validation
    documents, their separators counted as tokens without text, so that bits per byte = loss / ln 2 / bytes_per_token.
    identity: of the files that it was read from. tokenizer_file: where a tokenizer that was trained is kept.
    """

    train: TokenArray
    validation: TokenArray
    tokenizer: Tokenizer
    bytes_per_token: float
    identity: corpora.Identity
    tokenizer_file: Path | None = None


@reading()
def load(config: DataConfig, commit: str = "") -> Corpus:
    """Read, split and tokenize the corpus; both splits hold tokens [N] and document ends [D].

    commit: of a dataset on the hub, in the place of the newest of ``data.revision``.

    With ``config.cache_dir`` the tokens are kept there and read as they are asked for; without, they are in memory.
    The splits are the same; of a stream there are some held-out documents alone (``load_held_out``). Raises ValueError
    if the corpus is missing or has fewer than two documents, Damaged or NoData if it cannot be read, NotWritten if the
    cache cannot be written, and Killed if a process that tokenizes was.
    """
    if config.stream:
        return load_held_out(config, _STREAM_WINDOWS, commit)
    listing = corpora.list_files(config, commit)
    identity = listing.identify()
    tokenizer = open_tokenizer(config, listing)
    if config.cache_dir:
        shards = open_cache(config, tokenizer, listing)
    else:
        shards = _in_memory(corpora.cut(config, listing), tokenizer)
    return split(shards, config, tokenizer, identity)


def _in_memory(wanted: list[parts.Part], tokenizer: Tokenizer) -> list[Shard]:
    shards = []
    with progress(wanted) as advance:
        for number, part in enumerate(wanted):
            shards.append(tokenize_shard(parts.read(part), tokenizer)[0])
            advance(number, len(shards[-1].tokens))
    return shards


def split(shards: list[Shard], config: DataConfig, tokenizer: Tokenizer, identity: corpora.Identity) -> Corpus:
    """Both splits (tokens [N]) of a whole corpus in shards. Raises ValueError for fewer than two documents."""
    sizes = np.concatenate([np.empty(0, dtype=np.int64), *(shard.sizes for shard in shards)])
    if len(sizes) < 2:
        raise _too_few(len(sizes), config)
    train, validation = split_documents(sizes, config.validation_fraction, config.seed)
    splits = [select(shards, documents) for documents in (train, validation)]
    if not config.cache_dir:
        splits = [each._replace(tokens=np.asarray(each.tokens)) for each in splits]
    bytes_per_token = int(sizes[validation].sum()) / len(splits[1].tokens)
    return Corpus(splits[0], splits[1], tokenizer, bytes_per_token, identity, bpe_file(config))


def _too_few(documents: int, config: DataConfig) -> ValueError:
    """That there is nothing to split, and what to do about one document."""
    wanted = "at least 2 documents with text (one to train on, one to validate)"
    more = "cut it into several files" if config.corpus == "text_folder" else "a row is a document: cut it into several"
    what = f"1; {more}" if documents else "none: there is no text in it"
    return ValueError(f"data.path: wanted {wanted} in {config.path}, got {what}")


@reading()
def load_held_out(config: DataConfig, windows: int, commit: str = "") -> Corpus:
    """A stream's first held-out documents, enough for so many windows (tokens [N]), the same for every rank.

    Raises ValueError for a dataset of which nothing is held out, else as ``load``.
    """
    listing = corpora.list_files(config, commit)
    tokenizer = open_tokenizer(config, listing)
    shard, _ = tokenize_shard(_first_held_out(config, listing, tokenizer, windows), tokenizer)
    if not len(shard.ends):
        if not _has_text(parts.whole(listing.files, listing.root, config.column)):
            raise _too_few(0, config)
        raise ValueError(f"data.validation_fraction: no document of {config.path} is held out; raise it")
    held_out = select([shard], np.arange(len(shard.ends)))
    empty = TokenArray(np.empty(0, dtype=shard.tokens.dtype), np.empty(0, dtype=np.int64))
    bytes_per_token = int(shard.sizes.sum()) / len(shard.tokens)
    return Corpus(empty, held_out, tokenizer, bytes_per_token, listing.identify(), bpe_file(config))


def _first_held_out(
    config: DataConfig, listing: corpora.Listing, tokenizer: Tokenizer, windows: int
) -> Iterator[tuple[str, str]]:
    for part in parts.whole(listing.files, listing.root, config.column):
        for name, text in parts.read(part):
            if held_out_by_name(name, config.validation_fraction, config.seed):
                yield name, text
                windows -= len(tokenizer.encode(text)) // config.seq_len
            if windows <= 0:
                return


def open_tokenizer(config: DataConfig, listing: corpora.Listing) -> Tokenizer:
    """The tokenizer that ``config`` names. "bpe" is trained on the corpus at first use and kept in ``config.cache_dir``
    under a digest of what names the corpus: texts that come or change later get ids of the same tokenizer, so that a
    model goes on with the ids that it learned. Delete the file to have another trained.

    Raises ValueError for what ``get_tokenizer`` or ``train_bpe`` refuses, or a kept tokenizer that is damaged.
    """
    path = bpe_file(config)
    if path is None:
        return get_tokenizer(config.tokenizer, config.separator)
    if not path.is_file():
        with locked(path.parent / "bpe.lock"):
            if not path.is_file():
                wanted = corpora.cut(config, listing)
                if not _has_text(wanted):
                    raise _too_few(0, config)
                texts = (text for part in _spread(wanted) for _, text in parts.read(part))
                write_file(path, train_bpe(texts, config.bpe_size).definition.encode("utf-8"))
    try:
        tokenizer = from_definition("bpe", path.read_text(encoding="utf-8"), 0)
    except (ValueError, OSError) as error:
        raise ValueError(f"data.tokenizer: {path} cannot be read ({error}); delete it") from None
    if tokenizer.vocab_size != config.bpe_size:
        raise ValueError(f"data.tokenizer: {path} has {tokenizer.vocab_size} tokens, not {config.bpe_size}; delete it")
    return tokenizer


def _has_text(wanted: list[parts.Part]) -> bool:
    return any(True for part in wanted for _ in parts.read(part))


def bpe_file(config: DataConfig) -> Path | None:
    """Where the tokenizer that is trained on the corpus is kept; None for other tokenizers."""
    if config.tokenizer != "bpe":
        return None
    told = json.dumps([*corpora.named(config), config.column])
    name = f"bpe-{config.bpe_size}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
    return expanded(config.cache_dir) / name


def _spread(wanted: list[parts.Part], count: int = 8) -> list[parts.Part]:
    """At most ``count`` parts, from the first to the last."""
    if len(wanted) <= count:
        return wanted
    return [wanted[i * (len(wanted) - 1) // (count - 1)] for i in range(count)]
