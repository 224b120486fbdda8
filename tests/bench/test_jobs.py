"""Processes of rows: they compile together, one alone is timed, and what goes wrong with one costs its row."""

import sys
import time

import pytest

from titanfunc.bench import jobs

WORKER = """
import json, sys, time
from pathlib import Path
from titanfunc.bench.turns import Turns
job = json.loads(Path(sys.argv[1]).read_text())
turns = Turns(Path(job["lock"]), Path(job["told"]))
with turns.among_others("compiling"):
    begun = time.time()
    time.sleep(job["seconds"])
    if job["wrong"]:
        raise ValueError(job["wrong"])
    compiled = [begun, time.time()]
with turns.alone("timing"):
    begun = time.time()
    time.sleep(job["alone"])
    Path(job["result"]).write_text(json.dumps({"compiled": compiled, "alone": [begun, time.time()]}))
"""


def job(seconds=0.3, alone=0.2, wrong=""):
    return {"seconds": seconds, "alone": alone, "wrong": wrong}


def run_all(todo, at_once, limit=60.0, found=None):
    rows = {}
    jobs.run_all(todo, (sys.executable, "-c", WORKER), at_once, limit, found or rows.__setitem__)
    return rows


def overlap(left, right):
    return min(left[1], right[1]) - max(left[0], right[0])


def test_rows_compile_together_and_are_timed_alone(capsys):
    rows = run_all({"a": job(2), "b": job(2), "c": job(0.1), "wrong": job(wrong="no\nway")}, at_once=2)
    assert rows["wrong"]["status"] == "failed" and rows["wrong"]["error"] == "ValueError: no"
    right = [rows[name] for name in "abc"]
    assert overlap(rows["a"]["compiled"], rows["b"]["compiled"]) > 0
    for row in right:
        for other in right:
            assert overlap(row["alone"], other["compiled"]) < 0
            assert row is other or overlap(row["alone"], other["alone"]) < 0
    told = capsys.readouterr().err
    assert told.count("compiles (") == 4 and told.count("is timed (") == 3 and "wrong: failed: ValueError: no" in told


def test_waiting_for_others_is_not_a_row_s_own_time():
    rows = run_all({"first": job(0.1, alone=2.0), "second": job(0.1, alone=2.0)}, at_once=2, limit=3.5)
    assert [row["status"] for row in rows.values()] == ["measured"] * 2
    assert max(row["process_seconds"] for row in rows.values()) > 3.5
    rows = run_all({"slow": job(60), "quick": job()}, at_once=1, limit=2.0)
    assert rows["slow"]["error"] == "stopped after 2 s (time_limit)" and rows["quick"]["status"] == "measured"


def test_caches_are_kept_where_they_are_wanted(tmp_path):
    code = (
        "import json, os, sys; job = json.load(open(sys.argv[1])); "
        "json.dump({'places': [os.environ['TORCHINDUCTOR_CACHE_DIR'], os.environ['TRITON_CACHE_DIR']]}, "
        "open(job['result'], 'w'))"
    )
    for caches in (tmp_path / "kept", None):
        rows = {}
        jobs.run_all({"a": {}, "b": {}}, (sys.executable, "-c", code), 1, 60.0, rows.__setitem__, caches)
        places = [row["places"] for row in rows.values()]
        assert (places[0] == places[1]) == (caches is not None)
        if caches:
            assert places[0] == [str(caches / "inductor"), str(caches / "triton")]


def test_an_interruption_ends_the_processes():
    def interrupted(name, row):
        raise KeyboardInterrupt

    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_all({"wrong": job(0.5, wrong="no"), "endless": job(0.1, alone=100)}, at_once=2, found=interrupted)
    assert time.perf_counter() - begun < 30
