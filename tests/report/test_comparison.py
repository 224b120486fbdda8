import math

import pytest

from titanfunc.report import comparison
from titanfunc.report.comparison import as_markdown, band, plot_comparison, summarize
from titanfunc.report.style import COLOURS


def run(name, seed, last=2.0, lr=1e-3, **more):
    curve = [{"step": step, "loss": last + 4 * math.exp(-step), "bits_per_byte": 3.0} for step in (0, 1, 2)]
    curve[-1]["loss"] = last
    row = {"optimizer": name, "seed": seed, "lr": lr, "loss": last, "bits_per_byte": 3.0, "diverged": False}
    return {**row, "skipped": 0, "seconds_per_step": 0.5, "peak_memory_gib": None, "curve": curve, **more}


def test_a_summary():
    rows = [run("A", 0, 2.0), run("A", 1, 2.4, seconds_per_step=0.7, skipped=1), run("A", 2, 2.2, peak_memory_gib=3.0)]
    tuning = [run("A", 9, 2.5, lr=lr) for lr in (2e-3, 1e-3, 5e-4)]
    summary = summarize("A", rows, tuning)
    wanted = {"optimizer": "A", "lr": 1e-3, "lrs": [5e-4, 1e-3, 2e-3], "at_edge": False, "seeds": 3, "skipped": 1}
    assert {name: summary[name] for name in wanted} == wanted
    assert summary["loss_mean"] == pytest.approx(2.2) and summary["loss_sd"] == pytest.approx(0.2)
    assert (summary["loss_min"], summary["loss_max"], summary["bits_per_byte_sd"]) == (2.0, 2.4, 0.0)
    assert (summary["seconds_per_step"], summary["peak_memory_gib"]) == (0.5, 3.0)
    assert summarize("A", rows, tuning[:2])["at_edge"] and not summarize("A", rows)["at_edge"]
    with pytest.raises(ValueError, match="rows: wanted at least one run of A, got none"):
        summarize("A", [])


def test_a_run_that_diverged_counts_in_no_mean_and_is_told():
    summary = summarize("A", [run("A", 0, 2.0), run("A", 1, 9.0, diverged=True, loss=None)])
    assert (summary["loss_mean"], summary["loss_sd"], summary["diverged"]) == (2.0, None, 1)
    assert "| 2 (1 diverged) | 2.0000 |" in as_markdown([summary])
    none = summarize("A", [run("A", 0, diverged=True, loss=None)])
    assert none["loss_mean"] is None and "| 1 (1 diverged) | - |" in as_markdown([none])


def test_a_band_over_seeds():
    rows = [run("A", 0, 2.0), run("A", 1, 3.0), run("A", 2, 4.0)]
    rows[2]["curve"][1]["loss"] = None
    rows[2]["curve"].pop()
    steps, mean, least, most = band(rows, "loss")
    assert steps == [0, 1, 2] and mean[2] == 2.5 and (least[2], most[2]) == (2.0, 3.0)
    assert mean[1] == pytest.approx(2.5 + 4 / math.e) and mean[0] == pytest.approx(7.0)
    rows[0]["curve"][0]["loss"] = rows[1]["curve"][0]["loss"] = rows[2]["curve"][0]["loss"] = None
    assert math.isnan(band(rows, "loss")[1][0])


def test_a_picture_has_a_line_and_a_band_an_optimizer(tmp_path, monkeypatch):
    drawn = []
    new_figure = comparison.new_figure
    monkeypatch.setattr(comparison, "new_figure", lambda *args: drawn.append(new_figure(*args)) or drawn[-1])
    rows = [run(name, seed, 2.0 + seed) for name in ("A", "B") for seed in (0, 1)] + [run("C", 0)]
    for row in rows:
        del row["bits_per_byte"]
        for point in row["curve"]:
            del point["bits_per_byte"]
    picture = plot_comparison(rows, tmp_path / "curves.png", "title")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["A (mean of 2 seeds)", "B (mean of 2 seeds)", "C"]
    assert [line.get_color() for line in axes.lines] == list(COLOURS[:3]) and len(axes.collections) == 3
    assert axes.get_title(loc="left") == "Validation loss, nats a token"
    top = max(point["loss"] for row in rows for point in row["curve"] if point["step"])
    assert top < axes.get_ylim()[1] < 6.5  # the first point, of 7, does not stretch it
    with pytest.raises(ValueError, match="rows: wanted runs with a validation curve, got none"):
        plot_comparison([], tmp_path / "none.png")
