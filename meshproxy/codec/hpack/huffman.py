"""HPACK's Huffman code (RFC 7541 section 5.2 and appendix B): decoding, in C where that is possible.

The code is a canonical one, as those of DEFLATE are: of the codes of one length, higher symbols have higher codes. Cut off at DEFLATE's 15 bits, one code is
left over, fifteen ones, with which all longer codes begin; and in DEFLATE every block needs a code that ends it. So a DEFLATE block with this code, and
without any distance codes, is what zlib's decoder reads as HPACK strings: it has only to be given the bits of each byte in the reverse order.

One decoder serves the whole process, in the midst of one block that never ends. So each string has to end at the end of a code, whatever its padding was: two
bytes come after it (`_RESYNC`) that bring the decoder there from any state, by way of three symbols that tell how many ones the padding had. Nothing that
could end the block is given to that decoder: strings in which fifteen ones follow each other, as they do in the codes of some control characters, the
backslash and bytes above 127, are decoded by a loop over half-bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

from meshproxy.codec.hpack.tables import HpackError

# Symbols by the length of their codes in bits, shortest first, each group in the order of the codes. The codes follow from that.
_BY_LENGTH: dict[int, bytes] = {
    5: b"012aceiost",
    6: b" %-./3456789=A_bdfghlmnpru",
    7: b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: b"&*,;XZ",
    10: b'!"()?',
    11: b"'+|",
    12: b"#>",
    13: b"\0$@[]~",
    14: b"^}",
    15: b"<`{",
    19: b"\\\xc3\xd0",
    20: bytes((128, 130, 131, 162, 184, 194, 224, 226)),
    21: bytes((153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230)),
    22: bytes((129, 132, 133, 134, 136, 146, 154, 156, 160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233)),
    23: bytes((1, 135, 137, 138, 139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180, 182, 183, 188, 191, 197, 231, 239)),
    24: bytes((9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237)),
    25: bytes((199, 207, 234, 235)),
    26: bytes((192, 193, 200, 201, 202, 205, 210, 213, 218, 219, 238, 240, 242, 243, 255)),
    27: bytes((203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250, 251, 252, 253, 254)),
    28: bytes((2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31, 127, 220, 249)),
    30: bytes((10, 13, 22)),  # and the end of string, thirty ones, which must not occur
}
_END_OF_STRING_BITS = 30
_DEFLATE_BITS = 15
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bit by bit

_RESYNC = b"\x7c\x60"
# What is put between strings that are decoded together: `_RESYNC`, and the codes of "0", "-" and a zero byte, which end with a byte.
_BETWEEN = b"\x7c\x60\x02\xdf\xf8"
# What the first byte is of the three that `_RESYNC` is decoded to behind a padding of no, one ... seven ones; it is another one behind anything else.
_PADDED = frozenset(b"9DTvz;Z)")
_LEADING_ONES = [8 - (byte ^ 255).bit_length() for byte in range(256)]
_TRAILING_ONES = [_LEADING_ONES[byte] for byte in _REVERSED]


def decode(data: bytes) -> bytes:
    """The string that `data` is the code of. Raises HpackError if it does not end in a padding of less than eight ones, or contains the end of string."""
    ended = data + _RESYNC
    if 255 in data and _has_fifteen_ones(ended):
        return _decode_slowly(data)
    try:
        text = _inflate(ended.translate(_REVERSED))
    except MemoryError:
        _stop()
        raise
    if text[-3] in _PADDED:
        return text[:-3]
    raise HpackError("Huffman padding")


def decode_visible(data: list[bytes]) -> list[bytes] | None:
    """`decode` for several strings at once, if all they contain is visible ASCII characters and spaces; else None."""
    # HOT
    joined = _BETWEEN.join(data) + _BETWEEN
    if 255 in joined and _has_fifteen_ones(joined):
        return None
    try:
        text = _inflate(joined.translate(_REVERSED))
    except MemoryError:
        _stop()
        raise
    # The codes of all other characters are too long for that decoder, but for zero, which is behind each string.
    ended = text.split(b"\0")
    if len(ended) != len(data) + 1:
        return None
    ended.pop()
    strings = []
    for string in ended:
        if string[-5] not in _PADDED:
            raise HpackError("Huffman padding")
        strings.append(string[:-5])
    return strings


def _has_fifteen_ones(data: bytes) -> bool:
    """Whether fifteen ones follow each other in `data`, whose last byte ends with a zero. One byte of them is all ones."""
    at = data.find(255)
    while at >= 0:
        if _TRAILING_ONES[data[at - 1]] + _LEADING_ONES[data[at + 1]] >= 7:
            return True
        at = data.find(255, at + 1)
    return False


def _start(data: bytes) -> bytes:
    """What `_inflate` is until it is needed, which in many a process it never is."""
    global _inflate  # noqa: PLW0603
    _inflate = _inflater()
    return _inflate(data)


def _stop() -> None:
    """Nobody knows where the decoder stands."""
    global _inflate  # noqa: PLW0603
    _inflate = _start


_inflate: Callable[[bytes], bytes] = _start


def _codes() -> dict[str, int]:
    """Code, as text of zeros and ones -> symbol; without the end of string."""
    codes: dict[str, int] = {}
    code = 0
    before = 0
    for bits, symbols in _BY_LENGTH.items():
        code <<= bits - before
        before = bits
        for symbol in symbols:
            codes[f"{code:0{bits}b}"] = symbol
            code += 1
    return codes


def _inflater() -> Callable[[bytes], bytes]:
    """zlib's decoder after the head of a block (RFC 1951 section 3.2.7) that describes the code."""
    lengths = bytearray(257)
    for bits, symbols in _BY_LENGTH.items():
        if bits <= _DEFLATE_BITS:
            for symbol in symbols:
                lengths[symbol] = bits
    lengths[256] = _DEFLATE_BITS  # the end of the block
    lengths.append(0)  # no distance codes
    # Least significant bit first: not the last block, dynamic codes, 257 of them, one distance code, all 19 code lengths.
    bits_of_head = "0" + "01" + "00000" + "00000" + "1111"
    # Of those the lengths 0 to 15 are written as themselves, in four bits; 16, 17 and 18 mean repetition and come first.
    bits_of_head += "000" * 3 + "001" * 16
    # Codes, other than numbers, are written from their most significant bit on.
    bits_of_head += "".join(f"{length:04b}" for length in lengths)
    # Spaces, so that what follows begins at a byte.
    while len(bits_of_head) % 8:
        bits_of_head += "010100"
    head = bytes(int(bits_of_head[at : at + 8][::-1], 2) for at in range(0, len(bits_of_head), 8))
    decoder = zlib.decompressobj(-9)
    decoder.decompress(head)
    return decoder.decompress


