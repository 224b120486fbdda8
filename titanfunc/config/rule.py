"""How a memory writes, beside its gates. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from titanfunc.config._check import require, require_choice, require_number

WRITES = ("token", "chunk")
OBJECTIVES = ("l2", "huber", "lp")
REDUCTIONS = ("sum", "mean")
INNER_OPTIMIZERS = ("gradient", "muon")
OUTER_GRADIENTS = ("full", "first_order", "none")


@dataclass(frozen=True)
class WriteRule:
    """What is written, when, and what the outer gradient sees of it.

    write: "token": every token writes, W_t = (1 - alpha_t) W_{t-1} + S_t. "chunk": one write when a chunk is
    full, with the chunk's mean gates and its summed gradient, so that reads before it see the chunk's start.
    objective: of the residual M(k) - v: "l2", "huber" or "lp" (MIRAS, arXiv 2504.13173); parameter: huber's delta,
    lp's p (0: 1 and 3). loss: "sum" or "mean" over features.
    chunk_clip: largest norm of a chunk's summed gradient (write "chunk" only; 0: none).
    optimizer: "gradient", or "muon": S' = eta S - sum g, W' = (1 - alpha) W + theta orthogonalised(S') (write "chunk"
    only; vectors are not orthogonalised).
    outer_gradient: "full": through every write. "first_order": inner gradients are constants, the gates and the
    first weights still learn through what was written. "none": what a write leaves behind is a constant.
    """

    write: str = "token"
    objective: str = "l2"
    parameter: float = 0.0
    loss: str = "sum"
    chunk_clip: float = 0.0
    optimizer: str = "gradient"
    outer_gradient: str = "full"

    def __post_init__(self) -> None:
        require_choice(self.write, "memory.rule.write", WRITES)
        require_choice(self.objective, "memory.rule.objective", OBJECTIVES)
        require_choice(self.loss, "memory.rule.loss", REDUCTIONS)
        require_choice(self.optimizer, "memory.rule.optimizer", INNER_OPTIMIZERS)
        require_choice(self.outer_gradient, "memory.rule.outer_gradient", OUTER_GRADIENTS)
        require_number(self.parameter, "memory.rule.parameter")
        require_number(self.chunk_clip, "memory.rule.chunk_clip")
        if self.objective == "l2":
            require(self.parameter == 0, "memory.rule.parameter", "0 (l2 has none)", self.parameter)
        elif self.objective == "huber":
            require(self.parameter >= 0, "memory.rule.parameter", "a positive delta (0: 1)", self.parameter)
        else:
            ok = self.parameter == 0 or self.parameter >= 3
            require(ok, "memory.rule.parameter", "p of at least 3 (0: 3)", self.parameter)
        require(self.chunk_clip >= 0, "memory.rule.chunk_clip", "0 (no clip) or a positive norm", self.chunk_clip)
        if self.write == "token":
            wanted = "0 (it reads a whole chunk: rule.write=chunk)"
            require(self.chunk_clip == 0, "memory.rule.chunk_clip", wanted, self.chunk_clip)
            ok = self.optimizer == "gradient"
            require(
                ok, "memory.rule.optimizer", "gradient (muon takes a whole chunk: rule.write=chunk)", self.optimizer
            )


PER_TOKEN = WriteRule()
"""The default: every token writes, by the squared error."""
