"""Time and memory of training and of decoding against the length of the text.

    python benchmarks/lengths.py train --out lengths.json
    python benchmarks/lengths.py train --models lmm --batches 4 --lengths 4096 65536 --add --out lengths.json
    python benchmarks/lengths.py decode --until 65536 --out decode.json
    python benchmarks/lengths.py draw lengths.json decode.json --out lengths.png

Each (model, batch, length) is trained in a process of its own: ``--jobs`` of them compile at once, but for those of so
many tokens a step that six might not fit on a GPU (on a CPU 131,072), which compile alone, and one at a time is timed,
while no other compiles or times. They share what they compile: a row's compile seconds, which are those of all of its
first step, depend on those before it. A model is mac, mag or lmm (see FAMILIES), or a preset that may carry overrides
after a colon. Rows are measured batch by batch and length by length in the order given, all models at each. ``--add``
puts them beside those that ``--out`` has already, which must be of the same commit, device and versions, in place of
those that are measured again; ``merge`` does so with files. Text: windows of the built-in corpus, over the ends of
documents. The exit status is 1 if a row failed, took too long or has numbers that are not finite.

train: the compiled step on batches that lie on the device, the median of ``--steps`` after some to warm up. Peak memory
is that from the second step on, the recording of the CUDA graph included: that is when a graph's memory is allocated.
decode: a state is fed tokens up to each of four positions, in pieces of a prompt, and goes on from there token by
token: a step of ``generation.make_decode_step`` as ``generate`` calls it, compiled, on a GPU replayed as a CUDA graph.
``us_per_token`` is the median of the means over ``--steps``, its Python included, in nine rounds over the positions
(``us_rounds``); ``to_first`` that of a round's time there by its time at the first position; ``us_to_launch`` what
passes until the last step is launched: where that is less, the device is what is waited for. ``state_bytes`` are those
of the state after the steps; ``peak_gib`` holds the parameters and a state for each position too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titanfunc.bench import options
from titanfunc.bench.common import configuration, device_of, exit_status, header, write
from titanfunc.bench.jobs import run_all
from titanfunc.config.mistakes import refuse

FAST = "kernels=triton,remat=layer,layer_code=shared"
FAMILIES = {
    "mac": f"mac_24gb:layers=5,{FAST}", "mag": f"mag_24gb:layers=5,{FAST}", "lmm": f"lmm_24gb:layers=7,{FAST}",
}  # fmt: skip
"""24.8M, 24.2M and 26.4M parameters; the kept activations of 4 x 65536 tokens alone would take most of a device."""
BACKENDS = ("inductor", "aot_eager", "eager")
SAME = ("device", "python", "torch", "triton", "commit")
WORKER = (sys.executable, str(Path(__file__).resolve().with_name("length_rows.py")))


def run(args: argparse.Namespace, jobs: list[dict[str, Any]], unpack: Callable[..., list[dict[str, Any]]]) -> dict:
    """Every job in a process of its own; the result, written after each."""
    args.device = device_of(args.device)
    profile = getattr(args, "profile", False)
    options.require_gpu("--profile", profile, args.device)
    new = header(args)
    earlier = [read(str(args.out))] if args.add and args.out.exists() else []
    merged([*earlier, new])  # refuses before any work what cannot be put together
    common = {"device": args.device, "backend": args.backend, "steps": args.steps, "profile": profile}
    named = {" ".join(map(str, (job["model"], *job_of(job)[1:]))): {**job, **common} for job in jobs}
    found: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, numbers: dict[str, Any]) -> None:
        found[name] = unpack(named[name], numbers)
        new["rows"] = [row for each in named if each in found for row in found[each]]
        write(merged([*earlier, new]), args.out)
        for row in found[name]:
            print(json.dumps({key: value for key, value in row.items() if key != "profile"}), flush=True)

    with tempfile.TemporaryDirectory() as caches:
        try:
            run_all(named, WORKER, args.jobs, args.time_limit, keep, Path(caches))
        except KeyboardInterrupt:
            print("interrupted: the rows that were measured are in the result", file=sys.stderr)
            sys.exit(130)
    return new


def train(args: argparse.Namespace) -> int:
    """Measures every model, batch and length, and says how the time of a token changes from end to end."""
    jobs = [
        {"kind": "train", "model": text, "batch": batch, "length": length}
        for batch in args.batches
        for length in args.lengths
        for text in args.models
    ]

    def unpack(job: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"model": job["model"], "batch": job["batch"], "length": job["length"], **found}]

    result = run(args, jobs, unpack)
    for (text, batch), ratio in ratios(read(str(args.out))["rows"]).items():
        print(f"{text} batch {batch}: ns a token at the longest / at the shortest = {ratio:.3f}")
    return exit_status(result["rows"])


def ratios(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """{(model, batch): ns a token at its longest length by that at its shortest}, of those with two lengths."""
    curves = training_curves(rows, "ns_per_token")
    return {key: curve[-1][1] / curve[0][1] for key, curve in curves.items() if len(curve) > 1}


def training_curves(rows: list[dict[str, Any]], what: str) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """{(model, batch): (length, value), shortest first} of the rows that have the value."""
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        if row.get(what) is not None and "length" in row:
            curves.setdefault((row["model"], row["batch"]), []).append((row["length"], row[what]))
    return {key: sorted(curve) for key, curve in curves.items()}


def decode(args: argparse.Namespace) -> int:
    """Measures every model at every position."""

    def unpack(job: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
        rows = found.pop("positions", [{}])
        return [{"model": job["model"], **found, **row} for row in rows]

    jobs = [{"kind": "decode", "model": text, "until": args.until} for text in args.models]
    return exit_status(run(args, jobs, unpack)["rows"])


def merge(args: argparse.Namespace) -> int:
    """One result of several; of what was measured twice the later file's rows stay."""
    write(merged(args.files), args.out)
    return 0


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one, whose "command" is a list where there were several.

    Ends the process unless all were measured at one commit, on one device, with the same versions.
    """
    first, rows, commands = results[0], list[dict[str, Any]](), list[str]()
    for result in results:
        for name in SAME:
            want, got = first.get(name), result.get(name)
            if want != got:
                refuse(f"results: wanted all of {name} {want}, as the first is, got {got}")
        again = {job_of(row) for row in result["rows"]}
        rows = [row for row in rows if job_of(row) not in again] + result["rows"]
        own = result["command"] if isinstance(result["command"], list) else [result["command"]]
        commands += [command for command in own if command not in commands]
    return {**first, "command": commands if len(commands) > 1 else commands[0], "rows": rows}


def job_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured together: the model, and in training the batch and the length."""
    return tuple(row[name] for name in ("model", "batch", "length") if name in row)


