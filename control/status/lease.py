"""Which of several replicas does what only one may do: who holds a Lease of coordination.k8s.io/v1, as client-go's leader election has it."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Callable
from typing import Any

from control.api_server import ApiServer, Refused, Unreachable

_log = logging.getLogger("meshctl.kubernetes")
_CONFLICT, _NOT_FOUND = 409, 404


class Leadership:
    """`name` in `namespace` is the Lease, `identity` is ours. Who does not renew it for `duration_s` has lost it; we believe that we have it for two thirds
    of that. Clocks of other machines do not count: what counts is for how long we have seen nothing new.
    """

    def __init__(self, server: ApiServer, namespace: str, name: str, identity: str, on_change: Callable[[], None], duration_s: float = 15.0) -> None:
        self._server = server
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace, self._name, self._identity = namespace, name, identity
        self._duration_s = duration_s
        self._on_change = on_change
        self._renewed = -1.0  # when we last did
        self._seen: tuple[Any, Any] = (None, None)  # holder and time of renewal, and since when we know them
        self._since = 0.0
        self._leads = False

    @property
    def holds(self) -> bool:
        """Whether it is us."""
        return self._renewed >= 0 and asyncio.get_running_loop().time() - self._renewed < self._duration_s * 2 / 3

    async def run(self) -> None:
        """Until cancelled; then the Lease is given back, if it is ours."""
        try:
            while True:
                try:
                    await self._once()
                except (Refused, Unreachable) as error:
                    if not (isinstance(error, Refused) and error.status == _CONFLICT):
                        _log.warning("the Lease %s/%s: %s", self._namespace, self._name, error)
                if self.holds is not self._leads:
                    self._leads = self.holds
                    _log.info("%s status now, by the Lease %s/%s", "we write" if self._leads else "another writes", self._namespace, self._name)
                    self._on_change()
                await asyncio.sleep(self._duration_s / 7)
        finally:
            if self.holds:
                await self._give_back()

    async def _once(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            lease = await self._server.get(f"{self._path}/{self._name}")
        except Refused as error:
            if error.status != _NOT_FOUND:
                raise
            about = {"name": self._name, "namespace": self._namespace}
            made = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about, "spec": self._spec({})}
            await self._server.send("POST", self._path, made)
            self._renewed = now
            return
        spec = lease.get("spec") or {}
        holder, seen = spec.get("holderIdentity"), (spec.get("holderIdentity"), spec.get("renewTime"))
        if seen != self._seen:
            self._seen, self._since = seen, now
        if holder not in (None, "", self._identity) and now - self._since < float(spec.get("leaseDurationSeconds") or self._duration_s):
            self._renewed = -1.0
            return
        lease["spec"] = self._spec(spec)
        await self._server.send("PUT", f"{self._path}/{self._name}", lease)  # with its version: of two who try, one does
        self._renewed = now

    def _spec(self, before: dict[str, Any]) -> dict[str, Any]:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._duration_s)),
            "acquireTime": before.get("acquireTime") if same else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (0 if same else 1),
        }

    async def _give_back(self) -> None:
        try:
            lease = await self._server.get(f"{self._path}/{self._name}")
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                lease["spec"] = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                await self._server.send("PUT", f"{self._path}/{self._name}", lease)
        except (Refused, Unreachable) as error:
            _log.info("the Lease runs out by itself: %s", error)
        self._renewed = -1.0
