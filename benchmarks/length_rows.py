"""What a process of ``lengths.py`` does: it trains one model at one length, or decodes with one model.

    python benchmarks/length_rows.py JOB.json

The job says what; its numbers go into the file that the job names. Any number of such processes compile at once, each
until its first step is done; then one at a time has the machine: see titanfunc/bench/turns.py. The call that compiles
a step runs it too, and the activations of several long rows' steps may not fit on one device: such a row has the
machine from the start, and compiles alone.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import titanfunc as tf
from titanfunc import rng, tree
from titanfunc.bench import step_profile
from titanfunc.bench.common import configuration
from titanfunc.bench.turns import Turns
from titanfunc.generation import make_decode_step

WARM_UP = 6  # the first compiles, the fourth records a CUDA graph
PIECE = 1024  # tokens that a state is fed at once
ROUNDS = 9  # of so many steps of decoding at each position
GIB = 2**30
LONG = 131072
"""Tokens of a step from which on a row has a CPU from the start."""
A_TOKEN = 80 * 2**10
"""Bytes of a step on a GPU; 65 KiB were seen of replayed ones (mac_24gb of 5 layers, 4 x 65,536 tokens, an H200)."""
AT_ONCE = 6
"""First steps for which a GPU has to have room; a longer row has the GPU from the start."""
DecodeOne = Callable[[Any, torch.Tensor], tuple[torch.Tensor, Any]]
"""(state, token [1, 1]) -> (next token, new state)."""


Measure = Callable[[], dict[str, Any]]
"""Times what has compiled, and returns its numbers."""


class Device:
    """Where a row is measured."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, torch.device(name).type == "cuda"

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.cuda:
            torch.cuda.synchronize(self.name)

    def give_back(self) -> None:
        """Memory that nothing holds any more goes to the other processes."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        """Begins to look for the most memory that is held."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.name)

    def peak(self) -> float | None:
        """GiB of the most memory that was held; None on a CPU."""
        return round(torch.cuda.max_memory_allocated(self.name) / GIB, 3) if self.cuda else None

    def is_long(self, tokens: int) -> bool:
        """Whether there may be no room for the first steps of several rows of so many tokens."""
        if not self.cuda:
            return tokens >= LONG
        return tokens * A_TOKEN * AT_ONCE > torch.cuda.get_device_properties(self.name).total_memory


def size(values: Any) -> int:
    """Bytes of a tree of tensors."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(values))


def train(job: dict[str, Any], device: Device) -> Measure:
    """Compiles the step of one (model, batch, length) by taking the first; what it returns takes the others."""
    batch, length = job["batch"], job["length"]
    model, tx = tf.models.build(configuration(job["model"])), tf.optim.adamw(3e-4, clip_norm=1.0)
    state = tf.train.init_state(model, tx, device=device.name)
    corpus = tf.data.load(tf.config.DataConfig()).train
    windows = tf.data.Windows(corpus, length, batch, separate_documents=False)
    batches = [{"tokens": windows.batch(i).to(device.name)} for i in range(WARM_UP + job["steps"])]
    step = tf.train.compile_step(tf.train.make_train_step(model, tx), job["backend"])
    held, losses = size(state), []

    def one() -> None:
        nonlocal state
        state, metrics = step(state, batches[len(losses) % len(batches)])
        losses.append(metrics["loss"])

    begun = time.perf_counter()
    one()
    device.wait()
    compiled = time.perf_counter() - begun

    def measure() -> dict[str, Any]:
        device.forget_peak()
        for _ in range(WARM_UP - 1):
            one()
        times = milliseconds(one, job["steps"], device)
        peak, parameters = device.peak(), tree.size(state.params)
        where = {}
        if job["profile"]:
            found = step_profile.profile(one, 6 * parameters * batch * length)
            where = {"profile": {**found, "kernels": found["kernels"][:12]}}
        median, values = statistics.median(times), torch.stack(losses)
        return {
            "parameters": parameters,
            "step_ms": round(median, 3),
            "step_ms_min_max": [round(min(times), 3), round(max(times), 3)],
            "ns_per_token": round(1e6 * median / (batch * length), 2),
            "peak_memory_gib": peak,
            "state_gib": round(held / GIB, 6),
            "compile_seconds": round(compiled, 1),
            "loss_finite": bool(values.isfinite().all()),
            "loss_first_last": [round(values[i].item(), 4) for i in (0, -1)],
            **where,
        }

    return measure


def milliseconds(call: Callable[[], None], times: int, device: Device) -> list[float]:
    """Of each of some calls one after another; on a GPU as its own clock sees them, without a wait between them."""
    device.wait()
    if not device.cuda:
        marks = [time.perf_counter()]
        for _ in range(times):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    device.wait()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


@torch.no_grad()
def decode(job: dict[str, Any], device: Device) -> Measure:
    """Compiles a model's step by taking the first; what it returns finds a row for each position ("positions")."""
    config = configuration(job["model"])
    model = tf.models.build(config)
    params = tree.map(lambda leaf: leaf.to(device.name), model.init(rng.generator(0)))
    made = make_decode_step(model, temperature=0, backend=job["backend"])
    source = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (1, job["until"]), generator=source).to(device.name)
    token, seed = text[:, :1], torch.zeros((), dtype=torch.int64, device=device.name)
    fresh = contiguous(model.init_memory(params, 1))
    read = made.read(params, fresh, token)

    def step(memory: Any, token: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return made.run(read, memory, token, seed)

    begun = time.perf_counter()
    step(contiguous(fresh), token)
    device.wait()
    compiled = time.perf_counter() - begun

    @torch.no_grad()
    def measure() -> dict[str, Any]:
        together = math.lcm(config.mac.segment if config.family == "mac" else 1, config.memory.chunk_size)
        memory, done, states = fresh, 0, dict[int, Any]()
        for position in positions(job["until"]):
            while done < position:
                piece = text[:, done : min(position, done + PIECE)]
                memory = model.apply(params, memory, piece, aligned=done % together == 0)[1]
                done += piece.shape[1]
            states[position] = contiguous(memory)
        rows = by_turns(Carried(step, contiguous(fresh), token), states, job["steps"], device)
        return {"parameters": tree.size(params), "compile_seconds": round(compiled, 1), "positions": rows}

    return measure


def contiguous(memory: Any) -> Any:
    """A copy laid out as every other state is: the compiled step is made for one layout."""
    return tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), memory)


