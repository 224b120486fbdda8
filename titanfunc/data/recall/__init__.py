"""Recall tasks, drawn from a seed: nothing is downloaded, and a batch is a pure function of (seed, step).

>>> task = make_task("mqar", DataConfig(task="mqar", seq_len=128, batch_size=2))
>>> {name: tuple(leaf.shape) for name, leaf in task.batch(step=0).items()}
{'tokens': (2, 129), 'weights': (2, 128)}
"""

from titanfunc.config.data import DataConfig
from titanfunc.data.recall.haystack import Haystack
from titanfunc.data.recall.registry import make_task
from titanfunc.data.recall.rows import Maker, RecallTask, Row, Stream

__all__ = ["DataConfig", "Haystack", "Maker", "RecallTask", "Row", "Stream", "make_task"]