def read(text: str) -> dict[str, Any]:
    """The result in a file, for an option."""
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
        ok = isinstance(found, dict) and isinstance(found.get("rows"), list) and "command" in found
    except (OSError, ValueError):
        ok = False
    if not ok:
        raise argparse.ArgumentTypeError(f"wanted a result of this script, got {text!r}")
    return found


def model(text: str) -> str:
    """A model's text, for an option; of a family's name that of FAMILIES."""
    text = FAMILIES.get(text, text)
    try:
        configuration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {' '.join(str(error).split())}") from None
    return text


def draw(args: argparse.Namespace) -> int:
    """One picture of the rows of some results."""
    from titanfunc.report.style import COLOURS, INK, doubling_axis, new_figure, style

    rows = [row for result in args.files for row in result["rows"]]
    texts = list(dict.fromkeys(row["model"] for row in rows))
    if len(texts) > len(COLOURS):
        refuse(f"draw: wanted results of at most {len(COLOURS)} models, got {len(texts)}")
    colours = dict(zip(texts, COLOURS, strict=False))
    lengths = sorted({row["length"] for row in rows if "length" in row})
    batches = sorted({row["batch"] for row in rows if "batch" in row}, reverse=True)
    at = sorted({row["position"] for row in rows if "position" in row})
    wanted = [("ns_per_token", "Training: ns a token"), ("peak_memory_gib", "Training: peak memory, GiB")]
    curves = [(title, found) for what, title in wanted if (found := training_curves(rows, what))]
    figure = new_figure(0.3 + 4.6 * (len(curves) + bool(at)), 4.2)
    panels = iter(figure.subplots(1, len(curves) + bool(at), squeeze=False)[0])
    for title, found in curves:
        panel = next(panels)
        style(panel, title, "tokens in a row")
        for (text, batch), curve in found.items():
            look = {"color": colours[text], "linestyle": ("-", "--", ":")[batches.index(batch) % 3]}
            panel.plot(
                *zip(*curve, strict=True), marker="o", markersize=4, label=f"{short(text)}, batch {batch}", **look
            )
        if "memory" in title:
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter("{x:g}")
        else:
            panel.set_ylim(bottom=0)
        doubling_axis(panel, lengths)
        panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    if at:
        panel = next(panels)
        style(panel, "Decoding: µs a token, batch 1", "tokens read before")
        for text in texts:
            curve = [
                (row["position"], row["us_per_token"])
                for row in rows
                if row["model"] == text and row.get("us_per_token")
            ]
            if curve:
                points = zip(*sorted(curve), strict=True)
                panel.plot(*points, marker="o", markersize=4, color=colours[text], label=short(text))
        panel.set_ylim(bottom=0)
        doubling_axis(panel, at)
        panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(args.out)
    return 0


