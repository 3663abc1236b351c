"""An authorisation service that is asked by HTTP: it gets the request's head (and body), and its status says whether the request may go on.

200 lets it pass, 5xx is an error, all else refuses it. Which of the answer's headers go where is configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers
from meshproxy.api.durations import seconds_of
from meshproxy.codec.headers import RequestHead
from meshproxy.http import header_mutations, http_uri, retry
from meshproxy.http.client import HttpClient, HttpError
from meshproxy.http.ext_authz.grpc_service import DEFAULT_TIMEOUT_S
from meshproxy.http.ext_authz.verdict import DENIED, ERROR, OK, Mutation, Verdict
from meshproxy.http.header_mutations import APPEND, OVERWRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.codec.headers import Pair
    from meshproxy.context import Context
    from meshproxy.http.client import Answer
    from meshproxy.observe.stream_info import StreamInfo

    Matches = Callable[[bytes], bool]

_TO_REMOVE = b"x-envoy-auth-headers-to-remove"
# What a refused client gets besides what is allowed, where something is.
_ALWAYS = (b":status", b"content-length", b"www-authenticate", b"location")


class HttpService:
    """One service as an HttpService message has it."""

    def __init__(self, proto: Any, context: Context) -> None:
        """Raises ConfigError relative to `proto`."""
        uri = proto.server_uri
        with errors.under("server_uri"):
            http_uri.check(uri)
        if proto.path_prefix and not proto.path_prefix.startswith("/"):
            errors.fail("path_prefix", 'path_prefix should start with "/".')
        self._prefix: bytes = proto.path_prefix.encode()
        policy = None
        if proto.HasField("retry_policy"):
            with errors.under("retry_policy"):
                policy = retry.compile_core_policy(proto.retry_policy, context.runtime)
        timeout = seconds_of(uri, "timeout", DEFAULT_TIMEOUT_S)
        self.cluster_name: str = uri.cluster
        self._clock = context.clock
        self._client = HttpClient(context, uri.cluster, timeout=timeout or None, policy=policy, forwarded_for=False)
        with errors.under("authorization_request"):
            self._mutate = _compile_added(proto.authorization_request.headers_to_add)
        said = proto.authorization_response
        self._to_upstream = list_matcher(said, "allowed_upstream_headers", context.runtime)
        self._appended_upstream = list_matcher(said, "allowed_upstream_headers_to_append", context.runtime)
        self._to_client = list_matcher(said, "allowed_client_headers_on_success", context.runtime)
        self._to_metadata = list_matcher(said, "dynamic_metadata_from_headers", context.runtime)
        self._to_refused = list_matcher(said, "allowed_client_headers", context.runtime, always=_ALWAYS)
        if not len(said.allowed_client_headers.patterns):
            self._to_refused = lambda name: name != b"host" and name != b":authority"

    async def check(self, request: Any, stream: StreamInfo, log: Any = None) -> Verdict:
        """Ask. `request`: a CheckRequest, of which the HTTP part is sent. Whatever goes wrong is a verdict too."""
        http = request.attributes.request.http
        body: bytes = http.raw_body or http.body.encode()
        head = self._head(http, len(body))
        if self._mutate is not None:
            self._mutate(stream, head)
        started = self._clock()
        try:
            answer = await self._client.request(head, body)
        except HttpError:
            return Verdict(ERROR)
        answer.head.set(b"x-envoy-upstream-service-time", b"%d" % ((self._clock() - started) * 1000))  # as Envoy's own requests have it
        return self._verdict(answer)

    def _head(self, http: Any, length: int) -> RequestHead:
        if http.HasField("header_map"):
            pairs = [(one.key.encode(), one.raw_value) for one in http.header_map.headers]
        else:
            pairs = [(name.encode(), value.encode()) for name, value in http.headers.items()]
        head = RequestHead(b"", b"", items=[(b"content-length", b"%d" % length)])
        for name, value in pairs:
            if name == b":path":
                head.path = self._prefix + value
            elif name != b"content-length":
                head.add(name, value)
        return head

    def _verdict(self, answer: Answer) -> Verdict:
        status = answer.head.status
        if 500 <= status < 600:
            return Verdict(ERROR)
        fields: list[Pair] = [(b":status", b"%d" % status)]
        removed: list[bytes] = []
        for pair in answer.head.items:
            if pair[0] == _TO_REMOVE:
                removed += [name for part in pair[1].split(b",") if (name := part.strip().lower())]
            else:
                fields.append(pair)
        if status == 200:
            made = Verdict(OK, status=200)
            made.remove = removed
            mutations = [Mutation(*pair, OVERWRITE) for pair in fields if self._to_upstream(pair[0])]
            mutations += [Mutation(*pair, APPEND) for pair in fields if self._appended_upstream(pair[0])]
            made.add(mutations, [Mutation(*pair, APPEND) for pair in fields if self._to_client(pair[0])])
        else:
            made = Verdict(DENIED, status=status)
            made.reply = [pair for pair in fields if self._to_refused(pair[0])]
            made.body = answer.body
        made.metadata = {name.decode("latin-1"): value.decode("utf-8", "replace") for name, value in fields if self._to_metadata(name)}
        return made

    def __repr__(self) -> str:
        return f"<HttpService {self.cluster_name}>"


def list_matcher(proto: Any, field: str, runtime: Any, *, always: tuple[bytes, ...] = ()) -> Matches:
    """The ListStringMatcher in a field as a test of names, which the names `always` pass. Raises ConfigError relative to `proto`."""
    tests: list[Matches] = [name.__eq__ for name in always]
    for index, pattern in enumerate(getattr(proto, field).patterns):
        with errors.under(f"{field}.patterns[{index}]"):
            tests.append(matchers.compile_string(pattern, runtime))
    return lambda name: any(test(name) for test in tests)


def _compile_added(headers: Iterable[Any]) -> header_mutations.Mutation | None:
    """HeaderValues as they go into the request to the service: each in the place of what has its name."""
    from meshproxy.api import messages

    option = messages.known("envoy.config.core.v3.HeaderValueOption")
    options = []
    for header in headers:
        options.append(option(append_action=OVERWRITE))
        options[-1].header.CopyFrom(header)
    return header_mutations.compile_mutation(options, (), "headers", request=True)
