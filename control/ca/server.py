"""Listening: the authority's own certificate for its TLS port, renewed while it serves, and the Unix socket whose callers are known by their process.

gRPC for Python does not tell who is at the other end of a Unix socket. So connections are accepted here, the kernel is asked, and each is passed on to gRPC
over a second socket from an address of its own, which gRPC does tell: the address leads back to the credentials. The second socket is in a folder that only
we can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import secrets
import shutil
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from control.ca import certificates
from control.ca.attestation import PeerCredentials
from control.ca.authority import Authority
from meshproxy.api.spiffe import SpiffeId

_CHUNK = 64 * 1024
_MAX_CONNECTIONS = 1024


class OwnCertificate:
    """A certificate of the control plane itself, with DNS names or IP addresses beside its SPIFFE ID, since that is what servers are checked for."""

    def __init__(self, authority: Authority, identity: SpiffeId, names: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._authority = authority
        self._identity = identity
        self._names = tuple(_name(name) for name in names)
        self._clock = clock
        self._renew_at = 0.0
        self._said: Any = None
        self._bundle: tuple[x509.Certificate, ...] = ()

    def credentials(self, *, mutual: bool = False) -> grpc.ServerCredentials:
        """For `add_secure_port`. `mutual`: callers must have a certificate of the mesh."""
        return grpc.dynamic_ssl_server_credentials(self.configuration(), self._changed, require_client_authentication=mutual)

    def configuration(self) -> Any:
        """What a handshake that begins now should use; made anew at half of the certificate's life, and when the roots have changed."""
        now, bundle = self._clock(), self._authority.bundle()
        if self._said is None or now >= self._renew_at or bundle != self._bundle:
            key = certificates.new_key()
            issued = self._authority.issue_own(key.public_key(), self._identity, self._names)
            self._renew_at, self._bundle = now + (issued.not_after - now) / 2, bundle
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            pair = (private, certificates.pem(*issued.chain).encode())
            self._said = grpc.ssl_server_certificate_configuration([pair], root_certificates=certificates.pem(*bundle).encode())
        return self._said

    def _changed(self) -> Any:
        before = self._said
        try:
            found = self.configuration()
        except Exception:  # noqa: BLE001  # called by gRPC, at each handshake: whatever it is, the certificate of before is better than none
            return None
        return found if found is not before else None


class UnixFront:
    """Accepts on `path` for a gRPC server that listens on `inner`. `peer_of` tells the service who a peer is."""

    def __init__(self, path: str, mode: int = 0o666) -> None:
        self.path = path
        self._mode = mode
        self._folder = tempfile.mkdtemp(prefix="meshctl-")  # 0700
        self._peers: dict[str, PeerCredentials] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._inner = os.path.join(self._folder, "s")

    @property
    def inner(self) -> str:
        """For the gRPC server's `add_insecure_port`."""
        return f"unix:{self._inner}"

    def peer_of(self, peer: str) -> PeerCredentials | None:
        """The credentials behind what gRPC calls the peer; None when it did not come through here."""
        return self._peers.get(peer.removeprefix("unix-abstract:")) if peer.startswith("unix-abstract:") else None

    async def start(self) -> None:
        """Listen. A socket that a former process left is replaced; one that somebody listens on, and anything else at `path`, is an OSError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if not os.path.islink(self.path) and _is_socket(self.path):
                    if _is_served(self.path):  # by another control plane: whoever it knows would find us instead
                        raise OSError(errno.EADDRINUSE, "somebody listens there already", self.path)
                    os.unlink(self.path)
            os.fchmod(listening.fileno(), self._mode)  # Linux gives it to the file, so that nobody gets in before the chmod
            listening.bind(self.path)
            os.chmod(self.path, self._mode)  # what the umask has taken away
        except OSError:
            listening.close()
            raise
        self._server = await asyncio.start_unix_server(self._accepted, sock=listening)

    async def stop(self) -> None:
        """Close what is open."""
        if self._server is not None:
            self._server.close()
            for task in tuple(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await self._server.wait_closed()
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        name = f"meshctl-{secrets.token_hex(16)}"
        try:
            found = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self._peers[name] = PeerCredentials(*struct.unpack("3i", found))
            await self._pass_on(name, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end has gone, or we stop; nobody awaits this task
        finally:
            self._connections.discard(task)
            self._peers.pop(name, None)
            writer.close()

    async def _pass_on(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            inner.setblocking(False)
            inner.bind(f"\0{name}")
            await asyncio.get_running_loop().sock_connect(inner, self._inner)
            inner_reader, inner_writer = await asyncio.open_unix_connection(sock=inner)
        except OSError:
            inner.close()
            raise
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, inner_writer), name="unix front: in")
                group.create_task(_copy(inner_reader, writer), name="unix front: out")
        except* OSError:
            pass
        finally:
            inner_writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    raise ConnectionResetError  # HTTP/2 knows no half of a connection: when one end is gone, so is the other


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # too many are waiting already
            return True
        except OSError:
            return False
    return True


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
