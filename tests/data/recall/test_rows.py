"""Batches of every task: a pure function of (seed, step), of the right shapes."""

import pytest
import torch

from tests.data.recall.problems import make, text
from titanfunc.config.data import DataConfig
from titanfunc.config.recall import LEVELS, TASKS, TESTS, RecallConfig, least_length, least_test_length
from titanfunc.data.recall import Stream, make_task


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in ("tokens", "weights"))


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_a_pure_function_of_seed_and_step(task):
    one, two, other = make(task, seed=3), make(task, seed=3), make(task, seed=4)
    forward = [one.batch(step) for step in range(5)]
    backward = [two.batch(step) for step in reversed(range(5))][::-1]
    assert all(same(*pair) for pair in zip(forward, backward, strict=True))
    assert not any(same(forward[0], batch) for batch in (*forward[1:], other.batch(0)))
    assert forward[0]["tokens"].shape == (4, 701) and forward[0]["tokens"].dtype == torch.int64
    assert forward[0]["weights"].shape == (4, 700) and forward[0]["weights"].dtype == torch.float32
    assert forward[0]["tokens"].min() >= 0 and forward[0]["tokens"].max() < 256


@pytest.mark.parametrize("task", TASKS)
def test_rows_do_not_depend_on_the_batch_size(task):
    whole, halves = make(task, batch_size=4), make(task, batch_size=2)
    joined = torch.cat([halves.batch(step)["tokens"] for step in (2, 3)])
    assert torch.equal(whole.batch(1)["tokens"], joined)


@pytest.mark.parametrize("task", TASKS)
def test_streams_differ(task):
    config = DataConfig(seq_len=700, batch_size=2)
    streams = [make_task(task, config, text(), stream).batch(0)["tokens"] for stream in Stream]
    assert not any(torch.equal(streams[i], streams[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("test", TESTS)
def test_examples_are_of_one_length_always_the_same_and_however_many(test):
    task = make(test)
    level = 5 if LEVELS[TESTS[test]] == "pairs" else 0.5
    tokens, weights = task.examples(450, level, 3, seed=1)
    assert tokens.shape == (3, 451) and weights.shape == (3, 450)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    more, _ = task.examples(450, level, 5, seed=1)
    assert torch.equal(more[:3], tokens)
    other, _ = task.examples(450, level, 3, seed=2)
    assert not torch.equal(other, tokens)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_answer_has_the_texts_weight(task):
    plain, weighted = (make(task, text_weight=weight).batch(0)["weights"] for weight in (0.0, 0.25))
    assert set(plain.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weighted, torch.where(plain == 1, 1.0, 0.25))


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_the_least_length_hold_everything_that_may_be_drawn(task):
    least = least_length(task, RecallConfig())
    task = make(task, seq_len=least, batch_size=50)
    assert task.batch(0)["tokens"].shape == (50, least + 1)


@pytest.mark.parametrize("test", TESTS)
def test_test_rows_of_the_least_length(test):
    least = least_test_length(test, RecallConfig(), pairs=9)
    tokens, _ = make(test).examples(least, 9 if test == "mqar" else 1.0, 30)
    assert tokens.shape == (30, least + 1)


def test_a_task_for_tests_alone_need_not_fit_the_training_length():
    config = DataConfig(seq_len=10)
    assert make_task("mqar", config, stream=Stream.TEST).examples(99, 20, 1)[0].shape == (1, 100)
    with pytest.raises(ValueError, match=r"^data.seq_len: wanted at least 127"):
        make_task("mqar", config, stream=Stream.VALIDATION)


def test_refusals():
    config = DataConfig(seq_len=100)
    with pytest.raises(ValueError, match=r"^data.seq_len: wanted at least 540, for data.task=needle"):
        make_task("needle", config, text())
    with pytest.raises(ValueError, match=r"^text: wanted the documents that the task qa1 is put into, got None"):
        make_task("qa1", config)
    with pytest.raises(ValueError, match=r"^task: wanted one of mqar, .*, got 'sorting'"):
        make_task("sorting", config)
    with pytest.raises(ValueError, match=r"^step: wanted a whole number of at least 0, got -1"):
        make_task("copying", config).batch(-1)
