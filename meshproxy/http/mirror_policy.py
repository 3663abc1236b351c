"""`RequestMirrorPolicy`: which requests are copied, to which cluster, and what is changed in the copies. `http.mirror` sends them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under
from meshproxy.api.runtime import Runtime, compile_fraction

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import RequestHead
    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

HONOURS = {
    "envoy.config.route.v3.RouteAction.RequestMirrorPolicy": (
        "cluster cluster_header runtime_fraction disable_shadow_host_suffix_append request_headers_mutations host_rewrite_literal"
    ),
}


class MirrorPolicy:
    """One policy. `shadow_suffix`: the copy's host gets `-shadow`."""

    __slots__ = ("_chance", "_cluster", "_cluster_header", "_host", "_mutations", "shadow_suffix")

    def __init__(self, proto: route_components_pb2.RouteAction.RequestMirrorPolicy, context: Context) -> None:
        """Raises ConfigError with paths relative to the policy."""
        if proto.cluster and proto.cluster_header:
            fail(
                "cluster_header",
                f"Only one of cluster '{proto.cluster}' or cluster_header '{proto.cluster_header}' in request mirror policy can be specified",
            )
        if not proto.cluster and not proto.cluster_header:
            fail("cluster", "Exactly one of cluster or cluster_header in request mirror policy need to be specified")
        self._cluster = proto.cluster
        self._cluster_header = proto.cluster_header.lower().encode()
        self._host = proto.host_rewrite_literal.encode()
        self.shadow_suffix = not proto.disable_shadow_host_suffix_append
        self._chance: bool | Callable[[], bool] = True
        if proto.HasField("runtime_fraction"):
            self._chance = compile_fraction(proto.runtime_fraction, context.runtime or Runtime(), context.random)
        self._mutations: tuple[Any, ...] = ()
        if proto.request_headers_mutations:
            # The mutations of this rare field are those of the filter.
            from meshproxy.http.filters.header_mutation import compile_mutations

            with under("request_headers_mutations"):
                self._mutations = compile_mutations(proto.request_headers_mutations, request=True)

    def chosen(self) -> bool:
        """Whether this request is to be copied."""
        chance = self._chance
        return chance if isinstance(chance, bool) else chance()

    def cluster_name(self, stream: StreamInfo) -> str | None:
        """Where to; None when the request does not name it."""
        if self._cluster:
            return self._cluster
        assert stream.request is not None
        value = stream.request.get(self._cluster_header)
        return value.decode("utf-8", "surrogateescape") if value else None

    def change(self, stream: StreamInfo, head: RequestHead) -> None:
        """Apply header mutations and host rewrite to the copy's head, in place; before the suffix."""
        for mutate in self._mutations:
            mutate(head, stream)
        if self._host:
            head.authority = self._host


def compile_mirrors(protos: Iterable[route_components_pb2.RouteAction.RequestMirrorPolicy], context: Context) -> tuple[MirrorPolicy, ...]:
    """`request_mirror_policies` of one level. Raises ConfigError."""
    policies = []
    for index, proto in enumerate(protos):
        with under(f"request_mirror_policies[{index}]"):
            policies.append(MirrorPolicy(proto, context))
    return tuple(policies)
