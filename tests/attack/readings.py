"""How servers that differ would read the same bytes. What our proxy forwards must read the same to all of them; else somebody can smuggle.

`strict` is h11, which refuses what it does not understand. The others are written to be as lenient as the worst servers found in the wild, each with another
opinion about who is right when framing headers disagree. A reading is a list of (method, target, body); it ends where the bytes end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest

import h11

Reading = list[tuple[bytes, bytes, bytes]]


def strict(data: bytes) -> Reading:
    """As h11 reads it. Raises AssertionError for what h11 refuses."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(data)
    reading: Reading = []
    body = b""
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                reading.append((event.method, event.target, b""))
                body = b""
            elif isinstance(event, h11.Data):
                body += event.data
                reading[-1] = (*reading[-1][:2], body)
            elif isinstance(event, h11.EndOfMessage):
                server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                server.send(h11.EndOfMessage())
                if server.our_state is not h11.DONE:
                    return reading
                server.start_next_cycle()
            else:
                return reading
    except h11.RemoteProtocolError as error:
        raise AssertionError(f"h11 refuses what we forwarded: {error}: {data!r}") from None


def _lines(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a head, ended by LF or by CR LF, and what follows the head."""
    lines: list[bytes] = []
    while data:
        line, ended, data = data.partition(b"\n")
        line = line.removesuffix(b"\r")
        if not line and lines:
            break
        if line:
            lines.append(line)
        if not ended:
            break
    return lines, data


def _fields(lines: list[bytes], *, folds: bool) -> dict[bytes, list[bytes]]:
    fields: dict[bytes, list[bytes]] = {}
    last = b""
    for line in lines:
        if line[:1] in b" \t\x0b\x0c" and folds and last:
            fields[last][-1] += line.strip()
            continue
        name, _, value = line.partition(b":")
        last = re.sub(rb"[\x00-\x20\x7f-\xff]", b"", name.lower())
        fields.setdefault(last, []).append(value.strip(b" \t\x0b\x0c\r\0\x85\xa0"))
    return fields


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """Content and rest, with any line end, extensions and signs passed over."""
    content = b""
    while data:
        line, _, data = data.partition(b"\n")
        digits = re.match(rb"[\s+]*(?:0x)?([0-9a-fA-F]+)", line)
        size = int(digits[1], 16) if digits else 0
        if not size:
            while data:  # trailers
                line, _, data = data.partition(b"\n")
                if not line.strip(b"\r"):
                    break
            return content, data
        content += data[:size]
        data = data[size:]
        if data[:2] == b"\r\n":
            data = data[2:]
        elif data[:1] == b"\n":
            data = data[1:]
    return content, b""


def _lenient(data: bytes, *, folds: bool, chunked_wins: bool, first_length: bool, any_coding: bool) -> Reading:
    reading: Reading = []
    while data.strip(b"\r\n"):
        lines, data = _lines(data)
        words = lines[0].split()
        method, target = words[0], words[1] if len(words) > 1 else b""
        fields = _fields(lines[1:], folds=folds)
        codings = b",".join(fields.get(b"transfer-encoding", [])).lower()
        chunked = b"chunked" in codings if any_coding else codings == b"chunked"
        lengths = [int(digits[0]) for value in fields.get(b"content-length", []) if (digits := re.search(rb"\d+", value))]
        if chunked and (chunked_wins or not lengths):
            body, data = _chunks(data)
        elif lengths:
            length = lengths[0] if first_length else lengths[-1]
            body, data = data[:length], data[length:]
        else:
            body = b""
        reading.append((method, target, body))
    return reading


READERS: dict[str, Callable[[bytes], Reading]] = {
    "strict": strict,
    "chunked wins, folds lines": lambda data: _lenient(data, folds=True, chunked_wins=True, first_length=True, any_coding=True),
    "length wins, last length": lambda data: _lenient(data, folds=False, chunked_wins=False, first_length=False, any_coding=True),
    "length wins, first length, folds lines": lambda data: _lenient(data, folds=True, chunked_wins=False, first_length=True, any_coding=False),
    "chunked only if exact, last length": lambda data: _lenient(data, folds=False, chunked_wins=True, first_length=False, any_coding=False),
}


def one_reading(data: bytes) -> Reading:
    """The reading of all readers. Raises AssertionError when two differ."""
    expected = strict(data)
    for name, read in READERS.items():
        found = read(data)
        for ours, theirs in zip_longest(expected, found):
            assert ours == theirs, f"{ours} is {theirs} to {name!r}"
    return expected
