"""How heads of one shape are put together (`http.shape_plan`)."""

from itertools import permutations

import pytest

from meshproxy.http.gaps import joiner

PARTS = [b"<0>", b"<1>", b"<2>", b"<3>"]
VALUES = [b"path", b"an id", b""]


@pytest.mark.parametrize("order", [(), *(order for count in (1, 2, 3) for order in permutations(range(4), count))])
def test_values_come_in_their_order_behind_their_lengths(order):
    """Number three is the new request id."""
    parts = PARTS[: len(order) + 1]
    values = [[*VALUES, b"new"][place] for place in order]
    plain = b"".join(part + value for part, value in zip(parts, values, strict=False)) + parts[-1]
    assert joiner(order, 3, lengths=False)(parts, VALUES, b"new") == plain
    coded = b"".join(part + bytes((len(value),)) + value for part, value in zip(parts, values, strict=False)) + parts[-1]
    assert joiner(order, 3, lengths=True)(parts, VALUES, b"new") == coded


def test_a_length_of_more_than_a_byte_is_told():
    assert joiner((0,), 1, lengths=True)([b"a", b"b"], [bytes(126)], b"") == b"a\x7e" + bytes(126) + b"b"
    with pytest.raises(IndexError):
        joiner((0,), 1, lengths=True)([b"a", b"b"], [bytes(127)], b"")
    assert joiner((0,), 1, lengths=False)([b"a", b"b"], [bytes(127)], b"") == b"a" + bytes(127) + b"b"
