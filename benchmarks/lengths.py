"""Time and memory of training and of decoding against the length of the text.

    python benchmarks/lengths.py train --out lengths.json
    python benchmarks/lengths.py decode --until 65536 --out decode.json
    python benchmarks/lengths.py draw lengths.json decode.json --out lengths.png

Each (model, batch, length) is trained in a process of its own: ``--jobs`` of them compile at once, one at a time has
the device, and they share what they compile: a row's compile seconds depend on those before it. A model may carry
overrides after a colon. Text: windows of the built-in corpus, over the ends of documents.

train: the compiled step on batches that lie on the device, the median of ``--steps`` after some to warm up. Peak memory
is that from the second step on, the recording of the CUDA graph included: that is when a graph's memory is allocated.
decode: a state is fed tokens up to a position, and then goes on token by token by ``generation.make_decode_step``:
``us_per_token`` is a step as ``generate`` calls it, one compiled graph launched from Python; ``us_per_token_replayed``
the same step recorded as a CUDA graph, which ``generate`` does not do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from titanfunc.bench.common import configuration, header
from titanfunc.compile_report.process import in_process
from titanfunc.report.style import COLOURS, INK, doubling_axis, new_figure, style

FAST = "kernels=triton,remat=layer,layer_code=shared"
MODELS = (f"mac_24gb:layers=5,{FAST}", f"mag_24gb:layers=5,{FAST}", f"lmm_24gb:layers=7,{FAST}")
"""24.8M, 24.2M and 26.4M parameters; the kept activations of 4 x 65536 tokens alone would take most of a device."""
WORKER = Path(__file__).resolve().with_name("length_rows.py")


def run(args: argparse.Namespace, jobs: list[dict[str, Any]], unpack: Callable[..., list[dict[str, Any]]]) -> dict:
    """Every job in a process of its own; the result, written after each."""
    result = header(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def measure(i: int) -> dict[str, Any]:
            caches = Path(folder) / str(i)
            caches.mkdir()
            job = {**jobs[i], "lock": str(Path(folder) / "device"), "device": args.device, "backend": args.backend}
            worker = (sys.executable, str(WORKER))
            shared = {name: str(Path(folder) / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
            job["steps"] = args.steps
            return in_process(job, args.time_limit, caches, worker, environment=shared)

        places = {pool.submit(measure, i): i for i in range(len(jobs))}
        for done in as_completed(places):
            i = places[done]
            found[i] = unpack(jobs[i], done.result())
            result["rows"] = [row for j in sorted(found) for row in found[j]]
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            for row in found[i]:
                print(json.dumps({key: value for key, value in row.items() if key != "profile"}), flush=True)
    return result


def train(args: argparse.Namespace) -> None:
    """Measures every model, batch and length, and says how the time of a token changes from end to end."""
    jobs = [
        {"kind": "train", "model": text, "batch": batch, "length": length, "profile": args.profile}
        for text in args.models
        for batch in args.batches
        for length in args.lengths
    ]

    def unpack(job: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"model": job["model"], "batch": job["batch"], "length": job["length"], **found}]

    result = run(args, jobs, unpack)
    for (text, batch), ratio in ratios(result["rows"]).items():
        print(f"{text} batch {batch}: ns a token at the longest / at the shortest = {ratio:.3f}")


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


def decode(args: argparse.Namespace) -> None:
    """Measures every model at every position."""

    def unpack(job: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
        rows = found.pop("positions", [{}])
        return [{"model": job["model"], **found, **row} for row in rows]

    run(args, [{"kind": "decode", "model": text, "until": args.until} for text in args.models], unpack)


def draw(args: argparse.Namespace) -> None:
    """One picture of the rows of some results."""
    rows = [row for path in args.files for row in json.loads(path.read_text())["rows"]]
    texts = list(dict.fromkeys(row["model"] for row in rows))
    if len(texts) > len(COLOURS):
        raise SystemExit(f"draw: wanted at most {len(COLOURS)} models, got {len(texts)}")
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
            for what, line, label in (("us_per_token", "-", ""), ("us_per_token_replayed", "--", ", CUDA graph")):
                curve = [(row["position"], row[what]) for row in rows if row["model"] == text and row.get(what)]
                if curve:
                    points = zip(*sorted(curve), strict=True)
                    panel.plot(*points, line, marker="o", markersize=4, color=colours[text], label=short(text) + label)
        panel.set_ylim(bottom=0)
        doubling_axis(panel, at)
        panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(args.out)


def short(text: str) -> str:
    """A model's family, in capitals."""
    return text.partition("_")[0].upper()


def main() -> None:
    """Reads the arguments and does what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for do in (train, decode):
        part = parts.add_parser(do.__name__, help=do.__doc__)
        part.set_defaults(do=do)
        part.add_argument("--models", nargs="+", default=list(MODELS))
        part.add_argument("--jobs", type=int, default=6, help="processes at once")
        part.add_argument("--time-limit", type=float, default=3600.0, help="seconds of a process, its waits included")
        part.add_argument("--backend", default="inductor")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--commit", default="", help="written into the result where there is no git history")
        part.add_argument("--out", type=Path, required=True)
        part.add_argument("--steps", type=int, default=10 if do is train else 200, help="that are timed")
        if do is train:
            part.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536])
            part.add_argument("--batches", nargs="+", type=int, default=[4, 1])
            part.add_argument("--profile", action="store_true", help="where a step's time goes, by kind (CUDA)")
        else:
            part.add_argument("--until", type=int, default=65536, help="the last position")
    part = parts.add_parser("draw", help=draw.__doc__)
    part.set_defaults(do=draw)
    part.add_argument("files", nargs="+", type=Path)
    part.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for text in getattr(args, "models", ()):  # refuse a mistake before any work
        configuration(text)
    args.do(args)


if __name__ == "__main__":
    main()
