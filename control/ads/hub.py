"""All streams and the snapshot that they are served from."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

from control.ads.loads import Loads
from control.ads.session import Session
from control.model.security import spiffe_id
from control.model.snapshot import MeshSnapshot
from control.translate.proxy import ProxyKey, of_node
from control.translate.translator import Translator
from meshproxy.api.spiffe import SpiffeId


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
        snapshot = self._hub.snapshot
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            view = self._hub.translator.view(self.key, snapshot)
            self.session.update(view if self._is_entitled(snapshot, self.key) else view.without_secrets())
        yield from self.session.responses()

    def _is_entitled(self, snapshot: MeshSnapshot, key: ProxyKey) -> bool:
        """Whether it may have the secrets of the workload that it says it is."""
        workload = snapshot.workloads.get((key.namespace, key.name))
        if self.proven is None or workload is None:
            return self.proven is None
        return spiffe_id(snapshot.config.security.trust_domain, workload.namespace, workload.service_account) in self.proven


class Hub:
    """Owns the connections. `snapshot` is what all of them are served from."""

    def __init__(self, snapshot: MeshSnapshot) -> None:
        self.snapshot = snapshot
        self.translator = Translator()
        self.connections: set[Connection] = set()
        self.loads = Loads()
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
        connection.close()

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

    def publish(self, snapshot: MeshSnapshot) -> None:
        """Serve this from now on."""
        self.snapshot = snapshot
        for connection in self.connections:
            connection.wake()
