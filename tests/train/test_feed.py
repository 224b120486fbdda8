"""Batches come in order, ahead of the step, and their errors where they belong."""

from __future__ import annotations

import threading

import pytest
import torch

from titanfunc.data.ahead import make_ahead
from titanfunc.train.feed import AHEAD, Feed, NoBatch

CPU = torch.device("cpu")


def batches(step):
    made = {"tokens": torch.arange(6).view(2, 3) + 100 * step}
    return {**made, "held_out": torch.full((1, 2, 3), step)} if step % 3 == 0 else made


def feeding():
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(got[name].cpu(), want[name]) for name in want)


@pytest.fixture(params=[False, True], ids=["", "thread"])
def threaded(request):
    return request.param


@pytest.mark.parametrize("workers", [0, 2])
def test_what_comes_is_what_was_asked_for(workers, threaded):
    with Feed(make_ahead(batches, 23, workers), 2, 23, CPU, threaded) as feed:
        assert all(same(feed.next(), batches(step)) for step in range(2, 23))
        with pytest.raises(ValueError, match="step: wanted one below 23, got 23"):
            feed.next()
    assert not feeding()


def test_a_tensor_is_the_tokens(threaded):
    with Feed(lambda step: torch.full((1, 2), step), 0, 2, CPU, threaded) as feed:
        assert same(feed.next(), {"tokens": torch.tensor([[0, 0]])})


def test_no_more_is_made_than_there_is_room_for():
    made, full = [], threading.Event()

    def remember(step):
        made.append(step)
        if len(made) > AHEAD:
            full.set()
        return batches(step)

    with Feed(remember, 0, 100, CPU, threaded=True) as feed:
        assert not made  # the thread begins with the first step
        feed.next()
        assert full.wait(10)
        feed.close()
        assert made == list(range(len(made)))
        assert AHEAD < len(made) <= AHEAD + 2  # the one taken, the one on its way to the device, and those that wait


def test_for_a_cpu_nothing_is_made_ahead():
    made = []

    def remember(step):
        made.append(step)
        return batches(step)

    with Feed(remember, 0, 100, CPU) as feed:
        for step in range(5):
            feed.next()
            assert made == list(range(step + 1))
        assert not feeding()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (FileNotFoundError(2, "No such file", "shard_7"), NoBatch, r"the batch of step 4: .*No such file: 'shard_7'"),
        (ValueError("data: two\nlines"), NoBatch, r"^the batch of step 4: data: two lines$"),
        (EOFError(), NoBatch, "the batch of step 4: the data are exhausted"),
        (ZeroDivisionError("of the code, not the data"), ZeroDivisionError, "^of the code, not the data$"),
    ],
)
def test_an_error_comes_at_the_step_that_asked(error, kind, says, workers, threaded):
    def fails(step):
        if step == 3:
            raise error
        return batches(step)

    with Feed(make_ahead(fails, 9, workers), 1, 9, CPU, threaded) as feed:
        assert same(feed.next(), batches(1)) and same(feed.next(), batches(2))
        with pytest.raises(kind, match=says):
            feed.next()
    assert not feeding()


def test_closing_ends_the_thread_after_an_error_of_the_step_and_without_a_step(threaded):
    def interrupted():
        with Feed(batches, 0, 100, CPU, threaded) as feed:
            feed.next()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not feeding()
    with Feed(batches, 0, 100, CPU, threaded):
        pass
    assert not feeding()


def test_waiting_is_measured(monkeypatch, threaded):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(step):
        now[0] += 3.0  # the first is made while the feed waits for it
        return batches(step)

    with Feed(slow, 0, 1, CPU, threaded) as feed:
        feed.next()
        assert feed.waited == 3.0


def spin(cycles=20_000_000):
    """Keeps the device at work for some ten milliseconds."""
    torch.cuda._sleep(cycles)


@pytest.mark.gpu
def test_on_a_gpu_no_buffer_is_overwritten_before_it_is_read():
    device = torch.device("cuda")
    large = lambda step: {"tokens": torch.full((64, 4097), step)}  # noqa: E731
    kept = []
    with Feed(large, 0, 40, device) as feed:
        for _ in range(40):
            batch = feed.next()
            spin()
            kept.append(batch["tokens"].float().mean())  # read long after it was handed over
            del batch
    assert [each.item() for each in kept] == list(range(40))


@pytest.mark.gpu
def test_on_a_gpu_a_graph_is_recorded_while_batches_are_made():
    device, steps = torch.device("cuda"), 60
    made = lambda step: {"tokens": torch.full((8, 1025), step)}  # noqa: E731
    seen = []
    with Feed(made, 0, steps, device) as feed:
        static = torch.zeros(8, 1025, dtype=torch.int64, device=device)
        for step in range(steps):
            static.copy_(feed.next()["tokens"])
            if step % 10 == 0:  # the thread goes on meanwhile
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    total = static.double().mean()
            graph.replay()
            seen.append(total.clone())
    assert [each.item() for each in seen] == list(range(steps))


@pytest.mark.gpu
def test_on_a_gpu_pinned_memory_is_used_again():
    device = torch.device("cuda")
    with Feed(lambda step: {"tokens": torch.full((4, 65), step)}, 0, 200, device) as feed:
        for _ in range(200):
            feed.next()
            torch.cuda.synchronize()
        copies = feed._copies
        assert copies is not None
        assert sum(len(leaves) for _, leaves in copies._read_by) + sum(map(len, copies._free.values())) <= 2 * AHEAD + 2
