"""What a route does to the path and the host of a request that it forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import fail, under
from meshproxy.api.matchers import compile_substitution, strip_query
from meshproxy.api.uri_template import compile_rewrite

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.route_match import PathMatch
    from meshproxy.observe.stream_info import StreamInfo

HONOURS = {"envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig": "path_template_rewrite"}

PathRewrite = Callable[["StreamInfo", bytes], "bytes | None"]  # stream and :path -> the new :path, or None to leave it
HostRewrite = Callable[["StreamInfo", "RequestHead"], bytes]  # -> the new host, or empty to leave it

ORIGINAL_PATH = b"x-envoy-original-path"
ORIGINAL_HOST = b"x-envoy-original-host"


def compile_path_rewrite(action: route_components_pb2.RouteAction, match: PathMatch, runtime: Any = None) -> PathRewrite | None:
    """The one path rewrite of an action, if any. Queries are always kept. Raises ConfigError."""
    present = [name for name in ("prefix_rewrite", "path_rewrite") if getattr(action, name)]
    present += [name for name in ("regex_rewrite", "path_rewrite_policy") if action.HasField(name)]
    if not present:
        return None
    if len(present) > 1:
        fail(present[1], "Specify only one of prefix_rewrite, regex_rewrite, path_rewrite_policy or path_rewrite")
    which = present[0]
    if which == "prefix_rewrite":
        if match.template is not None:
            fail(which, "Cannot use prefix_rewrite with matcher extension")
        return prefix_rewrite(action.prefix_rewrite.encode(), match.matched_length)
    if which == "regex_rewrite":
        with under(which):
            return _whole_path(compile_substitution(action.regex_rewrite, runtime))
    if which == "path_rewrite":
        return _formatted(action.path_rewrite)
    with under("path_rewrite_policy.typed_config"):
        return _template(action.path_rewrite_policy.typed_config, match)


def prefix_rewrite(replacement: bytes, length: int | None) -> PathRewrite:
    """Replace the first `length` bytes of the path, or all of it but the query (None)."""
    if length is None:
        return lambda stream, path: replacement + path[len(strip_query(path)) :]
    return lambda stream, path: replacement + path[length:]


def _whole_path(change: Callable[[bytes], bytes | None]) -> PathRewrite:
    def rewrite(stream: StreamInfo, path: bytes) -> bytes:
        bare = strip_query(path)
        changed = change(bare)
        return path if changed is None else changed + path[len(bare) :]

    return rewrite


def _formatted(text: str) -> PathRewrite:
    """`path_rewrite`: format commands; a result of nothing leaves the path as it is."""
    from meshproxy.observe.format import compile_header_value

    with under("path_rewrite"):
        value = compile_header_value(text)

    def rewrite(stream: StreamInfo, path: bytes) -> bytes | None:
        text = value if isinstance(value, bytes) else value(stream)
        return text + path[len(strip_query(path)) :] if text else None

    return rewrite


def _template(packed: Any, match: PathMatch) -> PathRewrite:
    registry.module(registry.type_url(packed), "path rewrite")
    message: Any = registry.unpack(packed)
    if match.template is None:
        fail("", "unable to use envoy.path.rewrite.uri_template.uri_template_rewriter extension without a path_match_policy")
    with under("path_template_rewrite"):
        return _whole_path(compile_rewrite(message.path_template_rewrite, match.template))


def compile_host_rewrite(action: route_components_pb2.RouteAction, runtime: Any = None) -> HostRewrite | None:
    """The host rewrite of an action, except `auto_host_rewrite`, which needs the chosen upstream host."""
    which = action.WhichOneof("host_rewrite_specifier")
    if which == "host_rewrite_literal":
        literal = action.host_rewrite_literal.encode()
        return (lambda stream, head: literal) if literal else None
    if which == "host_rewrite_header":
        name = action.host_rewrite_header.lower().encode()
        return lambda stream, head: head.get(name, b"") or b""
    if which == "host_rewrite_path_regex":
        with under(which):
            substitute = compile_substitution(action.host_rewrite_path_regex, runtime)
        return lambda stream, head: substitute(strip_query(head.path))
    if which == "host_rewrite":
        from meshproxy.observe.format import compile_format

        with under(which):
            text = compile_format(action.host_rewrite)
        return lambda stream, head: text(stream).encode("utf-8", "surrogateescape")
    return None


def update_authority(head: RequestHead, host: bytes, *, append_forwarded: bool, keep_original: bool) -> None:
    """Change the request's host; the old one goes to `x-envoy-original-host` and, when asked for, to the end of `x-forwarded-host`."""
    old = head.authority
    if old:
        if keep_original:
            head.set(ORIGINAL_HOST, old)
        if append_forwarded:
            forwarded = head.get(b"x-forwarded-host")
            if forwarded is None:
                head.add(b"x-forwarded-host", old)
            elif _last_listed(forwarded) != old:
                head.set(b"x-forwarded-host", forwarded + b"," + old)
    head.authority = host


def _last_listed(value: bytes) -> bytes | None:
    """The last element that is not blank, with the blanks around it, as Envoy compares it."""
    parts = [part for part in value.split(b",") if part.strip()]
    return parts[-1] if parts else None