def short(text: str) -> str:
    """A model's family, in capitals."""
    return text.partition("_")[0].upper()


def main() -> None:
    """Reads the arguments and does what is asked."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART", dest="PART")
    for do in (train, decode):
        part = parts.add_parser(do.__name__, help=do.__doc__)
        part.set_defaults(do=do)
        part.add_argument("--models", nargs="+", type=model, default=list(FAMILIES.values()))
        part.add_argument("--jobs", type=options.count, default=6, help="processes at once")
        part.add_argument("--time-limit", type=options.seconds, default=900.0, help="seconds of a row, its waits apart")
        part.add_argument("--backend", type=options.one_of(*BACKENDS), default="inductor")
        part.add_argument("--device", type=options.device, default="auto", help="cpu, cuda, cuda:N, or auto")
        part.add_argument("--commit", default="", help="written into the result where there is no git history")
        part.add_argument("--out", type=options.new_file, required=True)
        part.add_argument("--add", action="store_true", help="keep the rows that --out has already")
        part.add_argument("--steps", type=options.count, default=10 if do is train else 200, help="that are timed")
        if do is train:
            lengths = [4096, 8192, 16384, 32768, 65536]
            part.add_argument("--lengths", nargs="+", type=options.count, default=lengths)
            part.add_argument("--batches", nargs="+", type=options.count, default=[4, 1])
            part.add_argument("--profile", action="store_true", help="where a step's time goes, by kind (CUDA)")
        else:
            part.add_argument("--until", type=options.count, default=65536, help="the last position")
    for do in (draw, merge):
        part = parts.add_parser(do.__name__, help=do.__doc__)
        part.set_defaults(do=do)
        part.add_argument("files", nargs="+", type=read)
        part.add_argument("--out", type=options.new_file, required=True)
    args = parser.parse_args()
    if hasattr(args, "device"):
        options.require_gpu("--profile", getattr(args, "profile", False), args.device)
        if args.add and args.out.exists():
            try:
                read(str(args.out))
            except argparse.ArgumentTypeError as error:
                parser.error(f"--out: {error}, to add to")
    sys.exit(args.do(args))


if __name__ == "__main__":
    main()
