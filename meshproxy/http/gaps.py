"""Heads with gaps for values: where they are cut, and how they are put together again (see `http.shape_plan` and `http.shaped_response`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from meshproxy.codec.hpack.encoder import LENGTHS
from meshproxy.codec.hpack.tables import encode_integer

if TYPE_CHECKING:
    from meshproxy.codec.headers import Pair

Join = Callable[[Sequence[bytes], Sequence[bytes], bytes], bytes]


@lru_cache(maxsize=64)
def joiner(order: tuple[int, ...], count: int, *, lengths: bool) -> Join:
    """A function that puts values between parts, of which there is one more: for each in `order` the value of that number, with its `lengths` before it if
    those are asked for. The new request id comes behind `count` values. Raises IndexError for a length that takes more than a byte.

    Written as code, for it costs a third of what a loop does.
    """
    names = ["request_id" if place == count else f"value{place}" for place in order]
    lines = [f"{name} = values[{place}]" for name, place in zip(names, order, strict=True) if place != count]
    if names:
        lines.append(f"{', '.join(f'part{number}' for number in range(len(names) + 1))} = parts")
        pieces = [f"part{number}, {f'LENGTHS[len({name})], ' if lengths else ''}{name}" for number, name in enumerate(names)]
        lines.append(f"return b''.join(({', '.join(pieces)}, part{len(names)}))")
    else:
        lines.append("return parts[0]")
    body = "\n ".join(lines)
    made: dict[str, Any] = {"LENGTHS": LENGTHS}
    exec(compile(f"def join(parts, values, request_id):\n {body}\n", "<joiner>", "exec"), made)
    join: Join = made["join"]
    return join


def cut_fields(fields: list[Pair], marks: list[bytes]) -> tuple[list[tuple[list[Pair], bytes]], tuple[int, ...]]:
    """Fields as `Encoder.encode_parts` takes them, and which value comes behind each of the parts but the last."""
    parts: list[tuple[list[Pair], bytes]] = []
    pairs: list[Pair] = []
    order = []
    for name, value in fields:
        if value in marks:
            order.append(marks.index(value))
            parts.append((pairs, name))
            pairs = []
        else:
            pairs.append((name, value))
    return [*parts, (pairs, b"")], (*order,)


def cut_wire(wire: bytes, marks: list[bytes]) -> tuple[list[bytes], tuple[int, ...]]:
    """The parts of a head around the marks, and which value comes behind each but the last."""
    places = sorted((wire.index(mark), place) for place, mark in enumerate(marks) if mark in wire)
    parts = []
    position = 0
    for at, place in places:
        parts.append(wire[position:at])
        position = at + len(marks[place])
    return [*parts, wire[position:]], tuple(place for _, place in places)


def join_long(parts: Sequence[bytes], values: Sequence[bytes], order: Sequence[int]) -> bytes:
    """What a `joiner` with lengths does, for values of any length."""
    ordered = [values[place] for place in order]
    lengths = [encode_integer(len(value), 7, 0) for value in ordered]
    return b"".join(chain.from_iterable(zip(parts, lengths, ordered, strict=False))) + parts[-1]
