import json
import math
import sys

import pytest

from titanfunc.report import curves, plot_curves


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_rows(steps=100, memory=True):
    rows = [{"step": 0, "validation_bits_per_byte": 8.0, "validation_loss": 5.5}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 2 + 3 * math.exp(-step / 30),
            "bits_per_byte": 3 + 5 * math.exp(-step / 30),
            "grad_norm": 1 + 1 / step,
            "lr": 1e-3 * min(1, step / 20),
            "tokens_per_second": 9000 + 500 * math.sin(step),
        }
        if memory:
            row |= {
                "memory/inner_loss": 1 / step,
                "memory/forget": 0.01,
                "memory/momentum_decay": 0.9,
                "memory/inner_lr": 0.1,
            }
        rows.append(row)
    return [*rows, {"step": steps, "validation_bits_per_byte": 3.2}]


LEARNING = [panel for panel in curves.PANELS if panel.quiet or panel.series[0][0].startswith("nested/")]


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def drawn_titles(monkeypatch):
    titles = []
    draw = curves._draw
    monkeypatch.setattr(
        curves, "_draw", lambda axes, panel, *rest: (titles.append(panel.title), draw(axes, panel, *rest))
    )
    return titles


def test_a_run_with_a_memory_has_all_panels(tmp_path, monkeypatch):
    titles = drawn_titles(monkeypatch)
    picture = plot_curves(write(tmp_path / "metrics.jsonl", run_rows()), tmp_path / "curves.png", "mac_tiny")
    assert titles == [panel.title for panel in curves.PANELS if panel not in LEARNING]
    width, height = png_size(picture)
    assert width > height > 500


def test_a_learning_optimizer_and_skipped_steps_have_panels(tmp_path, monkeypatch):
    titles = drawn_titles(monkeypatch)
    learned = {"nested/multiplier_attention": 1.2, "nested/meta_loss": -0.1, "nested/momentum_norm": 0.3, "skipped": 1}
    rows = [{**row, **learned} for row in run_rows()]
    plot_curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png", "mac_tiny")
    assert titles == [panel.title for panel in curves.PANELS]


def test_a_plain_run_has_only_its_own(tmp_path, monkeypatch):
    titles = drawn_titles(monkeypatch)
    plot_curves(write(tmp_path / "metrics.jsonl", run_rows(memory=False)), tmp_path / "curves.png")
    assert titles == ["Bits per byte", "Gradient norm, before clipping", "Learning rate", "Tokens per second"]


@pytest.mark.parametrize(
    ("forget", "scale", "limits"),
    [(0.01, "log", (0.01, 1.0)), (0.002, "log", (0.001, 1.0)), (None, "log", (0.1, 1.0)), (0.0, "linear", None)],
)
def test_gates_of_any_size_can_be_read(forget, scale, limits, tmp_path, monkeypatch):
    found = []
    draw = curves._draw
    monkeypatch.setattr(
        curves, "_draw", lambda axes, panel, *rest: (draw(axes, panel, *rest), found.append((panel.title, axes)))
    )
    rows = [{**row, "memory/forget": forget} for row in run_rows()]
    plot_curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    axes = dict(found)["Memory: mean gates"]
    assert axes.get_yscale() == scale
    assert axes.get_ylim() == pytest.approx(limits) if limits else axes.get_ylim()[0] == 0
    assert dict(found)["Learning rate"].get_yscale() == "linear"


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    rows = [{"step": 1, "bits_per_byte": 8.0}, {"step": 2, "bits_per_byte": None}, {"step": 3, "bits_per_byte": 7.0}]
    points = curves._points(rows, "bits_per_byte")
    assert points[0] == (1, 8.0)
    assert math.isnan(points[1][1])
    plot_curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")


def test_one_row_is_enough(tmp_path):
    plot_curves(write(tmp_path / "metrics.jsonl", [{"step": 1, "bits_per_byte": 8.0}]), tmp_path / "curves.png")
    assert png_size(tmp_path / "curves.png")[0] > 0


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(ValueError, match="metrics: wanted rows with bits_per_byte"):
        plot_curves(write(tmp_path / "metrics.jsonl", [{"step": 1, "other": 1.0}]), tmp_path / "curves.png")


def test_no_global_plotting_state():
    assert "matplotlib.pyplot" not in sys.modules


def test_a_recall_run_has_accuracy_and_no_bits(tmp_path, monkeypatch):
    titles = drawn_titles(monkeypatch)
    rows = [{"step": 0, "validation_loss": 5.5, "validation_accuracy": 0.0}]
    rows += [{"step": step, "loss": 5 / step, "accuracy": 1 - 1 / step, "grad_norm": 1.0} for step in range(1, 40)]
    picture = plot_curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png", "mac_tiny")
    assert titles == ["Loss of the answers, nats a token", "Accuracy of the answers' tokens", curves.PANELS[1].title]
    assert png_size(picture)[0] > 1000
