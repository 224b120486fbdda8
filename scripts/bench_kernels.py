"""Time the Triton kernels against what torch makes of their references, each row checked first.

    python scripts/bench_kernels.py --rows "rms_norm|memory" --out FILE.json

The rows stand in titanfunc/bench/kernel_rows. A row is right where every output and gradient of the kernel (for drawn
cotangents) lies within --tolerance of the largest number of the reference's; one that is not is reported and not timed.
Then three ways are timed, one after the other, inside CUDA graphs: the kernel and the reference, both compiled by
inductor in one graph with their gradients, and the reference eagerly. Times are medians of --rounds replays, in
microseconds; memory is the peak that a call adds. Rows called "peer: ..." put a memory layer with its projections
beside titans-pytorch's NeuralMemory where that is installed, and say so where it is not.
On a CPU only correctness is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from titanfunc.bench.common import Parser, device_of, header, write
from titanfunc.config.train import require_device


def arguments() -> argparse.Namespace:
    """The options; ends the process for what is none."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="a regular expression found in a row's name")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto: cuda where there is one, else cpu")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, help="the result as json, rewritten after each row")
    args = parser.parse_args()
    try:
        require_device(args.device, "--device")
        re.compile(args.rows)
    except ValueError as error:
        parser.error(str(error))
    except re.error as error:
        parser.error(f"--rows: wanted a regular expression, got {args.rows!r} ({error})")
    if args.rounds < 1:
        parser.error(f"--rounds: wanted at least 1, got {args.rounds}")
    return args


def main() -> None:
    """Read the arguments, measure the rows, write the result after each and print the table."""
    args = arguments()
    os.environ.setdefault("PYTORCH_JIT", "0")  # before torch is imported: a peer's scripted functions need it
    from titanfunc.bench import kernels, tables, timing
    from titanfunc.config.mistakes import refuse

    args.device = device_of(args.device)
    rows = kernels.chosen(args.rows)
    if not rows:
        refuse(f"--rows: wanted an expression found in a row's name, got {args.rows!r}")
    result = header(args)
    if args.device.startswith("cuda"):
        result["copy_tb_per_s"] = timing.copy_bandwidth(args.device, args.rounds)
    for row in rows:
        found = kernels.measured(row, args)
        result["rows"].append(found)
        print(json.dumps(found), flush=True)
        write(result, args.out)
    tables.show(tables.of_kernels(result["rows"]))


if __name__ == "__main__":
    main()
