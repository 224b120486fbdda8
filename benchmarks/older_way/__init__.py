"""The older way to train a memory, kept as a baseline: autograd.grad in a module's forward, and a graph that breaks."""

from older_way.model import OlderWay, Sizes, make_step

__all__ = ["OlderWay", "Sizes", "make_step"]
