"""The identity that this process gets for itself, as a source of secrets (meshproxy.identity.v1.Workload, an extension of the bootstrap).

TLS contexts name the secrets `default` and `ROOTCA` from the cluster `sds-grpc`, as Istio configures them. Where an agent would answer there, this extension
does: there need be no such cluster. See docs/identity.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry, spiffe
from meshproxy.api.durations import seconds
from meshproxy.api.errors import ConfigError, fail, under
from meshproxy.net.tasks import spawn
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError
from meshproxy.xds.resources import Resource, Update
from meshproxy.xds.subscription import Subscription, init_timeout

if TYPE_CHECKING:
    import asyncio

    from meshproxy.context import Context
    from meshproxy.identity.calls import Metadata
    from meshproxy.identity.provider import Provider, Secret, Watch
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.resources import ResourceType
    from meshproxy.xds.subscription import Rules, Watcher

TYPE_URL = "type.googleapis.com/meshproxy.identity.v1.Workload"
HONOURS = {"meshproxy.identity.v1.Workload": "authority workload_api identity life token_file join_token_file serves"}
SERVES = "sds-grpc"  # what Istio calls the cluster of its agent's socket


def find(bootstrap: Any) -> Any:
    """The Workload message of a bootstrap, or None. Raises ConfigError when there are several."""
    found = None
    for at, extension in enumerate(bootstrap.bootstrap_extensions):
        with under(f"bootstrap_extensions[{at}]"):
            if registry.type_url(extension.typed_config) == TYPE_URL:
                if found is not None:
                    fail("", "a process has one identity: there are two Workload extensions")
                with under("typed_config"):
                    found = registry.unpack(extension.typed_config)
    return found


def serves(proto: Any) -> str:
    """The cluster in whose place it answers."""
    return proto.serves.value or SERVES


def check(proto: Any, is_static: Callable[[str], bool]) -> None:
    """Raise ConfigError, with paths relative to the message, for what leads nowhere."""
    if bool(proto.authority.value) == bool(proto.workload_api.value):
        fail("authority", "exactly one of authority and workload_api must name a cluster")
    for name in ("authority", "workload_api"):
        cluster = getattr(proto, name).value
        if cluster and not is_static(cluster):
            fail(name, f"must have a statically defined non-EDS cluster: '{cluster}' does not exist or is an EDS cluster")
    if proto.identity.value:
        try:
            spiffe.parse(proto.identity.value)
        except ValueError as error:
            fail("identity", str(error))
    for name in ("token_file", "join_token_file", "life"):
        if proto.workload_api.value and proto.HasField(name):
            fail(name, "goes with authority only")
    if proto.token_file.value and proto.join_token_file.value:
        fail("join_token_file", "goes without token_file only")


class LocalIdentity:
    """The source, and those who subscribed. `start` it inside the running loop."""

    def __init__(self, proto: Any, context: Context) -> None:
        self.serves = serves(proto)
        self._proto = proto
        self._context = context
        self._task: asyncio.Task[None] | None = None
        self._provider: Provider | None = None

    @property
    def provider(self) -> Provider:
        """Made when it is first needed: it takes the cryptography library."""
        if self._provider is None:
            from meshproxy.identity.provider import Provider

            self._provider = Provider()
        return self._provider

    def answers(self, source: Any) -> bool:
        """Whether a ConfigSource means us."""
        services = source.api_config_source.grpc_services
        return len(services) == 1 and services[0].envoy_grpc.cluster_name == self.serves

    def start(self) -> None:
        """Get the identity, and keep it fresh."""
        if self._task is None:
            self._task = spawn("identity", self._source().run(self.provider.publish))

    def close(self) -> None:
        """Let it expire."""
        if self._task is not None:
            self._task.cancel()

    def _source(self) -> Any:
        from meshproxy.identity.spire import SpireSource
        from meshproxy.identity.workload import Wish, WorkloadSource

        proto, context = self._proto, self._context
        identity = spiffe.parse(proto.identity.value) if proto.identity.value else None
        calls = ClusterCalls(GrpcClient(context.clusters, proto.authority.value or proto.workload_api.value))
        if proto.workload_api.value:
            return SpireSource(calls, identity, clock=context.wall, chance=context.random.random)
        wish = Wish(
            identity,
            seconds(proto.life),
            token_file=proto.token_file.value,
            join_token_file=proto.join_token_file.value,
        )
        return WorkloadSource(calls, wish, clock=context.wall, chance=context.random.random)


class LocalSubscription(Subscription):
    """A secret that comes from this process."""

    def __init__(
        self, local: LocalIdentity, source: Any, type: ResourceType, name: str, watcher: Watcher, scope: Scope, context: Context, rules: Rules
    ) -> None:
        super().__init__(type, name, watcher, scope, context, rules, init_timeout(source))
        self._local = local
        self._watch: Watch | None = None

    def start(self) -> None:
        super().start()
        self.attempts.n += 1
        self._local.start()
        self._watch = self._local.provider.watch(self.name, self._told)

    def close(self) -> None:
        super().close()
        if self._watch is not None:
            self._watch.close()

    def _told(self, secret: Secret) -> None:
        with contextlib.suppress(ConfigError):  # counted and logged
            self.answered(Update(self.type, secret.version, [Resource(secret.name, secret.version, secret.proto)]))


class ClusterCalls:
    """`meshproxy.identity.calls.Calls` over one of our clusters."""

    def __init__(self, client: GrpcClient) -> None:
        self._client = client

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout: float) -> bytes:
        """See Calls."""
        try:
            return await self._client.unary(method, request, metadata=metadata, timeout=timeout)
        except GrpcError as error:
            raise _failure(error) from error

    async def stream(self, method: str, request: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        """See Calls."""
        try:
            async with self._client.stream(method, metadata=metadata) as stream:
                await stream.send(request, done=True)
                async for message in stream:
                    yield message
        except GrpcError as error:
            raise _failure(error) from error


def _failure(error: GrpcError) -> Exception:
    from meshproxy.identity.calls import CallFailed

    return CallFailed(error.status, error.message or str(error))
