"""Routes that answer by themselves: redirects, direct responses, and the redirect to HTTPS that a virtual host can require."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource
from meshproxy.api.errors import fail, under
from meshproxy.api.matchers import compile_substitution, strip_query
from meshproxy.http.replies import Reply
from meshproxy.http.route_rewrite import ORIGINAL_PATH

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.route_match import PathMatch
    from meshproxy.observe.stream_info import StreamInfo

HONOURS = {
    "envoy.config.route.v3.RedirectAction": (
        "https_redirect scheme_redirect host_redirect port_redirect path_redirect prefix_rewrite regex_rewrite response_code strip_query"
    ),
    "envoy.config.route.v3.DirectResponseAction": "status body body_format",
}

Answer = Callable[["StreamInfo"], Reply]

DEFAULT_MAX_BODY = 4096  # bytes; RouteConfiguration.max_direct_response_body_size_bytes
_DETAILS = "direct_response"
_REDIRECT_STATUS = (301, 302, 303, 307, 308)  # RedirectAction.RedirectResponseCode


def https_redirect(stream: StreamInfo) -> Reply:
    """301 to the same URL under https."""
    head = stream.request
    assert head is not None
    return Reply(301, details=_DETAILS, headers=((b"location", b"https://" + head.authority + head.path),))


# -- direct responses -----------------------------------------------------------------------------------------------------------------------------------


def compile_direct_response(proto: route_components_pb2.DirectResponseAction, max_body: int = DEFAULT_MAX_BODY) -> Answer:
    """The answer of a `DirectResponseAction`; 201 and 3xx say where: the requested URL. Bodies are read now. Raises ConfigError."""
    status = proto.status
    body = b""
    if proto.HasField("body"):
        with under("body"):
            body = datasource.read(proto.body, allow_empty=True, max_size=max_body)
    if proto.HasField("body_format"):
        return _formatted(status, body, proto.body_format)
    if status != 201 and not 300 <= status < 400:
        reply = Reply(status, body, details=_DETAILS)
        return lambda stream: reply
    return lambda stream: Reply(status, body, details=_DETAILS, headers=_location(stream))


def _location(stream: StreamInfo) -> tuple[tuple[bytes, bytes], ...]:
    head = stream.request
    assert head is not None
    if not head.path:
        return ()
    return ((b"location", head.scheme + b"://" + _host(head, head.scheme, b"") + head.path),)


def _formatted(status: int, body: bytes, proto: Any) -> Answer:
    from meshproxy.observe.format import compile_substitution_format

    with under("body_format"):
        text = compile_substitution_format(proto)
    content_type = proto.content_type.encode() or (b"application/json" if proto.WhichOneof("format") == "json_format" else b"text/plain")
    # A reply is text/plain unless it says otherwise.
    headers = () if content_type == b"text/plain" else ((b"content-type", content_type),)
    has_location = status == 201 or 300 <= status < 400

    def answer(stream: StreamInfo) -> Reply:
        stream.local_reply_body = body  # what %LOCAL_REPLY_BODY% stands for
        return Reply(status, text(stream), details=_DETAILS, headers=(*_location(stream), *headers) if has_location else headers)

    return answer


# -- redirects ------------------------------------------------------------------------------------------------------------------------------------------


class Redirect:
    """A `RedirectAction`; callable. The request's path is rewritten in place first, as Envoy does, so that access logs show it."""

    __slots__ = ("_host", "_insert_original", "_path", "_path_has_query", "_port", "_regex", "_replaced_length", "_replacement", "_scheme", "_status", "_strip")

    def __init__(self, proto: route_components_pb2.RedirectAction, match: PathMatch, *, insert_original: bool = True, runtime: Any = None) -> None:
        """Raises ConfigError with paths relative to the action."""
        self._status = _REDIRECT_STATUS[proto.response_code]
        self._scheme = proto.scheme_redirect.encode() or (b"https" if proto.https_redirect else b"")
        self._host = proto.host_redirect.encode()
        self._port = b":%d" % proto.port_redirect if proto.port_redirect else b""
        self._path = proto.path_redirect.encode()
        self._path_has_query = b"?" in self._path
        self._strip = proto.strip_query and not self._path_has_query
        self._insert_original = insert_original
        self._replacement = proto.prefix_rewrite.encode()
        self._replaced_length = match.matched_length
        if self._replacement and match.template is not None:
            fail("prefix_rewrite", "Cannot use prefix_rewrite with matcher extension")
        self._regex: Callable[[bytes], bytes] | None = None
        if proto.HasField("regex_rewrite"):
            with under("regex_rewrite"):
                self._regex = compile_substitution(proto.regex_rewrite, runtime)

    def __call__(self, stream: StreamInfo) -> Reply:
        head = stream.request
        assert head is not None
        self._rewrite(head)
        scheme = self._scheme or head.scheme
        host = self._host or _host(head, scheme, self._port)
        location = b"%b://%b%b%b" % (scheme, host, self._port, self._target(head.path))
        return Reply(self._status, details=_DETAILS, headers=((b"location", location),))

    def _rewrite(self, head: RequestHead) -> None:
        path = head.path
        if self._regex is not None:
            bare = strip_query(path)
            changed = self._regex(bare)
            if not changed:
                return
            new = changed + path[len(bare) :]
        elif self._replacement:
            length = self._replaced_length
            new = self._replacement + path[len(strip_query(path)) if length is None else length :]
        else:
            return
        if self._insert_original:
            head.set(ORIGINAL_PATH, path)
        head.path = new

    def _target(self, path: bytes) -> bytes:
        if self._path:
            # The redirect's own query wins over the request's, which is otherwise kept.
            target = self._path if self._path_has_query else self._path + path[_query_start(path) :]
        else:
            target = path
        if not target.startswith(b"/"):
            target = b"/" + target
        return target[: _query_start(target)] if self._strip else target


def _query_start(path: bytes) -> int:
    position = path.find(b"?")
    return len(path) if position < 0 else position


def _host(head: RequestHead, scheme: bytes, port: bytes) -> bytes:
    """The request's host, without its port when another is set or when it was the default of a scheme that changes."""
    host = head.authority
    end = host.rfind(b"]:") + 1 if host.startswith(b"[") else host.rfind(b":")
    if end <= 0:
        return host
    if port:
        return host[:end]
    protocol = head.get(b"x-forwarded-proto", head.scheme)
    if scheme != protocol and host[end:] == (b":443" if protocol == b"https" else b":80" if protocol == b"http" else None):
        return host[:end]
    return host
