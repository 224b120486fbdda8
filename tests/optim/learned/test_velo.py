"""The whole of VeLO against a plain reference: what it reads, its recurrent network, and the mixed networks."""

from __future__ import annotations

import math

import pytest
import torch

from tests.optim.learned import reference
from tests.optim.learned.test_formulas import as_dict, leaf
from titanfunc import rng, tree
from titanfunc.optim import apply_updates
from titanfunc.optim.learned import init_velo, velo

HIDDEN, BANK, UNITS, TOTAL = 4, 3, 6, 40


def network():
    made = init_velo(rng.generator(1), HIDDEN, BANK, UNITS)
    moved = tree.map(lambda w: w + 0.2 * leaf(w.shape, w.numel(), torch.float32), made)
    return {**moved, "decays": made["decays"]}


class Losses:
    """Decaying means of the loss, and where each lies between its lowest value and the next slower mean."""

    def __init__(self, total):
        reach = [10 ** (1 + k * (math.log10(total) - 1) / 9) for k in range(10)]
        self.decays = [math.exp(-1 / r) for r in reach]
        self.means, self.lowest, self.count = [0.0] * 10, [1e12] * 10, 0

    def see(self, loss):
        if self.count:
            greatest = max(m / (1 - d ** (self.count + 1)) for m, d in zip(self.means, self.decays, strict=True))
            loss = min(2 * abs(greatest), loss)
        else:
            loss = min(2 * abs(loss), loss)
        self.count += 1
        self.means = [d * m + (1 - d) * loss for m, d in zip(self.means, self.decays, strict=True)]
        self.corrected = [m / (1 - d**self.count) for m, d in zip(self.means, self.decays, strict=True)]
        self.lowest = [min(a, b) for a, b in zip(self.lowest, self.corrected, strict=True)]

    def features(self):
        if self.count <= 2:
            return [0.0] * 9
        found = []
        for k in range(9):
            span = max(1e-8, self.corrected[k + 1] - self.lowest[k])
            found.append(min(1.0, max(-1.0, (self.corrected[k] - self.lowest[k]) / span - 1)))
        return found


def log(x):
    return 0.5 * min(5.0, max(-5.0, math.log(1e-8 + abs(10 * x))))


def read(p, slow, shape, done, losses):
    scale = 1 / math.sqrt(max(1e-9, sum(x * x for x in p.values()) / len(p)))
    m = [[x * scale for x in line] for line in slow.m.values()]
    v = [x * scale for x in slow.v.values()]
    mean = [sum(line[k] for line in m) / len(m) for k in range(3)]
    fraction = [math.tanh(10 * (done - place)) for place in (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)]
    rank = [float(sum(size > 1 for size in shape) == k) for k in range(5)]
    spread_m = [log(sum((line[k] - mean[k]) ** 2 for line in m) / len(m)) for k in range(3)]
    spread_v = [log(sum((x - mean[k]) ** 2 for x in v) / len(v)) for k in range(3)]
    return [*fraction, *losses, log(sum(v) / len(v)), *rank, *spread_m, *spread_v]


def linear(layer, x):
    weight, bias = layer["weight"].tolist(), layer["bias"].tolist()
    return [sum(x[i] * weight[i][o] for i in range(len(x))) + bias[o] for o in range(len(bias))]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_updates_follow_the_published_formula_for_five_steps():
    net = network()
    params = {"matrix": leaf((4, 3), 2), "deep": {"vector": leaf((5,), 3), "number": leaf((), 4)}}
    transformation = velo(net, TOTAL, learning_rate=2.0)
    state = transformation.init(params)
    names = list(tree.named_leaves(params))
    slow = {name: reference.Leaf(tuple(p.shape)) for name, p in tree.named_leaves(params).items()}
    hidden = {name: net["start"]["hidden"][0].tolist() for name in names}
    cell = {name: net["start"]["cell"][0].tolist() for name in names}
    losses = Losses(TOTAL)
    for step, loss in enumerate((3.0, 9.0, 2.0, 2.5, 1.0)):  # 9 counts as twice the greatest mean
        grads = tree.map(lambda p: leaf(p.shape, 20 + p.numel()) * (0.1 + step), params)  # noqa: B023
        updates, state = transformation.update(grads, state, params, loss=torch.tensor(loss))
        losses.see(loss)
        seen = {
            name: read(as_dict(p), slow[name], p.shape, step / TOTAL, losses.features())
            for name, p in tree.named_leaves(params).items()
        }
        mixed = [linear(net["mix"], x) for x in seen.values()]
        greatest = [max(0.0, *(line[k] for line in mixed)) for k in range(UNITS)]
        for name, p in tree.named_leaves(params).items():
            x = [a + b for a, b in zip(linear(net["merge"], seen[name]), greatest, strict=True)]
            gates = linear(net["lstm"], x + hidden[name])
            enter, candidate, forget, leave = (gates[k * UNITS : (k + 1) * UNITS] for k in range(4))
            for k in range(UNITS):
                cell[name][k] *= sigmoid(forget[k] + 1)
                cell[name][k] += sigmoid(enter[k]) * math.tanh(candidate[k])
                hidden[name][k] = sigmoid(leave[k]) * math.tanh(cell[name][k])
            controls = torch.tensor(linear(net["controls"], hidden[name]))
            (rate,) = linear(net["rate"], hidden[name])
            own = tree.map(lambda w: 100 * sum(c * x for c, x in zip(controls, w, strict=True)) / BANK, net["bank"])  # noqa: B023
            g = as_dict(tree.named_leaves(grads)[name])
            slow[name].see(g)
            steps = reference.velo_step(own, slow[name], as_dict(p), g)
            wanted = -2.0 * rate * torch.tensor(steps, dtype=torch.float64).reshape(p.shape)
            torch.testing.assert_close(tree.named_leaves(updates)[name], wanted, rtol=2e-4, atol=1e-8)
        params = apply_updates(params, updates)


def test_an_untrained_velo_takes_steps_of_a_thousandth():
    net, params = init_velo(rng.generator(3), bank=64, units=16), {"w": leaf((16, 8), 0), "b": leaf((8,), 1)}
    transformation = velo(net, 100)
    state = transformation.init(params)
    for i in range(5):
        grads = tree.map(lambda p: leaf(p.shape, i), params)  # noqa: B023
        updates, state = transformation.update(grads, state, params, loss=torch.tensor(1.0))
        for update in tree.leaves(updates):
            assert 1e-5 < update.abs().mean() < 5e-3


def test_mistakes_are_named():
    net = network()
    with pytest.raises(ValueError, match="loss: wanted the 0-d loss"):
        velo(net, 10).update({"w": leaf((2,), 0)}, velo(net, 10).init({"w": leaf((2,), 0)}), {"w": leaf((2,), 0)})
    with pytest.raises(ValueError, match="total_steps: wanted at least 1, got 0"):
        velo(net, 0)
    with pytest.raises(ValueError, match=r"params: wanted leaves of at most 4 axes above 1, got w \[2, 2, 2, 2, 2\]"):
        velo(net, 10).init({"w": leaf((2, 2, 2, 2, 2), 0)})
    with pytest.raises(ValueError, match=r"network: lstm.bias: wanted \[24\], got \[23\]"):
        velo({**net, "lstm": {"weight": net["lstm"]["weight"], "bias": torch.zeros(23)}}, 10)
    with pytest.raises(ValueError, match=r"network: wanted a nested dict with controls.weight \[R, B\]"):
        velo(net["bank"], 10)
    with pytest.raises(ValueError, match="network: wanted the bank of per-parameter networks"):
        velo({name: part for name, part in net.items() if name != "bank"}, 10)
