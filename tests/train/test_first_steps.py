"""What is remembered of first steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from titanfunc.ops import compile_ahead
from titanfunc.train import first_steps
from titanfunc.train.first_steps import FirstSteps, Kernels

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


@pytest.fixture
def knobs():
    """Triton's, for compilation."""
    found = pytest.importorskip("triton").knobs.compilation
    before = found.listener
    yield found
    found.listener = before


def heard(knobs, name, seconds, cache_hit=False):
    """As triton.compiler.compile calls it."""
    times = SimpleNamespace(total=1e6 * seconds)
    knobs.listener(
        src=SimpleNamespace(name=name), metadata={}, metadata_group={}, times=times, cache_hit=cache_hit
    )  # fmt: skip


def test_it_says_what_triton_compiled_here_and_how_long_others_were_waited_for(monkeypatch, knobs):
    said, others = [], []
    knobs.listener = lambda **given: others.append(given["src"].name)
    before = knobs.listener
    assert FirstSteps({}, CPU) and knobs.listener is before
    first = FirstSteps({}, torch.device("meta"), said.append)
    first._kernels.listen()  # as on a GPU
    monkeypatch.setattr(first_steps, "counters", {"inductor": Counter(fxgraph_cache_hit=1), "aot_autograd": Counter()})
    monkeypatch.setattr(compile_ahead, "_waits", [1.5, 0.25])
    first._waited = (0, 0.0)
    for i in range(5):
        heard(knobs, f"kernel_{i}", i)
    heard(knobs, "old", 0.1, cache_hit=True)
    first.write(1, {"compile_seconds": 12.34})
    assert knobs.listener is before and others == [f"kernel_{i}" for i in range(5)] + ["old"]
    assert said == [
        "compiled in 12 s; of the programs, inductor's cache held 1 of 1; of Triton's kernels, 5 compiled here in "
        "10.0 s (kernel_4 4.0 s, kernel_3 3.0 s, kernel_2 2.0 s, ...), 1 in its cache; waited 1.8 s for 2 processes"
    ]


def test_another_listener_is_not_cut_off(knobs):
    knobs.listener = None
    kernels = Kernels()
    kernels.listen()
    knobs.listener = later = lambda **given: None
    kernels.stop()
    assert knobs.listener is later
    knobs.listener = kernels.take
    FirstSteps({}, CPU).close()
    assert knobs.listener == kernels.take
    kernels.stop()
    assert knobs.listener is None


def test_listeners_that_stop_out_of_order_count_nothing_more(knobs):
    knobs.listener = None
    first, second = Kernels(), Kernels()
    first.listen()
    second.listen()
    first.stop()
    heard(knobs, "kernel", 1)
    assert not first.compiled and second.compiled == [("kernel", 1)]
    second.stop()
    heard(knobs, "kernel", 1)
    assert not first.compiled and len(second.compiled) == 1


def test_it_listens_from_its_beginning_to_its_end(knobs):
    before = knobs.listener
    first = FirstSteps({}, CPU)
    first.begin()
    assert knobs.listener is before
    first._listens = True  # as on a GPU
    first.begin()
    assert knobs.listener == first._kernels.take
    first.close()
    assert knobs.listener is before


def test_triton_calls_it_for_what_it_compiles_and_for_what_it_holds(tmp_path):
    """For another machine's GPU, with Triton's own compiler, in a process that does not interpret its kernels."""
    pytest.importorskip("triton")
    (tmp_path / "kernels.py").write_text(
        "import json, triton\n"
        "import triton.language as tl\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from titanfunc.train.first_steps import Kernels\n"
        "@triton.jit\n"
        "def twice(x):\n"
        "    tl.store(x, 2 * tl.load(x))\n"
        "kernels = Kernels()\n"
        "kernels.listen()\n"
        "for i in range(2):\n"
        "    triton.compile(ASTSource(twice, {'x': '*fp32'}), target=GPUTarget('cuda', 90, 32))\n"
        "kernels.stop()\n"
        "print(json.dumps([kernels.compiled, kernels.held]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ((name, seconds),), held = json.loads(done.stdout)
    assert name == "twice" and seconds > 0 and held == 1


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
