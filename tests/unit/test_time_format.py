"""Time formats, as Envoy 1.40 wrote them for the same moment."""

from __future__ import annotations

import time

import pytest

from meshproxy.observe.time_format import ISO_MILLISECONDS, ISO_MILLISECONDS_LOCAL, compile_time

MOMENT = 1795235412.350991


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ISO_MILLISECONDS, "2026-11-21T04:30:12.350Z"),
        ("%s", "1795235412"),
        ("%s.%3f", "1795235412.350"),
        ("%Y/%m/%dT%H:%M:%S%z", "2026/11/21T04:30:12+0000"),
        ("%f", "350991000"),
        ("%1f", "3"),
        ("%6f", "350991"),
        ("%9f", "350991000"),
        ("%0f", "%0f"),
        ("%E0S", "12"),
        ("%E3S", "12.350"),
        ("%E*S", "12.350991"),
        ("%E6f", "350991"),
        ("%E*f", "350991"),
        ("%E4Y", "2026"),
        ("%ET", "T"),
        ("%E", "%E"),
        ("%Q", "%Q"),
        ("%Ez", "+00:00"),
        ("%E*z", "+00:00:00"),
        ("%:z", "+00:00"),
        ("%Z", "UTC"),
        ("%%Z", "%Z"),
        ("x%Z", "xUTC"),
        ("%Od", "21"),
        ("%-d", "21"),
        ("%t%%x", "\t%x"),
        ("100%", "100%"),
        ("%%s %3f%3f", "%s 350350"),
        ("%a %b %e %j %p %I", "Sat Nov 21 325 AM 04"),
        ("%D %T %R %F", "11/21/26 04:30:12 04:30 2026-11-21"),
        ("%G-%V %u %U %y %C %g %h %k %l %M", "2026-47 6 46 26 20 26 Nov  4  4 30"),
        ("", ""),
    ],
)
def test_formats(text: str, expected: str) -> None:
    render = compile_time(text)
    assert render(MOMENT) == render(MOMENT) == expected.encode()


@pytest.mark.parametrize(("text", "expected"), [("%E*S", b"12"), ("%E*f", b"0"), ("a%E*S%%%3f", b"a12%000")])
def test_whole_seconds(text: str, expected: bytes) -> None:
    assert compile_time(text)(1795235412.0) == expected


def test_the_second_changes() -> None:
    render = compile_time(ISO_MILLISECONDS)
    assert [render(1795235412.9999), render(1795235413.0), render(1795235412.5)] == [
        b"2026-11-21T04:30:12.999Z",
        b"2026-11-21T04:30:13.000Z",
        b"2026-11-21T04:30:12.500Z",
    ]


def test_exact_milliseconds_are_kept() -> None:
    render = compile_time("%3f")
    assert [render(1795235412 + number / 1000) for number in range(1000)] == [b"%03d" % number for number in range(1000)]


def test_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert compile_time(ISO_MILLISECONDS_LOCAL, local=True)(MOMENT) == b"2026-11-21T10:00:12.350+0530"
        assert compile_time("%Ez %Z", local=True)(MOMENT) == b"+05:30 IST"
        assert compile_time("%H")(MOMENT) == b"04"
    finally:
        monkeypatch.undo()
        time.tzset()
