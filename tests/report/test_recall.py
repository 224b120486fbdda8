"""Pictures of an evaluation: what is drawn in them, and that they are pictures."""

import pytest
from matplotlib.figure import Figure

from titanfunc.evals import buckets
from titanfunc.report import plot_heat_map, plot_lengths, plot_positions
from titanfunc.report import recall as module

LENGTHS, DEPTHS = (1024, 2048, 4096), (0.0, 0.5, 1.0)


def rows(run="one", states=("on", "off"), level="depth", levels=DEPTHS):
    return [
        {"run": run, "memory": state, "task": "passkey", "length": length, level: each, "accuracy": 0.5 * (i + j) / 2}
        for state in states
        for i, length in enumerate(LENGTHS)
        for j, each in enumerate(levels)
        if state == "on" or i < 2
    ]


def position_rows(run="one", states=("on", "off"), kinds=("text", "mqar")):
    return [
        {"run": run, "memory": state, "of": kind, "trained": kind != "text", "length": 100, "first": first,
         "last": last, "loss": 3 / first}
        for state in states
        for kind in kinds
        for first, last in buckets(100)
    ]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    made = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (made.append(self), save(self, *a, **k))[1])
    return made


def png(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_heat_map_has_a_cell_a_length_and_depth_and_both_memory_states(tmp_path, figures):
    picture = plot_heat_map(rows(), tmp_path / "map.png", "passkey: one")
    on, off, bar = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (on, off)] == ["memory on", "memory off"]
    assert on.images[0].get_array().shape == (3, 3)  # depths downwards, lengths to the right
    assert on.images[0].get_array()[0].tolist() == [0.0, 0.25, 0.5]
    assert texts(on)[:3] == ["0%", "25%", "50%"] and len(texts(on)) == 9
    assert len(texts(off)) == 6  # what was not measured stays empty
    assert [label.get_text() for label in on.get_xticklabels()] == ["1,024", "2,048", "4,096"]
    assert [label.get_text() for label in on.get_yticklabels()] == ["0%", "50%", "100%"]
    assert bar.get_ylabel() == "answers right"
    assert png(picture)[0] > 600


def test_pairs_take_the_place_of_depths(tmp_path, figures):
    plot_heat_map(rows(states=("none",), level="pairs", levels=(4, 8)), tmp_path / "map.png")
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "no memory" and axes.get_ylabel() == "key-value pairs"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "8"]


def test_runs_are_compared_by_length(tmp_path, figures):
    both = rows("one") + rows("two", states=("none",), levels=(0.0,))
    png(plot_lengths(both, tmp_path / "lines.png", "passkey: 2 runs"))
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["one, memory on", "one, memory off", "two, no memory"]
    assert lines["one, memory on"].get_ydata().tolist() == [0.25, 0.5, 0.75]  # means over depths
    colours = [line.get_color() for line in lines.values()]
    assert colours[0] == colours[1] != colours[2]
    assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "-"]


def test_loss_by_position_has_a_panel_a_kind_and_one_legend(tmp_path, figures):
    png(plot_positions(position_rows(), tmp_path / "positions.png"))
    text, pairs = figures[0].axes
    assert text.get_title(loc="left") == "Held-out text (not trained on), 100 tokens a row"
    assert pairs.get_title(loc="left") == "Answers of mqar, 100 tokens a row"
    assert [len(axes.lines) for axes in (text, pairs)] == [2, 2]
    assert [entry.get_text() for entry in figures[0].legends[0].texts] == ["memory on", "memory off"]


def test_what_cannot_be_drawn_is_told(tmp_path):
    for draw in (plot_heat_map, plot_lengths, plot_positions):
        with pytest.raises(ValueError, match="rows: wanted"):
            draw([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="rows: wanted some with a depth or pairs, got none"):
        plot_heat_map([{"run": "a", "memory": "on", "length": 3, "accuracy": 1.0}], tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_legible_on_every_shade():
    """A label's contrast with its cell, by WCAG's formula, is at least 3 (its threshold for large text)."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in (i / 20 for i in range(21)):
        cell = luminance(module.SHADES(value))
        label = luminance(module.label_colour(value))
        assert (max(cell, label) + 0.05) / (min(cell, label) + 0.05) >= 3, value
