"""The sweep of kernel constants: candidates are right, constants come back, mistakes are named. No times."""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from titanfunc_kernels import attention, memory_small_common, memory_wide, memory_wide_backward, norm, single_write

from tests.kernels import checks

# A device compiles every candidate for a while, and sweeps them in earnest elsewhere.
SWEPT = ["norm"] if checks.GPU else ["memory_small", "memory_wide", "single_write", "norm", "attention"]


@pytest.fixture
def tune(monkeypatch):
    """benchmarks/tune_kernels.py, whose neighbours are found beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("tune_kernels")
    module.calls_of.cache_clear()
    return module


@pytest.fixture
def rows_of(tune, monkeypatch):
    """The rows of a sweep over one case."""

    def run(kernel, case):
        monkeypatch.setattr(tune, "cases_of", lambda _: [case])
        return list(tune.sweep(kernel, arguments()))

    return run


def arguments(**options):
    whole = {"device": checks.DEVICE.type, "seconds": 300.0, "compile": 0.7, "rounds": 3, "tolerance": 0.03}
    return argparse.Namespace(**whole, shapes=options.get("shapes", ""))


def constants():
    wide = (
        memory_wide.HIDDEN,
        memory_wide.UPDATE,
        memory_wide.ROWS,
        memory_wide.update_stages,
        memory_wide.token_block,
    )
    return (
        [copy.deepcopy(x) if isinstance(x, dict) else x for x in
         (*wide, memory_wide.token_block.__defaults__, memory_wide_backward.update_stages, norm.BACKWARD_TILE,
          memory_small_common.blocks_of, single_write.BLOCKS, single_write.single_write.__kwdefaults__,
          attention.FORWARD)]
    )  # fmt: skip


def tiny(kernel):
    """A tiny case, with its candidates."""
    module = importlib.import_module(f"tuning.{kernel}")
    small = {
        "memory_small": lambda: module.case(1, 2, 16, 16, 32, [module.cut(1, 16, 4)]),
        "memory_wide": lambda: module.case(
            1, 1, 20, 16, 24, [{"memory_wide.UPDATE.bfloat16": {"BM": 32}, "memory_wide.ROWS": 16,
                                "memory_wide.token_block.most": 16, "memory_wide.update_stages": 3}],
        ),
        "single_write": lambda: module.case(20, 24, 40, module.CASES[0].candidates[:1]),
        "norm": lambda: module.case(10, 24, module.CASES[0].candidates[3:5]),
        "attention": lambda: module.case(1, 1, 40, 0, 20, 16, 3, [{"attention.FORWARD.(16, 16)": {"queries": 16}}]),
    }  # fmt: skip
    return small[kernel]()


@pytest.mark.parametrize("kernel", SWEPT)
def test_a_sweep_checks_every_candidate_and_restores_the_constants(tune, rows_of, kernel):
    before = constants()
    case = tiny(kernel)
    rows = rows_of(kernel, case)
    assert [row["settings"] for row in rows] == tune.settings_of(case)
    assert all(row.get("right") for row in rows), rows
    assert all(("forward_us" in row) == checks.GPU for row in rows)
    assert constants() == before


def test_a_wrong_candidate_is_found(rows_of):
    rows = rows_of("norm", tiny("norm")._replace(candidates=[{"norm._tile": (2, 16, 1)}]))
    assert [row["right"] for row in rows] == [True, False]  # 16 of 24 features


def test_an_unknown_constant_is_an_error_of_its_row_alone(rows_of):
    unknown = [{"norm.NOWHERE": 1}, {"norm._tile.size": 1}, {"norm.BACKWARD_TILE.x": 1}, {"norm.BACKWARD_TILE": 2048}]
    before = constants()
    rows = rows_of("norm", tiny("norm")._replace(candidates=unknown))
    assert ["error" in row for row in rows] == [False, True, True, True, False]
    assert constants() == before


def test_shapes_are_chosen_and_time_runs_out(tune, monkeypatch):
    monkeypatch.setattr(tune, "cases_of", lambda _: [tiny("norm")])
    assert list(tune.sweep("norm", arguments(shapes="N 99"))) == []
    spent = arguments()
    spent.seconds = 0.0
    assert all("skipped" in row for row in tune.sweep("norm", spent))


def test_a_worker_tells_what_went_wrong(tune, monkeypatch):
    monkeypatch.setattr(tune, "cases_of", lambda _: [tiny("norm")])
    compile_candidate = partial(tune.compile_candidate, "norm", 0, device=checks.DEVICE.type)
    assert compile_candidate({"norm.BACKWARD_TILE": 2048}, until=math.inf) == ""
    assert compile_candidate({"norm.NOWHERE": 1}, until=math.inf).startswith("AttributeError")
    assert compile_candidate({}, until=0.0) is None


def test_workers_compile_in_processes_of_their_own(tune):
    case = tiny("norm")  # which no worker finds under that name
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = tune.compiled(pool, "nowhere", {0: case}, checks.DEVICE.type, 100.0)
    assert {job: text.split(":")[0] for job, text in found.items()} == {
        (0, place): "ModuleNotFoundError" for place in range(len(tune.settings_of(case)))
    }


def test_forward_and_backward_are_timed_apart(tune, monkeypatch):
    """With a clock that runs what it times and tells how often each raw launch has run."""
    ran = []
    calls = tiny("norm").make(checks.DEVICE)
    counted = calls._replace(
        forward=lambda: (ran.append("forward"), calls.forward())[1],
        backward=lambda made: (ran.append("backward"), calls.backward(made))[1],
    )

    def clock(run, rounds):
        ran.clear()
        run()
        return {"forward": 1.0, "backward": 2.0}["".join(ran)], 0.0

    monkeypatch.setattr(tune, "microseconds", clock)
    options = arguments()
    options.device = "cuda"
    _, row = tune.measure(counted, {"norm.BACKWARD_TILE": 2048}, None, options)
    assert (row["right"], row["forward_us"], row["backward_us"]) == (True, 1.0, 2.0)


def test_a_setting_reaches_every_module_that_imported_the_constant(tune):
    from tuning.settings import changed

    settings = {
        "memory_wide.OUTPUT": {"BN": 64},
        "memory_wide.update_stages": 7,
        "memory_wide.token_block.most": 16,
        "memory_wide.UPDATE.bfloat16": {"maxnreg": 128},
        "single_write.single_write.together": False,
        "single_write.BLOCKS.bfloat16": {"columns": 32},
    }
    kept = memory_wide.OUTPUT["BK"], memory_wide.UPDATE[torch.bfloat16]["BM"]
    with changed(settings):
        assert memory_wide_backward.OUTPUT["BN"] == 64
        assert memory_wide_backward.update_stages(1) == 7
        assert memory_wide_backward.token_block(64) == 16
        assert memory_wide_backward.UPDATE[torch.bfloat16]["maxnreg"] == 128
        assert (memory_wide.OUTPUT["BK"], memory_wide.UPDATE[torch.bfloat16]["BM"]) == kept
        assert single_write.BLOCKS[torch.bfloat16].columns == 32
        assert single_write.single_write.__kwdefaults__["together"] is False
    assert "maxnreg" not in memory_wide.UPDATE[torch.bfloat16]


def test_every_candidate_names_constants_there_are(tune):
    from tuning.settings import changed

    for kernel in tune.KERNELS:
        for case in tune.cases_of(kernel):
            for settings in tune.settings_of(case):
                with changed(settings):
                    pass


def test_the_fastest_right_settings_of_each_pass(tune):
    rows = [
        {"kernel": "k", "shape": "s", "settings": {}, "right": True, "forward_us": 4.0, "backward_us": 3.0},
        {"kernel": "k", "shape": "s", "settings": {"a": 1}, "right": True, "forward_us": 2.0, "backward_us": 5.0},
        {"kernel": "k", "shape": "s", "settings": {"a": 2}, "right": False},
    ]
    forward, backward = tune.best(rows)
    assert (forward["best_us"], forward["as_it_is_us"], forward["settings"]) == (2.0, 4.0, {"a": 1})
    assert (backward["best_us"], backward["settings"]) == (3.0, {})
