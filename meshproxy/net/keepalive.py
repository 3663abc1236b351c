"""PINGs that tell whether the peer of an HTTP/2 connection is still there (envoy.config.core.v3.KeepaliveSettings)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from random import Random

    from meshproxy.codec.h2.settings import Options


class Keepalive:
    """Of one connection, from its beginning to `stop`. Times are seconds.

    `ping(data)` sends a PING with eight bytes; `dead()` is called once when nothing at all came for the timeout after one.
    """

    __slots__ = ("_dead", "_interval", "_jitter", "_loop", "_ping", "_random", "_sending", "_timeout", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, random: Random, options: Options, ping: Callable[[bytes], None], dead: Callable[[], None]) -> None:
        self._loop = loop
        self._random = random
        self._interval = options.keepalive_interval
        self._jitter = int(options.keepalive_jitter) * round(options.keepalive_interval * 1000) // 100  # milliseconds, of whole per cent
        self._timeout = options.keepalive_timeout
        self._ping = ping
        self._dead = dead
        self._sending: asyncio.TimerHandle | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._schedule()

    def _schedule(self) -> None:
        if self._interval:
            delay = self._interval + (self._random.randrange(self._jitter) / 1000 if self._jitter else 0.0)
            self._sending = self._loop.call_later(delay, self.send)

    def send(self) -> None:
        """A PING now, unless one is not answered yet."""
        if self._waiting is None:
            self._ping((time.time_ns() // 1_000_000).to_bytes(8, "big"))
            self._wait()

    def _wait(self) -> None:
        self._waiting = self._loop.call_later(self._timeout, self._timed_out)

    def _timed_out(self) -> None:
        self.stop()
        self._dead()

    def heard(self) -> None:
        """Something came: the answer may be behind it."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._wait()

    def answered(self) -> None:
        """The answer to a PING came."""
        self.stop()
        self._schedule()

    def stop(self) -> None:
        """No more PINGs, and no more waiting for answers."""
        for timer in (self._sending, self._waiting):
            if timer is not None:
                timer.cancel()
        self._sending = self._waiting = None
