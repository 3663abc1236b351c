"""An authorisation service that is asked by gRPC: envoy.service.auth.v3.Authorization/Check, a call for each check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import errors, messages
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.api.metadata import struct_dict
from meshproxy.codec import grpc
from meshproxy.http.ext_authz.verdict import DENIED, ERROR, JOIN, OF_RESPONSES, OK, Mutation, Verdict
from meshproxy.http.header_mutations import APPEND, OVERWRITE
from meshproxy.observe.format import compile_header_value
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

_METHOD = "/envoy.service.auth.v3.Authorization/Check"
DEFAULT_TIMEOUT_S = 0.2


class GrpcService:
    """One service as a GrpcService message has it."""

    def __init__(self, proto: Any, context: Context) -> None:
        """Raises ConfigError relative to `proto`."""
        if proto.WhichOneof("target_specifier") != "envoy_grpc":
            errors.fail("google_grpc", "only envoy_grpc is supported", UNSUPPORTED)
        target = proto.envoy_grpc
        self._timeout = seconds_of(proto, "timeout", DEFAULT_TIMEOUT_S) or None
        self._constant: list[tuple[str, str | bytes]] = []
        self._computed: list[tuple[str, Callable[[StreamInfo], bytes]]] = []
        for index, one in enumerate(proto.initial_metadata):
            with errors.under(f"initial_metadata[{index}].value"):
                value = compile_header_value(one.value)
            if isinstance(value, bytes):
                self._constant.append((one.key, one.value))
            else:
                self._computed.append((one.key, value))
        self.cluster_name: str = target.cluster_name
        self._client = GrpcClient(context.clusters, target.cluster_name, authority=target.authority, metadata=self._constant)
        self._total = context.stats.scope("http.async-client.").counter("rq_total")
        self._answer: Any = messages.known("envoy.service.auth.v3.CheckResponse")

    async def check(self, request: Any, stream: StreamInfo, log: Any = None) -> Verdict:
        """Ask. `request`: a CheckRequest; `log`: see `LoggingInfo`. Whatever goes wrong is a verdict too."""
        metadata = [(name, text.decode("latin-1")) for name, value in self._computed if (text := value(stream))]
        self._total.n += 1
        try:
            async with self._client.stream(_METHOD, metadata=metadata, timeout=self._timeout) as call:
                try:
                    await call.send(request.SerializeToString(), done=True)
                    message = await call.read()
                    if message is None:
                        raise GrpcError(grpc.INTERNAL, "no response")
                    answer = self._answer.FromString(message)
                    if await call.read() is not None:
                        raise GrpcError(grpc.INTERNAL, "more than one response")
                finally:
                    if log is not None:
                        log.bytesSent, log.bytesReceived = call.stream.upstream_bytes_sent, call.stream.upstream_bytes_received
        except GrpcError as error:
            return Verdict(ERROR, grpc_status=error.status)
        except (DecodeError, ValueError):
            return Verdict(ERROR, grpc_status=grpc.INTERNAL)
        return _verdict(answer)

    def __repr__(self) -> str:
        return f"<GrpcService {self.cluster_name}>"


def check_version(proto: Any) -> None:
    """Raise ConfigError if `transport_api_version` is V2; AUTO is V3."""
    v2 = 1
    if proto.transport_api_version == v2:
        errors.fail("transport_api_version", "the v2 xDS major version has been removed and is no longer supported: V3 is what is spoken")


def _verdict(answer: Any) -> Verdict:
    code = answer.status.code
    if code == grpc.OK:
        made = Verdict(OK, grpc_status=code)
        if answer.HasField("ok_response"):
            ok = answer.ok_response
            made.add([_of_request(option) for option in ok.headers], _of_response(ok.response_headers_to_add, made))
            made.remove = [name.encode() for name in ok.headers_to_remove]
            made.query = [(one.key.encode(), one.value.encode()) for one in ok.query_parameters_to_set]
            made.query_remove = [name.encode() for name in ok.query_parameters_to_remove]
    else:
        kind = "error_response" if answer.HasField("error_response") else "denied_response"
        made = Verdict(ERROR, grpc_status=code) if kind == "error_response" else Verdict(DENIED, status=403, grpc_status=code)
        if answer.HasField(kind):
            reply = getattr(answer, kind)
            made.reply = [_pair(option) for option in reply.headers if not option.append.value]
            if made.outcome == ERROR:  # as in Envoy, where a refusal does without them
                made.reply += [_pair(option) for option in reply.headers if option.append.value]
            if 200 <= reply.status.code < 600:  # or the client would wait for another response
                made.status = reply.status.code
            made.body = reply.body.encode()
    old = answer.HasField("ok_response") and answer.ok_response.HasField("dynamic_metadata")
    struct = answer.ok_response.dynamic_metadata if old else answer.dynamic_metadata
    if len(struct.fields):
        made.metadata = struct_dict(struct)
    return made


def _of_request(option: Any) -> Mutation:
    """Envoy looks at the old `append` alone."""
    return Mutation(*_pair(option), JOIN if option.append.value else OVERWRITE)


def _of_response(options: Iterable[Any], made: Verdict) -> list[Mutation]:
    mutations = []
    for option in options:
        action = option.append_action
        if option.HasField("append"):
            action = APPEND if option.append.value else OVERWRITE
        if action in OF_RESPONSES:
            mutations.append(Mutation(*_pair(option), action))
        else:
            made.invalid = True
    return mutations


def _pair(option: Any) -> tuple[bytes, bytes]:
    return option.header.key.lower().encode(), option.header.value.encode()
