"""Whatever comes, and however it is cut: the ClientHello reader answers, asks for more, or says that it is none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec.client_hello import ClientHello, NotClientHelloError, TooLargeError, parse
from tests.unit.test_client_hello import built, extension, extensions, hello, names

REAL = hello()
hellos = st.builds(
    lambda name, alpn, padding: built(extensions(names(name), extension(16, len(alpn).to_bytes(2, "big") + alpn), extension(21, bytes(padding)))),
    st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name),
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4).map(lambda names: b"".join(bytes((len(name),)) + name for name in names)),
    st.integers(0, 600),
)


def outcome(data: bytes) -> ClientHello | str | None:
    try:
        return parse(data)
    except NotClientHelloError:
        return "not"
    except TooLargeError:
        return "large"


@given(hellos, st.binary(max_size=20))
def test_prefixes_wait_and_the_rest_does_not_matter(data, rest):
    found = parse(data)
    assert found is not None
    assert found.size == len(data)
    assert all(parse(data[:size]) is None for size in range(len(data)))
    assert parse(data + rest) == found


@given(hellos, st.data())
def test_records_do_not_matter(data, draw):
    message = data[5:]
    cuts = sorted(draw.draw(st.sets(st.integers(1, len(message) - 1), max_size=6)))
    parts = [message[start:end] for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    records = b"".join(b"\x16\x03\x03" + len(part).to_bytes(2, "big") + part for part in parts)
    found, expected = parse(records), parse(data)
    assert found is not None
    assert expected is not None
    assert (found.server_name, found.alpn) == (expected.server_name, expected.alpn)


@given(st.binary(max_size=400))
def test_garbage(data):
    outcome(data)
    outcome(b"\x16\x03\x01" + data)
    outcome(b"\x16\x03\x01" + len(data).to_bytes(2, "big") + data)


@given(st.integers(0, len(REAL) - 1), st.integers(0, 255), st.binary(max_size=8))
def test_damaged(at, byte, inserted):
    outcome(REAL[:at] + bytes((byte,)) + REAL[at + 1 :])
    outcome(REAL[:at] + inserted + REAL[at:])


@given(st.binary(max_size=300), st.data())
def test_a_verdict_never_changes_with_more_bytes(data, draw):
    data = REAL[: draw.draw(st.integers(0, len(REAL)))] + data
    first: object = None
    for size in range(len(data) + 1):
        found = outcome(data[:size])
        if first is not None:
            assert found == first
        first = found
