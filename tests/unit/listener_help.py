"""What tests of listeners share: a terminal filter that says what it knows of its connections, and chains that end in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshproxy.net import filter_chain
from tests.unit.net_help import (
    DOWNSTREAM_TLS,
    connect_to,
    tcp_proxy,
)


class Say(asyncio.Protocol):
    """Says what it knows of its connection, then echoes."""

    def __init__(self, conn: Any) -> None:
        self.conn = conn

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        conn = self.conn
        transport.write(f"{conn.filter_chain.name} {conn.server_name} {','.join(conn.application_protocols)} {conn.remote} {conn.local}\n".encode())

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Terminal:
    """A terminal filter in place of the real ones."""

    terminal = True

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.missing: list[tuple[str | None, bool]] = []

    def missed(self, conn: Any, *, secure: bool) -> None:
        self.missing.append((conn.local_close_reason, secure))

    def create_protocol(self, conn: Any) -> asyncio.Protocol:
        self.connections.append(conn)
        return Say(conn)


@pytest.fixture
def filters(monkeypatch):
    """Network filters for the chains that are compiled next, the terminal one last; the typed configuration does not matter."""
    chain: list[Any] = [Terminal()]
    monkeypatch.setattr(filter_chain, "_compile_filters", lambda *_: (chain[:-1], chain[-1]))
    return chain


def chain(name: str = "", match: dict[str, Any] | None = None, tls: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "filters": [tcp_proxy()], **fields}
    if match is not None:
        made["filter_chain_match"] = match
    if tls is not None:
        made["transport_socket"] = {"name": "tls", "typed_config": {"@type": DOWNSTREAM_TLS, **tls}}
    return made


def inspector(type_url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "x", "typed_config": {"@type": type_url, **fields}}


async def connect(listener: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await connect_to(listener.addresses[0].port, **options)


async def first_line(listener: Any, data: bytes = b"", **options: Any) -> str:
    """What a connection that sends `data` is told; '' when it is closed."""
    reader, writer = await connect(listener, **options)
    writer.write(data)
    try:
        return (await reader.readline()).decode().rstrip()
    except OSError:
        return ""
    finally:
        writer.transport.abort()
