"""Writes statuses and Events, when we hold the Lease."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from control.api_server import MERGE, ApiServer, Refused, Unreachable
from control.kinds import registry
from control.kinds.fields import FLAW
from control.model.secret import CaBundle
from control.sources.kubernetes import KINDS
from control.status.conditions import Object
from control.status.gateway_api import statuses

if TYPE_CHECKING:
    from control.app import Mesh
    from control.sources.kubernetes import About
    from control.status.lease import Leadership

_log = logging.getLogger("meshctl.kubernetes")
_PLURALS = {(kind.group, kind.kind): kind.plural for kind in KINDS}
_CONFLICT, _NOT_FOUND = 409, 404
_REST_S = 1.0  # between two rounds: a hundred routes that change one by one are written in a few
_AGAIN_S = 10.0
_LONGEST = 1024  # bytes of an Event's message


class Writer:
    """`wake` says that there may be something to write."""

    def __init__(self, server: ApiServer, mesh: Mesh) -> None:
        self._server = server
        self._mesh = mesh
        self._woken = asyncio.Event()
        self._told: set[str] = set()  # names of Events
        self.written = 0

    def wake(self) -> None:
        self._woken.set()

    async def run(self, leadership: Leadership) -> None:
        """Until cancelled."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            if leadership.holds and not await self.write(lambda: leadership.holds):
                asyncio.get_running_loop().call_later(_AGAIN_S, self.wake)
            await asyncio.sleep(_REST_S)

    async def write(self, may: Callable[[], bool] = lambda: True) -> bool:
        """Bring everything up to date, as long as we `may`; returns whether that was possible."""
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whole = True
        bundles = {(one.namespace, one.name) for one in self._mesh.store.objects.values() if isinstance(one, CaBundle)}
        for one, status in list(statuses(self._objects(), self._mesh.snapshot, now, bundles)):
            if not may():
                return True  # it is for another to go on
            whole &= await self._put(one, status)
        told, self._told = self._told, set()  # of what is wrong no more, nothing has to be known
        for name, message in self._complaints().items():
            if not may():
                return True
            whole &= await self._tell(name, message, now, told)
        return whole

    def _objects(self) -> list[Object]:
        cluster, store = self._mesh.cluster, self._mesh.store
        problems = self._complaints(flaws=False)
        found = []
        for name, about in cluster.about.items() if cluster is not None else ():
            identity = registry.identity(about.document) if about.document is not None else None
            if about.document is not None and identity is not None:
                wrong = (problems[name],) if name in problems else ()
                found.append(Object(identity, about.document, store.objects.get(identity), wrong))
        return found

    def _complaints(self, *, flaws: bool = True) -> dict[str, str]:
        """What is wrong with objects of the cluster, by the store's name of them; without `flaws`, which have conditions of their own, why they are refused."""
        found: dict[str, list[str]] = {}
        for one in self._mesh.troubles:
            if self._mesh.cluster is not None and one.file in self._mesh.cluster.about and (flaws or one.problem.kind != FLAW):
                found.setdefault(one.file, []).append(str(one.problem))
        return {name: "; ".join(some) for name, some in found.items()}

    async def _put(self, one: Object, status: dict[str, Any]) -> bool:
        """Only if the object is still the one that we know."""
        meta = one.document["metadata"]
        patch = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": status}
        try:
            await self._server.send("PATCH", f"{self._path(one)}/status", patch, content_type=MERGE)
        except Refused as error:
            if error.status in (_CONFLICT, _NOT_FOUND):  # a newer state, or none, is on its way to us
                return True
            _log.warning("the status of %s: %s", one.identity, error)
            return False
        except Unreachable as error:
            _log.info("the status of %s: %s", one.identity, error)
            return False
        self.written += 1
        return True

    def _path(self, one: Object) -> str:
        meta = one.document["metadata"]
        where = f"/namespaces/{meta['namespace']}" if meta.get("namespace") else ""
        return f"/apis/{one.document['apiVersion']}{where}/{_PLURALS[one.identity[:2]]}/{meta['name']}"

    async def _tell(self, name: str, message: str, now: str, told: set[str]) -> bool:
        """An Event about what is wrong, once for each thing that is. `told`: names of Events that are there."""
        about: About | None = self._mesh.cluster.about.get(name)  # type: ignore[union-attr]
        identity = next((one.identity for one in self._mesh.troubles if one.file == name and one.identity is not None), None)
        if about is None or identity is None:
            return True  # it has gone, or is right, since we began
        _, kind, namespace, own = identity
        event = f"{own[:200]}.{hashlib.blake2b(f'{about.uid} {message}'.encode(), digest_size=8).hexdigest()}"
        if event in told:
            self._told.add(event)
            return True
        document = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": event, "namespace": namespace},
            "involvedObject": {"apiVersion": about.api_version, "kind": kind, "namespace": namespace, "name": own, "uid": about.uid},
            "type": "Warning",
            "reason": "Refused",
            "message": message[:_LONGEST],
            "source": {"component": "meshctl"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._server.send("POST", f"/api/v1/namespaces/{namespace}/events", document)
        except Refused as error:
            if error.status != _CONFLICT:  # another replica, or we ourselves before, said so
                _log.warning("an Event about %s: %s", name, error)
                return error.status == _NOT_FOUND
        except Unreachable:
            return False
        self._told.add(event)
        return True
