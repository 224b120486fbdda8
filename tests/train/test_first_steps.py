"""What is remembered of first steps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from titanfunc.train import first_steps
from titanfunc.train.first_steps import FirstSteps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TITANFUNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_next_run_like_it_knows_how_long_it_took():
    first = FirstSteps({"model": "a"}, CPU)
    assert first.last() is None
    first.write(1, {"loss": 2.0})
    assert first.last() is None
    first.write(1, {"compile_seconds": 12.34})
    assert FirstSteps({"model": "a"}, CPU).last() == 12.3
    assert FirstSteps({"model": "b"}, CPU).last() is None
    first.write(1, {"compile_seconds": 5})
    assert FirstSteps({"model": "a"}, CPU).last() == 5


def test_it_says_what_was_compiled_and_what_was_found(monkeypatch):
    said = []
    first = FirstSteps({}, CPU, said.append)
    monkeypatch.setattr(first_steps, "counters", {"inductor": Counter(), "aot_autograd": Counter()})
    first.write(1, {"compile_seconds": 3})
    assert said == []
    first_steps.counters["inductor"].update(fxgraph_cache_hit=3, fxgraph_cache_miss=2)
    first.write(1, {"compile_seconds": 12.34})
    first.write(2, {"loss": 1.0})
    assert said == ["compiled in 12 s; of the programs, inductor's cache held 3 of 5"]
    first_steps.counters["aot_autograd"].update(autograd_cache_hit=1, autograd_cache_miss=1, autograd_cache_bypass=2)
    first.write(3, {"compile_seconds": 2})
    assert said[1:] == ["compiled in 2 s; of the programs, inductor's cache held 3 of 5, AOTAutograd's 1 of 4"]


def test_only_the_newest_are_kept(monkeypatch):
    monkeypatch.setattr(first_steps, "KEPT", 2)
    for name in "abca":
        FirstSteps({"model": name}, CPU).write(1, {"compile_seconds": 1})
    assert [FirstSteps({"model": name}, CPU).last() for name in "abc"] == [1, None, 1]


@pytest.mark.parametrize("text", ["", "[1]", '{"half'])
def test_a_file_that_cannot_be_read_is_done_without(cache, text):
    cache.mkdir()
    (cache / "first_steps.json").write_text(text)
    first = FirstSteps({}, CPU)
    assert first.last() is None
    first.write(1, {"compile_seconds": 3})
    assert first.last() == 3


def test_a_folder_that_cannot_be_written_is_done_without(cache):
    cache.write_text("a file")
    first = FirstSteps({}, CPU)
    first.write(1, {"compile_seconds": 3})
    assert first.last() is None
