"""Connections ahead of requests for a whole cluster: which hosts get them, and in which order requests come to those."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.codec.headers import RequestHead
from meshproxy.upstream.pool import Pool
from tests.unit import upstream_help as up

HEAD = RequestHead(b"GET", b"/", b"a.test", [])


@pytest.fixture
def dialled(monkeypatch) -> list[str]:
    """The hosts that are dialled; none of them ever answers."""
    seen: list[str] = []

    def dial(pool: Pool) -> None:
        pool.connecting += 1
        seen.append(pool.host.address.text)

    monkeypatch.setattr(Pool, "_dial", dial)
    return seen


def cluster(ratio: float, count: int = 3, **fields: Any) -> Any:
    return up.cluster(up.static(up.group(*up.addresses(count)), preconnect_policy={"predictive_preconnect_ratio": ratio}, **fields))


def request(made: Any) -> str:
    """A request takes a connection; which host it is for."""
    host = made.pick(None)
    made.pool_for(host, 0, HEAD)
    return str(host.address.text)


def test_the_next_requests_come_where_the_connections_are(dialled):
    made = cluster(3.0)
    first = request(made)
    assert len(set(dialled)) == 3  # (0 + 1) * 3: one for this request, and two for the next ones
    assert dialled[-1] == first
    assert [request(made) for _ in range(3)] == dialled
    assert len(dialled) == 3  # nothing waits: there is room for all that is expected


@pytest.mark.parametrize(("ratio", "dials"), [(1.0, 0), (1.5, 2), (2.0, 2), (3.0, 3)])
def test_how_many(dialled, ratio, dials):
    request(cluster(ratio))
    assert len(dialled) == dials


@pytest.mark.parametrize(("policy", "dials"), [("ROUND_ROBIN", 3), ("RANDOM", 3), ("LEAST_REQUEST", 0), ("RING_HASH", 0), ("MAGLEV", 0)])
def test_balancers_that_cannot_look_ahead(dialled, policy, dials):
    request(cluster(3.0, lb_policy=policy))
    assert len(dialled) == dials


def test_no_more_hosts_are_chosen_ahead_than_are_healthy(dialled):
    made = cluster(3.0, 1)
    for _ in range(3):
        made.pool_for(made.hosts[0], 0, HEAD)  # a request that found its host in another way
    assert len(dialled) == 1


def test_what_was_chosen_is_forgotten_when_hosts_change(dialled):
    made = cluster(3.0)
    request(made)
    gone = made.hosts[0]
    made.set_flags(gone, 0x1)
    assert gone.address.text not in {request(made) for _ in range(6)}


def test_such_clusters_have_no_plans():
    assert cluster(1.0).plannable
    assert not cluster(2.0).plannable
    assert not cluster(2.0).one_pool
