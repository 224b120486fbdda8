import io
import math
import os
import signal
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor

from titanfunc.config import TrainConfig
from titanfunc.train.display import Display, describe
from titanfunc.train.loop import Diverged, train
from titanfunc.train.metrics import UNFINISHED


class State(NamedTuple):
    step: Tensor
    params: Any
    skipped: Tensor
    skipped_in_row: Tensor


def fresh(step: int = 0) -> State:
    return State(torch.tensor(step), {"w": torch.zeros(3)}, torch.tensor(0), torch.tensor(0))


def fake_step(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """Adds the batch's first token to w; a token of 9 stands for a loss that is not finite."""
    token = batch["tokens"][0, 0]
    bad = token == 9
    params = {"w": state.params["w"] + torch.where(bad, 0, token)}
    new = State(state.step + 1, params, state.skipped + bad, (state.skipped_in_row + 1) * bad)
    loss = torch.where(bad, math.nan, 8.0 - state.step)
    return new, {"loss": loss, "memory/inner_loss": loss * 2, "skipped": bad, "lr": torch.tensor(0.5)}


def batches(step: int) -> Tensor:
    return torch.full((2, 5), step)


class Rows(list):
    def close(self) -> None:
        raise AssertionError("the loop does not own its writers")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.append({"step": step, **values})

    def named(self, name: str) -> dict[int, float]:
        return {row["step"]: row[name] for row in self if name in row}


def run(config: TrainConfig, state: State | None = None, **options: Any):
    rows, saved = Rows(), {}
    out = io.StringIO()
    settings = {
        "save": lambda step, state, sums: saved.update({step: int(state.step)}),
        "writers": [rows],
        "display": Display(config.steps, console=Console(file=out)),
        **options,
    }
    state, outcome = train(settings.pop("step", fake_step), state or fresh(), settings.pop("batches", batches), config,
                           **settings)  # fmt: skip
    return state, outcome, rows, saved, out.getvalue()


def test_rows_average_their_interval():
    _, outcome, rows, saved, printed = run(TrainConfig(steps=7, log_every=3, checkpoint_every=4))
    losses = rows.named("loss")
    # Step 1 is read by itself, as it compiles; then 2-3, 4, which is saved, 5-6, and the rest at the end.
    assert losses == {1: 8.0, 3: 6.5, 4: 5.0, 6: 3.5, 7: 2.0}
    assert rows.named("memory/inner_loss")[6] == 7.0
    assert rows.named("bits_per_byte")[1] == pytest.approx(8.0 / math.log(2))
    assert rows.named("lr")[6] == 0.5
    assert list(rows.named("compile_seconds")) == [1]
    assert list(rows.named("tokens_per_second")) == [3, 4, 6, 7]
    assert all(row["peak_memory_gib"] > 0 for row in rows)
    assert saved == {4: 4, 7: 7}
    assert (outcome.step, outcome.stopped_by, outcome.tokens) == (7, None, 6 * 2 * 4)
    lines = printed.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/7", "step 3/7", "step 4/7", "step 6/7", "step 7/7"]
    assert "loss 3.5000  bits/byte 5.049  inner_loss 7" in lines[3]


def test_bytes_per_token_scales_the_bits():
    *_, rows, _, _ = run(TrainConfig(steps=1), bytes_per_token=4.0)
    assert rows.named("bits_per_byte")[1] == pytest.approx(2.0 / math.log(2))


def test_validation_comes_first_then_periodically_then_last():
    seen = []

    def evaluate(params: Any) -> dict[str, float]:
        seen.append(float(params["w"][0]))
        return {"loss": float(len(seen)), "bits_per_byte": 1.0}

    config = TrainConfig(steps=7, log_every=100, eval_every=3, checkpoint_every=0)
    _, outcome, rows, saved, printed = run(config, evaluate=evaluate)
    assert rows.named("validation_loss") == {0: 1.0, 3: 2.0, 6: 3.0, 7: 4.0}
    assert seen == [0.0, 3.0, 15.0, 21.0]  # the sum of the batches so far
    assert outcome.validation["loss"] == 4.0
    assert list(saved) == [7]
    assert "step 3/7  validation  loss 2.0000  bits/byte 1.000" in printed

    config = TrainConfig(steps=2, eval_every=0)
    *_, rows, _, _ = run(config, evaluate=evaluate)
    assert list(rows.named("validation_loss")) == [2]


def test_going_on_begins_at_the_states_step():
    asked = []

    def remember(step: int) -> Tensor:
        asked.append(step)
        return batches(step)

    evaluate = {"evaluate": lambda params: {"loss": 0.0}}
    _, outcome, rows, _, _ = run(TrainConfig(steps=7, log_every=2), fresh(step=4), batches=remember, **evaluate)
    assert asked == [4, 5, 6]
    assert list(rows.named("loss")) == [6, 7]  # as of a run that began at 0
    assert list(rows.named("compile_seconds")) == [6]
    assert list(rows.named("validation_loss")) == [7]  # not again at the start
    assert outcome.step == 7


def test_speed_leaves_out_validation_and_checkpoints(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow_step(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        now[0] += 100.0 if int(state.step) == 0 else 2.0
        return fake_step(state, batch)

    def slowly(seconds: float, value: Any) -> Any:
        now[0] += seconds
        return value

    config = TrainConfig(steps=6, log_every=5, eval_every=2, checkpoint_every=3)
    _, outcome, rows, _, _ = run(
        config,
        step=slow_step,
        save=lambda *_: slowly(30.0, None),
        evaluate=lambda params: slowly(50.0, {"loss": 1.0}),
    )
    assert rows.named("compile_seconds") == {1: 100.0}
    assert rows.named("tokens_per_second") == {3: 4.0, 5: 4.0, 6: 4.0}
    assert (outcome.seconds, outcome.tokens) == (10.0, 5 * 8)


def test_reads_the_device_only_where_it_says(device_reads):
    reads: list[int] = []

    def count(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        reads.append(device_reads.count)  # before this step
        return fake_step(state, batch)

    run(TrainConfig(steps=18, log_every=8), step=count, save=lambda *_: None)
    begun = reads[0]
    assert [reads[step] - begun for step in range(18)] == [0, *[1] * 7, *[2] * 8, *[3] * 2]
    assert device_reads.count - begun == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_checkpoint(number):
    before = signal.getsignal(number)

    def interrupted(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        if int(state.step) == 2:
            os.kill(os.getpid(), number)
        return fake_step(state, batch)

    state, outcome, rows, saved, _ = run(TrainConfig(steps=50, log_every=20), step=interrupted)
    assert (outcome.step, outcome.stopped_by) == (3, number)
    assert saved == {3: 3}
    assert list(rows.named("loss")) == [1, 3]
    assert list(rows.named(UNFINISHED)) == [3]
    assert int(state.step) == 3
    assert signal.getsignal(number) is before


def test_a_signal_before_the_first_step_takes_none_and_saves():
    def evaluate(params: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    _, outcome, rows, saved, _ = run(TrainConfig(steps=5), evaluate=evaluate)
    assert (outcome.step, outcome.stopped_by, saved) == (0, signal.SIGTERM, {0: 0})
    assert len(rows) == 1  # of the validation


class Asked:
    """As if a signal had come before the loop began."""

    received = signal.SIGTERM


def test_a_signal_before_the_first_step_of_a_run_that_goes_on_saves_nothing_again():
    sums = {"loss": [9.0, 3, 1.0], "lr": [1.5, 3, 0.5]}
    for step in (0, 3):
        _, outcome, rows, saved, _ = run(TrainConfig(steps=5), fresh(step), signals=Asked(), resumed=sums)
        assert (outcome.step, outcome.stopped_by, saved) == (step, signal.SIGTERM, {})
        assert [(row["step"], row["loss"], row["lr"], row[UNFINISHED]) for row in rows] == [(step, 3.0, 0.5, True)]


def test_a_run_that_goes_on_ends_the_interval_that_was_cut():
    sums = {"loss": [12.0, 2, 5.5], "memory/inner_loss": [24.0, 2, 11.0], "skipped": [0.0, 2, 0.0],
            "lr": [1.0, 2, 0.5], "skipped_in_row": [0.0, 2, 0.0]}  # fmt: skip
    *_, rows, saved, _ = run(TrainConfig(steps=7, log_every=5), fresh(step=3), resumed=sums)
    assert rows.named("loss") == {5: (12.0 + 5.0 + 4.0) / 4, 7: 2.5}
    assert not rows.named(UNFINISHED) and list(saved) == [7]
    other = {"loss": [12.0, 2, 5.5], "of_other_settings": [1.0, 1, 1.0]}
    *_, rows, saved, _ = run(TrainConfig(steps=7, log_every=5), fresh(step=3), resumed=other)
    assert rows.named("loss") == {5: 4.5, 7: 2.5}


@pytest.mark.parametrize("first", [True, False])
def test_an_interval_ends_as_soon_as_the_first_writer_has_its_row(first):
    class Full(Rows):
        def write(self, step: int, values: dict[str, Any]) -> None:
            if step == 5:
                raise OSError("no room")

    rows, full, saved = Rows(), Full(), {}
    config = TrainConfig(steps=20, log_every=5, checkpoint_every=0)
    options = {"save": lambda step, state, sums: saved.update({step: sums})}
    with pytest.raises(OSError, match="no room"):
        run(config, writers=[full, rows] if first else [rows, full], **options)
    assert list(rows.named("loss")) == ([1] if first else [1, 5])
    assert list(saved) == [5] and bool(saved[5]) == first
    *_, again, _, _ = run(config, fresh(step=5), resumed=saved[5], **options)
    assert list(again.named("loss")) == [*([5] if first else []), 10, 15, 20]
    assert not first or again.named("loss")[5] == 5.5  # the mean over steps 2 to 5


def test_too_many_skipped_steps_are_seen_at_a_stop_too():
    def stopped(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        if int(state.step) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return fake_step(state, batch)

    rows, saved = Rows(), {}
    with pytest.raises(Diverged, match=r"step 6: .* 3 steps in a row"):
        run(
            TrainConfig(steps=50, log_every=20, max_skipped=3),
            step=stopped,
            batches=lambda step: torch.full((2, 5), 9 if 3 <= step < 6 else 1),
            save=lambda step, state, sums: saved.update({step: sums["skipped"]}),
            writers=[rows],
        )
    assert saved == {7: (9.0, 6, 3.0)}
    assert list(rows.named(UNFINISHED)) == [7]


def test_a_second_interrupt_does_not_wait():
    def stubborn(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return fake_step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        run(TrainConfig(steps=5), step=stubborn)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_too_many_skipped_steps_end_the_run_after_a_checkpoint():
    def bad_from_three(step: int) -> Tensor:
        return torch.full((2, 5), 9 if step >= 3 else 1)

    saved: dict[int, float] = {}
    rows = Rows()
    with pytest.raises(Diverged, match=r"step 15: .* 12 steps in a row"):
        run(
            TrainConfig(steps=50, log_every=5, max_skipped=10),
            batches=bad_from_three,
            save=lambda step, state, sums: saved.update({step: float(state.params["w"][0])}),
            writers=[rows],
        )
    assert saved == {15: 3.0}
    assert rows.named("skipped_in_row") == {1: 0, 5: 2, 10: 7, 15: 12}
    assert math.isnan(rows.named("loss")[15])


@pytest.mark.parametrize("last", [7, 10, 12])
def test_skipped_steps_between_two_readings_end_the_run_too(last):
    """Steps 4 to ``last``, counted from 1, and the device is read at 10 and 20."""
    rows, saved = Rows(), {}

    def bad(step: int) -> Tensor:
        return torch.full((2, 5), 9 if 3 <= step < last or step == 1 else 1)

    with pytest.raises(Diverged, match=rf"step {min(last, 10)}: .* {min(last, 10) - 3} steps in a row") as raised:
        run(
            TrainConfig(steps=30, log_every=10, max_skipped=3),
            batches=bad,
            save=lambda step, state, sums: saved.update({step: float(state.params["w"][0])}),
            writers=[rows],
        )
    assert raised.value.steps == range(3, min(last, 10))
    assert saved == {10: 10 - 1 - len(raised.value.steps)}  # of the others each has added 1
    assert [row["step"] for row in rows] == [1, 10]


def test_fewer_skipped_steps_between_two_readings_do_not():
    def bad(step: int) -> Tensor:
        return torch.full((2, 5), 9 if step in (2, 3, 5, 6, 9, 10) else 1)

    assert run(TrainConfig(steps=20, log_every=10, max_skipped=3), batches=bad)[1].step == 20


def test_a_few_skipped_steps_do_not():
    def one_bad(step: int) -> Tensor:
        return torch.full((2, 5), 9 if step == 3 else 1)

    _, outcome, rows, _, printed = run(TrainConfig(steps=6, log_every=2, max_skipped=2), batches=one_bad)
    assert outcome.step == 6
    assert rows.named("skipped") == {1: 0, 2: 0, 4: 1, 6: 1}
    assert rows.named("loss")[4] == 6.0  # of step 3 alone, counted from 1
    assert "skipped 1" in printed


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    config = TrainConfig(steps=4, log_every=2)
    run(config, display=Display(4, console=console), evaluate=lambda params: {"loss": 1.0})
    printed = out.getvalue()
    assert "4/4" in printed
    assert "inner_loss" in printed
    assert "step 4/4  validation  loss 1.0000" in printed


def test_describe_leaves_out_what_is_no_news():
    assert describe({"skipped": 0.0, "skipped_in_row": 0.0, "grad_norm": 0.5}) == "grad 0.500"
    assert describe({"skipped": 3.0}) == "skipped 3"
    assert describe({"memory/forget": 0.0123456, "novel": 2.0}) == "forget 0.0123  novel 2"


def test_a_batch_may_hold_weights_and_answers_have_an_accuracy():
    seen = []

    def with_weights(step: int) -> dict[str, Tensor]:
        return {"tokens": batches(step), "weights": torch.ones(2, 4)}

    def step_fn(state: State, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        seen.append(set(batch))
        new, metrics = fake_step(state, batch)
        return new, {**metrics, "accuracy": torch.tensor(0.25)}

    options = {"batches": with_weights, "step": step_fn, "bytes_per_token": None}
    _, outcome, rows, _, printed = run(TrainConfig(steps=2, log_every=2), **options)
    assert seen == [{"tokens", "weights"}] * 2
    assert outcome.tokens == 2 * 4  # of the second step; the weights are no tokens
    assert list(rows.named("accuracy").values()) == [0.25, 0.25]
    assert not rows.named("bits_per_byte")  # which are of text alone
    assert "step 2/2  loss 7.0000  accuracy 25.0%  inner_loss" in printed
