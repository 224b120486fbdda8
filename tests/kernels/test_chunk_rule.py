"""The per-chunk rule by the kernels of the per-token rule: full chunks, in one closed form, against the reference."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
import torch
from titanfunc_kernels import memory_small_backward

import titanfunc as tf
from tests.kernels import checks, rounded
from titanfunc.config import WriteRule
from titanfunc.ops import backend, memory_write_read

CHUNK = 16


def problem(size, hidden, tokens, dtype=torch.float32, depth=2, lead=2):
    """A network, a state of so many samples and heads, and q, k, v and gates for ``tokens``."""
    net = tf.memory.mlp(size, hidden, depth=depth)
    first = {name: checks.draw(lead, *w.shape[1:], scale=0.2) for name, w in net.init(torch.Generator(), lead).items()}
    rows = [torch.nn.functional.normalize(checks.draw(lead, lead, tokens, size, seed=i), dim=-1) for i in range(3)]
    gates = [s * torch.sigmoid(checks.draw(lead, lead, tokens, seed=9 + i)) for i, s in enumerate((0.2, 0.9, 0.3))]
    return net, first, [row.to(dtype) for row in rows], gates


def scanned(net, rule, kernels, read="inclusive", aligned=True, chunk=CHUNK):
    """(first weights, q, k, v, gates) -> reads, and the state's leaves."""

    def run(first, rows, gates):
        state = tf.memory.init_state(first, len(rows[0]), rule)
        y, after = tf.memory.scan(
            net, state, *rows, tf.memory.Gates(*gates), chunk, aligned=aligned, read=read, clip=0.5, rule=rule,
            kernels=kernels,
        )  # fmt: skip
        return [y, *(leaf for leaf in tf.tree.leaves(after) if leaf.is_floating_point())]

    return run


def pulled(run, first, rows, gates):
    outputs, pull = torch.func.vjp(run, first, rows, gates)
    cotangents = [checks.draw(*y.shape, dtype=rows[0].dtype, seed=50 + i) for i, y in enumerate(outputs)]
    return outputs, tf.tree.leaves(pull([c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]))


@contextlib.contextmanager
def closed_form_in_plain_torch():
    """What kernels=triton asks for is the reference's closed form, histories rounded as the kernels keep them."""
    rows = {
        "memory_write": rounded.write, "memory_read": backend.implementation("memory_read", "reference"),
        "memory_write_read": functools.partial(memory_write_read._then_read, rounded.write),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, row in rows.items():
            stack.enter_context(mock.patch.dict(backend._TABLE[name], triton=row))
        yield


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(
    ("size", "hidden", "depth", "chunk", "read"),
    [
        (16, 32, 2, CHUNK, "inclusive"), (16, 32, 2, CHUNK, "exclusive"), (16, 16, 1, CHUNK, "inclusive"),
        (16, 16, 1, CHUNK, "exclusive"), (18, 10, 2, 5, "inclusive"), (18, 10, 2, 5, "exclusive"),
        (19, 19, 1, 5, "inclusive"), (19, 19, 1, 5, "exclusive"), (64, 64, 2, 64, "inclusive"),
    ],
)  # fmt: skip
def test_full_chunks_by_the_tolerance_rule(size, hidden, depth, chunk, read, dtype):
    """Float64 is the per-chunk rule as it is defined, not its closed form."""
    rule = WriteRule(write="chunk")
    net, first, rows, gates = problem(size, hidden, 2 * chunk, dtype, depth, lead=2 if size == 16 else 1)
    run = scanned(net, rule, "triton", read, chunk=chunk)
    with checks.poison():
        got = pulled(run, first, rows, gates)
    with closed_form_in_plain_torch():
        plain = pulled(run, first, rows, gates)
    wide = tf.tree.map(torch.Tensor.double, (first, rows, gates))
    exact = pulled(scanned(net, rule, "reference", read, chunk=chunk), *wide)
    for i, each in enumerate(zip(got[0], plain[0], exact[0], strict=True)):
        checks.assert_as_exact(f"output {i}", *each, floor=2e-6)
    rounded.assert_gradients_as_exact(dtype, got[1], plain[1], exact[1], len(got[1]) - 3)


def test_compiled_is_eager_and_runs_the_kernels_backward():
    net, first, rows, gates = problem(16, 16, 2 * CHUNK, lead=1)
    scan = scanned(net, WriteRule(write="chunk"), "triton")

    def run(w0, w1, *rest):
        return tuple(scan({"w0": w0, "w1": w1}, rest[:3], rest[3:]))

    tensors = [first["w0"], first["w1"], *rows, *gates]
    checks.check_compiled(run, tensors, range(len(tensors)))
    k, v = 3, 4
    checks.check_backward_that_runs(memory_small_backward, "backward", run, tensors, (k, v))


@pytest.mark.parametrize(
    ("size", "hidden", "depth", "read", "outer"),
    [
        *((16, 32, 2, read, outer) for read in ("inclusive", "exclusive") for outer in ("full", "first_order")),
        (16, 16, 1, "inclusive", "full"), (16, 16, 1, "exclusive", "first_order"),
        (24, 40, 2, "inclusive", "first_order"), (24, 40, 2, "exclusive", "full"),
    ],
)  # fmt: skip
def test_full_chunks_are_written_as_the_reference_writes_them(size, hidden, depth, read, outer):
    rule = WriteRule(write="chunk", outer_gradient=outer)
    net, *given = problem(size, hidden, 3 * CHUNK, depth=depth, lead=2 if size == 16 else 1)
    got, want = (pulled(scanned(net, rule, kernels, read), *given) for kernels in ("triton", "reference"))
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max() + 1e-3), rtol=0)