_Step = tuple[bytes, int]


def _decode_slowly(data: bytes) -> bytes:
    table, accepting = _half_bytes()
    pieces: list[bytes] = []
    state = 0
    for byte in data:
        piece, state = table[state + (byte >> 4)]
        pieces.append(piece)
        piece, state = table[state + (byte & 15)]
        pieces.append(piece)
    if state not in accepting:
        raise HpackError("Huffman padding or end of string")
    return b"".join(pieces)


@cache
def _half_bytes() -> tuple[list[_Step], frozenset[int]]:
    """Transitions by sixteen times the state plus half a byte: (what is decoded, sixteen times the next state); and the states that a string may end in."""
    codes = _codes()
    end = "1" * _END_OF_STRING_BITS
    # A state is what was read of a code, in which the end of string is a state that is never left.
    prefixes = sorted({code[:length] for code in codes for length in range(len(code))} | {end[:length] for length in range(len(end) + 1)}, key=len)
    numbers = {prefix: 16 * number for number, prefix in enumerate(prefixes)}
    table: list[_Step] = []
    for prefix in prefixes:
        for half in range(16):
            decoded = b""
            read = prefix
            for bit in f"{half:04b}":
                if read != end:
                    read += bit
                symbol = codes.get(read)
                if symbol is not None:
                    decoded += bytes((symbol,))
                    read = ""
            table.append((decoded, numbers[read]))
    return table, frozenset(numbers["1" * ones] for ones in range(8))
