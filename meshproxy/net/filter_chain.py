"""A filter chain: TLS or not, network filters, and the filter at the end that speaks the protocol. Compiled once, shared by its connections."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry, secrets
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import Collector, fail, under
from meshproxy.api.metadata import metadata_dict
from meshproxy.net.connection import DEFAULT_BUFFER_LIMIT
from meshproxy.net.listener_stats import stat_prefix
from meshproxy.observe.stats import Store
from meshproxy.record import Record

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.net.tls import DownstreamTls
    from meshproxy.observe.stats import Scope

HONOURS = {
    "envoy.config.listener.v3.FilterChain": "filter_chain_match filters use_proxy_proto metadata transport_socket transport_socket_connect_timeout name",
    "envoy.config.listener.v3.Filter": "name typed_config",
    "envoy.config.core.v3.TransportSocket": "name typed_config",
}


class NetworkContext(Record, frozen=True):
    """What a network filter may use when it is compiled. `listener_prefix` is `listener.<address>.`, or "" where there is no listener."""

    context: Context
    scope: Scope  # the root scope
    listener: Any = None
    listener_prefix: str = ""

    @property
    def buffer_limit(self) -> int:
        """The listener's per_connection_buffer_limit_bytes; 1 MiB by default."""
        listener = self.listener
        if listener is not None and listener.HasField("per_connection_buffer_limit_bytes"):
            return listener.per_connection_buffer_limit_bytes.value
        return DEFAULT_BUFFER_LIMIT


class FilterChain:
    """`on_connection`, `on_first_data` and `on_close` are the hooks of the filters before the terminal one, in order (closing: in reverse).

    `handshake_timeout`: seconds until the transport socket must be connected, 0.0 for none. `takes_socket`: the terminal filter wants the bare socket.
    `missed`: how the terminal filter, if it cares, hears of a connection that never got to it.
    """

    __slots__ = (
        "handshake_timeout",
        "metadata",
        "missed",
        "name",
        "on_close",
        "on_connection",
        "on_first_data",
        "proxy_protocol",
        "reports_close",
        "takes_socket",
        "terminal",
        "tls",
    )

    def __init__(self, proto: Any, network: NetworkContext, listener_scope: Scope) -> None:
        self.name: str = proto.name
        self.metadata = metadata_dict(proto.metadata)
        self.handshake_timeout = seconds_of(proto, "transport_socket_connect_timeout", 0.0)
        self.proxy_protocol: bool = proto.use_proxy_proto.value
        with under("transport_socket"):
            self.tls = compile_transport(proto, listener_scope, network.context)
        filters, self.terminal = _compile_filters(proto, network)
        self.on_connection = _hooks(filters, "on_connection")
        self.on_first_data = _hooks(filters, "on_first_data")
        self.on_close = _hooks(reversed(filters), "on_close")
        self.takes_socket: bool = self.tls is None and not self.on_first_data and getattr(self.terminal, "takes_socket", False)
        self.missed: Callable[..., None] | None = getattr(self.terminal, "missed", None)
        self.reports_close: bool = getattr(self.terminal, "reports_close", False)

    def retire(self) -> None:
        """It takes no new connections: those that it has are told to end."""
        retire = getattr(self.terminal, "retire", None)
        if retire is not None:
            retire()

    def dispose(self) -> None:
        """Its last connection is gone."""
        dispose = getattr(self.terminal, "dispose", None)
        if dispose is not None:
            dispose()

    def __repr__(self) -> str:
        return f"<filter chain {self.name or '(unnamed)'}>"


def _hooks(filters: Any, name: str) -> tuple[Callable[..., Any], ...]:
    return tuple(getattr(filter, name) for filter in filters if hasattr(filter, name))


def share_tls(listeners: Iterable[Any], context: Context) -> None:
    """In main, before it forks: make the TLS contexts of listeners that every worker inherits (net.tls.compile_downstream). Raises ConfigError."""
    errors = Collector()
    for at, listener in enumerate(listeners):
        chains = [(f"filter_chains[{index}]", chain) for index, chain in enumerate(listener.filter_chains)]
        for path, chain in (*chains, ("default_filter_chain", listener.default_filter_chain)):
            if chain.HasField("transport_socket"):
                with errors.under(f"static_resources.listeners[{at}].{path}.transport_socket"):
                    compile_transport(chain, Store().scope(stat_prefix(listener)), context)
    errors.raise_any()


def compile_transport(proto: Any, scope: Scope, context: Context) -> DownstreamTls | None:
    """None for plaintext: no transport socket, or a raw buffer."""
    if not proto.HasField("transport_socket"):
        return None
    socket = proto.transport_socket
    with under("typed_config"):
        if socket.WhichOneof("config_type") is None:
            fail("", f"the configuration of transport socket {socket.name!r} is missing")
        message = registry.unpack(socket.typed_config)
        module = registry.module(registry.type_url(socket.typed_config), "downstream transport socket")
        if message.DESCRIPTOR.name == "RawBuffer":
            return None
        if any(True for _ in secrets.discovered(message.common_tls_context)):
            from meshproxy.net.tls_sds import DownstreamSds  # few workers need it

            return DownstreamSds(message, scope, _secrets_of(context), context.ticket_seed)
        with under("common_tls_context"):
            secrets.inline(message.common_tls_context, context.secrets)
        return module.compile_downstream(message, scope, context.tls_contexts, context.ticket_seed)


def _secrets_of(context: Context) -> secrets.Secrets:
    if context.secrets is None:
        context.secrets = secrets.Secrets()
    return context.secrets


def _compile_filters(proto: Any, network: NetworkContext) -> tuple[list[Any], Any]:
    filters = []
    last = len(proto.filters) - 1
    if last < 0:
        # Envoy accepts it, and closes every connection as soon as it is made.
        return [], CloseFilter()
    for at, entry in enumerate(proto.filters):
        with under(f"filters[{at}]"):
            which = entry.WhichOneof("config_type")
            if which != "typed_config":
                fail(
                    which or "typed_config",
                    f"the configuration of network filter {entry.name!r} is missing" if which is None else "filters by discovery are not supported",
                )
            with under("typed_config"):
                url = registry.type_url(entry.typed_config)
                compiled = registry.module(url, "network filter").compile(registry.unpack(entry.typed_config), network)
            terminal = getattr(compiled, "terminal", False)
            if terminal and at != last:
                fail("", f"Error: terminal filter named {entry.name} of type {url.rpartition('/')[2]} must be the last filter in a network filter chain.")
            if not terminal and at == last:
                fail("", f"Error: non-terminal filter named {entry.name} of type {url.rpartition('/')[2]} is the last filter in a network filter chain.")
            filters.append(compiled)
    terminal_filter = filters.pop()
    return [compiled for compiled in filters if compiled is not None], terminal_filter


class CloseFilter:
    """What stands for an empty list of filters."""

    terminal = True

    def create_protocol(self, conn: Any) -> Any:
        """A protocol that closes its connection."""
        import asyncio

        class Close(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                transport.close()

        return Close()
