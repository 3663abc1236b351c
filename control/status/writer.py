"""Writes statuses and Events, when we hold the Lease."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import logging
from typing import TYPE_CHECKING, Any

from control.api_server import MERGE, ApiServer, Refused, Unreachable
from control.kinds import registry
from control.status.gateway_api import Object, statuses

if TYPE_CHECKING:
    from control.app import Mesh
    from control.sources.kubernetes import About
    from control.status.lease import Leadership

_log = logging.getLogger("meshctl.kubernetes")
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
            if leadership.holds and not await self.write():
                asyncio.get_running_loop().call_later(_AGAIN_S, self.wake)
            await asyncio.sleep(_REST_S)

    async def write(self) -> bool:
        """Bring everything up to date; returns whether that was possible."""
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whole = True
        for one, status in list(statuses(self._objects(), self._mesh.snapshot, now)):
            whole &= await self._put(one, status)
        for name, message in self._complaints().items():
            whole &= await self._tell(name, message, now)
        return whole

    def _objects(self) -> list[Object]:
        cluster, store = self._mesh.cluster, self._mesh.store
        problems = self._complaints()
        found = []
        for name, about in cluster.about.items() if cluster is not None else ():
            identity = registry.identity(about.document) if about.document is not None else None
            if about.document is not None and identity is not None:
                wrong = (problems[name],) if name in problems else ()
                found.append(Object(identity, about.document, store.objects.get(identity), wrong))
        return found

    def _complaints(self) -> dict[str, str]:
        """What is wrong with objects of the cluster, by the store's name of them."""
        found: dict[str, list[str]] = {}
        for one in self._mesh.troubles:
            if self._mesh.cluster is not None and one.file in self._mesh.cluster.about:
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
        kind = one.identity[1].lower()
        return f"/apis/{one.document['apiVersion']}{where}/{kind}{'es' if kind.endswith('s') else 's'}/{meta['name']}"

    async def _tell(self, name: str, message: str, now: str) -> bool:
        """An Event about what is wrong, once for each thing that is."""
        about: About = self._mesh.cluster.about[name]  # type: ignore[union-attr]
        _, kind, namespace, own = next(one.identity for one in self._mesh.troubles if one.file == name and one.identity is not None)
        event = f"{own[:200]}.{hashlib.blake2b(f'{about.uid} {message}'.encode(), digest_size=8).hexdigest()}"
        if event in self._told:
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
