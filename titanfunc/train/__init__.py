"""The train state, the train step, and its compilation. The loop lives in titanfunc.train.loop."""

from titanfunc.fullgraph import compile_function
from titanfunc.train.compile import CompiledStep, compile_step
from titanfunc.train.state import TrainState, init_state
from titanfunc.train.step import TrainStep, loss_fn, make_answer_step, make_eval_step, make_train_step

__all__ = [
    "CompiledStep",
    "TrainState",
    "TrainStep",
    "compile_function",
    "compile_step",
    "init_state",
    "loss_fn",
    "make_answer_step",
    "make_eval_step",
    "make_train_step",
]
