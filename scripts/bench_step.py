"""Train models on real text for some steps and record speed, memory, compile time and loss, peers beside ours.

    python scripts/bench_step.py --models mac_168m:kernels=triton transformer_168m --jobs 4 --out FILE.json
    python scripts/bench_step.py --models mac_24gb@4x2048 titans_pytorch_mac titans_pytorch_mac:memory=none
    python scripts/bench_step.py --models transformer_168m torch_transformer:transformer_168m --profile TRACES

A model is a preset with overrides after a colon and its own batch and length after an @, or a peer: titans_pytorch_mac
(:memory=none), eager, and torch_transformer:PRESET, compiled; peers have torch's fused AdamW. --optims takes ours, with
overrides (nested:nested.base=muon), and torch_muon: torch.optim.Muon and AdamW on compiled gradients.

Each row is a process of its own. --jobs of them compile at once, and one times its steps when no other compiles or
times, so that a table costs little more than its slowest compile. Compilers begin with empty caches, or with --caches.
A row is right where its first loss is the eager reference's (a peer's: a guess's) and its loss falls. Fields:
start_seconds from the process' start to the end of the first step, which first_step_seconds alone has (compiling);
step_ms and tokens_per_second by the median after 10 steps; memory_before_steps_gib between steps, peak_memory_gib in
them, CUDA graph and all; alone: when it was timed. --profile adds where a step's time goes (CUDA), and with a folder
its trace. The exit status is 1 if a row failed or was stopped at its time limit; a peer that is not installed is none.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from titanfunc.bench import options
from titanfunc.bench.common import device_of, exit_status, header, write
from titanfunc.bench.step_row import TITANS, StepRow, rows_of

WARM_UP = 10
BACKENDS = ("inductor", "aot_eager", "eager", "none")


def arguments() -> tuple[argparse.Namespace, list[StepRow]]:
    """The options and the rows; ends the process for what is none."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--optims", nargs="+", default=["adamw"])
    parser.add_argument("--batch", type=options.count, help="of models that name none (16; 4 for titans_pytorch_mac)")
    parser.add_argument("--seq", type=options.count, help="the same (1024; 2048 for titans_pytorch_mac)")
    parser.add_argument("--steps", type=options.count, default=50)
    parser.add_argument("--lr", type=options.positive, default=6e-4)
    parser.add_argument("--backend", type=options.one_of(*BACKENDS), default="inductor", help="none: no torch.compile")
    parser.add_argument("--device", type=options.device, default="auto", help="cpu, cuda, cuda:N; auto: cuda if there")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--jobs", type=options.count, default=2, help="processes at once, all on the device")
    parser.add_argument("--time-limit", type=options.seconds, default=900, help="of a row, waiting for others apart")
    parser.add_argument("--caches", type=options.folder, help="keeps what compilers made (none: nothing is kept)")
    parser.add_argument("--against", default="", help="the row that ratios are to (the first)")
    traces = "profiles a step of each row (CUDA); a folder after it is for traces"
    parser.add_argument("--profile", nargs="?", type=options.folder, const=False, metavar="TRACES", help=traces)
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=options.new_file, help="the result as json, rewritten after each row")
    args = parser.parse_args()
    options.require_gpu("--profile", args.profile is not None, args.device)
    try:
        rows = rows_of(args.models, args.optims, args.batch, args.seq)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    names = [row.name for row in rows]
    for wrong, said in (
        (args.steps <= WARM_UP, f"--steps: wanted more than the {WARM_UP} of the warm-up, got {args.steps}"),
        (len(set(names)) < len(names), f"--models: wanted each row once, got {', '.join(names)}"),
        (args.against not in ("", *names), f"--against: wanted one of {', '.join(names)}, got {args.against!r}"),
    ):
        if wrong:
            parser.error(said)
    return args, rows


def main() -> None:
    """Measure every row, write the result after each and print the table."""
    args, rows = arguments()
    os.environ.setdefault("PYTORCH_JIT", "0")  # as bench_kernels.py has it for titans-pytorch
    from titanfunc.bench import jobs, peers, step, step_profile, tables

    args.device = device_of(args.device)
    options.require_gpu("--profile", args.profile is not None, args.device)
    shared = {
        "device": args.device, "steps": args.steps, "lr": args.lr, "cuda_graph": not args.no_cuda_graph,
        "backend": None if args.backend == "none" else args.backend,
        "profile": None if args.profile is None else str(args.profile or ""),
    }  # fmt: skip
    result = {**header(args), "jobs": args.jobs}
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, numbers: dict[str, Any]) -> None:
        found[name] = numbers
        result["rows"] = [{**_told(row), **found[row.name]} for row in rows if row.name in found]
        write(result, args.out)

    todo = {}
    for row in rows:
        if row.kind == TITANS and not peers.installed():
            keep(row.name, {"status": f"{peers.PACKAGE} is not installed"})
        else:
            todo[row.name] = {"row": row._asdict(), **shared}
    try:
        jobs.run_all(todo, step.WORKER, args.jobs, args.time_limit, keep, args.caches)
    except KeyboardInterrupt:
        print("interrupted: the rows that were measured are in the result", file=sys.stderr)
        sys.exit(130)
    for row in result["rows"]:
        if "profile" in row:
            print(f"{row['name']}: {step_profile.table(row['profile'])}\n")
    tables.show(tables.of_steps(result["rows"], args.against))
    sys.exit(exit_status(result["rows"]))


def _told(row: StepRow) -> dict[str, Any]:
    peer = row.kind != "ours"
    return {
        "name": row.name, "model": row.text, "optimizer": "torch.optim.AdamW" if peer else row.optimizer,
        "batch": row.batch, "seq_len": row.seq_len,
    }  # fmt: skip


if __name__ == "__main__":
    main()
