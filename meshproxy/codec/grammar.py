"""What fields may look like whatever the version of HTTP (RFC 9110 5), and which of them Envoy joins when they repeat."""

from __future__ import annotations

import re

from meshproxy.codec.headers import Pair

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
LENGTH = re.compile(rb"0|[1-9][0-9]{0,18}").fullmatch  # no leading zeros: some read them as octal
MAX_LENGTH = (1 << 63) - 1  # bytes of a body
# A table that changes bad bytes and leaves the others: `value.translate(VALUE) is value` says that there are none, in a third of the time of a regex.
VALUE = bytes(code if code == 9 or 32 <= code != 127 else code ^ 64 for code in range(256))

# Fields whose repeated lines Envoy joins with a comma, at the place of the first one; the others stay lines of their own.
JOINED_IN_REQUESTS = frozenset(
    b"""accept accept-encoding access-control-request-headers access-control-request-method authorization cache-control content-encoding content-type expect
    grpc-accept-encoding grpc-timeout if-match if-modified-since if-none-match if-range if-unmodified-since origin pragma proxy-status referer te user-agent via
    x-client-trace-id x-envoy-attempt-count x-envoy-decorator-operation x-envoy-downstream-service-cluster x-envoy-downstream-service-node
    x-envoy-external-address x-envoy-force-trace x-envoy-ip-tags x-envoy-max-retries x-envoy-original-host x-envoy-original-path x-envoy-original-url
    x-envoy-retry-on x-forwarded-client-cert x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-request-id""".split(),
)
JOINED_IN_RESPONSES = frozenset(
    b"""access-control-allow-credentials access-control-allow-headers access-control-allow-methods access-control-allow-origin access-control-expose-headers
    access-control-max-age age cache-control content-encoding content-type date etag expires grpc-message grpc-status last-modified location proxy-status
    server vary via x-envoy-attempt-count x-envoy-decorator-operation x-envoy-degraded x-envoy-immediate-health-check-fail x-envoy-ratelimited
    x-envoy-upstream-canary x-envoy-upstream-healthchecked-cluster x-request-id""".split(),
)


def join_repeated(items: list[Pair], names: frozenset[bytes]) -> list[Pair]:
    """Fields of one of `names` become one, at the place of the first."""
    joined: list[Pair] = []
    places: dict[bytes, int] = {}
    for pair in items:
        name = pair[0]
        if name in names:
            place = places.get(name)
            if place is not None:
                joined[place] = name, joined[place][1] + b"," + pair[1]
                continue
            places[name] = len(joined)
        joined.append(pair)
    return joined