class Carried:
    """Calls a step with the state, which it writes over, and the token that the one before it made."""

    def __init__(self, step: DecodeOne, memory: Any, token: torch.Tensor) -> None:
        self.step, self.memory, self.token = step, memory, token
        self._first = token

    def begin_at(self, memory: Any) -> None:
        """Goes on from another state, in the same place: a recorded graph stays the one that is replayed."""
        tree.map(lambda mine, other: mine.copy_(other), self.memory, memory)
        self.token = self._first

    def __call__(self) -> None:
        """One token more."""
        self.token, self.memory = self.step(self.memory, self.token)


def by_turns(carried: Carried, states: dict[int, Any], steps: int, device: Device) -> list[dict[str, Any]]:
    """A row for each position: the time of a call there, in ROUNDS that go over all positions, so that what changes on
    the machine meanwhile changes all of them; and what becomes of the state and of the memory that is held."""
    times: dict[int, list[float]] = {position: [] for position in states}
    launching: dict[int, list[float]] = {position: [] for position in states}
    found: dict[int, dict[str, Any]] = {position: {"state_finite": True, "peak_gib": None} for position in states}
    for _ in range(ROUNDS):
        for position, state in states.items():
            device.wait()
            device.forget_peak()
            carried.begin_at(state)
            took, launched = microseconds(carried, steps, device)
            times[position].append(took)
            launching[position].append(launched)
            row = found[position]
            row["peak_gib"] = max(filter(None, (row["peak_gib"], device.peak())), default=None)
            row["state_bytes"] = size(carried.memory)
            row["state_finite"] &= all(bool(leaf.isfinite().all()) for leaf in tree.leaves(carried.memory))
    first = next(iter(times.values()))
    return [
        {
            "position": position,
            "us_per_token": round(statistics.median(here), 2),
            "us_min_max": [round(min(here), 2), round(max(here), 2)],
            "us_to_launch": round(statistics.median(launching[position]), 2),
            "to_first": round(statistics.median(mine / its for mine, its in zip(here, first, strict=True)), 4),
            "us_rounds": [round(each, 1) for each in here],
            **found[position],
        }
        for position, here in times.items()
    ]


def microseconds(call: Callable[[], None], steps: int, device: Device) -> tuple[float, float]:
    """Of a call, once warm: until the last of ``steps`` is done, and until it is launched."""
    for _ in range(WARM_UP):
        call()
    device.wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    launched = time.perf_counter()
    device.wait()
    return 1e6 * (time.perf_counter() - start) / steps, 1e6 * (launched - start) / steps


def positions(until: int) -> list[int]:
    """Where a token is timed: at ``until`` and at a fourth of it, three times over."""
    return sorted({max(1, until // part) for part in (64, 16, 4, 1)})


def main() -> None:
    """Does the job of a file: compiles while others may, unless its steps are long, and is timed alone."""
    job = json.loads(Path(sys.argv[1]).read_text())
    device, turns = Device(job["device"]), Turns(Path(job["lock"]), Path(job["told"]))
    long = job["kind"] == "train" and device.is_long(job["batch"] * job["length"])
    with (turns.alone if long else turns.among_others)("compiling"):
        measure = {"train": train, "decode": decode}[job["kind"]](job, device)
        device.give_back()
    with turns.alone("timing"):
        since = time.time()
        found = measure()
        del measure  # with it the state: the next one may need the whole device
        device.give_back()
        until = time.time()
    Path(job["result"]).write_text(json.dumps({**found, "alone": [since, until]}))


if __name__ == "__main__":
    main()
