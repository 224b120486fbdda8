"""What tokenizers there are and how many tokens each has. No torch; the library is imported only where one is read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from titanfunc.config import hub
from titanfunc.config._check import require
from titanfunc.config.files import expanded, require_path

if TYPE_CHECKING:
    import tokenizers

BYTES = 256
HUB_TOKENIZERS = {"llama2": ("NousResearch/Llama-2-7b-hf", 32000), "smollm": ("HuggingFaceTB/SmolLM-135M", 49152)}
"""Well-known tokenizers: where each lies, and its tokens."""
FILE = "tokenizer.json"
WANTED = f"bytes, bpe, {', '.join(HUB_TOKENIZERS)}, a tokenizer's .json file or a name on the hub (owner/name)"
_ALPHABET = 257  # bpe: every byte, and the separator


def require_tokenizer(name: str, bpe_size: int) -> None:
    """Raise ValueError for what cannot be a tokenizer; nothing is read."""
    kinds = name in ("bytes", "bpe", *HUB_TOKENIZERS) if isinstance(name, str) else False
    file = isinstance(name, str) and name.endswith(".json")
    named = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    require(kinds or file or named, "data.tokenizer", WANTED, name)
    require_path(name, "data.tokenizer")
    ok = isinstance(bpe_size, int) and not isinstance(bpe_size, bool) and _ALPHABET <= bpe_size <= 2**20
    require(ok, "data.bpe_size", f"a whole number from {_ALPHABET} (the bytes and a separator) to {2**20}", bpe_size)


def vocab_size(tokenizer: str, bpe_size: int = 8192) -> int:
    """The number of tokens of a tokenizer: what ``vocab_size`` of the model has to be.

    A file, and a name on the hub that is not well known, are read for it. Raises ValueError for a name that is none,
    or one that cannot be read.

    >>> vocab_size("bytes"), vocab_size("bpe", 4096)
    (256, 4096)
    """
    require_tokenizer(tokenizer, bpe_size)
    if tokenizer == "bytes":
        return BYTES
    if tokenizer == "bpe":
        return bpe_size
    if tokenizer in HUB_TOKENIZERS:
        return HUB_TOKENIZERS[tokenizer][1]
    return count(read_tokenizer(tokenizer))


def count(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the greatest id: ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def read_tokenizer(name: str) -> tokenizers.Tokenizer:
    """A tokenizer of the library ``tokenizers``: a .json file, or one of the hub (kept by the hub's own cache).

    Raises ValueError, in one line, for what is not there or is no tokenizer.
    """
    import tokenizers

    place = repository(name)
    try:
        return tokenizers.Tokenizer.from_file(hub.fetch(place, FILE) if place else str(expanded(name)))
    except Exception as error:  # the library raises bare Exception
        what = "fetched from the hub" if place else "read as a tokenizer's .json file"
        raise ValueError(
            f"data.tokenizer: {place or name} cannot be {what} ({_line(error)}); wanted {WANTED}"
        ) from None


def repository(name: str) -> str:
    """Where on the hub a tokenizer lies; "" for one that does not.

    >>> repository("smollm"), repository("bytes"), repository("mine/tokenizer.json")
    ('HuggingFaceTB/SmolLM-135M', '', '')
    """
    if name in HUB_TOKENIZERS:
        return HUB_TOKENIZERS[name][0]
    return "" if name in ("bytes", "bpe") or name.endswith(".json") else name


def require_reach(name: str) -> None:
    """Raise ValueError for a tokenizer of the hub that neither can be fetched nor was before."""
    place = repository(name)
    if place and not hub.reachable() and not hub.is_kept(place, FILE):
        raise ValueError(
            f"data.tokenizer: {place} cannot be fetched from the hub ({hub.unreachable()}); wanted bytes, bpe or a "
            f"tokenizer's .json file"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