def test_a_stream_in_pieces_is_one_pass():
    rule = WriteRule(write="chunk")
    net, first, rows, gates = problem(16, 32, 3 * CHUNK)
    pieces, states = {}, {}
    for way in ("triton", "reference"):
        state, found = tf.memory.init_state(first, 2, rule), []
        for begin, end, aligned in [(0, CHUNK, True), (CHUNK, CHUNK + 5, True), (CHUNK + 5, 3 * CHUNK, False)]:
            part = [x[:, :, begin:end] for x in (*rows, *gates)]
            y, state = tf.memory.scan(
                net, state, *part[:3], tf.memory.Gates(*part[3:]), CHUNK, aligned=aligned, clip=0.5, rule=rule,
                kernels=way,
            )  # fmt: skip
            found.append(y)
        pieces[way], states[way] = torch.cat(found, 2), state
    whole = scanned(net, rule, "triton")(first, rows, gates)[0]
    torch.testing.assert_close(pieces["triton"], pieces["reference"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pieces["triton"], whole, atol=1e-5, rtol=1e-4)
    for a, b in zip(tf.tree.leaves(states["triton"]), tf.tree.leaves(states["reference"]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_ragged_end_is_written_in_plain_torch():
    rule = WriteRule(write="chunk")
    net, first, rows, gates = problem(16, 32, 2 * CHUNK + 5)
    for aligned in (True, False):
        got, want = (
            scanned(net, rule, kernels, aligned=aligned)(first, rows, gates) for kernels in ("triton", "reference")
        )
        assert all(map(torch.equal, got, want))


def test_a_write_that_is_not_finite_counts_for_nothing():
    rule = WriteRule(write="chunk")
    net, first, rows, gates = problem(16, 32, 2 * CHUNK)
    rows[1][0, 1, 3, 2], rows[2][1, 0, 20, 0], gates[2][1, 1, 7] = torch.nan, torch.inf, torch.nan
    got, want = (scanned(net, rule, kernels)(first, rows, gates) for kernels in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_has_no_closed_form_is_refused():
    net, first, rows, gates = problem(16, 32, CHUNK)
    for rule in (WriteRule(write="chunk", optimizer="muon"), WriteRule(write="chunk", chunk_clip=1.0)):
        with pytest.raises(ValueError, match="memory_write: rule, net: wanted an MLP memory, optimizer"):
            scanned(net, rule, "triton")(first, rows, gates)
