"""Response flags: why a response is as it is, as bits of `StreamInfo.flags`.

Names are Envoy's (`%RESPONSE_FLAGS%`, source/common/stream_info).
"""

from __future__ import annotations

_NAMES = (
    ("LH", "FailedLocalHealthCheck"),
    ("UH", "NoHealthyUpstream"),
    ("UT", "UpstreamRequestTimeout"),
    ("LR", "LocalReset"),
    ("UR", "UpstreamRemoteReset"),
    ("UF", "UpstreamConnectionFailure"),
    ("UC", "UpstreamConnectionTermination"),
    ("UO", "UpstreamOverflow"),
    ("NR", "NoRouteFound"),
    ("DI", "DelayInjected"),
    ("FI", "FaultInjected"),
    ("RL", "RateLimited"),
    ("UAEX", "UnauthorizedExternalService"),
    ("RLSE", "RateLimitServiceError"),
    ("DC", "DownstreamConnectionTermination"),
    ("URX", "UpstreamRetryLimitExceeded"),
    ("SI", "StreamIdleTimeout"),
    ("IH", "InvalidEnvoyRequestHeaders"),
    ("DPE", "DownstreamProtocolError"),
    ("UMSDR", "UpstreamMaxStreamDurationReached"),
    ("RFCF", "ResponseFromCacheFilter"),
    ("NFCF", "NoFilterConfigFound"),
    ("DT", "DurationTimeout"),
    ("UPE", "UpstreamProtocolError"),
    ("NC", "NoClusterFound"),
    ("OM", "OverloadManagerTerminated"),
    ("DF", "DnsResolutionFailed"),
    ("DO", "DropOverload"),
    ("DR", "DownstreamRemoteReset"),
    ("UDO", "UnconditionalDropOverload"),
    ("URX", "UpstreamRetryLimitExceeded"),
)

(
    LH, UH, UT, LR, UR, UF, UC, UO, NR, DI, FI, RL, UAEX, RLSE, DC, URX, SI, IH, DPE, UMSDR, RFCF, NFCF, DT, UPE, NC, OM, DF, DO, DR, UDO, URX_LAST,
) = (1 << bit for bit in range(len(_NAMES)))  # fmt: skip

BY_NAME: dict[str, int] = {short: 1 << bit for bit, (short, _) in enumerate(_NAMES)}
BY_NAME["URX"] = URX | URX_LAST
# Envoy prints flags in the order in which they were set: that of a filter before those of the router; there what stopped a retry comes before what ended the
# request (TCP sessions: after it, URX_LAST).
_PRINTED_FIRST = (DI, UO | URX)

_text: dict[int, tuple[str, str]] = {0: ("-", "-")}


def short(flags: int) -> str:
    """`UF,URX`, or `-` when no flag is set."""
    return (_text.get(flags) or _remember(flags))[0]


def long(flags: int) -> str:
    """`UpstreamConnectionFailure,UpstreamRetryLimitExceeded`, or `-`."""
    return (_text.get(flags) or _remember(flags))[1]


def _remember(flags: int) -> tuple[str, str]:
    # Few combinations occur in practice; the memo keeps the access log from joining strings for each request.
    parts = [flags & first for first in _PRINTED_FIRST]
    parts.append(flags & ~sum(_PRINTED_FIRST))
    names = [pair for part in parts for bit, pair in enumerate(_NAMES) if part & (1 << bit)]
    text = _text[flags] = (",".join(pair[0] for pair in names), ",".join(pair[1] for pair in names))
    return text
