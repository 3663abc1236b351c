"""What the decoders of the process share: what came lately, for as long as there is room. All memos are bounded, and emptied when they are full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.fields import Fields, Shape, size_of
from meshproxy.codec.hpack.huffman import decode as decode_huffman
from meshproxy.codec.hpack.layout import Layout
from meshproxy.codec.hpack.scan import read_string
from meshproxy.codec.hpack.tables import STATIC

if TYPE_CHECKING:
    from meshproxy.codec.hpack.foresight import Step

MAX_SHARED = 256  # decoded blocks that connections share ...
MAX_SHARED_SIZE = 8192  # ... of at most so many bytes
MAX_SHARED_SHAPES = 256
MAX_LAYOUTS = 16
MAX_CHAINS = 32  # of a hundred steps at most
MAX_ONCE = 1024
MAX_INDEPENDENT = 256
MAX_NAMES = 512
MAX_NAME = 64
MAX_SECRETS = 512  # of at most 126 bytes
MAX_PAIRS = 2048
MAX_PAIR = 256

Part = Pair | bytes
Segment = tuple[bytes, int]  # with its length

# The table of decoders whose dynamic table was never used; not changed. No byte that references something is below 0x81.
STATIC_TABLE = [STATIC[0]] * 0x80 + [*STATIC]
LITERAL_NAMES: dict[bytes, bytes] = {}  # literal names as they came lately, with their length -> themselves
SECRETS: dict[bytes, bytes] = {}  # values that are never indexed, Huffman coded -> as they are: the same ones come all the time, from one client
PAIRS: dict[Pair, Pair] = {}  # fields in dynamic tables: those of different connections are mostly the same
ONCE: set[bytes | int] = set()  # blocks that came lately, and hashes of what is the same in similar ones
SHAPES: dict[tuple[Part, ...], Shape] = {}  # by the fields; of those with values that differ, the names
LAYOUTS: dict[tuple[int, ...], Layout] = {}  # by the sizes of what is no value, and whether values are coded
SHARED: dict[tuple[Pair, ...], Fields] = {}
STEPS: dict[Any, Step] = {}  # the first of each chain, by what its block was like
# Blocks without references to the dynamic table -> their fields, what they put into it (the newest first), and the size of that.
INDEPENDENT: dict[bytes, tuple[Fields, list[Pair], int]] = {}


def new_shape(key: tuple[Part, ...]) -> Shape | None:
    """A shape that nobody knows, if it comes for the second time."""
    number = hash(key)
    if number in ONCE:
        return shape_of(key)
    if len(ONCE) >= MAX_ONCE:
        ONCE.clear()
    ONCE.add(number)
    return None


def shape_of(key: tuple[Part, ...]) -> Shape | None:
    """The shape that connections share; None if it is too large."""
    shape = SHAPES.get(key)
    if shape is None:
        items = tuple((part, b"") if isinstance(part, bytes) else part for part in key)
        if size_of(items) > MAX_SHARED_SIZE:
            return None
        if len(SHAPES) >= MAX_SHARED_SHAPES:
            SHAPES.clear()
        shape = SHAPES[key] = Shape(items, tuple((place, part) for place, part in enumerate(key) if isinstance(part, bytes)))
    return shape


def layout_of(segments: tuple[Segment, ...], tail: bytes, *, coded: bool) -> Layout:
    """The layout that connections share."""
    key = (*(size for _, size in segments), len(tail), coded)
    layout = LAYOUTS.get(key)
    if layout is None:
        if len(LAYOUTS) >= MAX_LAYOUTS:
            for retired in LAYOUTS.values():
                retired.retire()
            LAYOUTS.clear()
        layout = LAYOUTS[key] = Layout(key[:-2], len(tail), coded=coded)
    return layout


def secret_of(data: bytes) -> bytes:
    """What the Huffman code `data` stands for, remembered."""
    value = decode_huffman(data)
    if len(SECRETS) >= MAX_SECRETS:
        SECRETS.clear()
    SECRETS[data] = value
    return value


def literal_name(block: bytes, position: int) -> tuple[bytes, int]:
    """The literal name at `position`, which is remembered if it is short, and the position of its value."""
    name, end = read_string(block, position)
    if end - position <= MAX_NAME and end <= len(block):
        if len(LITERAL_NAMES) >= MAX_NAMES:
            LITERAL_NAMES.clear()
        LITERAL_NAMES[block[position:end]] = name
    return name, end
