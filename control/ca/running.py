"""The authority as a part of a running control plane: everything of this package, wired together for a gRPC server.

running = RunningAuthority(Options(folder, "cluster.local", socket="/run/meshctl/ca.sock"))
server.add_generic_rpc_handlers(running.handlers())
for address in running.inner: server.add_insecure_port(address)     # before it starts
await running.start()                                               # after it has started
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from control.ca.admission import Admission
from control.ca.attestation import Attestor, Renewals, UnixPeers
from control.ca.authority import Authority
from control.ca.kubernetes import KubernetesTokens, Reviews
from control.ca.rotation import Settings
from control.ca.server import OwnCertificate, UnixFront
from control.ca.service import CertificateService
from control.ca.tokens import JoinTokens
from meshproxy.api import spiffe
from meshproxy.record import Record

if TYPE_CHECKING:
    import grpc

_TICK_S = 60.0
NAMES = ("localhost", "127.0.0.1", "::1")
SYSTEM_NAMESPACE, SERVICE_ACCOUNT = "mesh-system", "meshctl"


class Options(Record, frozen=True):
    """`folder`: of the authority's keys; `socket`: path of the Unix socket whose callers are known by their process, "" for none; `names`: that the control
    plane's TLS port is called by; `reviews`: who knows service account tokens."""

    folder: str
    trust_domain: str
    settings: Settings = Settings()
    socket: str = ""
    names: Sequence[str] = NAMES
    reviews: Reviews | None = None


class RunningAuthority:
    """See above. Raises StoreError and BadCertificate as Authority does, ValueError for bad options. `peers`: who the processes of this machine are;
    `admission`: who calls other services of the same gRPC server by TLS."""

    def __init__(self, options: Options) -> None:
        self.authority = Authority(options.folder, options.trust_domain, options.settings)
        self.tokens = tokens_of(options.folder)
        self.peers = UnixPeers()
        attestors: list[Attestor] = [self.tokens, Renewals(options.trust_domain, self.authority.bundle)]
        accounts = KubernetesTokens(options.trust_domain, options.reviews) if options.reviews is not None else None
        if accounts is not None:
            attestors.append(accounts)
        self.admission = Admission(options.trust_domain, accounts)
        self._front = UnixFront(options.socket) if options.socket else None
        if self._front is not None:
            attestors.append(self.peers)
        self.service = CertificateService(self.authority, attestors, self._front.peer_of if self._front is not None else lambda _: None)
        self._own = OwnCertificate(self.authority, spiffe.workload(options.trust_domain, SYSTEM_NAMESPACE, SERVICE_ACCOUNT), options.names)
        self._every = min(_TICK_S, options.settings.life_s / 10)
        self._ticking: asyncio.Task[None] | None = None

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For the gRPC server."""
        return self.service.handlers()

    @property
    def inner(self) -> tuple[str, ...]:
        """Addresses that the gRPC server listens on in the clear, so that the Unix socket leads to it."""
        return (self._front.inner,) if self._front is not None else ()

    def credentials(self, *, mutual: bool = False) -> grpc.ServerCredentials:
        """For TLS ports, renewed while they serve. `mutual`: callers must show a certificate of the mesh."""
        return self._own.credentials(mutual=mutual)

    async def start(self) -> None:
        """Open the Unix socket and rotate what is due, from time to time. Raises OSError."""
        if self._front is not None:
            await self._front.start()
        self._ticking = asyncio.create_task(self._tick(), name="authority: rotation")

    async def stop(self) -> None:
        """End what `start` began."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait([self._ticking])
        if self._front is not None:
            await self._front.stop()

    async def _tick(self) -> None:
        while True:
            self.authority.tick()
            await asyncio.sleep(self._every)


def tokens_of(folder: str) -> JoinTokens:
    """The join tokens that belong to an authority's folder, also for other processes than the one that serves it."""
    return JoinTokens(f"{folder}/tokens")
