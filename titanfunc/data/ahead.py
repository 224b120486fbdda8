"""Batches made by other processes ahead of the step that will ask for them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]
Batches = Callable[[int], Batch]


class _Steps(Dataset[Batch | Exception]):
    """The batches of steps ``first`` to ``end``; a step's place in the list is its number less ``first``.

    An error is a result like another: raised here, it would come to the one who asks with a traceback for a message.
    """

    def __init__(self, batches: Batches, first: int, end: int) -> None:
        self.batches, self.first, self.end = batches, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, place: int) -> Batch | Exception:
        try:
            return self.batches(self.first + place)
        except Exception as error:
            return _plain(error)


def _plain(error: Exception) -> Exception:
    """The error, or one of the same message where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def make_ahead(batches: Batches, end: int, workers: int) -> Batches:
    """The same batches (tensors of any shapes), each made by one of ``workers`` processes before it is asked for.

    Steps up to ``end`` are made in order from the first one asked for; asking for another than the next begins
    anew there. As a batch is a pure function of its step, it does not matter who makes it; what ``batches`` raises is
    raised for that step. workers 0: ``batches`` itself. Raises ValueError for a negative number, or a step from ``end``
    on.
    """
    if workers < 0:
        raise ValueError(f"workers: wanted 0 or more, got {workers}")
    if not workers:
        return batches
    coming: Iterator[Batch | Exception] = iter(())
    due = -1

    def batch(step: int) -> Batch:
        nonlocal coming, due
        if not 0 <= step < end:
            raise ValueError(f"step: wanted 0 to {end - 1}, got {step}")
        if step != due:
            # Forked, as how a batch is made cannot be sent to another process; nothing there touches a GPU.
            loader = DataLoader(
                _Steps(batches, step, end),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=4,
                multiprocessing_context="fork",
            )
            coming = iter(loader)
        due = step + 1
        made = next(coming)
        if step == end - 1:
            coming = iter(())  # the processes end here, and not when somebody lets go of this function
        if isinstance(made, Exception):
            coming, due = iter(()), -1
            raise made
        return made

    return batch
