"""What becomes of request heads before routing; the whole of it is compared with Envoy in tests/differential."""

from __future__ import annotations

import random
import uuid

from meshproxy.http.request_head import RequestIds


def test_request_ids() -> None:
    ids = RequestIds(random.Random(1))
    drawn = [ids.new().decode() for _ in range(1000)]
    assert len(set(drawn)) == 1000
    for text in drawn:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (4, uuid.RFC_4122)
    assert len({text[:8] for text in drawn}) > 1


def test_two_sources_draw_different_ids() -> None:
    first, second = RequestIds(random.Random(1)), RequestIds(random.Random(2))
    assert not {first.new() for _ in range(300)} & {second.new() for _ in range(300)}
