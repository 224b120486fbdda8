"""How fast text becomes tokens, and tokens batches.

    python benchmarks/data.py --out benchmarks/results/cpu_data.json

tokenize: the built-in corpus in documents of at most 4000 characters, by one core: by this package, and by the library
alone, with one or more of them a call (its ids come as Python lists). to_shards: the same documents, read from a .jsonl
file, tokenized, and written as a cache is. batch: ``Windows.batch`` on a cache of ``--tokens`` random tokens (uint16)
in shards, read from the disk or all in memory, of which a tenth is held out, in documents of 500 to 1500; one thread,
steps in order. open: from the files to the first batch.

Rows that are compared are timed in turn, ``--repeats`` times each, on one thread. ``cpu_seconds`` and
``mtok_per_second`` are of the time that it had a processor, ``seconds`` and ``mtok_per_second_of_clock`` of what went
by: medians, which are worse where others work on the machine (``load``, before and after), even the first two, as they
take the processor's caches and half of its cores. ``best_mtok_per_second`` is of the repeat that took least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from titanfunc.bench import options
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


class Case(NamedTuple):
    """What is timed: do, the tokens that it makes, and how often it makes them in one call."""

    about: Row
    do: Callable[[], Any]
    tokens: int = 0
    times: int = 1


def timed(cases: Sequence[Case], repeats: int) -> Iterator[Row]:
    """A row a case, all of them timed in turn: seconds, by the clock and of the processor, and the speed."""
    took: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, mine in zip(cases, took, strict=True):
            began = time.perf_counter(), time.process_time()
            case.do()
            mine.append(((time.perf_counter() - began[0]) / case.times, (time.process_time() - began[1]) / case.times))
    for case, mine in zip(cases, took, strict=True):
        clock, processor = zip(*mine, strict=True)
        row = {**case.about, "seconds": median(clock), "cpu_seconds": median(processor)}
        if case.tokens:
            row["mtok_per_second"] = case.tokens / row["cpu_seconds"] / 1e6
            row["mtok_per_second_of_clock"] = case.tokens / row["seconds"] / 1e6
            row["best_mtok_per_second"] = case.tokens / min(processor) / 1e6
        yield row


def tokenize_rows(repeats: int, size: int) -> Iterator[Row]:
    """By this package, by the library, and all the way into a cache: the same texts."""
    import tokenizers

    documents = load_documents(DataConfig())["text"]
    texts = [text[i : i + 4000] for text in documents for i in range(0, len(text), 4000)]
    named = [(str(i), text) for i, text in enumerate(texts)]
    bpe = train_bpe(documents, size)
    library = tokenizers.Tokenizer.from_str(bpe.definition)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "texts.jsonl")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def to_shards() -> None:
            shard, names = tokenize_shard(read(Part("jsonl", (file.name,), name, "text")), bpe)
            write_shard(Path(name), 0, shard, names, {})

        def by(way: str, together: int) -> Callable[[], int]:
            encode = getattr(library, way)
            groups = [texts[i : i + together] for i in range(0, len(texts), together)]
            return lambda: sum(len(each.ids) for group in groups for each in encode(group, add_special_tokens=False))

        def case(what: str, tokenizer: Tokenizer, who: str, do: Callable[[], Any]) -> Case:
            tokens = len(tokenize_shard(named, tokenizer)[0].tokens)
            about = {"what": what, "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size} tokens", "by": who}
            return Case({**about, "tokens": tokens}, do, tokens)

        cases = [
            case("tokenize", byte_tokenizer(), "titanfunc", lambda: tokenize_shard(named, byte_tokenizer())),
            case("tokenize", bpe, "titanfunc", lambda: tokenize_shard(named, bpe)),
            case("to_shards", bpe, "titanfunc", to_shards),
        ]
        for way in ("encode_batch", "encode_batch_fast"):
            for together in (1, 100, 1000):
                cases.append(case("tokenize", bpe, f"tokenizers: {way} of {together}", by(way, together)))
        yield from timed(cases, repeats)


def batch_rows(total: int, repeats: int, steps: int) -> Iterator[Row]:
    """Batches of both kinds of windows from a cache that lies on the disk."""
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), np.random.default_rng(0)
        entries = [write_random(folder, i, total // 8, source) for i in range(8)]
        config = DataConfig(cache_dir=name)

        def opened(batch: int, length: int, separate: bool, kept: str = "on the disk") -> Windows:
            shards = [open_shard(folder, entry, np.dtype(np.uint16)) for entry in entries]
            where = config if kept == "on the disk" else DataConfig()
            train = split(shards, where, byte_tokenizer(), Identity("", 0, 0)).train
            return Windows(train, length, batch, separate_documents=separate)

        def case(batch: int, length: int, separate: bool, kept: str) -> Case:
            windows, first = opened(batch, length, separate, kept), iter(range(0, 10**9, steps))

            def make() -> None:
                start = next(first)
                for step in range(start, start + steps):
                    windows.batch(step)

            make()
            about = {"what": "batch", "batch": batch, "length": length, "separate_documents": separate, "kept": kept}
            return Case({**about, "tokens": total}, make, batch * length, steps)

        yield from timed([Case({"what": "open", "tokens": total}, lambda: opened(16, 1024, False).batch(0))], repeats)
        yield from timed([case(*each) for each in BATCHES], repeats)


def write_random(folder: Path, number: int, tokens: int, source: np.random.Generator) -> Row:
    """A shard of random tokens in documents of 500 to 1500."""
    lengths = source.integers(500, 1500, size=tokens // 1000)
    ids = source.integers(0, 2**16, size=int(lengths.sum()), dtype=np.uint16)
    return write_shard(folder, number, Shard(ids, np.cumsum(lengths), lengths * 4, str), [], {})


def main() -> None:
    """Measures all of it and prints a row as it comes."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=options.count, default=10**8, help="of the cache")
    parser.add_argument("--size", type=options.count, default=8192, help="tokens of bpe")
    parser.add_argument("--repeats", type=options.count, default=9)
    parser.add_argument("--steps", type=options.count, default=500, help="batches that are timed together")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=options.new_file)
    args = parser.parse_args()
    args.device = "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    import tokenizers

    result = header(args) | {"numpy": np.__version__, "tokenizers": tokenizers.__version__, "cores": os.cpu_count()}
    result["load"] = [os.getloadavg()]
    result["rows"] = []
    batches = batch_rows(args.tokens, args.repeats, args.steps)
    for row in itertools.chain(batches, tokenize_rows(args.repeats, args.size)):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(result, args.out)
    result["load"].append(os.getloadavg())
    write(result, args.out)


if __name__ == "__main__":
    main()
