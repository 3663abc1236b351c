"""What an API server has of one kind, kept up to date: a list in pages, then a watch from there, and again when the watch can go on no more.

Whatever goes wrong, what was known stays. That a kind is not there (its CRD is not installed, or is gone) is believed when it has been so for two looks.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple, Protocol

from control.api_server import JSON, ApiServer, Refused, Unreachable
from meshproxy.record import Record

_log = logging.getLogger("meshctl.kubernetes")
_PAGE = 500
_GONE, _FORBIDDEN, _NOT_FOUND, _TIMEOUT = 410, 403, 404, 504
_PARTIAL = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
_BUILT_IN = ("", "discovery.k8s.io")


class Kind(NamedTuple):
    """What to ask for. `versions`: that we know, the best first; `optional`: we can do without where we may not read it; `fields`, `labels`: selectors;
    `partial`: metadata is all that matters."""

    group: str
    kind: str
    plural: str
    versions: tuple[str, ...]
    namespaced: bool = True
    optional: bool = False
    fields: str = ""
    labels: str = ""
    partial: bool = False

    def path(self, version: str, namespace: str = "") -> str:
        """Of all its objects, or of those of a namespace."""
        root = f"/apis/{self.group}/{version}" if self.group else f"/api/{version}"
        return f"{root}/namespaces/{namespace}/{self.plural}" if namespace and self.namespaced else f"{root}/{self.plural}"

    def api_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version


class State(Enum):
    """How far one is with a kind."""

    STARTING = "starting"
    WATCHING = "watching"
    AWAY = "away"  # the API server cannot be asked, or answers with errors
    ABSENT = "absent"  # it does not serve this kind
    FORBIDDEN = "forbidden"  # we may not read it


class Pace(Record, frozen=True):
    """Seconds. `first`, `most`: after failures; `absent`: until the next look for a kind; `watch`: the shortest time that a watch is asked to last."""

    first: float = 0.5
    most: float = 30.0
    absent: float = 10.0
    watch: float = 300.0


class Sink(Protocol):
    """What is made of objects. `read` changes nothing, and gives None for what is not for us."""

    def read(self, document: dict[str, Any]) -> Any: ...
    def replace(self, read: Iterable[Any]) -> None: ...
    def put(self, document: dict[str, Any]) -> None: ...
    def remove(self, document: dict[str, Any]) -> None: ...


class Reach:
    """Whether the API server answers, as all who ask it together know, and whether any of them got further. `dice`: random.random's like."""

    def __init__(self, pace: Pace, dice: Callable[[], float] = random.random) -> None:
        self.pace = pace
        self.dice = dice
        self._waiting: set[asyncio.Event] = set()
        self._watching: set[asyncio.Event] = set()

    def moved(self) -> None:
        """Somebody got further: conditions are worth another look."""
        for one in self._watching:
            one.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is so about those who ask."""
        woken = asyncio.Event()
        self._watching.add(woken)
        try:
            while not condition():
                await woken.wait()
                woken.clear()
        finally:
            self._watching.discard(woken)

    def answered(self) -> None:
        """Those who wait because it did not need not wait any longer."""
        for one in self._waiting:
            one.set()

    async def pause(self, failures: int) -> None:
        """Wait after the so-manieth failure in a row, longer each time, and never all at the same time."""
        woken = asyncio.Event()
        self._waiting.add(woken)
        try:
            # Not wait_for: Python 3.11's forgets a cancellation that comes in the same turn as what it waits for.
            async with asyncio.timeout(min(self.pace.most, self.pace.first * 2 ** min(failures - 1, 30)) * (0.5 + self.dice() / 2)):
                await woken.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(woken)


class Discovery:
    """Which kinds an API server has. What it said is good for `memory_s`, so that all who look at about the same time ask once."""

    def __init__(self, server: ApiServer, memory_s: float) -> None:
        self._server = server
        self._memory_s = memory_s
        self._known: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def version(self, kind: Kind) -> str:
        """The best version of a kind that is there; "" without any. Raises Refused and Unreachable."""
        if kind.group in _BUILT_IN:
            return kind.versions[0]
        groups = await self._ask("/apis", self._groups)
        for version in kind.versions:
            if version in groups.get(kind.group, ()):
                path = f"/apis/{kind.group}/{version}"
                if kind.plural in await self._ask(path, lambda path=path: self._plurals(path)):  # type: ignore[misc]
                    return version
        return ""

    async def close(self) -> None:
        """Ask nothing any longer, and forget."""
        asking = [task for _, task in self._known.values()]
        self._known.clear()
        for one in asking:
            one.cancel()
        if asking:
            await asyncio.wait(asking)

    async def _ask(self, key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        now = asyncio.get_running_loop().time()
        when, task = self._known.get(key, (0.0, None))
        if task is None or now - when > self._memory_s or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(ask())
            task.add_done_callback(lambda one: one.cancelled() or one.exception())  # also if nobody waits for it any longer
            self._known[key] = now, task
        return await asyncio.shield(task)

    async def _groups(self) -> dict[str, set[str]]:
        found = await self._server.get("/apis")
        return {one["name"]: {version["version"] for version in one["versions"]} for one in found.get("groups") or ()}

    async def _plurals(self, path: str) -> set[str]:
        try:
            found = await self._server.get(path)
        except Refused as error:
            if error.status == _NOT_FOUND:  # it went between the two questions
                return set()
            raise
        return {one["name"] for one in found.get("resources") or ()}


class Reflector:
    """See above. `namespace` "" is all of them. `settled`: all is known that could be known. `reach` is told of each step."""

    def __init__(self, server: ApiServer, kind: Kind, namespace: str, sink: Sink, reach: Reach, discovery: Discovery) -> None:
        self.kind = kind
        self.namespace = namespace
        self.state = State.STARTING
        self.problem = ""
        self.resource_version = ""  # from where to watch; "" for a list first
        self.version = ""
        self.lists = 0
        self.settled = False
        self._server = server
        self._sink = sink
        self._reach = reach
        self._discovery = discovery
        self._failures = 0
        self._looks = 0  # without finding the kind

    def __repr__(self) -> str:
        return f"<Reflector {self.kind.plural} {self.namespace or '*'} {self.state.value}>"

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._once()
            except Refused as error:
                if not await self._refused(error):
                    continue
            except Unreachable as error:
                self._is(State.AWAY, str(error))
                self._failures += 1
            if self._failures:
                await self._reach.pause(self._failures)

    async def _once(self) -> None:
        if not self.version:
            self.version = await self._discovery.version(self.kind)
            if not self.version:
                await self._absent()
                return
        if not self.resource_version:
            await self._list()
            self._failures = 0
            self._looks = 0
            self.settled = True
            self._is(State.WATCHING)
            self._reach.answered()
        await self._watch()

    async def _absent(self) -> None:
        self._looks += 1
        self._failures = 0
        if self._looks > 1:
            self._sink.replace(())
        self.settled = True
        self._is(State.ABSENT)
        await asyncio.sleep(self._reach.pace.absent * (0.5 + self._reach.dice() / 2))

    async def _refused(self, error: Refused) -> bool:
        """What to do about an answer that is an error; returns whether that has to wait."""
        watched, self._failures = bool(self.resource_version), self._failures + 1
        if error.status == _GONE or (watched and error.status == _TIMEOUT):  # we are too far behind, or ahead of an API server that was set back
            self.resource_version = ""
            return self._failures > 1
        if error.status == _NOT_FOUND:
            self.version = self.resource_version = ""
            return True
        if error.status == _FORBIDDEN:
            self.settled |= self.kind.optional
            self._is(State.FORBIDDEN, str(error))
            return True
        self._is(State.AWAY, str(error))
        return True

    def _is(self, state: State, problem: str = "") -> None:
        if state is not self.state and (state in (State.AWAY, State.FORBIDDEN) or self.state in (State.AWAY, State.FORBIDDEN)):
            where = f" of {self.namespace}" if self.namespace else ""
            if problem:
                _log.warning("%s%s: %s%s", self.kind.plural, where, problem, "; what was known is served" if self.lists else "")
            else:
                _log.info("%s%s: %s", self.kind.plural, where, state.value)
        self.state, self.problem = state, problem
        self._reach.moved()

    def _accept(self, suffix: str) -> str:
        return _PARTIAL.format(suffix) if self.kind.partial else JSON

    # --- the two questions

    async def _list(self) -> None:
        """Ask for all of it, a page at a time. A list that takes too long to be one is asked for again, in one piece."""
        try:
            read, at = await self._pages(_PAGE)
        except Refused as error:
            if error.status != _GONE:
                raise
            read, at = await self._pages(0)
        self.lists += 1
        self._sink.replace(read)
        self.resource_version = at

    async def _pages(self, limit: int) -> tuple[list[Any], str]:
        path = self.kind.path(self.version, self.namespace)
        asked: dict[str, str | int] = {**self._selectors(), **({"limit": limit} if limit else {})}
        read = []
        while True:
            page = await self._server.get(path, asked, self._accept("List"))
            for item in page.get("items") or ():
                one = self._sink.read(self._named(item))
                if one is not None:
                    read.append(one)
            about = page.get("metadata") or {}
            if not about.get("continue"):
                return read, str(about.get("resourceVersion") or "")
            asked["continue"] = about["continue"]

    async def _watch(self) -> None:
        """Take what changes, for as long as the API server tells us."""
        loop, pace = asyncio.get_running_loop(), self._reach.pace
        began, told = loop.time(), False
        asked: dict[str, str | int] = self._selectors()
        asked |= {"resourceVersion": self.resource_version, "allowWatchBookmarks": "true", "timeoutSeconds": int(pace.watch * (1 + self._reach.dice())) or 1}
        path = self.kind.path(self.version, self.namespace)
        async with self._server.events(path, asked, self._accept("")) as events:
            if self.state is not State.WATCHING:
                self._is(State.WATCHING)
                self._reach.answered()
            async for event in events:
                told, self._failures = True, 0
                self._take(str(event.get("type")), event.get("object") or {})
        if not told and loop.time() - began < pace.first:  # somebody in between ends what he does not understand
            self._failures += 1

    def _take(self, kind: str, document: dict[str, Any]) -> None:
        if kind == "ERROR":
            raise Refused(int(document.get("code") or 500), str(document.get("reason") or ""), str(document.get("message") or "the watch failed"))
        if kind in ("ADDED", "MODIFIED"):
            self._sink.put(self._named(document))
        elif kind == "DELETED":
            self._sink.remove(self._named(document))
        at = (document.get("metadata") or {}).get("resourceVersion")
        if at:
            self.resource_version = str(at)
        self._reach.moved()

    def _selectors(self) -> dict[str, str | int]:
        return {name: value for name, value in (("fieldSelector", self.kind.fields), ("labelSelector", self.kind.labels)) if value}

    def _named(self, document: dict[str, Any]) -> dict[str, Any]:
        """Items of lists do not say what they are, and metadata alone says that it is metadata."""
        document["apiVersion"], document["kind"] = self.kind.api_version(self.version), self.kind.kind
        return document
