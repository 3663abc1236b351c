"""Keys of issuers of tokens, for proxies that cannot fetch them themselves: each asked again and again, with what it said last kept while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from control.model.security import KeySource

if TYPE_CHECKING:
    from control.sources.key_fetch import Fetcher

_log = logging.getLogger("meshctl")
REFRESH_S = 300.0  # as often as proxies ask who fetch keys themselves
KEPT_S = 7 * 86400.0  # after the last answer, as in Istio
_RETRY_S = 1.0, 60.0  # after the first failure, and at most
Fetch = Callable[[KeySource, float], Awaitable[str]]


class Unusable(Exception):
    """Keys cannot be had; the text says why."""


class Statistics(NamedTuple):
    """What is known of a source. `age_s`: since it answered last; `why`: the reason of the last failure, "" after an answer."""

    issuer: str
    uri: str
    known: bool
    age_s: float | None
    why: str


@dataclass(slots=True)
class _One:
    timeout_s: float
    task: asyncio.Task[None] | None = None
    keys: str = ""
    answered: float | None = None
    why: str = ""
    failures: int = 0
    tried: asyncio.Event = field(default_factory=asyncio.Event)


class _OverHttp:
    """Imports what it needs when somebody is asked."""

    def __init__(self) -> None:
        self._fetcher: Fetcher | None = None

    async def __call__(self, source: KeySource, timeout_s: float) -> str:
        if self._fetcher is None:
            try:
                from control.sources.key_fetch import Fetcher
            except ModuleNotFoundError as error:
                if error.name != "aiohttp":
                    raise
                raise Unusable("aiohttp is needed to ask: pip install 'meshproxy[control]'") from error
            self._fetcher = Fetcher()
        return await self._fetcher(source, timeout_s)

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()


def over_http() -> Issuers:
    """That asks issuers."""
    asking = _OverHttp()
    return Issuers(asking, asking.close)


class Issuers:
    """Who is wanted is asked by a task of its own. `changed`: set when `known` is another one. To be closed, with what asks."""

    def __init__(
        self,
        fetch: Fetch,
        end: Callable[[], Awaitable[None]] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.changed = asyncio.Event()
        self._fetch = fetch
        self._end = end
        self._clock = clock
        self._pause = pause
        self._all: dict[KeySource, _One] = {}

    @property
    def known(self) -> dict[KeySource, str]:
        """Key sets."""
        return {source: one.keys for source, one in self._all.items() if one.keys}

    def want(self, sources: Mapping[KeySource, float]) -> None:
        """Whose keys are needed, and how long to wait for an answer of each, in seconds; the others are forgotten."""
        for source in [one for one in self._all if one not in sources]:
            gone = self._all.pop(source)
            if gone.task is not None:
                gone.task.cancel()
            if gone.keys:
                self.changed.set()
        for source, timeout_s in sources.items():
            known = self._all.get(source)
            if known is None:
                known = self._all[source] = _One(timeout_s)
                known.task = asyncio.create_task(self._keep(source, known), name=f"keys of {source.issuer}")
            known.timeout_s = timeout_s

    async def wait_tried(self, limit_s: float) -> None:
        """Until each was asked once, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for one in list(self._all.values()):
                    await one.tried.wait()

    def statistics(self) -> list[Statistics]:
        now = self._clock()
        return [
            Statistics(source.issuer, source.uri, bool(one.keys), None if one.answered is None else now - one.answered, one.why)
            for source, one in sorted(self._all.items())
        ]

    async def close(self) -> None:
        """End all tasks."""
        tasks = [one.task for one in self._all.values() if one.task is not None]
        self._all = {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._end is not None:
            await self._end()

    async def _keep(self, source: KeySource, one: _One) -> None:
        while True:
            try:
                keys = await self._fetch(source, one.timeout_s)
            except Unusable as error:
                self._failed(source, one, str(error))
                wait_s = min(_RETRY_S[0] * 2 ** min(one.failures - 1, 10), _RETRY_S[1])
            else:
                if one.why:
                    _log.info("keys of issuer %s are there", source.issuer)
                one.answered, one.why, one.failures = self._clock(), "", 0
                wait_s = REFRESH_S
                if keys != one.keys:
                    one.keys = keys
                    self.changed.set()
            one.tried.set()
            await self._pause(wait_s * random.uniform(0.9, 1.1))

    def _failed(self, source: KeySource, one: _One, why: str) -> None:
        one.failures += 1
        if one.keys and one.answered is not None and self._clock() - one.answered > KEPT_S:
            one.keys = ""
            self.changed.set()
        if one.why != why:
            consequence = "its last ones stay good" if one.keys else "none of its tokens is good"
            _log.warning("keys of issuer %s: %s; %s", source.issuer, why, consequence)
        one.why = why
