"""Times in access logs: strftime formats with Envoy's additions, compiled so that the part which changes only once a second is kept.

Besides strftime's own: `%s` (seconds since the epoch), `%f` and `%1f` to `%9f` (fraction of the second), and of Abseil's extensions `%E#S`, `%E*S`, `%E#f`,
`%E*f`, `%E4Y`, `%ET`, `%Ez`, `%E*z` and `%:z`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

ISO_MILLISECONDS = "%Y-%m-%dT%H:%M:%E3SZ"
ISO_MILLISECONDS_LOCAL = "%Y-%m-%dT%H:%M:%E3S%z"

# Compiled when a format is: that takes milliseconds, and few configurations have formats.
_TOKEN = r"%%|%s|%[1-9]?f|%E(?:[0-9]+|\*)[Sf]|%E4Y|%ET|%E\*?z|%:z|%[EO]?[A-Za-z]|%-[a-z]"
# gmtime's zone is called GMT; Envoy's is UTC.
_ZONE_NAME = r"((?:^|[^%])(?:%%)*)%Z"
_KNOWN = frozenset("aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ")

# The nearest float below 12.35 must not become 12.349.
_ROUNDING = 4e-7

Formatter = Callable[[float], bytes]


def compile_time(text: str, *, local: bool = False) -> Formatter:
    """A function from Unix time to formatted time. UTC unless `local`."""
    zone = time.localtime if local else time.gmtime
    pieces = _parse(text if local else re.sub(_ZONE_NAME, r"\1UTC", text))
    fractions = [int(digits) for kind, digits in pieces if kind == "fraction"]
    if 0 in fractions:
        return _shortest(pieces, zone)
    second = -1
    template = b""

    def render(now: int) -> bytes:
        when = zone(now)
        return b"".join([_PIECES[kind](value, when, now) for kind, value in pieces])

    def whole(wall: float) -> bytes:
        nonlocal second, template
        now = int(wall)
        if now != second:
            template = render(now) % ()
            second = now
        return template

    scale = 10 ** fractions[0] if fractions else 0
    start = end = 0.0  # of the second that `template` is for

    def single(wall: float) -> bytes:
        # HOT: access logs begin with this.
        nonlocal start, end, template
        if not start <= wall < end:
            now = int(wall + _ROUNDING)
            template = render(now)
            start = now - _ROUNDING
            end = start + 1
        return template % int((wall - start) * scale)

    scales = [_scale(digits) for digits in fractions]

    def several(wall: float) -> bytes:
        now, micros = _split(wall)
        return render(now) % tuple([micros * up // down for up, down in scales])

    if not fractions:
        return whole
    return single if len(fractions) == 1 and fractions[0] <= 6 else several


def _parse(text: str) -> list[tuple[str, str | int]]:
    """Pieces: ("text", literal), ("time", strftime format), ("epoch", ""), ("zone", "" or seconds too), ("fraction", digits; 0: as many as it takes)."""
    pieces: list[tuple[str, str | int]] = []
    position = 0
    for match in re.finditer(_TOKEN, text):
        if match.start() > position:
            pieces.append(("text", text[position : match.start()]))
        pieces.extend(_token(match.group()))
        position = match.end()
    if position < len(text):
        pieces.append(("text", text[position:]))
    return pieces


def _token(token: str) -> list[tuple[str, str | int]]:
    last = token[-1]
    if token == "%%":
        return [("text", "%")]
    if token == "%s":
        return [("epoch", "")]
    if last == "f" or (last == "S" and token[1] == "E" and len(token) > 3):
        inner = token[2:-1] if token[1] == "E" else token[1:-1] or "9"
        digits = 0 if inner == "*" else min(int(inner), 15)
        seconds: list[tuple[str, str | int]] = [("time", "%S")] if last == "S" else []
        if token[1] == "E" and inner == "0":
            return seconds or [("text", "")]
        point: list[tuple[str, str | int]] = [("text", ".")] if last == "S" else []
        return [*seconds, *point, ("fraction", digits)]
    if token == "%E4Y":
        return [("time", "%Y")]
    if token == "%ET":
        return [("text", "T")]
    if token in ("%Ez", "%:z", "%E*z"):
        return [("zone", "seconds" if "*" in token else "")]
    if token[1] == "-" or last in _KNOWN:
        return [("time", token)]
    return [("text", token)]


def _split(wall: float) -> tuple[int, int]:
    """Seconds and microseconds: a float has no more than that of a time of today."""
    return divmod(int((wall + _ROUNDING) * 1000000), 1000000)


def _scale(digits: int) -> tuple[int, int]:
    return (10 ** (digits - 6), 1) if digits > 6 else (1, 10 ** (6 - digits))


def _literal(value: str | int, when: time.struct_time, now: int) -> bytes:
    return str(value).encode().replace(b"%", b"%%")


def _strftime(value: str | int, when: time.struct_time, now: int) -> bytes:
    return time.strftime(str(value), when).encode().replace(b"%", b"%%")


def _zone(value: str | int, when: time.struct_time, now: int) -> bytes:
    sign, offset = "+" if when.tm_gmtoff >= 0 else "-", abs(when.tm_gmtoff)
    text = f"{sign}{offset // 3600:02}:{offset // 60 % 60:02}"
    return (f"{text}:{offset % 60:02}" if value else text).encode()


def _fraction(value: str | int, when: time.struct_time, now: int) -> bytes:
    return b"%%0%dd" % int(value)


def _epoch(value: str | int, when: time.struct_time, now: int) -> bytes:
    return b"%d" % now


_PIECES = {"text": _literal, "time": _strftime, "zone": _zone, "fraction": _fraction, "epoch": _epoch}


def _shortest(pieces: list[tuple[str, str | int]], zone: Callable[[float], time.struct_time]) -> Formatter:
    """Formats with `%E*S` or `%E*f`, whose fraction has as many digits as it needs. Rare: nothing is kept."""

    def render(wall: float) -> bytes:
        now, micros = _split(wall)
        when = zone(now)
        out: list[bytes] = []
        for kind, value in pieces:
            if kind != "fraction":
                out.append(_PIECES[kind](value, when, now).replace(b"%%", b"%"))
            elif value:
                up, down = _scale(int(value))
                out.append(b"%0*d" % (int(value), micros * up // down))
            elif micros or not (out and out[-1] == b"."):
                out.append((b"%06d" % micros).rstrip(b"0") or b"0")
            else:
                out.pop()
        return b"".join(out)

    return render
