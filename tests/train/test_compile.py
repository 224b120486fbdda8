"""compile_step: whatever a step hands on of its state, what is donated is right; mistakes come out as they are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import titanfunc as tf

BACKENDS = [None, "aot_eager", "inductor"]
ONE = torch.tensor(1.0)
HANDED_ON = {
    "as it is": lambda x: x,
    "copied": torch.clone,
    "viewed": lambda x: x.view(1, 2).reshape(2),
    "to and fro": lambda x: x.double().float(),
    "turned over twice": lambda x: x.flip(0).flip(0),
    "unbound": lambda x: torch.unbind(x.view(1, 2))[0],
    "split": lambda x: torch.split(x.view(2, 1), 1)[0].expand(2, 1).reshape(2) * 0 + torch.split(x, [2, 0])[0],
    "a part": lambda x: torch.cat([x, x]).chunk(2)[1],
    "in one part": lambda x: x.chunk(1)[0].float(),
}
REARRANGED = {
    "turned": lambda x: x.view(2, 2, 4).transpose(0, 1).reshape(4, 4),
    "moved": lambda x: x.view(2, 2, 2, 2).movedim(0, -1).reshape(4, 4),
    "transposed": lambda x: x.t(),
    "flipped": lambda x: x.flip(0),
    "as it was": lambda x: x,
    "copied": torch.clone,
}


def compiled(step: Any, backend: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return tf.train.compile_step(step, backend, **options)


def numbers(**leaves: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(leaf) for name, leaf in leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_old_values_become_new_ones_and_results(backend):
    def step(state, batch):
        x = state["current"]
        handed_on = {name: hand_on(x) for name, hand_on in HANDED_ON.items()}
        return {"current": 2 * x + batch["x"], **handed_on}, {**handed_on, "part": x[:1]}

    state = numbers(current=[3.0, 4.0], **{name: [0.0, 0.0] for name in HANDED_ON})
    run = compiled(step, backend)
    for now, after in (([3.0, 4.0], [7.0, 9.0]), ([7.0, 9.0], [15.0, 19.0])):
        new, results = run(state, {"x": ONE})
        assert new is state and new["current"].tolist() == after
        assert {name: new[name].tolist() for name in HANDED_ON} == dict.fromkeys(HANDED_ON, now)
        assert {name: results[name].tolist() for name in HANDED_ON} == dict.fromkeys(HANDED_ON, now)
        assert results["part"].tolist() == now[:1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leaf_is_rearranged_within_itself(backend):
    before = {name: torch.arange(16.0).view(4, 4) + i for i, name in enumerate(REARRANGED)}
    wanted = {name: change(before[name]).clone() for name, change in REARRANGED.items()}
    run = compiled(lambda state, _: ({name: change(state[name]) for name, change in REARRANGED.items()}, {}), backend)
    after, _ = run({name: leaf.clone() for name, leaf in before.items()}, {})
    assert all(torch.equal(after[name], wanted[name]) for name in REARRANGED)


@pytest.mark.gpu
def test_old_values_in_a_cuda_graph():
    def step(state, batch):
        x = state["current"]
        handed_on = {name: hand_on(x) for name, hand_on in HANDED_ON.items()}
        return {"current": 2 * x + batch["x"], **handed_on}, {**handed_on, "new": 2 * x + batch["x"]}

    names = ("current", *HANDED_ON)
    state = {name: torch.tensor([3.0, 4.0], device="cuda") for name in names}
    run, kept, now = compiled(step, "inductor"), [], torch.tensor([3.0, 4.0])
    for i in range(8):
        kept.append((now, run(state, {"x": torch.tensor(float(i), device="cuda")})[1]))
        assert all(torch.equal(state[name].cpu(), now) for name in HANDED_ON)
        now = 2 * now + i
        assert torch.equal(state["current"].cpu(), now)
    for then, results in kept:  # outlive the replays after them
        assert all(torch.equal(results[name].cpu(), then) for name in HANDED_ON)


@pytest.mark.parametrize(("backend", "device"), [
    *((backend, "cpu") for backend in BACKENDS), pytest.param("inductor", "cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_what_is_fixed_is_read_where_it_lies_and_stays(backend, device):
    run = compiled(lambda state, batch, fixed: ({"sum": state["sum"] + batch * fixed["w"]}, 2 * fixed["w"]), backend)
    first, second = (torch.arange(4.0, device=device).view(2, 2) + i for i in (1, 9))
    state, wanted, kept = {"sum": torch.zeros(2, 2, device=device)}, torch.zeros(2, 2, device=device), []
    for w, on in ((first, device), (second, device), (second.t(), device), (first, "cpu")):
        for i in range(6):
            before = w.clone()
            _, doubled = run(state, torch.tensor(float(i), device=on), {"w": w})
            wanted = wanted + i * before
            kept.append((doubled, 2 * before))
            assert torch.equal(w, before) and torch.equal(state["sum"], wanted)
            w.add_(1)  # new numbers in the same place
    assert all(torch.equal(doubled, then) for doubled, then in kept)
    with pytest.raises(ValueError, match=r"fixed\[1\]\['a'\]: wanted a tensor, got int"):
        run(state, ONE, {"w": first}, {"a": 3})


@pytest.mark.parametrize("options", [{}, {"mode": "default"}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_leaves_change_places(backend, options):
    run = compiled(lambda state, batch: ({"a": state["b"], "b": state["a"].clone()}, {}), backend, **options)
    state = numbers(a=[1.0], b=[2.0])
    for a, b in ((2.0, 1.0), (1.0, 2.0)):
        run(state, {})
        assert (state["a"].item(), state["b"].item()) == (a, b)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_results_outlive_the_next_step(backend):
    def step(state, batch):
        new = state["a"] + batch["x"]
        return {"a": new}, {"new": new, "again": new, "old": state["a"]}

    run, state = compiled(step, backend), numbers(a=[0.0])
    kept = [run(state, {"x": ONE})[1] for _ in range(3)]
    assert [(m["new"].item(), m["again"].item(), m["old"].item()) for m in kept] == [(1, 1, 0), (2, 2, 1), (3, 3, 2)]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_shape_has_its_own_results(backend):
    run = compiled(lambda state, batch: (state, {f"of {len(batch['x'])}": batch["x"].sum()}), backend)
    state = numbers(a=[0.0])
    for length in (3, 2, *range(3, 13), 3):  # more than Dynamo allows one function
        assert list(run(state, {"x": torch.ones(length)})[1]) == [f"of {length}"]


def fails(state, batch):
    raise KeyError("a mistake of its own") from OSError("the disk's")


MISTAKES = {
    "another structure": (lambda s, b: ({"b": s["a"]}, {}), {}, "step: wanted .a new state of the old one's structure"),
    "no metrics": (lambda s, b: s, {}, "step: wanted .a new state of the old one's structure, metrics."),
    "another shape": (lambda s, b: ({"a": s["a"].sum()}, {}), {}, r"step: state\['a'\]: wanted float32 \[2\] on cpu"),
    "another dtype": (lambda s, b: ({"a": s["a"].double()}, {}), {}, r"state\['a'\]: wanted float32 .*, got float64"),
    "a number": (lambda s, b: (s, {"loss": 3.0}), {}, r"result\[1\]\['loss'\]: wanted a tensor, got float"),
    "a number given": (lambda s, b: (s, {}), {"x": 3}, r"batch\['x'\]: wanted a tensor, got int"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_value_error(name, backend):
    step, batch, message = MISTAKES[name]
    state = numbers(a=[1.0, 2.0])
    with pytest.raises(ValueError, match=message):
        compiled(step, backend)(state, batch)
    assert state["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_step_raises_comes_out_and_holds_nothing(backend):
    state = numbers(a=[1.0])
    leaf = weakref.ref(state["a"])
    run, found = compiled(fails, backend), ""
    try:
        run(state, {})
    except KeyError as error:
        found = f"{error} {error.__cause__!r} {error.__context__!r}"
    del state
    if backend:
        torch._dynamo.reset()
        gc.collect()  # Dynamo's own circles
    assert leaf() is None
    assert found == "'a mistake of its own' OSError(\"the disk's\") None"


def test_options_that_would_bring_the_fault_back_are_refused():
    state = numbers(a=[1.0])
    for options, message in (
        ({"mode": "default", "options": {"max_autotune": True}}, "wanted mode or options of inductor, got both"),
        ({"options": {"post_grad_custom_pre_pass": lambda graph: None}}, "post_grad_custom_pre_pass: wanted none"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(lambda state, batch: (state, {}), "inductor", **options)(state, {})


def test_a_state_that_cannot_be_donated_is_refused():
    whole = torch.zeros(4)
    run = compiled(lambda state, batch: (state, {}), None)
    run({"a": whole[:2], "b": whole[2:]}, {})  # beside each other
    with pytest.raises(ValueError, match=r"memory of their own, got state\['a'\] and state\['b'\] that overlap"):
        run({"a": whole[:3], "b": whole[2:]}, {})
    with pytest.raises(ValueError, match="state: wanted at least one tensor, got none"):
        run({}, {})


def test_how_it_runs_is_told():
    assert compiled(fails, None).how("cuda") == "eager, its state donated"
    assert compiled(fails, "inductor").how("cpu") == "the step as one graph by inductor, its state donated"
    assert compiled(fails, "inductor").how("cuda:0").endswith(", replayed as a CUDA graph")
    assert "CUDA" not in compiled(fails, "inductor", cuda_graph=False).how("cuda")
