"""Limits new connections by a token bucket (envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit).

A connection that finds no token is closed. Filters with the same `share_key` and the same bucket settings have one bucket together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.api import errors, runtime
from meshproxy.net import token_bucket
from meshproxy.observe import flags

if TYPE_CHECKING:
    from envoy.extensions.filters.network.local_ratelimit.v3.local_rate_limit_pb2 import LocalRateLimit as LocalRateLimitProto

    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext
    from meshproxy.net.token_bucket import TokenBucket

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit"
HONOURS = {
    "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit": "stat_prefix token_bucket runtime_enabled share_key",
    "envoy.type.v3.TokenBucket": "max_tokens tokens_per_fill fill_interval",
}


class LocalRateLimit:
    """The filter: a token for each connection."""

    __slots__ = ("_bucket", "_enabled", "_limited")

    def __init__(self, proto: LocalRateLimitProto, bucket: TokenBucket, context: NetworkContext) -> None:
        self._bucket = bucket
        flag = proto.runtime_enabled if proto.HasField("runtime_enabled") else None
        self._enabled = runtime.compile_flag(flag, context.context.runtime)
        self._limited = context.scope.scope(f"local_rate_limit.{proto.stat_prefix}.").counter("rate_limited")

    def on_connection(self, conn: ConnectionInfo) -> bool | None:
        enabled = self._enabled
        if not (enabled if isinstance(enabled, bool) else enabled()) or self._bucket.consume():
            return None
        self._limited.n += 1
        conn.local_close_reason = "local_ratelimit_close_over_limit"
        conn.flags |= flags.URX
        return False


def compile(proto: LocalRateLimitProto, context: NetworkContext) -> LocalRateLimit:
    """The filter for a LocalRateLimit proto. Raises ConfigError."""
    if not proto.stat_prefix:
        errors.fail("stat_prefix", "must not be empty")
    if not proto.HasField("token_bucket"):
        errors.fail("token_bucket", "must be set")
    settings = proto.token_bucket.SerializeToString(deterministic=True)
    with errors.under("token_bucket"):
        if not proto.share_key:
            identity = b"network:%b:%b" % (context.listener_prefix.encode(), proto.SerializeToString(deterministic=True))
            return LocalRateLimit(proto, token_bucket.compile_bucket(proto.token_bucket, context.context, identity), context)
        common = context.context.shared
        key = ("network local rate limit", proto.share_key, settings)
        bucket = common.get(key)
        if bucket is None:
            identity = b"network share:%b:%b" % (proto.share_key.encode(), settings)
            bucket = common[key] = token_bucket.compile_bucket(proto.token_bucket, context.context, identity)
    return LocalRateLimit(proto, bucket, context)
