"""User instructions of a worker for one request, counted by callgrind: the same to within a percent on every machine with the same interpreter."""

from __future__ import annotations

import pytest

from benchmarks import callgrind, load, proxies
from benchmarks.backend import Backend
from benchmarks.configs import Spec

BUDGETS = {
    "minimal": (Spec(), load.MINIMAL, 60_000),
    "mesh set, 11 headers": (Spec("mesh"), load.ELEVEN, 110_000),
    "mesh set, every request different": (Spec("mesh"), load.VARYING, 135_000),
    "mesh set, every request and every answer different": (Spec("mesh"), load.TAGGED, 145_000),
    "HTTP/2, repeated": (Spec(http2=True), load.REPEATED_H2, 72_000),
    "HTTP/2, every request different": (Spec(http2=True), load.VARYING_LITERALS_H2, 140_000),
    "HTTP/2, every request different and in the header table": (Spec(http2=True), load.VARYING_H2, 140_000),
    "HTTP/2, every request and every answer different": (Spec(http2=True), load.TAGGED_H2, 175_000),
    "gRPC stream, a message of 1 KiB there and back": (Spec(http2=True), load.STREAMING, 30_000),
}
BURSTS = callgrind.Bursts(warm_up=300, small=200, big=800)


@pytest.mark.slow
@pytest.mark.skipif(not callgrind.available(), reason="valgrind is not installed: instructions per request are NOT checked")
@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_per_request(name, folder):
    spec, requests, ceiling = BUDGETS[name]
    where = folder / name.replace(" ", "-").replace(",", "")
    with Backend(where / "backend", requests.service) as service:
        count = callgrind.instructions_per_request(proxies.OURS, spec, requests, service.port, where, BURSTS)
    print(f"{name}: {count:,.0f} user instructions per request; ceiling {ceiling:,}")
    assert count <= ceiling
