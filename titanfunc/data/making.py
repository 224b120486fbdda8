"""Parts of a corpus to shards of tokens, by as many processes as there are cores."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config.failures import Killed
from titanfunc.data import parts
from titanfunc.data.parts import Part
from titanfunc.data.progress import progress
from titanfunc.data.shards import finished, write_shard
from titanfunc.data.tokenizers import Tokenizer, from_definition
from titanfunc.data.tokens import tokenize_shard

_ALONE_BYTES = 32 << 20  # what this process does before another has even begun
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # Ctrl-C reaches all: this process ends them


class _Job(NamedTuple):
    """A shard to be made; all of it can be sent to another process."""

    folder: Path
    number: int
    part: Part
    name: str
    definition: str
    separator: int


def make_shards(
    folder: Path, wanted: Sequence[Part], tokenizer: Tokenizer, processes: int | None = None
) -> list[dict[str, Any]]:
    """A shard in ``folder`` for each part, those that are there already kept; the json of each, in order.

    processes: at work at once (None: the cores there are, but this one alone for little text). Raises ValueError for
    text that cannot be read, NotWritten for a full disk, Killed for a process that was; finished shards are kept then,
    as they are at an interrupt, which drops what is under way.
    """
    entries = {number: finished(folder, number, {"part": part.key}) for number, part in enumerate(wanted)}
    todo = [number for number, entry in entries.items() if entry is None]
    if processes is None:
        little = sum(wanted[number].size for number in todo) < _ALONE_BYTES
        processes = 1 if little else _cores()
    told = (tokenizer.name, tokenizer.definition, tokenizer.separator)
    jobs = [_Job(folder, number, wanted[number], *told) for number in todo]
    done = {number: entry for number, entry in entries.items() if entry is not None}
    with progress(wanted, done, sum(entry["tokens"] for entry in done.values())) as advance, _telling_interrupts():
        for made, number in _alone(jobs, tokenizer) if processes <= 1 else _together(jobs, processes):
            entries[number] = made
            advance(number, made["tokens"])
    return [entry for number in range(len(wanted)) if (entry := entries[number]) is not None]


@contextlib.contextmanager
def _telling_interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = "what is finished is kept, and the next run goes on from there"
        print(f"tokenizing was interrupted: {kept}", file=sys.stderr, flush=True)
        raise


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _alone(jobs: Sequence[_Job], tokenizer: Tokenizer) -> Iterator[tuple[dict[str, Any], int]]:
    return ((_make(job, tokenizer), job.number) for job in jobs)


def _together(jobs: Sequence[_Job], processes: int) -> Iterator[tuple[dict[str, Any], int]]:
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker() for _ in range(min(processes, len(jobs)))]
    for worker in workers:
        idle.put(worker)

    def do(job: _Job) -> dict[str, Any]:
        worker = idle.get()
        try:
            return worker.make(job)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(max(1, len(workers))) as threads:
        try:
            with _killed_by_interrupts(workers):
                places = {threads.submit(do, job): job.number for job in jobs}
                try:
                    for done in as_completed(places):
                        yield done.result(), places[done]
                except Exception:
                    threads.shutdown(cancel_futures=True)  # what is under way becomes a shard still
                    raise
        finally:
            threads.shutdown(cancel_futures=True)
            for worker in workers:
                worker.close()


@contextlib.contextmanager
def _killed_by_interrupts(workers: Sequence[_Worker]) -> Iterator[None]:
    """Somebody who interrupts waits for the end, and a part that is under way may take many seconds more."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):  # the latter where whoever takes the shards was interrupted
        for worker in workers:
            worker.kill()
        raise


class _Worker:
    """A process that makes shards, and ends when this one does, however it does.

    Not of ``multiprocessing``: this process may have threads, which a fork would not survive, and a script that is not
    guarded by its name, which a spawned process would run again.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-c", f"{_DEAF}; from titanfunc.data.making import serve; serve()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def make(self, job: _Job) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise Killed(
                "data.cache_dir: a process that tokenizes was killed (is there enough memory?); what is finished is "
                "kept, and the next run goes on from there"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        made: dict[str, Any] = answer
        return made

    def kill(self) -> None:
        """End it, whatever it does: of a shard that it was at nothing counts until all of it is there."""
        self._process.kill()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Make the shards that come on stdin until it ends, and answer each on stdout; what a worker process runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: dict[str, Any] | Exception = _make(job)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


def _make(job: _Job, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Read, tokenize and write one part; its json."""
    if tokenizer is None:
        tokenizer = from_definition(job.name, job.definition, job.separator)
    shard, names = tokenize_shard(parts.read(job.part), tokenizer)
    return write_shard(job.folder, job.number, shard, names, {"part": job.part.key})
