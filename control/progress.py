"""How far long work is, for people: on stderr, and only of what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TextIO, TypeVar

_T = TypeVar("_T")

FIRST_S = 1.0  # what is done sooner needs no words
ANEW_S = 0.2  # on a terminal, where a line is written over
LINE_S = 5.0  # elsewhere, such as in the log of a build


def each(items: Collection[_T], what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[_T]:
    """The items, one after another, and `what: 12 of 340` now and then. Nothing of it is left on a terminal."""
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    total, pause = len(items), ANEW_S if terminal else LINE_S
    due, told = clock() + FIRST_S, False
    try:
        for done, item in enumerate(items):
            if clock() >= due:
                due, told = clock() + pause, True
                stream.write(f"\r\x1b[K{what}: {done} of {total}" if terminal else f"{what}: {done} of {total}\n")
                stream.flush()
            yield item
    finally:
        if told and terminal:
            stream.write("\r\x1b[K")
            stream.flush()
