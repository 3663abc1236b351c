"""A Kubernetes API server, as whoever this process is: JSON in, JSON out. One client for all that asks it (documents, tokens, status).

Where it is and who we are is read by kubernetes_asyncio: the service account of a pod, or a kubeconfig with its certificates, tokens and plugins. Its generated
classes are not used: kinds come and go with CRDs, and what reads documents wants them as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import aiohttp
import yaml
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config

from meshproxy.record import Record

MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
JSON, MERGE = "application/json", "application/merge-patch+json"
_CONNECT_S = 10.0
_ANSWER_S = 60.0  # API servers give up after this time, too
_LONGEST_EVENT = 64 << 20
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Unreachable(Exception):
    """The API server cannot be asked now, or we do not know how. The text says why."""


class Refused(Exception):
    """The API server's answer is an error. `status`: of HTTP; `reason`: Kubernetes' word for it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status = status
        self.reason = reason


class Access(Record, frozen=True):
    """How to find the API server. `kubeconfig` "": by the pod's service account, or else $KUBECONFIG or ~/.kube/config; `context` "": that file's current one.

    `mount`: the folder of the service account.
    """

    kubeconfig: str = ""
    context: str = ""
    mount: str = MOUNT


class _Client:
    """A session with the API server as what we were when it was opened. `calls`: that are under way."""

    __slots__ = ("api", "calls", "retired")

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.calls = 0
        self.retired = False

    async def done(self) -> None:
        """One call less."""
        self.calls -= 1
        if self.retired and not self.calls:
            await self.api.close()


class ApiServer:
    """See above. What a kubeconfig, a token or a plugin says is asked for again when the API server no longer knows us. To be used within one event loop."""

    def __init__(self, access: Access | None = None) -> None:
        self._access = access or Access()
        self._client: _Client | None = None
        self._opening = asyncio.Lock()

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
        """Nothing can be asked after this."""
        if self._client is not None:
            await self._client.api.close()

    @contextlib.asynccontextmanager
    async def _calling(self, call: _Call) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a call, asked for a second time when our token is no good: it may be another by now."""
        for again in (False, True):
            client = await self._open()
            client.calls += 1
            try:
                async with await call.make(client.api) as response:
                    if response.status != 401 or again:
                        yield response
                        return
                    self._forget(client)
            except (aiohttp.ClientSSLError, ConfigException) as error:  # we may have been given another authority meanwhile
                self._forget(client)
                raise Unreachable(f"{call.path}: {error}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unreachable(f"{call.path}: {str(error) or 'no answer in time'}") from error
            finally:
                await client.done()

    async def _open(self) -> _Client:
        async with self._opening:
            if self._client is None:
                configuration = await _configuration(self._access)
                try:
                    api = ApiClient(configuration)
                except (OSError, ValueError) as error:
                    raise Unreachable(f"the certificates for the API server: {error}") from error
                api.user_agent = "meshctl"
                self._client = _Client(api)
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

    async def make(self, api: ApiClient) -> aiohttp.ClientResponse:
        """Raises what aiohttp and our configuration's plugins raise."""
        who = await api.configuration.get_api_key_with_prefix("BearerToken")
        headers = {**self.headers, "User-Agent": api.user_agent, **({"Authorization": who.strip()} if who else {})}
        url = f"{api.configuration.host}{self.path}"
        return await api.rest_client.request(self.method, url, self.parameters, headers, self.body, _preload_content=False, _request_timeout=self.timeout)


async def _configuration(access: Access) -> Configuration:
    """Raises Unreachable."""
    found = Configuration()
    try:
        if not access.kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
            load_incluster_config(
                found,
                token_filename=f"{access.mount}/token",
                cert_filename=f"{access.mount}/ca.crt",
            )
        else:
            path = access.kubeconfig or os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
            if not any(os.path.isfile(one) for one in path.split(":")):
                raise Unreachable(f"{path}: there is no such kubeconfig")
            await load_kube_config(path, access.context or None, found, persist_config=False)
    except (ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise Unreachable(f"how to find the API server: {error}") from error
    found.host = (found.host or "").rstrip("/")
    found.connection_pool_maxsize = 0  # each watch has one
    found.disable_strict_ssl_verification = True  # the authorities of many clusters lack what RFC 5280 asks for, and kubectl does not mind
    return found


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
