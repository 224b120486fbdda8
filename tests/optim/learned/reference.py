"""The published optimizers' formulas once more, element by element in Python's floats (float64), from the sources."""

from __future__ import annotations

import itertools
import math

DECAYS = {"momentum": (0.9, 0.99, 0.999), "second": (0.999,), "factored": (0.9, 0.99, 0.999)}


def elements(shape):
    return list(itertools.product(*(range(size) for size in shape)))


def two_largest(shape):
    """(second largest, largest) axis; among equals the later one counts as larger."""
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    return order[-2], order[-1]


class Leaf:
    """The accumulators of one leaf; gradients and parameters are dicts from index tuples to floats."""

    def __init__(self, shape, decays=DECAYS):
        self.shape, self.decays = shape, decays
        self.m = {i: [0.0] * 3 for i in elements(shape)}
        self.v = dict.fromkeys(elements(shape), 0.0)
        self.row, self.column, self.full = {}, {}, {}
        if len(shape) < 2:
            self.full = {i: [0.0] * 3 for i in elements(shape)}
            return
        self.second, self.largest = two_largest(shape)
        for i in elements(shape):
            self.row[self.without(i, self.largest)] = [0.0] * 3
            self.column[self.without(i, self.second)] = [0.0] * 3

    @staticmethod
    def without(index, axis):
        return index[:axis] + index[axis + 1 :]

    def see(self, g):
        for i in elements(self.shape):
            self.m[i] = [d * m + (1 - d) * g[i] for d, m in zip(self.decays["momentum"], self.m[i], strict=True)]
            (d,) = self.decays["second"]
            self.v[i] = d * self.v[i] + (1 - d) * g[i] ** 2
        if len(self.shape) < 2:
            for i in elements(self.shape):
                self.full[i] = self.blend(self.full[i], g[i] ** 2 + 1e-30)
            return
        for table, axis in ((self.row, self.largest), (self.column, self.second)):
            for place in table:
                line = [g[(*place[:axis], k, *place[axis:])] ** 2 + 1e-30 for k in range(self.shape[axis])]
                table[place] = self.blend(table[place], sum(line) / len(line))

    def blend(self, old, new):
        return [d * x + (1 - d) * new for d, x in zip(self.decays["factored"], old, strict=True)]

    def factored(self, i, values, floors):
        """Three values over the root of the factored second moment, and row, column, and their inverse roots."""
        if len(self.shape) < 2:
            v = self.full[i]
            scaled = [x / math.sqrt(v[k] + floors) for k, x in enumerate(values)]
            return scaled, v, v
        row, column = self.row[self.without(i, self.largest)], self.column[self.without(i, self.second)]
        at = self.second - 1 if self.second > self.largest else self.second
        place = self.without(i, self.largest)
        size = self.shape[self.second]
        scaled = []
        for k, x in enumerate(values):
            mean = sum(self.row[(*place[:at], j, *place[at + 1 :])][k] for j in range(size)) / size
            relative = max(row[k] / (mean + 1e-9), 1e-9)
            scaled.append(x / math.sqrt(relative) / math.sqrt(max(column[k], 1e-9)))
        return scaled, row, column

    def small_fc(self, p, g):
        columns = []
        for i in elements(self.shape):
            inverse = 1 / math.sqrt(self.v[i] + 1e-6)
            factored_g, row, column = self.factored(i, [g[i]] * 3, 1e-9)
            factored_m, _, _ = self.factored(i, self.m[i], 1e-6)
            roots = [1 / math.sqrt(x + 1e-8) for x in (*row, *column)]
            first = [g[i], p[i], *self.m[i], self.v[i], *(m * inverse for m in self.m[i]), inverse]
            columns.append([*first, *factored_g, *row, *column, *roots, *factored_m])
        return normalise(columns)

    def velo(self, p, g):
        columns = []
        for i in elements(self.shape):
            inverse = 1 / math.sqrt(self.v[i] + 1e-6)
            factored_g, row, column = self.factored(i, [g[i]] * 3, 1e-9)
            factored_m, _, _ = self.factored(i, self.m[i], 0.0)
            roots = [1 / math.sqrt(x + 1e-8) for x in (*row, *column)]
            first = [g[i], min(max(g[i], -0.1), 0.1), p[i], *self.m[i], self.v[i]]
            first += [*(m * inverse for m in self.m[i]), inverse, *factored_g, g[i] * inverse]
            columns.append([*first, *row, *column, *roots, *factored_m])
        return normalise(columns)


def normalise(columns):
    count = len(columns)
    squares = [sum(line[k] ** 2 for line in columns) / count for k in range(len(columns[0]))]
    return [[x / math.sqrt(1e-5 + square) for x, square in zip(line, squares, strict=True)] for line in columns]


def layers(network, x):
    for name in ("input", "hidden", "output"):
        weight, bias = network[name]["weight"].tolist(), network[name]["bias"].tolist()
        x = [sum(x[i] * weight[i][o] for i in range(len(x))) + bias[o] for o in range(len(bias))]
        x = x if name == "output" else [max(value, 0.0) for value in x]
    return x


def small_fc_step(network, leaf, p, g, count):
    """What is subtracted of each element, in the order of ``elements``."""
    times = [math.tanh(count / scale - 1) for scale in (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)]
    out = [layers(network, [*line, *times]) for line in leaf.small_fc(p, g)]
    return [direction * math.exp(0.001 * magnitude) * 0.01 for direction, magnitude in out]


def velo_step(network, leaf, p, g):
    scale = math.sqrt(sum(value**2 for value in p.values()) / len(p) + 1e-9)
    out = [layers(network, line) for line in leaf.velo(p, g)]
    return [direction * math.exp(0.001 * magnitude) * 0.001 * scale for direction, magnitude, _ in out]
