"""Fetching the keys of an issuer of tokens: OpenID Connect Discovery 1.0, section 4, and JSON Web Key Sets (RFC 7517).

Where to look is what documents say, who may be written by anybody with a namespace: so there are limits on size, time and redirects, some addresses are never
asked, and of an answer nothing is used but public keys.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import jwt
from aiohttp.abc import AbstractResolver, ResolveResult

from control.model.security import KeySource
from control.sources.issuers import Unusable

MAX_BYTES = 256 << 10
MAX_REDIRECTS = 3
WELL_KNOWN = "/.well-known/openid-configuration"
_REDIRECTS = (301, 302, 303, 307, 308)
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
# Where clouds tell machines their secrets. Link-local IPv4 and IPv6, which have the others, are refused as such.
_METADATA = (ipaddress.ip_address("fd00:ec2::254"),)


def check_address(text: str) -> None:
    """Raises Unusable for an address that is never asked."""
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or address
    if inner.is_link_local or inner.is_multicast or inner.is_unspecified or inner in _METADATA:
        raise Unusable(f"{text} is never asked: no issuer is there")


class _Resolver(AbstractResolver):
    """Names -> addresses that may be asked."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        made: list[ResolveResult] = []
        for kind, _, proto, _, address in found:
            check_address(str(address[0]))
            made.append({"hostname": host, "host": str(address[0]), "port": port, "family": kind, "proto": proto, "flags": socket.AI_NUMERICHOST})
        return made

    async def close(self) -> None:
        """Nothing is kept."""


class Fetcher:
    """Asks over HTTP; to be closed."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._new_session()
        return self._session

    def _new_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=_Resolver(), limit=8, force_close=True)
        # Compressed answers could be any size; issuers need none for so little.
        headers = {"User-Agent": "meshctl", "Accept": "application/json", "Accept-Encoding": "identity"}
        return aiohttp.ClientSession(connector=connector, headers=headers, auto_decompress=False, trust_env=True)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __call__(self, source: KeySource, timeout_s: float) -> str:
        """The public keys of a source, as a key set whose text is the same for the same keys; each document within `timeout_s`. Raises Unusable."""
        uri = source.uri
        if not uri:
            uri = keys_of(source.issuer, await self._get(source.issuer.rstrip("/") + WELL_KNOWN, timeout_s))
        return usable(uri, await self._get(uri, timeout_s))

    async def _get(self, url: str, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise Unusable(f"{url} did not answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, Unusable) else None
            raise Unusable(f"{url}: {cause or str(error) or type(error).__name__}") from error

    async def _follow(self, url: str) -> bytes:
        asked = url
        for _ in range(MAX_REDIRECTS + 1):
            _check_url(asked)
            async with self._connected().get(asked, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    to = urljoin(asked, response.headers.get("location", ""))
                    if urlsplit(asked).scheme == "https" and urlsplit(to).scheme != "https":
                        raise Unusable(f"{asked} leads to {to}, which is not https")
                    asked = to
                    continue
                if response.status != 200:
                    raise Unusable(f"{asked} answers {response.status}")
                content = b""
                async for piece in response.content.iter_chunked(16 << 10):
                    content += piece
                    if len(content) > MAX_BYTES:
                        raise Unusable(f"{asked} answers with more than {MAX_BYTES} bytes")
                return content
        raise Unusable(f"{url} leads on and on")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unusable(f"{url} is no http or https URL")
    try:
        ipaddress.ip_address(parts.hostname)
    except ValueError:
        return  # names are checked when they are resolved
    check_address(parts.hostname)


def _object(url: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unusable(f"{url} answers with what is no JSON object")
    return found


def keys_of(issuer: str, content: bytes) -> str:
    """Where an issuer says that its keys are. Raises Unusable."""
    where = issuer.rstrip("/") + WELL_KNOWN
    found = _object(where, content)
    said, uri = found.get("issuer"), found.get("jwks_uri")
    if not isinstance(said, str) or said.rstrip("/") != issuer.rstrip("/"):
        raise Unusable(f"{where} is about another issuer, {said!r:.100}")
    if not isinstance(uri, str):
        raise Unusable(f"{where} says no jwks_uri")
    _check_url(uri)
    if urlsplit(issuer).scheme == "https" and urlsplit(uri).scheme != "https":
        raise Unusable(f"{where} says a jwks_uri that is not https, {uri:.100}")
    return uri


def usable(uri: str, content: bytes) -> str:
    """The keys in a key set that proxies can use, without what is private. Raises Unusable if there are none."""
    keys = _object(uri, content).get("keys")
    made = []
    for key in keys if isinstance(keys, list) else ():
        if isinstance(key, dict) and key.get("kty") != "oct" and key.get("use") in (None, "sig"):
            public = {name: value for name, value in key.items() if name not in _PRIVATE}
            try:
                jwt.PyJWK(public)
            except (jwt.PyJWTError, ValueError, TypeError, KeyError):
                continue
            made.append(public)
    if not made:
        raise Unusable(f"{uri} answers with no key that could be used")
    return json.dumps({"keys": made}, sort_keys=True)
