"""Time the Triton kernels against what torch makes of their references, each row checked first.

    python scripts/bench_kernels.py --rows "rms_norm|memory" --out FILE.json

The rows stand in titanfunc/bench/kernel_rows. A row is right where every output and gradient of the kernel (for drawn
cotangents) lies within --tolerance of the largest number of the reference's; one that is not is reported and not timed.
Then three ways are timed, one after the other, inside CUDA graphs: the kernel and the reference, both compiled by
inductor in one graph with their gradients, and the reference eagerly. Times are medians of --rounds replays, in
microseconds; memory is the peak that a call adds. Rows called "peer: ..." put a memory layer with its projections
beside titans-pytorch's NeuralMemory where that is installed, and say so where it is not.
On a CPU only correctness is looked at. The exit status is 1 if a row is not right or could not be measured; a peer that
is not installed or runs out of memory is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from titanfunc.bench import options
from titanfunc.bench.common import device_of, exit_status, header, write


def arguments() -> argparse.Namespace:
    """The options; ends the process for what is none."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=options.expression, default="", help="an expression found in a row's name")
    parser.add_argument("--rounds", type=options.count, default=30)
    parser.add_argument("--tolerance", type=options.positive, default=0.03)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--device", type=options.device, default="auto", help="cpu, cuda, cuda:N; auto: cuda if there")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=options.new_file, help="the result as json, rewritten after each row")
    return parser.parse_args()


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
    sys.exit(exit_status(result["rows"]))


if __name__ == "__main__":
    main()
