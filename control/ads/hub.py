"""All streams and the snapshot that they are served from."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from control.ads.health import Health
from control.ads.interest import Interest, service_of
from control.ads.loads import Loads
from control.ads.registrations import Registrations, registration_of
from control.ads.session import Session
from control.model.security import spiffe_id
from control.model.service import OBSERVED
from control.model.snapshot import MeshSnapshot
from control.translate.proxy import ProxyKey, of_node
from control.translate.translator import Asked, Translator
from control.translate.view import View
from meshproxy.api.spiffe import SpiffeId

_log = logging.getLogger("meshctl.ads")


MAX_TIDY_S = 60.0  # between looks at what is not used


class Scope(NamedTuple):
    """How much of the mesh sidecars are sent whose Workloads do not say: what they may call, or, `observed`, what they have called. What was not called for
    `forget_s` seconds is taken away from those who ask again; 0.0: never."""

    observed: bool = False
    forget_s: float = 3600.0


class NotPermitted(Exception):
    """The client says that it is the proxy of somebody else."""


class Connection:
    """One stream; `identity` is whose it is, if that was proved.

    It is told that there is something new and comes for it when it can send: however much changes meanwhile, one push is pending.
    """

    def __init__(self, hub: Hub, session: Session, number: int) -> None:
        self.session = session
        self.number = number
        self.key: ProxyKey | None = None
        self.peer = ""
        self.identity: SpiffeId | None = None
        self.proven: frozenset[str] | None = None  # SPIFFE IDs, see `peers.proven`
        self._hub = hub
        self._snapshot: MeshSnapshot | None = None
        self._asked: Asked | None = None
        self._view: View | None = None
        self._interest = Interest(session)
        self._wake = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Connection {self.number} {self.key}>"

    def receive(self, data: bytes) -> None:
        """A request of the client. Raises ProtocolError and NotPermitted."""
        self.session.receive(data)
        if self.key is None:
            key = of_node(self.session.node)
            self._hub.check(self.identity, key)
            self.key = key
            self._hub.register(self)
        for url, why in self.session.refusals.items():
            _log.warning("%s refuses %s: %s", self.key, url.rpartition(".")[2], " ".join(why.split()))
        self.session.refusals.clear()
        self.wake()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def close(self) -> None:
        """The stream has ended: `wait` returns False."""
        self._closed = True
        self._wake.set()

    async def wait(self) -> bool:
        """Wait until there may be something to send; False when the stream is over."""
        await self._wake.wait()
        self._wake.clear()
        return not self._closed

    def responses(self) -> Iterator[bytes]:
        """What is to be sent now."""
        if self.key is None:
            return
        self._look(self.key)
        yield from self.session.responses()

    def _look(self, key: ProxyKey) -> None:
        """See what there is for the proxy now."""
        snapshot = self._hub.snapshot
        asked = self._interest.asked(self._hub.clock()) if self._hub.is_scoped(self.session, snapshot, key) else None
        if snapshot is self._snapshot and asked == self._asked:
            return
        self._snapshot, self._asked = snapshot, asked
        view = self._view = self._hub.translator.view(key, snapshot, asked)
        self.session.update(view if self._is_entitled(snapshot, key) else view.without_secrets())
        if asked is not None and self._interest.drop_unknown(view.led):
            self._look(key)

    def forget(self, before: float) -> None:
        """Take away what was used before that time and not since, as far as that is known."""
        if self._asked is None or self._view is None:
            return
        used = self._hub.loads.used(self.session.node.id, before)
        if used is None:
            return
        services: dict[str, float] = {}
        for name, when in used.items():
            services[service_of(name)] = max(when, services.get(service_of(name), when))
        if gone := self._interest.drop_idle(self._view.led, services, before):
            _log.info("%s has not called %s for long: no longer sent", self.key, ", ".join(sorted(gone)))
            self.wake()

    def _is_entitled(self, snapshot: MeshSnapshot, key: ProxyKey) -> bool:
        """Whether it may have the secrets of the workload that it says it is."""
        workload = snapshot.workloads.get((key.namespace, key.name))
        if self.proven is None or workload is None:
            return self.proven is None
        return spiffe_id(snapshot.config.security.trust_domain, workload.namespace, workload.service_account) in self.proven


class Hub:
    """Owns the connections. `snapshot` is what all of them are served from. `clock`: monotonic, in seconds."""

    def __init__(self, snapshot: MeshSnapshot, scope: Scope = Scope(), clock: Callable[[], float] = time.monotonic) -> None:  # noqa: B008  immutable
        self._scope = scope
        self.clock = clock
        self._tidied = clock()
        self.snapshot = snapshot
        self.translator = Translator()
        self.connections: set[Connection] = set()
        self.loads = Loads(clock)
        self.health = Health(clock)
        self.registrations = Registrations(clock)
        self._numbers = itertools.count(1)

    def open(self, *, delta: bool, only: str = "") -> Connection:
        """A stream has begun."""
        number = next(self._numbers)
        connection = Connection(self, Session(delta=delta, only=only, prefix=f"{number}/"), number)
        self.connections.add(connection)
        return connection

    def close(self, connection: Connection) -> None:
        """A stream has ended."""
        self.connections.discard(connection)
        self.registrations.left(connection.number)
        connection.close()

    def register(self, connection: Connection) -> None:
        """It is known whose proxy that is: it may be a workload that only its group describes."""
        assert connection.key is not None
        one = registration_of(connection.session.node, connection.key)
        if one is not None:
            account = connection.identity.path.rpartition("/")[2] if connection.identity is not None else None
            self.registrations.came(connection.number, one, account)

    def check(self, identity: SpiffeId | None, key: ProxyKey) -> None:
        """A proxy is that of the workload of the same identity; of a workload that nobody has described only the namespace can be compared.

        `identity` None: it is believed. Raises NotPermitted.
        """
        if identity is None:
            return
        workload = self.snapshot.workloads.get((key.namespace, key.name))
        wanted = f"/ns/{key.namespace}/sa/"
        if identity.path != f"{wanted}{workload.service_account}" if workload is not None else not identity.path.startswith(wanted):
            account = workload.service_account if workload is not None else "any"
            raise NotPermitted(f"{identity} may not have the configuration of {key}, whose service account is {account} of {key.namespace}")

    def is_scoped(self, session: Session, snapshot: MeshSnapshot, key: ProxyKey) -> bool:
        """Whether a proxy is sent only what it has called: by delta, over a stream for all types, unless its Workload or everybody's scope says otherwise."""
        if not session.delta or session.only:
            return False
        workload = snapshot.workloads.get((key.namespace, key.name))
        chosen = workload.sidecar.scope if workload is not None and workload.sidecar is not None else ""
        return chosen == OBSERVED if chosen else self._scope.observed

    def tidy(self) -> None:
        """To be called now and then: take away what is not used, and forget reports of who is gone."""
        self.health.tidy()
        self.registrations.tidy()
        now, forget_s = self.clock(), self._scope.forget_s
        if forget_s and now - self._tidied >= min(forget_s / 10, MAX_TIDY_S):
            self._tidied = now
            for connection in list(self.connections):
                connection.forget(now - forget_s)

    def publish(self, snapshot: MeshSnapshot) -> None:
        """Serve this from now on."""
        self.snapshot = snapshot
        for connection in self.connections:
            connection.wake()
        self.health.published(snapshot)
