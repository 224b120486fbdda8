"""What feeding costs a step: the time of steps on batches as a run reads them against steps on one that is there.

    python benchmarks/feeding.py --model mac_168m:kernels=triton,layer_code=shared --out feeding.json
    python benchmarks/feeding.py --model mac_tiny --data sotu needle needle:workers=2 --backend none --device cpu

A kind of data is a corpus or a recall task with settings of ``data`` after a colon. In one process and by turns, rounds
of ``--steps`` steps are taken on a batch that lies on the device ("fixed"), on batches from the thread that makes them
ahead ("fed"), and on batches made and copied when they are wanted ("inline", which is what the thread saves). The clock
stops when the device is done. A row holds medians over the rounds, in ms a step, what the two cost over "fixed" in per
cent of it, ms of the CPU a step (other processes cannot change those much), and the ms that the loop waited for the
thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from titanfunc.bench import options
from titanfunc.bench.common import device_of, header, parsed, write
from titanfunc.config import Experiment
from titanfunc.config.experiment import from_mapping
from titanfunc.config.recall import TASKS
from titanfunc.config.train import COMPILERS

WARM_UP = 6


def experiment_of(model: str, data: str, args: argparse.Namespace) -> Experiment:
    """The settings of a row. Raises ValueError for what they cannot be."""
    preset, changes = parsed(model)
    name, settings = parsed(data)
    sizes = {"batch_size": args.batch} | ({"seq_len": args.seq} if args.seq else {})
    kind = {"task": name} if name in TASKS else {"corpus": name}
    return from_mapping(
        {"model": {"preset": preset, **changes}, "data": {**sizes, **kind, **settings}, "train": {"eval_batches": 1}}
    )


def measure(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """A row's numbers."""
    import torch

    from titanfunc.data import open_source
    from titanfunc.data.ahead import make_ahead
    from titanfunc.device import require_kernels_run
    from titanfunc.job import make_step
    from titanfunc.train import init_state
    from titanfunc.train.feed import Feed

    device = torch.device(args.device)
    require_kernels_run(experiment.model, device)
    source = open_source(experiment.data, 1)
    model, tx, step = make_step(experiment, None if args.backend == "none" else args.backend)
    state = init_state(model, tx, 0, device)
    end = WARM_UP + args.steps * args.rounds
    numbers = itertools.count()
    fixed = {name: leaf.to(device) for name, leaf in source.batches(0).items()}

    def inline() -> dict[str, torch.Tensor]:
        batch = source.batches(next(numbers))
        if device.type == "cuda":
            return {name: leaf.pin_memory().to(device, non_blocking=True) for name, leaf in batch.items()}
        return batch

    def seconds(next_batch: Callable[[], Any], steps: int) -> tuple[float, float]:
        """Of a step: those that passed, and those of the CPU in all of the process' threads."""
        nonlocal state
        _wait(device)
        begun, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, _ = step(state, next_batch())
        _wait(device)
        return (time.perf_counter() - begun) / steps, (time.process_time() - busy) / steps

    with Feed(make_ahead(source.batches, end, experiment.data.workers), 0, end, device, threaded=True) as feed:
        ways: dict[str, Callable[[], Any]] = {"fixed": lambda: fixed, "fed": feed.next, "inline": inline}
        for way in ways.values():
            seconds(way, WARM_UP)
        waited, found = feed.waited, {name: list[tuple[float, float]]() for name in ways}
        for turn in range(args.rounds):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            for name in order:
                found[name].append(seconds(ways[name], args.steps))
        waited = (feed.waited - waited) / (args.steps * args.rounds)
    medians = {name: statistics.median(time for time, _ in times) for name, times in found.items()}
    busy = {name: statistics.median(time for _, time in times) for name, times in found.items()}
    return {
        **{f"{name}_ms": round(1e3 * middle, 4) for name, middle in medians.items()},
        **{f"{name}_cpu_ms": round(1e3 * middle, 4) for name, middle in busy.items()},
        **{f"{name}_percent": round(100 * (medians[name] / medians["fixed"] - 1), 3) for name in ("fed", "inline")},
        "fed_waits_ms": round(1e3 * waited, 4),
        "rounds_ms": {name: [round(1e3 * each, 4) for each, _ in times] for name, times in found.items()},
        "batch_megabytes": round(sum(leaf.nbytes for leaf in fixed.values()) / 1e6, 3),
    }


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Reads the arguments, measures each kind of data and writes the result after each."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mac_tiny", help="a preset, with settings after a colon")
    parser.add_argument("--data", nargs="+", default=["sotu", "mqar", "needle", "needle:workers=2"])
    parser.add_argument("--batch", type=options.count, default=16, help="rows")
    parser.add_argument("--seq", type=int, default=0, help="tokens of a row (0: the model's)")
    parser.add_argument("--steps", type=options.count, default=50, help="of a round")
    parser.add_argument("--rounds", type=options.count, default=9)
    parser.add_argument("--backend", default="inductor", choices=[name for name in COMPILERS if name != "auto"])
    parser.add_argument("--device", type=options.device, default="auto")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=options.new_file, help="the result as json, rewritten after each row")
    args = parser.parse_args()
    try:
        experiments = {text: experiment_of(args.model, text, args) for text in args.data}
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    args.device = device_of(args.device)
    result = {**header(args), "model": args.model, "batch": args.batch, "steps": args.steps}
    for text, experiment in experiments.items():
        result["rows"].append({"data": text, "seq_len": experiment.data.seq_len, **measure(experiment, args)})
        write(result, args.out)
        row = result["rows"][-1]
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "rounds_ms"), flush=True)


if __name__ == "__main__":
    main()
