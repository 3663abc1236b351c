"""PINGs of HTTP/2 connections: when they are sent, and when a peer is given up."""

from random import Random

import pytest

from meshproxy.codec.h2.settings import Options
from meshproxy.net.keepalive import Keepalive
from tests.unit.http2_downstream_help import Loop


class Last(Random):
    """As late as it can be. Keeps the range that was asked for."""

    asked = 0

    def randrange(self, start, stop=None, step=1):
        self.asked = start
        return start - 1


class Peer:
    """The other end: when PINGs came, and whether it is taken for dead."""

    def __init__(self, **options: float) -> None:
        self.loop = Loop()
        self.random = Last()
        self.pings: list[float] = []
        self.dead = False
        values = {f"keepalive_{name}": value for name, value in options.items()}
        self.keepalive = Keepalive(self.loop, self.random, Options(**values), self._ping, self._die)  # type: ignore[arg-type]

    def _ping(self, data: bytes) -> None:
        assert len(data) == 8
        self.pings.append(round(self.loop.now - 1000, 3))

    def _die(self) -> None:
        self.dead = True


@pytest.mark.parametrize(
    ("interval", "jitter", "milliseconds"),
    [(10, 15, 1500), (10, 15.9, 1500), (10, 0.9, 0), (0.1, 15, 15), (0.001, 15, 0), (10, 0, 0), (1, 100, 1000), (10, 250, 25_000)],
)
def test_jitter_is_added_to_each_interval(interval, jitter, milliseconds):
    peer = Peer(interval=interval, jitter=jitter, timeout=5)
    assert peer.random.asked == milliseconds
    delay = interval + max(milliseconds - 1, 0) / 1000
    peer.loop.pass_(delay * 1.01)
    assert peer.pings == [pytest.approx(delay, abs=0.001)]
    peer.keepalive.answered()
    peer.loop.pass_(delay * 1.01)
    assert len(peer.pings) == 2
    assert not peer.dead


def test_one_ping_at_a_time_and_none_after_the_end():
    peer = Peer(interval=10, jitter=0, timeout=30)
    peer.loop.pass_(11)
    peer.keepalive.send()
    peer.loop.pass_(15)
    assert peer.pings == [10]
    peer.keepalive.answered()
    peer.loop.pass_(10)
    assert peer.pings == [10, 36]
    peer.keepalive.stop()
    assert peer.loop.waiting == 0


def test_whatever_is_heard_gives_it_more_time():
    peer = Peer(interval=10, jitter=0, timeout=2)
    peer.keepalive.heard()
    peer.loop.pass_(11.5)
    for _ in range(3):
        peer.keepalive.heard()
        peer.loop.pass_(1.5)
    assert not peer.dead
    peer.loop.pass_(0.6)
    assert peer.dead
    assert peer.loop.waiting == 0


def test_without_an_interval_it_is_asked_only_when_told():
    peer = Peer(timeout=2, idle_interval=1)
    peer.loop.pass_(1000)
    assert peer.pings == []
    peer.keepalive.send()
    peer.keepalive.answered()
    peer.loop.pass_(1000)
    assert peer.pings == [1000]
    assert not peer.dead
