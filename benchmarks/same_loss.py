"""Trains a model with each implementation of its operations on the same batches, and draws the losses of all seeds.

    python benchmarks/same_loss.py --model mac_24gb --seeds 0 1 2 --steps 300 --out DIRECTORY

A seed draws both the initial weights and the batches. DIRECTORY gets losses.json (the loss of every step, the one on
held-out text, and for each implementation the mean and spread of both over the seeds) and losses.png. ``--merge`` puts
files of several runs together (one an implementation, say) in place of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import titanfunc as tf
from titanfunc.bench.common import configuration, header
from titanfunc.report.style import COLOURS, new_figure, style

LAST = 20  # steps whose mean is a run's last loss


def train(text: str, args: argparse.Namespace, corpus: tf.data.Corpus) -> list[dict[str, Any]]:
    """A row for each seed of the model that ``text`` names: one compiled step serves all of them."""
    model = tf.models.build(configuration(text))
    tx = tf.optim.from_config(tf.optim.OptimConfig(lr=args.lr, warmup_steps=args.steps // 10), args.steps)
    step = tf.train.compile_step(tf.train.make_train_step(model, tx), args.backend)
    test = tf.train.make_eval_step(model)
    held_out = tf.data.Windows(corpus.validation, args.seq, args.batch, seed=1234)
    rows = []
    for seed in args.seeds:
        state = tf.train.init_state(model, tx, seed=seed, device=args.device)
        windows = tf.data.Windows(corpus.train, args.seq, args.batch, seed=seed)
        losses = []
        for i in range(args.steps):
            state, metrics = step(state, {"tokens": windows.batch(i).to(args.device)})
            losses.append(metrics["loss"].item())
        with torch.no_grad():
            unseen = [
                test(state.params, {"tokens": held_out.batch(i).to(args.device)}).item() for i in range(args.held_out)
            ]
        rows.append({"model": text, "seed": seed, "held_out": statistics.mean(unseen), "losses": losses})
        print(text, "seed", seed, "last", round(statistics.mean(losses[-LAST:]), 4), "held out",
              round(rows[-1]["held_out"], 4), flush=True)  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model the mean over its seeds, and the greatest distance of a seed from it."""
    found = []
    for text in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == text]
        line: dict[str, Any] = {"model": text, "seeds": len(own)}
        for name, values in (
            ("last", [statistics.mean(row["losses"][-LAST:]) for row in own]),
            ("held_out", [row["held_out"] for row in own]),
        ):
            line[name] = round(statistics.mean(values), 4)
            line[f"{name}_spread"] = round(max(abs(value - line[name]) for value in values), 4)
        found.append(line)
    return found


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Losses of all runs, a colour an implementation."""
    figure = new_figure(10, 4)
    texts = list(dict.fromkeys(row["model"] for row in rows))
    steps = len(rows[0]["losses"])
    panels = figure.subplots(1, 2)
    for row in rows:
        place = texts.index(row["model"])
        label = row["model"] if row["seed"] == rows[0]["seed"] else None
        for panel in panels:
            panel.plot(row["losses"], color=COLOURS[place], linestyle=("-", "--")[place > 0], linewidth=1, label=label)
    last = [loss for row in rows for loss in row["losses"][2 * steps // 3 :]]
    style(panels[0], "All steps", "step", "training loss (nats a token)")
    style(panels[1], "The last third", "step")
    panels[1].set_xlim(2 * steps // 3, steps)
    panels[1].set_ylim(min(last), max(last))
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(picture)


def main() -> None:
    """Reads the arguments, trains or merges, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mac_24gb")
    parser.add_argument("--kernels", nargs="+", default=["reference", "triton"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=8, help="batches of held-out text")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--merge", nargs="+", type=Path, help="losses.json of earlier runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result = header(args)
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        result = parts[0] | {"command": [part["command"] for part in parts]}
        result["rows"] = [row for part in parts for row in part["rows"]]
    else:
        texts = [f"{args.model}{',' if ':' in args.model else ':'}kernels={kernels}" for kernels in args.kernels]
        for text in texts:  # refuse a mistake before any work
            configuration(text)
        corpus = tf.data.load(tf.config.DataConfig(seq_len=args.seq, batch_size=args.batch))
        for text in texts:
            result["rows"] += train(text, args, corpus)
    result["summary"] = summary(result["rows"])
    for row in result["rows"]:
        row["losses"] = [round(loss, 4) for loss in row["losses"]]
    (args.out / "losses.json").write_text(json.dumps(result) + "\n")
    draw(result["rows"], args.out / "losses.png")
    for line in result["summary"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
