"""A Kubernetes API server, as whoever this process is: JSON in, JSON out. One client for all that asks it (documents, tokens, status).

`access` says where it is and who we are. Generated classes of kinds are not used: kinds come and go with CRDs, and what reads documents wants them as they are.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import aiohttp
from kubernetes_asyncio.config import ConfigException
from yarl import URL

from control.access import Access, Found, NoAccess, find

__all__ = ("JSON", "MERGE", "Access", "ApiServer", "Refused", "Unreachable")

JSON, MERGE = "application/json", "application/merge-patch+json"
_CONNECT_S = 10.0
_ANSWER_S = 60.0  # API servers give up after this time, too
_LONGEST_EVENT = 64 << 20
_ENDED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)  # a connection that there was
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Unreachable(Exception):
    """The API server cannot be asked now, or we do not know how. The text says why."""


class Refused(Exception):
    """The API server's answer is an error. `status`: of HTTP; `reason`: Kubernetes' word for it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status = status
        self.reason = reason


class _Connections(aiohttp.TCPConnector):
    """Connections that can all be ended at once: by TLS, one that is closed waits for the farewell of the other end, maybe longer than its event loop lasts."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(limit=0, ssl=tls)  # each watch has one
        self._made: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        made = await super()._create_connection(req, traces, timeout)
        if made.transport is not None:
            self._made.add(made.transport)
        return made

    async def end(self) -> None:
        """When nothing is asked by them any longer."""
        for one in self._made:
            one.abort()
        await asyncio.sleep(0)  # they are told of their end in the next turn


class _Client:
    """A session with the API server as what we were when it was opened. `calls`: that are under way."""

    __slots__ = ("_connections", "calls", "found", "retired", "session")

    def __init__(self, found: Found) -> None:
        self.found = found
        self._connections = _Connections(found.tls)
        self.session = aiohttp.ClientSession(connector=self._connections, headers={"User-Agent": "meshctl"}, read_bufsize=1 << 20)
        self.calls = 0
        self.retired = False

    async def done(self) -> None:
        """One call less."""
        self.calls -= 1
        if self.retired and not self.calls:
            await self.close()

    async def close(self) -> None:
        """End it, with its connections."""
        await self.session.close()
        await self._connections.end()


class ApiServer:
    """See above. What a kubeconfig, a token or a plugin says is asked for again when the API server no longer knows us. To be used within one event loop."""

    def __init__(self, access: Access | None = None) -> None:
        self._access = access or Access()
        self._client: _Client | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def get(self, path: str, parameters: Mapping[str, str | int] | None = None, accept: str = JSON) -> dict[str, Any]:
        """What is at a path. Raises Refused and Unreachable."""
        return await self.send("GET", path, None, parameters, accept=accept)

    async def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        parameters: Mapping[str, str | int] | None = None,
        *,
        accept: str = JSON,
        content_type: str = JSON,
    ) -> dict[str, Any]:
        """The answer to a call. Raises Refused and Unreachable."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S, connect=_CONNECT_S)
        call = _Call(method, path, body, dict(parameters or {}), {"Accept": accept, "Content-Type": content_type}, timeout)
        async with self._calling(call) as response:
            return _answer(path, response.status, await response.read())

    @contextlib.asynccontextmanager
    async def events(self, path: str, parameters: Mapping[str, str | int], accept: str = JSON) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of a watch, until it ends. Raises Refused and Unreachable."""
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S)
        async with self._calling(_Call("GET", path, None, {**parameters, "watch": 1}, {"Accept": accept}, timeout)) as response:
            if response.status != 200:
                _answer(path, response.status, await response.read())
            _keep_alive(response)
            yield _events(path, response)

    async def close(self) -> None:
        """Nothing can be asked after this: whoever tries finds it unreachable."""
        self._closed = True
        if self._client is not None:
            await self._client.close()

    @contextlib.asynccontextmanager
    async def _calling(self, call: _Call) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a call, asked for a second time when our token is no good: it may be another by now."""
        for again in (False, True):
            client = await self._open()
            client.calls += 1
            try:
                async with await call.make(client) as response:
                    if response.status != 401 or again:
                        yield response
                        return
                    self._forget(client)
            except (aiohttp.ClientSSLError, ConfigException) as error:  # we may have been given another authority meanwhile
                self._forget(client)
                raise Unreachable(f"{call.path}: {error}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if client.found.shows_certificate and isinstance(error, _ENDED) and not isinstance(error, aiohttp.ClientConnectorError):
                    self._forget(client)  # in TLS 1.3 this may be all that we hear of a certificate that is not liked
                raise Unreachable(f"{call.path}: {str(error) or 'no answer in time'}") from error
            finally:
                await client.done()

    async def _open(self) -> _Client:
        async with self._opening:
            if self._client is None:
                try:
                    found = await find(self._access)
                except NoAccess as error:
                    raise Unreachable(str(error)) from error
                if self._closed:
                    raise Unreachable("the client of the API server is closed")
                self._client = _Client(found)
            return self._client

    def _forget(self, client: _Client) -> None:
        """Have it read anew who we are, before the next call. To be called within a call of the client, which closes it when it is done."""
        client.retired = True
        if self._client is client:
            self._client = None


class _Call(NamedTuple):
    method: str
    path: str
    body: Mapping[str, Any] | None
    parameters: dict[str, str | int]
    headers: dict[str, str]
    timeout: aiohttp.ClientTimeout

    async def make(self, client: _Client) -> aiohttp.ClientResponse:
        """Raises what aiohttp and the files of tokens raise."""
        found = client.found
        who = await found.who()
        proxy = URL(found.proxy) if found.proxy else None
        known = f"{proxy.user}:{proxy.password or ''}" if proxy is not None and proxy.user else ""
        return await client.session.request(
            self.method,
            URL(f"{found.url}{self.path}", encoded=True),
            params=self.parameters,
            headers={**self.headers, **({"Authorization": who} if who else {})},
            data=None if self.body is None else json.dumps(self.body),
            timeout=self.timeout,
            server_hostname=found.server_name,
            proxy=proxy.with_user(None) if proxy is not None else None,
            proxy_headers={"Proxy-Authorization": f"Basic {base64.b64encode(known.encode()).decode()}"} if known else None,
            allow_redirects=False,
        )


def _answer(path: str, status: int, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content) if content else {}
    except ValueError:
        found = None
    if not 200 <= status < 300:
        said = found if isinstance(found, dict) else {}
        raise Refused(status, str(said.get("reason") or ""), str(said.get("message") or f"{path}: {content[:200].decode('utf-8', 'replace')}"))
    if not isinstance(found, dict):
        raise Unreachable(f"{path}: the answer is no JSON object")
    return found


async def _events(path: str, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    held = b""
    try:
        async for piece in response.content.iter_any():
            *lines, held = (held + piece).split(b"\n")
            if len(held) > _LONGEST_EVENT:
                raise Unreachable(f"{path}: an event has more than {_LONGEST_EVENT} bytes")
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unreachable(f"{path}: {error!r}") from error
    except ValueError as error:
        raise Unreachable(f"{path}: an event is no JSON") from error


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel notice when the other end is gone without a word: a watch may be silent for minutes."""
    transport = response.connection.transport if response.connection is not None else None
    found = transport.get_extra_info("socket") if transport is not None else None
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            found.setsockopt(socket.IPPROTO_TCP, option, value)
