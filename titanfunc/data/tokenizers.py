"""Tokenizers: text to ids and back, as plain functions in a NamedTuple."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from titanfunc.config.vocabulary import BYTES, count, read_tokenizer, vocab_size
from titanfunc.data import progress

if TYPE_CHECKING:
    import tokenizers

IntArray: TypeAlias = npt.NDArray[Any]
"""A numpy array of whole numbers."""

SEPARATOR = "<|endoftext|>"
_SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")
_BATCH_CHARS = 1 << 20
_INTERRUPTED = 0.5  # seconds that an interrupt waits for a training to end
TRAINING_CHARS = 200_000_000
"""Characters of the corpus that a tokenizer is trained on, at most."""


class Tokenizer(NamedTuple):
    """A tokenizer: ids lie in ``[0, vocab_size)`` and ``separator`` is the id that ends a document.

    encode: text to ids [N], without separator. decode: ids [N] to text, unreadable bytes replaced.
    definition: what it can be made from again (``from_definition``), "" for bytes. encode_batch: many texts at once.
    """

    name: str
    vocab_size: int
    separator: int
    encode: Callable[[str], IntArray]
    decode: Callable[[Sequence[int] | IntArray], str]
    definition: str = ""
    encode_batch: Callable[[Sequence[str]], list[IntArray]] | None = None

    @property
    def fingerprint(self) -> str:
        """A digest of all that its ids depend on."""
        told = f"{self.definition or self.name} {self.vocab_size} {self.separator}"
        return hashlib.sha256(told.encode()).hexdigest()

    def encode_all(self, texts: Iterable[str]) -> Iterator[IntArray]:
        """The ids [N] of each text, in order, encoded some at a time; those before one that is refused come first."""
        if self.encode_batch is None:
            yield from map(self.encode, texts)
            return
        for batch in _batches(texts):
            try:
                encoded: Iterable[IntArray] = self.encode_batch(batch)
            except ValueError:
                encoded = map(self.encode, batch)
            yield from encoded


def byte_tokenizer() -> Tokenizer:
    """The bytes of UTF-8 as ids, 256 in all; byte 0, which text does not hold, ends a document.

    >>> byte_tokenizer().encode("né").tolist()
    [110, 195, 169]
    """
    return Tokenizer("bytes", BYTES, 0, _encode_bytes, _decode_bytes)


def get_tokenizer(name: str, separator: str = "") -> Tokenizer:
    """The tokenizer of that name: "bytes", a file or one of the hub. separator: its token ("": one of the usual).

    Raises ValueError for an unknown name, a file or a name of the hub that cannot be read, a separator that it does
    not have, or a number of tokens other than the well-known one. "bpe" is trained: ``train_bpe``.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name == "bpe":
        raise ValueError("data.tokenizer: bpe is trained on a corpus (train_bpe), got no corpus")
    wanted = vocab_size(name)
    library = read_tokenizer(name)
    if count(library) != wanted:
        raise ValueError(f"data.tokenizer: wanted {wanted} tokens in {name}, got {count(library)}")
    return from_library(name, library, separator)


def from_library(name: str, library: tokenizers.Tokenizer, separator: str = "") -> Tokenizer:
    """A tokenizer of the library ``tokenizers`` as ours. Raises ValueError without the separator that is asked for.

    A document that holds the separator's own text does not end there: no special token is looked for in texts.
    """
    import tokenizers

    names = (separator,) if separator else _SEPARATORS
    found = [each for each in names if library.token_to_id(each) is not None]
    if not found:
        raise ValueError(
            f"data.separator: wanted a token of {name}, got {separator!r}; none of {', '.join(names)} is one"
        )
    definition = library.to_str()
    library = tokenizers.Tokenizer.from_str(definition)
    library.no_truncation()
    library.no_padding()
    end = tokenizers.AddedToken(found[0], special=True, normalized=False)
    library.add_special_tokens([end])
    library.encode_special_tokens = True
    number = int(library.token_to_id(found[0]) or 0)

    def encode_batch(texts: Sequence[str]) -> list[IntArray]:
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        return [_checked(np.array(each.ids, dtype=np.uint32), number, name) for each in encoded]

    def decode(ids: Sequence[int] | IntArray) -> str:
        return library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    return Tokenizer(
        name, count(library), number, lambda text: encode_batch([text])[0], decode, definition, encode_batch
    )


def from_definition(name: str, definition: str, separator: int) -> Tokenizer:
    """The tokenizer that has this ``definition`` and ``separator``. Raises ValueError for one that cannot be read."""
    if not definition:
        return get_tokenizer(name)
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data.tokenizer: {name} cannot be read ({error})") from None
    return from_library(name, library, library.id_to_token(separator) or "")


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level byte-pair encoding of ``size`` tokens, the separator and every byte among them.

    Trained on the first TRAINING_CHARS characters. Raises ValueError if the texts yield fewer tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train(library, trainer, _first(texts, TRAINING_CHARS))
    got = count(library)
    if got != size:
        raise ValueError(f"data.bpe_size: wanted at most {got}, all the tokens that this corpus yields, got {size}")
    return from_library("bpe", library, SEPARATOR)


def _train(library: tokenizers.Tokenizer, trainer: Any, texts: Iterator[str]) -> None:
    """Train in a thread: the library looks at no signal, and an interrupt would wait for its end, many seconds. What
    takes long is told on stderr."""
    interrupted = threading.Event()
    errors: list[BaseException] = []
    read, whole = 0, False

    def feed() -> Iterator[str]:
        nonlocal read, whole
        for text in texts:
            if interrupted.is_set():
                raise InterruptedError
            yield text
            read += len(text)
        whole = True

    def work() -> None:
        try:
            library.train_from_iterator(feed(), trainer)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun, pause = time.monotonic(), progress.FIRST
    try:
        while thread.is_alive():
            thread.join(_INTERRUPTED)
            if (seconds := time.monotonic() - begun) >= pause:
                pause = seconds + progress.EVERY
                at = "making tokens of" if whole else "has read"
                with contextlib.suppress(OSError):  # of a log that takes no more
                    print(f"training bpe: {at} {read:,} characters, {seconds:.0f} s", file=sys.stderr, flush=True)
    except BaseException:
        interrupted.set()
        thread.join(_INTERRUPTED)  # it is in Python now and then until all texts are read, and then no more
        raise
    if errors:
        raise errors[0]


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, about _BATCH_CHARS characters at a time."""
    total = 0

    def key(text: str) -> int:
        nonlocal total
        total += len(text)
        return total // _BATCH_CHARS

    return (list(group) for _, group in itertools.groupby(texts, key))


def _checked(ids: IntArray, separator: int, name: str) -> IntArray:
    if (ids == separator).any():
        raise ValueError(
            f"data.separator: {name} makes its separator, id {separator}, of plain text; name another token"
        )
    return ids


def _encode_bytes(text: str) -> IntArray:
    ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    if "\0" in text:
        raise ValueError("data.tokenizer: bytes ends documents with byte 0, and a document holds one; take another")
    return ids


def _decode_bytes(ids: Sequence[int] | IntArray) -> str:
    array = np.asarray(ids)
    if array.size and not (array.min() >= 0 and array.max() < BYTES):
        raise ValueError(f"ids: wanted bytes in [0, 256), got values from {array.min()} to {array.max()}")
    return array.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
