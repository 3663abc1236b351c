"""Answers that the proxy gives by itself: the only place that turns a failure into a response.

A `Reply` is a value: filters return one, the router picks one from the table below, the connection manager sends it. Statuses, bodies, flags and
response code details are Envoy's.
"""

from __future__ import annotations

from meshproxy.observe import flags


class Reply:
    """A local reply.

    `body` is text/plain unless `headers` names a content type; an empty body has neither content-type nor content-length. `details` is the response code
    details. `flag` is ORed into the stream's response flags. `headers` are extra pairs. A gRPC request gets the same reply as HTTP 200 with `grpc-status`
    (`grpc_status`, or the mapping of `status`) and the body as `grpc-message`. `close`: close the downstream HTTP/1 connection after it. `early`: the request's
    body was refused before its end was taken, whatever of it has come meanwhile. `as_is`: a filter's response rather than a refusal: neither the route nor
    `local_reply_config` change it.
    """

    __slots__ = ("as_is", "body", "close", "details", "early", "flag", "grpc_status", "headers", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        *,
        details: str,
        flag: int = 0,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        grpc_status: int | None = None,
        close: bool = False,
        early: bool = False,
        as_is: bool = False,
    ) -> None:
        self.status = status
        self.body = body
        self.details = details
        self.flag = flag
        self.headers = headers
        self.grpc_status = grpc_status
        self.close = close
        self.early = early
        self.as_is = as_is

    def __repr__(self) -> str:
        return f"Reply({self.status}, {self.body!r}, details={self.details!r}, flag={flags.short(self.flag)})"


OVERLOADED = ((b"x-envoy-overloaded", b"true"),)

NO_ROUTE = Reply(404, details="route_not_found", flag=flags.NR)
NO_HEALTHY_UPSTREAM = Reply(503, b"no healthy upstream", details="no_healthy_upstream", flag=flags.UH)
MAINTENANCE = Reply(503, b"maintenance mode", details="maintenance_mode", flag=flags.UO, headers=OVERLOADED)
MAINTENANCE_PLAIN = Reply(503, b"maintenance mode", details="maintenance_mode", flag=flags.UO)
DROP_OVERLOAD = Reply(503, b"drop overload", details="drop_overload", flag=flags.DO, headers=((b"x-envoy-drop-overload", b"true"),))
UNCONDITIONAL_DROP_OVERLOAD = Reply(
    503, b"unconditional drop overload", details="unconditional_drop_overload", flag=flags.UDO, headers=((b"x-envoy-unconditional-drop-overload", b"true"),)
)
NO_FILTER_CONFIG = Reply(500, details="", flag=flags.NFCF)
UPGRADE_FAILED = Reply(403, details="upgrade_failed")
MISSING_HOST = Reply(400, details="missing_host_header")
