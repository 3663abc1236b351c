"""The catalogue of tests/attack/test_smuggling.py on both: nothing that Envoy refuses passes here."""

from __future__ import annotations

import asyncio

from tests.attack.test_smuggling import catalogue, responses
from tests.differential.harness import Pair, Rig, bootstrap, cluster, http, to

_QUICK = {"stream_idle_timeout": "0.5s", "request_headers_timeout": "0.5s", "drain_timeout": "0.02s", "common_http_protocol_options": {"idle_timeout": "0.5s"}}
CONFIG = bootstrap(
    http("main", to("a"), **_QUICK),
    http("liberal", to("a"), **_QUICK, stream_error_on_invalid_http_message=True, upgrade_configs=[{"upgrade_type": "websocket"}],
         http_protocol_options={"accept_http_10": True, "default_host_for_http_10": "a.test", "enable_trailers": True}),
    clusters=[cluster("a")],
)  # fmt: skip


async def passed(rig: Rig, listener: str, requests: list[bytes]) -> list[int]:
    """How many requests of each attempt were answered by the upstream, or as if by it."""
    waiting = list(enumerate(requests))
    found = [0] * len(requests)

    async def shoot() -> None:
        while waiting:
            number, request = waiting.pop()
            wire = await rig.connect(listener)
            wire.send(request)
            await wire.until(lambda: False)
            received = bytes(wire.received)
            if received.startswith(b"HTTP/"):  # and not frames: `PRI * HTTP/2.0` begins HTTP/2, in which none of these is a request
                found[number] = responses(received).count(200)
            wire.close()

    await asyncio.gather(*(shoot() for _ in range(100)))
    return found


def test_nothing_passes_that_envoy_refuses(pair: Pair) -> None:
    """Attempt by attempt, on a plain listener and on one with every liberty that Envoy can be given."""

    async def both(listener: str, requests: list[bytes]) -> list[list[int]]:
        return await asyncio.gather(passed(pair.oracle, listener, requests), passed(pair.subject, listener, requests))

    for listener in ("main", "liberal"):
        requests = list(dict.fromkeys(catalogue()))
        for attempt in range(3):  # where a busy machine let one of the two run into a timeout, both get another chance
            envoys, ours = pair.loop.run_until_complete(both(listener, requests))
            assert attempt or sum(ours) > 100
            requests = [request for request, theirs, mine in zip(requests, envoys, ours, strict=True) if mine > theirs]
            if not requests:
                break
        assert not requests, f"{listener}: {len(requests)} pass here and not at Envoy: {requests[:5]}"
