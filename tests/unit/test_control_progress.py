"""Progress of long work."""

from __future__ import annotations

import io

import pytest

from control.progress import ANEW_S, FIRST_S, LINE_S, each


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, count: int, seconds: float) -> str:
    """What is said of so many items that take so long each."""
    now = [100.0]
    seen = []
    for item in each(range(count), "counting", stream, lambda: now[0]):
        seen.append(item)
        now[0] += seconds
    assert seen == list(range(count))
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_done_soon_needs_no_words(stream):
    assert run(stream(), 9, FIRST_S / 10) == ""
    assert run(stream(), 0, 1.0) == ""


def test_lines_for_logs():
    assert run(io.StringIO(), 12, 1.0) == "counting: 1 of 12\ncounting: 6 of 12\ncounting: 11 of 12\n"
    assert LINE_S == 5 * FIRST_S


def test_one_line_on_a_terminal():
    said = run(Terminal(), 4, FIRST_S)
    assert ANEW_S < FIRST_S
    assert said == "".join(f"\r\x1b[Kcounting: {done} of 4" for done in (1, 2, 3)) + "\r\x1b[K"


def test_a_line_on_a_terminal_is_taken_away_when_work_fails():
    now = [0.0]
    terminal = Terminal()
    items = each([1, 2, 3], "counting", terminal, lambda: now[0])
    next(items)
    now[0] = FIRST_S
    next(items)
    items.close()
    assert terminal.getvalue().endswith("1 of 3\r\x1b[K")
