"""How far tokenizing is: a bar on a terminal, and elsewhere, as in a batch job's log, a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from titanfunc.data.parts import Part

FIRST, EVERY = 5.0, 60.0
"""Seconds until the first line, so that there is none where little is to be done, and from one to the next."""
Advance = Callable[[int, int], None]


@contextlib.contextmanager
def progress(wanted: Sequence[Part], done: Collection[int] = (), tokens: int = 0) -> Iterator[Advance]:
    """Show on stderr how far the parts are; what is called with the number of each finished part and its tokens.

    done, tokens: numbers of the parts that were finished before, and the tokens of these.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _bar(wanted, done) if console.is_terminal else _lines(wanted, done, tokens) as advance:
        yield advance


@contextlib.contextmanager
def _bar(wanted: Sequence[Part], done: Collection[int]) -> Iterator[Advance]:
    """A bar of the bytes of text."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("tokenizing", total=sum(map(_size, wanted)))
        shown.advance(task, sum(_size(wanted[number]) for number in done))
        made = 0

        def advance(number: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            seconds = shown.tasks[0].elapsed
            speed = f", {made / seconds / 1e6:.1f} M/s" if seconds else ""
            shown.update(task, advance=_size(wanted[number]), description=f"{made / 1e6:,.0f} M tokens{speed}")

        yield advance


@contextlib.contextmanager
def _lines(wanted: Sequence[Part], done: Collection[int], tokens: int) -> Iterator[Advance]:
    """Lines from a thread of its own: a part may take longer than the time from one to the next."""
    left = Counter(file for part in wanted for file in part.files)  # parts that a file's text is in
    files, size = len(left), sum(map(_size, wanted)) or 1
    read = 0
    ended = threading.Event()

    def finish(number: int) -> None:
        nonlocal read
        read += _size(wanted[number])
        left.subtract(wanted[number].files)

    def advance(number: int, made: int) -> None:
        nonlocal tokens
        finish(number)
        tokens += made

    def tell() -> None:
        pause = FIRST
        while not ended.wait(pause):
            finished = files - sum(count > 0 for count in list(left.values()))
            of = f"{finished:,} of {files:,} file{'s' if files != 1 else ''} done, {read / size:.0%} of the text"
            with contextlib.suppress(OSError):  # of a log that takes no more
                print(f"tokenizing: {of}, {tokens:,} tokens so far", file=sys.stderr, flush=True)
            pause = EVERY

    for number in done:
        finish(number)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield advance
    finally:
        ended.set()
        teller.join()


def _size(part: Part) -> int:
    return max(part.size, 1)
