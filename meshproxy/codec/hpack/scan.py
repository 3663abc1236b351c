"""What a valid block says of the dynamic table, without decoding it."""

from __future__ import annotations

from meshproxy.codec.hpack.huffman import decode as decode_huffman
from meshproxy.codec.hpack.tables import FIRST_DYNAMIC, NEWEST, decode_rest

Reference = tuple[int, int, int, bool, bool]


def references_of(block: bytes) -> tuple[list[Reference], list[tuple[int, int]]] | None:
    """What a block, which is valid, says of the dynamic table: its references, and what it inserts.

    Of each reference, where the byte is that would be another one for another entry (-1 where there is none); how many entries were newer when the block
    began, below zero for those of the block itself; the place of the field; whether it is all of that, or its name; whether it comes behind an insertion. Of
    each insertion, the place of the field, and where the length of its value is. None where nothing is inserted, or there is what hardly anybody sends.
    """
    position = place = 0
    found: list[Reference] = []
    inserted: list[tuple[int, int]] = []
    while position < len(block):
        first = block[position]
        at = position
        position += 1
        if first >= 0x80:
            if first == 0xFF:
                return None
            if first >= NEWEST:
                found.append((at, first - NEWEST - len(inserted), place, True, bool(inserted)))
            place += 1
            continue
        if 0x20 <= first < 0x40:
            return None
        most = 63 if first >= 0x40 else 15
        index = first & most
        if index == most:
            at = position
            index, position = decode_rest(block, position, most)
            if position > at + 1:
                return None
        elif not index:
            length = block[position] & 127
            if length == 127:
                return None
            position += 1 + length
        elif index >= FIRST_DYNAMIC:
            at = -1  # in the first byte, which has no room for more
        begin = position
        length = block[begin] & 127
        if length == 127:
            return None
        position += 1 + length
        if index >= FIRST_DYNAMIC:
            found.append((at, index - FIRST_DYNAMIC - len(inserted), place, False, bool(inserted)))
        if most == 63:
            inserted.append((place, begin))
        place += 1
    return (found, inserted) if inserted else None


def insertions_of(block: bytes) -> list[int] | None:
    """Which fields of a valid block go into the dynamic table; None if it depends on what is in there already."""
    position = place = 0
    inserted = []
    while position < len(block):
        first = block[position]
        position += 1
        if first >= 0x80:
            most = 127
        elif first >= 0x40:
            most = 63
            inserted.append(place)
        elif first >= 0x20:
            return None
        else:
            most = 15
        index = first & most
        if index == most:
            index, position = decode_rest(block, position, most)
        if index >= FIRST_DYNAMIC:
            return None
        if first < 0x80:
            if not index:
                _, position = read_string(block, position)
            _, position = read_string(block, position)
        place += 1
    return inserted


def read_string(block: bytes, position: int) -> tuple[bytes, int]:
    """The string at `position`, and the position after it; which is beyond the block's end if the string is."""
    first = block[position]
    position += 1
    length = first & 127
    if length == 127:
        length, position = decode_rest(block, position, 127)
    data = block[position : position + length]
    position += length
    return decode_huffman(data) if first >= 128 and position <= len(block) else data, position
