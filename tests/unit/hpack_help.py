"""What tests of HPACK share."""

from __future__ import annotations

import pytest

from meshproxy.codec.hpack import encoder as encoder_module
from meshproxy.codec.hpack import memos
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.tables import FIRST_DYNAMIC, HpackError, encode_integer


@pytest.fixture(autouse=True)
def nothing_seen():
    """Blocks and fields that other tests have seen come for the first time again."""
    memos.ONCE.clear()
    memos.SHARED.clear()
    memos.SHAPES.clear()
    memos.LAYOUTS.clear()
    encoder_module._once.clear()


def pairs(text: str):
    """`name: value` lines as fields; a name may begin with a colon."""
    fields = []
    for line in text.strip().splitlines():
        name, _, value = line.strip()[1:].partition(": ")
        fields.append(((line.strip()[0] + name).encode(), value.encode()))
    return tuple(fields)


def table_of(decoder: Decoder):
    """The dynamic table, newest first, as the peer could reference it."""
    entries = []
    while True:
        try:
            entries += decoder.decode(encode_integer(FIRST_DYNAMIC + len(entries), 7, 0x80)).items
        except HpackError:
            return tuple(entries)


def size_of(fields) -> int:
    return sum(len(name) + len(value) + 32 for name, value in fields)
