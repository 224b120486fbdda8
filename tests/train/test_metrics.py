import json
import math
import os

import pytest
import torch

from titanfunc.config import ModelConfig
from titanfunc.train import checkpoint
from titanfunc.train.metrics import Accumulator, MetricsFile, bits_per_byte, read_rows


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_bits_per_byte():
    assert bits_per_byte(math.log(256)) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)


def test_means_over_the_interval_and_newest_of_some():
    metrics = Accumulator()
    metrics.add(scalars(loss=1.0, lr=0.1, skipped=0, flag=False))
    metrics.add(scalars(loss=3.0, lr=0.2, skipped=2, flag=True))
    assert metrics.read() == {"loss": 2.0, "lr": pytest.approx(0.2), "skipped": 2.0, "flag": 0.5}
    assert metrics.read() == {}
    metrics.add(scalars(other=5.0))
    assert metrics.read() == {"other": 5.0}


def test_values_that_are_not_finite_are_left_out_of_the_mean():
    metrics = Accumulator()
    for loss, norm in ((1.0, math.nan), (math.nan, math.inf), (2.0, math.nan)):
        metrics.add(scalars(loss=loss, norm=norm))
    values = metrics.read()
    assert values["loss"] == 1.5
    assert math.isnan(values["norm"])


def test_sums_go_on_to_the_last_bit_wherever_an_interval_is_cut():
    source = torch.Generator().manual_seed(0)
    losses = (torch.randn(40, generator=source) * 10.0 ** torch.arange(40).remainder(9)).tolist()
    losses[20] = math.nan

    def steps(first, end):
        return [scalars(loss=losses[i], lr=i / 8, grad_norm=math.inf if i > 18 else 1.0) for i in range(first, end)]

    whole = Accumulator()
    for values in steps(0, 40):
        whole.add(values)
    expected = whole.read()
    assert not whole
    for cuts in ((1, 40), (21, 22, 33, 40), (19, 40)):
        sums, first = {}, 0
        for end in cuts:
            part = Accumulator(json.loads(json.dumps(sums, allow_nan=False)))
            for values in steps(first, end):
                part.add(values)
            so_far = part.read(end=end == 40)
            sums, first = part.sums, end
            assert bool(part) == (end < 40)
        assert so_far == expected and not sums


def test_steps_may_overwrite_their_outputs():
    loss = torch.tensor(1.0)
    metrics = Accumulator()
    metrics.add({"loss": loss})
    loss.fill_(3.0)
    metrics.add({"loss": loss})
    assert metrics.read() == {"loss": 2.0}


def test_names_must_stay():
    metrics = Accumulator()
    metrics.add(scalars(loss=1.0))
    with pytest.raises(ValueError, match="wanted the same names"):
        metrics.add(scalars(loss=1.0, lr=0.1))


def test_only_read_reads_the_device_and_once(device_reads):
    metrics = Accumulator()
    for _ in range(5):
        metrics.add({"loss": torch.zeros(()), "lr": torch.ones(())})
    assert device_reads.count == 0
    metrics.read()
    assert device_reads.count == 1


def test_rows_are_valid_json_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
    file.write(2, {"loss": 1.0})
    file.close()
    assert read_rows(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 1.0}


def test_resume_drops_later_rows_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    file = MetricsFile(path, resume_step=2)
    file.write(3, {"loss": 1.5})
    file.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_drops_the_row_of_an_interval_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "unfinished": true}\n{"step": 2, "lr": 1.0}\n')
    MetricsFile(path, resume_step=2).close()
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "lr": 1.0}]


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b"\xff{}\n", b'{"step": "2"}\n', b"\n[1]\nx\n"])
def test_resume_keeps_what_can_be_read(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n{"step": 3}\n' + b"\0" * 9)
    MetricsFile(path, resume_step=2).close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    told = capsys.readouterr().err
    more = " and 2 more" if damage.count(b"\n") == 3 else ""
    assert told == f"warning: {path}: line 2{more} cannot be read: left out\n"


def test_rows_are_on_the_disk_before_their_checkpoint_is_there(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"loss": 1.0})
    order, fsync, rename = [], os.fsync, os.rename
    of_rows = os.stat(tmp_path / "metrics.jsonl").st_ino

    def synced(handle):
        if os.fstat(handle).st_ino == of_rows:
            order.append("rows")
        fsync(handle)

    def renamed(old, new):
        order.append(os.path.basename(new))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, ModelConfig(layers=2))
    assert order == ["rows", "step_00000001"]


def test_a_new_file_appends_where_nothing_is_to_be_dropped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=5)
    file.write(6, {"loss": 1.0})
    file.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}'])
def test_damage_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="line 2: wanted a json object with a step"):
        read_rows(path)
