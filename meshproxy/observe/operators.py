"""The command operators of format strings (`%DURATION%`, `%REQ(X?Y):Z%`), each as a Python expression over a stream `s`.

`value_of` is the way in; what expressions may say is in `codegen`.

Source: Envoy's configuration/advanced/substitution_formatter; which operators take parameters or lengths, and what they answer when there is nothing, was
found by asking Envoy 1.40.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from typing import Any

from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.observe.codegen import ANY, COMMON, SAME, Code, Value, as_bytes
from meshproxy.observe.time_format import ISO_MILLISECONDS, ISO_MILLISECONDS_LOCAL, compile_time
from meshproxy.record import replace


def value_of(code: Code, name: str, parameter: str, length: int | None, enabled: frozenset[str] = frozenset()) -> Value:
    """The value of one command. ConfigError when there is no such command or its parameters are wrong. `enabled`: commands of configured extensions."""
    simple = _SIMPLE.get(name)
    if simple is not None:
        if parameter or length is not None:
            raise ConfigError(f"{name} does not take any parameters or length")
        return simple
    entry = _WITH_PARAMETERS.get(name)
    if entry is None or (name in _OF_EXTENSIONS and name not in enabled):
        if name in _UNSUPPORTED:
            raise ConfigError.at("", f"%{name}% is not supported", UNSUPPORTED)
        raise ConfigError(f"Not supported field in StreamInfo: {name}")
    make, parameter_required, length_allowed = entry
    if parameter_required and not parameter:
        raise ConfigError(f"{name} requires parameters")
    if length is not None and not length_allowed:
        raise ConfigError(f"{name} does not allow length to be specified.")
    value = make(code, parameter)
    return value if length is None else replace(value, length=length)


# -- commands without parameters


def _text(expression: str, *, optional: bool = True, key: str = "", planned: str = "") -> Value:
    return Value("text", expression, optional, key=key, planned=planned)


def _number(expression: str, *, optional: bool = False, key: str = "") -> Value:
    return Value("int", expression, optional, key=key)


def _between(start: str, end: str) -> Value:
    return _number(f"v.between({start}, {end}, 1000)", optional=True)


def _if_http(value: Value) -> Value:
    return replace(value, expression=f"({value.expression} if s.protocol is not None else None)")


def _simple() -> dict[str, Value]:
    table = {
        "REQUEST_HEADERS_BYTES": _number("v.request_header_map_bytes(s)"),
        "RESPONSE_HEADERS_BYTES": _number("v.response_header_map_bytes(s)"),
        "RESPONSE_TRAILERS_BYTES": _number("v.response_trailer_map_bytes(s)"),
        "BYTES_RECEIVED": _number("s.bytes_received"),
        "BYTES_SENT": _number("s.bytes_sent"),
        "BYTES_RETRANSMITTED": _number("0"),
        "PACKETS_RETRANSMITTED": _number("0"),
        "UPSTREAM_WIRE_BYTES_SENT": _number("s.upstream_bytes_sent"),
        "UPSTREAM_WIRE_BYTES_RECEIVED": _number("s.upstream_bytes_received"),
        "DOWNSTREAM_WIRE_BYTES_SENT": _number("v.downstream_wire_bytes_sent(s)"),
        "DOWNSTREAM_WIRE_BYTES_RECEIVED": _number("v.downstream_wire_bytes_received(s)"),
        "PROTOCOL": _text("s.protocol", key="s.protocol"),
        "UPSTREAM_PROTOCOL": _text("s.upstream_protocol"),
        "RESPONSE_CODE": _number("s.status", key="s.status"),
        "RESPONSE_FLAGS": _text("short(s.flags)", optional=False, key="s.flags"),
        "RESPONSE_FLAGS_LONG": _text("long(s.flags)", optional=False, key="s.flags"),
        "CONNECTION_TERMINATION_DETAILS": _text("v.termination_details(s)"),
        "DURATION": _number("int(((s.end or clock()) - s.start) * 1000 + 1e-4)"),
        "REQUEST_DURATION": _if_http(_between("s.start", "s.request_end")),
        "REQUEST_TX_DURATION": _if_http(_between("s.start", "s.upstream_sent")),
        "RESPONSE_DURATION": _if_http(_between("s.start", "s.upstream_first")),
        "RESPONSE_TX_DURATION": _if_http(_between("s.upstream_first", "s.end")),
        "DOWNSTREAM_CX_RTT": _number("v.round_trip(s)"),
        "ROUNDTRIP_DURATION": _number("None", optional=True),
        "DOWNSTREAM_HANDSHAKE_DURATION": _number("v.handshake_duration(s)", optional=True),
        "UPSTREAM_CONNECTION_POOL_READY_DURATION": _between("s.start", "v.pool_ready(s)"),
        "ROUTE_NAME": _text("v.route_name(s)", key="(None if s.route is None else s.route.name)"),
        "ROUTE_RESOLUTION_COUNT": _number("v.route_resolutions(s)"),
        "ROUTE_RESOLUTION_TIME_US": _number("(int(s.route_time * 1000000) if v.route_resolutions(s) else None)", optional=True),
        "VIRTUAL_CLUSTER_NAME": _text("s.virtual_cluster_name"),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT": _number("s.attempts", key="s.attempts"),
        "UPSTREAM_HOST": _text(
            "(None if s.host is None else s.host.address.text)", key="(None if s.host is None else s.host.address._text or s.host.address.text)"
        ),
        "UPSTREAM_HOST_NAME": _text("v.upstream_host_name(s.host)"),
        "UPSTREAM_HOST_NAME_WITHOUT_PORT": _text("v.upstream_host_name_without_port(s.host)"),
        "UPSTREAM_HOSTS_ATTEMPTED": _text("v.hosts_attempted(s, v.host_address)"),
        "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT": _text("v.hosts_attempted(s, v.host_ip)"),
        "UPSTREAM_HOST_NAMES_ATTEMPTED": _text("v.hosts_attempted(s, v.upstream_host_name)"),
        "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT": _text("v.hosts_attempted(s, v.upstream_host_name_without_port)"),
        "UPSTREAM_CLUSTER": _text("v.cluster_name(s)", key="(None if s.cluster is None else s.cluster.observability_name)"),
        "UPSTREAM_CLUSTER_RAW": _text("(None if s.cluster is None else s.cluster.name)", key="(None if s.cluster is None else s.cluster.name)"),
        "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID": _text("(None if s.upstream is None else '')"),
        "UPSTREAM_TRANSPORT_FAILURE_REASON": _text("(s.upstream_failure.replace(' ', '_') if s.upstream_failure else None)"),
        "UPSTREAM_DETECTED_CLOSE_TYPE": _text("(None if s.host is None and s.protocol is not None else s.upstream_detected_close)"),
        "UPSTREAM_LOCAL_CLOSE_REASON": _text("None"),
        "UPSTREAM_CONNECTION_ID": _number("(0 if s.upstream is None else s.upstream.id)"),
        "UPSTREAM_CONNECTION_IDS_ATTEMPTED": _text("v.upstream_connections_attempted(s)"),
        "UPSTREAM_SERVER_NAME": _text("(None if s.upstream is None else s.upstream.server_name)"),
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON": _text("(s.connection.transport_failure.replace(' ', '_') if s.connection.transport_failure else None)"),
        "DOWNSTREAM_LOCAL_CLOSE_REASON": _text("s.connection.local_close_reason"),
        "DOWNSTREAM_DETECTED_CLOSE_TYPE": _text("s.connection.detected_close", optional=False),
        "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID": _text("''", optional=False),
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID": _text("''", optional=False),
        "CONNECTION_ID": _number("s.connection.id"),
        "STREAM_ID": _text("v.stream_id(s)"),
        "GRPC_STATUS_NUMBER": _number("v.grpc_status(s)", optional=True),
        "TLS_JA3_FINGERPRINT": _text("None"),
        "TLS_JA4_FINGERPRINT": _text("None"),
        "HOSTNAME": _text(repr(socket.gethostname()), optional=False),
        "LOCAL_REPLY_BODY": Value("bytes", "s.local_reply_body", False),
        "LISTENER_NAME": _text("(None if s.connection.listener is None else s.connection.listener.name or None)"),
        "FILTER_CHAIN_NAME": _text("(None if s.connection.filter_chain is None else s.connection.filter_chain.name or None)"),
        "ACCESS_LOG_TYPE": _text("s.access_log_type", optional=False),
        "UNIQUE_ID": _text("v.unique_id()", optional=False),
        "TRACE_ID": _text('getattr(s, "trace_id", None)'),
        "SPAN_ID": _text('getattr(s, "span_id", None)'),
        "CUSTOM_FLAGS": _text('getattr(s, "custom_flags", "")', optional=False),
    }
    for form in ("", "DECOMPRESSED_"):
        table[f"UPSTREAM_{form}HEADER_BYTES_SENT"] = _number(f"s.upstream_{form.lower()}header_bytes_sent")
        table[f"UPSTREAM_{form}HEADER_BYTES_RECEIVED"] = _number(f"s.upstream_{form.lower()}header_bytes_received")
        table[f"DOWNSTREAM_{form}HEADER_BYTES_SENT"] = _number(f"v.downstream_{form.lower()}header_bytes_sent(s)")
        table[f"DOWNSTREAM_{form}HEADER_BYTES_RECEIVED"] = _number(f"v.downstream_{form.lower()}header_bytes_received(s)")
    for command, address in _ADDRESSES.items():
        table[f"{command}_ADDRESS"] = _text(f"(None if (a := {address}) is None else a._text or a.text)")
        table[f"{command}_PORT"] = _number(f"v.address_port({address})", optional=True)
    table |= _tls_commands()
    return {name: replace(value, planned=_PLANNED.get(name) or _by_facts(value.expression)) for name, value in table.items()}


_DOWNSTREAM = ("REMOTE", "LOCAL", "DIRECT_REMOTE", "DIRECT_LOCAL")
# Of streams with `facts`: what those of one kind have in common, and how to say the rest.
_PLANNED = {
    **dict.fromkeys(
        (
            "PROTOCOL RESPONSE_CODE RESPONSE_FLAGS RESPONSE_FLAGS_LONG BYTES_RECEIVED ROUTE_NAME UPSTREAM_REQUEST_ATTEMPT_COUNT UPSTREAM_CLUSTER"
            " UPSTREAM_CLUSTER_RAW UPSTREAM_TRANSPORT_FAILURE_REASON HOSTNAME GRPC_STATUS_NUMBER VIRTUAL_CLUSTER_NAME"
        ).split(),
        COMMON,
    ),
    **dict.fromkeys("CONNECTION_TERMINATION_DETAILS FILTER_CHAIN_NAME UNIQUE_ID ACCESS_LOG_TYPE".split(), SAME),
    **{f"DOWNSTREAM_{which}_ADDRESS": f"(connection.{which.lower()}._text or connection.{which.lower()}.text)" for which in _DOWNSTREAM},
    "DURATION": "int((end - start) * 1000 + 1e-4)",
    "UPSTREAM_HOST": "(host.address._text or host.address.text)",
    "UPSTREAM_LOCAL_ADDRESS": "((a := exchange.info.local)._text or a.text)",
    "UPSTREAM_PROTOCOL": "exchange.protocol",
    "BYTES_SENT": "sent",
}
# What expressions ask of a stream, and where facts have it: such a stream got its request at once, and its response, too.
_FACTS_OF = (
    ("(s.connection.remote if s.remote is None else s.remote)", "connection.remote"),
    ("v.upstream_local(s)", "exchange.info.local"),
    ("v.upstream_remote(s)", "exchange.info.remote"),
    ("v.upstream_tls(s)", "exchange.info.tls"),
    ("s.upstream_first", "end"),
    ("s.upstream_sent", "start"),
    ("s.request_end", "start"),
    ("s.upstream.", "exchange.info."),
    ("s.upstream ", "exchange.info "),
    ("s.protocol is not None", "True"),
    ("s.connection", "connection"),
    ("s.host", "host"),
    ("s.start", "start"),
    ("s.end", "end"),
)


def _by_facts(expression: str) -> str:
    """An expression, said of a stream with `facts`; empty where they do not say it."""
    for asked, fact in _FACTS_OF:
        expression = expression.replace(asked, fact)
    return "" if re.search(r"\bs\b", expression) else expression


_ADDRESSES = {
    "UPSTREAM_LOCAL": "v.upstream_local(s)",
    "UPSTREAM_REMOTE": "v.upstream_remote(s)",
    "DOWNSTREAM_REMOTE": "(s.connection.remote if s.remote is None else s.remote)",
    "DOWNSTREAM_DIRECT_REMOTE": "s.connection.direct_remote",
    "DOWNSTREAM_LOCAL": "s.connection.local",
    "DOWNSTREAM_DIRECT_LOCAL": "s.connection.direct_local",
}


def _tls_commands() -> dict[str, Value]:
    table: dict[str, Value] = {}
    for direction, tls in (("DOWNSTREAM", "s.connection.tls"), ("UPSTREAM", "v.upstream_tls(s)")):
        for field in ("version", "cipher", "session_id"):
            table[f"{direction}_TLS_{field.upper()}"] = _text(f"v.tls_field({tls}, {field!r})")
        kinds = ("ip", "dns", "uri", "email", "other") if direction == "DOWNSTREAM" else ("ip", "dns", "uri")
        for side in ("peer", "local"):
            for kind in kinds:
                command = f"{direction}_{side.upper()}_{'OTHERNAME' if kind == 'other' else kind.upper()}_SAN"
                table[command] = _text(f"v.certificate_field({tls}, '{side}_certificate', '{kind}_sans')")
        fields = {"PEER_SUBJECT": "subject", "PEER_ISSUER": "issuer"}
        if direction == "DOWNSTREAM":
            fields |= {"PEER_SERIAL": "serial", "PEER_FINGERPRINT_256": "sha256", "PEER_FINGERPRINT_1": "sha1"}
            table["DOWNSTREAM_LOCAL_SUBJECT"] = _text(f"v.certificate_field({tls}, 'local_certificate', 'subject')")
        for command, field in fields.items():
            table[f"{direction}_{command}"] = _text(f"v.certificate_field({tls}, 'peer_certificate', '{field}')")
        table[f"{direction}_PEER_CERT"] = _text(f"v.certificate_pem({tls})")
    return table


_SIMPLE = _simple()

# What Python's ssl module does not tell, and the expression language.
_UNSUPPORTED = frozenset(
    """
    DOWNSTREAM_TLS_GROUP UPSTREAM_TLS_GROUP DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256 DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_1 DOWNSTREAM_PEER_CHAIN_SERIALS
    DOWNSTREAM_PEER_ISSUER_FINGERPRINT_256 DOWNSTREAM_PEER_ISSUER_SERIAL CEL TYPED_CEL FILE_CONTENT SECRET UPSTREAM_FILTER_STATE
    """.split()
)
_OF_EXTENSIONS = frozenset(("REQ_WITHOUT_QUERY",))


# -- commands with parameters

_PSEUDO = {":method": "method", ":path": "path", ":authority": "authority", "host": "authority", ":scheme": "scheme", ":protocol": "protocol"}
# Request headers with values that hardly ever come twice.
_UNIQUE = frozenset(":path x-envoy-original-path x-request-id x-client-trace-id traceparent tracestate b3 x-b3-traceid x-b3-spanid idempotency-key".split())
_HEADER_NAME = r":?[!#$%&'*+.^_`|~0-9A-Za-z-]+"


def _header_names(parameter: str) -> list[str]:
    names = parameter.lower().split("?")
    if len(names) > 2:
        raise ConfigError(f"More than 1 alternative header specified in token: {parameter}")
    names = [name for name in names if name]
    if not all(re.fullmatch(_HEADER_NAME, name) for name in names):
        raise ConfigError("Invalid header configuration. Format string contains invalid characters.")
    return names


def _first_of(code: Code, names: list[str], lookup: Callable[[Code, str], str]) -> str:
    if not names:
        return "None"
    if len(names) == 1:
        return lookup(code, names[0])
    first, second = code.local(lookup(code, names[0])), code.local(lookup(code, names[1]))
    return f"({second} if {first} is None else {first})"


def _request_header(code: Code, name: str) -> str:
    attribute = _PSEUDO.get(name)
    if attribute is None:
        return f"{code.head('request')}({name.encode()!r})"
    request = code.local("s.request")
    # A request line that could not be read leaves them empty, and HTTP/1.0 may have no authority: all that counts as no header.
    return f"(None if {request} is None else {request}.{attribute} or None)"


def _response_header(code: Code, name: str) -> str:
    if name == ":status":
        return "(None if s.response is None else b'%d' % s.response.status)"
    code.response_headers.add(name.encode())
    return f"{code.head('response')}({name.encode()!r})"


def _trailer(code: Code, name: str) -> str:
    return f"{code.head('response_trailers')}({name.encode()!r})"


def _headers_of(lookup: Callable[[Code, str], str]) -> Callable[[Code, str], Value]:
    def make(code: Code, parameter: str) -> Value:
        names = _header_names(parameter)
        expression = _first_of(code, names, lookup)
        key = expression if names == [":method"] and lookup is _request_header else ""
        of_request = (*names,) if lookup is _request_header else ()
        return Value("bytes", expression, key=key, unique=not _UNIQUE.isdisjoint(names), planned=_planned_header(names), of_request=of_request)

    return make


def _planned_header(names: list[str]) -> str:
    """See `_PLANNED`; for requests and responses, which have no names in common that matter here."""
    if not any(name in _OF_EACH_STREAM for name in names):
        return COMMON
    return _OF_EACH_STREAM[names[0]] if len(names) == 1 else ""


_OF_EACH_STREAM = {"x-request-id": "request_id", "x-envoy-upstream-service-time": "service_time", "date": ""}


def _request_without_query(code: Code, parameter: str) -> Value:
    return Value("bytes", f"v.without_query({_first_of(code, _header_names(parameter), _request_header)})", unique=True)


def _start_time(code: Code, parameter: str) -> Value:
    return _time(code, parameter, "s.start_wall", local=False)


def _start_time_local(code: Code, parameter: str) -> Value:
    return _time(code, parameter, "s.start_wall", local=True)


def _emit_time(code: Code, parameter: str) -> Value:
    return _time(code, parameter, "wall()", local=False)


def _emit_time_local(code: Code, parameter: str) -> Value:
    return _time(code, parameter, "wall()", local=True)


def _time(code: Code, parameter: str, when: str, *, local: bool) -> Value:
    pattern = _time_pattern(parameter) or (ISO_MILLISECONDS_LOCAL if local else ISO_MILLISECONDS)
    import json

    safe = not local and json.dumps(pattern) == f'"{pattern}"'
    render = code.bind(compile_time(pattern, local=local))
    planned = f"{render}(start_wall)" if when == "s.start_wall" else SAME
    return Value("bytes", f"{render}({when})", optional=False, safe=safe, planned=planned)


def _time_pattern(parameter: str) -> str:
    if re.search(r"%[-_0^#]*[1-9]*[EO]?n", parameter):
        raise ConfigError("Invalid header configuration. Format string contains newline.")
    return parameter


def _certificate_time(tls: str, field: str) -> Callable[[Code, str], Value]:
    def make(code: Code, parameter: str) -> Value:
        render = code.bind(compile_time(_time_pattern(parameter) or ISO_MILLISECONDS))
        expression = f"v.certificate_time({tls}, {field!r}, {render})"
        return Value("bytes", expression, planned=_by_facts(expression))

    return make


_MOMENTS = {
    "DS_RX_BEG": "s.start",
    "DS_RX_HDR_END": "((s.head_end or s.start) if v.route_resolutions(s) else 0.0)",
    "DS_RX_END": "s.request_end",
    "DS_HS_BEG": "(s.connection.start if s.connection.handshake_end else 0.0)",
    "DS_HS_END": "(0.0 if s.protocol is None else s.connection.handshake_end)",
    "US_CX_BEG": "v.upstream_moment(s, 'start')",
    "US_CX_END": "v.upstream_moment(s, 'connected')",
    "US_HS_END": "v.upstream_moment(s, 'handshake_end')",
    "US_TX_BEG": "(0.0 if s.protocol is None else s.upstream_start)",
    "US_TX_END": "s.upstream_sent",
    "US_RX_BEG": "s.upstream_first",
    "US_RX_BODY_BEG": "v.body_start(s)",
    "US_RX_END": "s.upstream_last",
    "DS_TX_BEG": "v.response_start(s)",
    "DS_TX_END": "(0.0 if s.protocol is None else s.end)",
    "DS_CX_BEG": "v.connection_moment(s, 'start')",
    "DS_CX_END": "v.connection_moment(s, 'end')",
}
_UNITS = {"ms": 1000, "us": 1000000, "ns": 1000000000}


def _common_duration(code: Code, parameter: str) -> Value:
    parts = parameter.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"Invalid common duration configuration: {parameter}.")
    unit = _UNITS.get(parts[2] if len(parts) == 3 else "ms")
    if unit is None:
        raise ConfigError(f"Invalid common duration precision: {parts[2]}.")
    # Unknown names are points that filters may set; none of ours does.
    start, end = (_MOMENTS.get(part, "0.0") for part in parts[:2])
    return _number(f"v.between({start}, {end}, {unit})", optional=True)


def _details(code: Code, parameter: str) -> Value:
    return _text("(s.details or None)" if parameter == "ALLOW_WHITESPACES" else "v.details(s)", key="s.details", planned=COMMON)


def _grpc_status(code: Code, parameter: str) -> Value:
    if parameter == "NUMBER":
        return replace(_number("v.grpc_status(s)", optional=True), planned=COMMON)
    if parameter not in ("", "CAMEL_STRING", "SNAKE_STRING"):
        raise ConfigError(f"GrpcStatusFormatter only supports CAMEL_STRING, SNAKE_STRING or NUMBER. Got: {parameter}")
    return _text(f"v.grpc_status_name(s, v.grpc.{'SNAKE_NAMES' if parameter == 'SNAKE_STRING' else 'NAMES'})", planned=COMMON)


def _option(command: str, given: str, allowed: dict[str, str]) -> str:
    """The expression for an option; the first allowed one is the default."""
    chosen = allowed.get(given or next(iter(allowed)))
    if chosen is None:
        raise ConfigError(f"Invalid {command} option: '{given}', only {'/'.join(f'{name!r}' for name in allowed)} are allowed")
    return chosen


def _server_name(code: Code, parameter: str) -> Value:
    which, _, source = parameter.partition(":")
    host = _option("REQUESTED_SERVER_NAME", source, {"ORIG_OR_HOST": "v.any_host(s)", "HOST": "v.host(s)", "ORIG": "v.original_host(s)"})
    return _text(
        _option(
            "REQUESTED_SERVER_NAME",
            which,
            {"SNI_ONLY": "v.server_name(s)", "SNI_FIRST": f"(v.server_name(s) or {host})", "HOST_FIRST": f"({host} or v.server_name(s))"},
        ),
        planned=SAME if which in ("", "SNI_ONLY") else "",
    )


def _path(code: Code, parameter: str) -> Value:
    query, _, source = parameter.partition(":")
    path = _option("PATH", source, {"ORIG_OR_PATH": "v.any_path(s)", "ORIG": "v.original_path(s)", "PATH": "v.path(s)"})
    return Value("bytes", _option("PATH", query, {"WQ": path, "NQ": f"v.without_query({path})"}), unique=True, planned=COMMON, of_request=(ANY,))


def _query_parameter(code: Code, parameter: str) -> Value:
    return Value("bytes", f"v.query_parameter(s, {parameter.encode()!r})", unique=True, planned=COMMON, of_request=(ANY,))


def _query_parameters(code: Code, parameter: str) -> Value:
    query = _option("QUERY_PARAMS", parameter, {"ORIG": "v.query(s)", "DECODED": "v.decoded_query(s)"})
    return Value("bytes", query, unique=True, planned=COMMON, of_request=(ANY,))


def _address_without_port(address: str) -> Callable[[Code, str], Value]:
    def make(code: Code, parameter: str) -> Value:
        masked = re.fullmatch(r"[+-]?\d{1,9}", parameter.strip())
        expression = f"v.address_masked({address}, {int(parameter)})" if masked else f"v.address_without_port({address})"
        return _text(expression, planned=_by_facts(expression))

    return make


def _environment(code: Code, parameter: str) -> Value:
    return Value("bytes", repr(os.environ.get(parameter, "-").encode("utf-8", "surrogateescape")), optional=False, planned=SAME)


def _metadata(namespace_of: str) -> Callable[[Code, str], Value]:
    """`namespace_of` is an expression with a hole for the namespace."""

    def make(code: Code, parameter: str) -> Value:
        namespace, *keys = parameter.split(":")
        found = namespace_of.format(repr(namespace))
        expression = f"v.dig({found}, {tuple(keys)!r})" if keys else found
        return Value("plain", expression, planned=COMMON if namespace_of in _OF_ROUTES else _by_facts(expression))

    return make


_METADATA = {
    "DYNAMIC": "v.dynamic_metadata(s, {})",
    "CLUSTER": "v.metadata_of(s.cluster, {})",
    "ROUTE": "v.metadata_of(s.route, {})",
    "UPSTREAM_HOST": "v.metadata_of(s.host, {})",
    "LISTENER": "v.metadata_of(s.connection.listener, {})",
    "LISTENER_FILTER_CHAIN": "v.metadata_of(s.connection.filter_chain, {})",
    "VIRTUAL_HOST": "v.metadata_of(v.virtual_host(s), {})",
}


_OF_ROUTES = frozenset((_METADATA["CLUSTER"], _METADATA["ROUTE"], _METADATA["VIRTUAL_HOST"]))


def _any_metadata(code: Code, parameter: str) -> Value:
    kind, _, rest = parameter.partition(":")
    source = _METADATA.get(kind)
    if source is None:
        raise ConfigError(f"{kind} is not supported type of metadata")
    return _metadata(source)(code, rest)


def _filter_state(code: Code, parameter: str) -> Value:
    key, _, rest = parameter.partition(":")
    how, _, field = rest.partition(":")
    if not key:
        raise ConfigError("Invalid filter state configuration, key cannot be empty.")
    if how not in ("", "PLAIN", "TYPED", "FIELD"):
        raise ConfigError("Invalid filter state serialize type, only support PLAIN/TYPED/FIELD.")
    if (how == "FIELD") != bool(field):
        raise ConfigError("Invalid filter state serialize type, FIELD should be used with the field name.")
    if how == "FIELD":
        return _text(f"v.filter_state_field(s, {key!r}, {field!r})")
    if how == "PLAIN":
        return _text(f"v.filter_state_text(s, {key!r})")
    return Value("plain", f"v.filter_state(s, {key!r})")


def _coalesce(code: Code, parameter: str) -> Value:
    import json

    try:
        operators = json.loads(parameter)["operators"]
    except ValueError as error:
        raise ConfigError(f"COALESCE: failed to parse JSON configuration: {error}") from None
    except (KeyError, TypeError):
        raise ConfigError("COALESCE: JSON configuration must contain 'operators' array") from None
    if not isinstance(operators, list):
        raise ConfigError("COALESCE: JSON configuration must contain 'operators' array")
    if not operators:
        raise ConfigError("COALESCE: 'operators' array must not be empty")
    chosen = code.fresh()
    for index, entry in enumerate(operators):
        try:
            value = _coalesce_entry(code, entry)
        except ConfigError as error:
            raise ConfigError(f"COALESCE: failed to parse operator at index {index}: {error}") from None
        text = as_bytes(code, value)
        # Everything before the first operator is evaluated anyway: operators are cheap, and none has an effect.
        code.lines.append(f"{chosen} = {text} or None" if index == 0 else f"{chosen} = {chosen} or {text} or None")
    return Value("bytes", chosen)


def _coalesce_entry(code: Code, entry: Any) -> Value:
    if isinstance(entry, str):
        return value_of(code, entry, "", None)
    if not isinstance(entry, dict):
        raise ConfigError("operator entry must be either a string (command name) or an object with 'command' field")
    if not isinstance(entry.get("command"), str):
        raise ConfigError("operator object must have 'command' field")
    length = entry.get("max_length")
    if length is not None and (not isinstance(length, int) or length <= 0):
        raise ConfigError("'max_length' must be a positive integer")
    return value_of(code, entry["command"], str(entry.get("param", "")), length)


Maker = Callable[[Code, str], Value]
# Command -> maker, whether a parameter is required, whether a length is allowed.
_WITH_PARAMETERS: dict[str, tuple[Maker, bool, bool]] = {
    **dict.fromkeys(("REQ", "REQUEST_HEADER"), (_headers_of(_request_header), True, True)),
    **dict.fromkeys(("RESP", "RESPONSE_HEADER"), (_headers_of(_response_header), True, True)),
    **dict.fromkeys(("TRAILER", "RESPONSE_TRAILER"), (_headers_of(_trailer), True, True)),
    "REQ_WITHOUT_QUERY": (_request_without_query, True, True),
    "START_TIME": (_start_time, False, False),
    "START_TIME_LOCAL": (_start_time_local, False, False),
    "EMIT_TIME": (_emit_time, False, False),
    "EMIT_TIME_LOCAL": (_emit_time_local, False, False),
    "COMMON_DURATION": (_common_duration, True, False),
    "RESPONSE_CODE_DETAILS": (_details, False, False),
    "GRPC_STATUS": (_grpc_status, False, False),
    "REQUESTED_SERVER_NAME": (_server_name, False, False),
    "PATH": (_path, False, True),
    "QUERY_PARAM": (_query_parameter, True, True),
    "QUERY_PARAMS": (_query_parameters, False, True),
    "ENVIRONMENT": (_environment, True, True),
    "METADATA": (_any_metadata, True, True),
    "DYNAMIC_METADATA": (_metadata(_METADATA["DYNAMIC"]), True, True),
    "CLUSTER_METADATA": (_metadata(_METADATA["CLUSTER"]), True, False),
    "UPSTREAM_METADATA": (_metadata(_METADATA["UPSTREAM_HOST"]), True, False),
    "FILTER_STATE": (_filter_state, True, True),
    "COALESCE": (_coalesce, True, True),
    **{f"{name}_ADDRESS_WITHOUT_PORT": (_address_without_port(address), False, False) for name, address in _ADDRESSES.items()},
    **{
        f"{direction}_PEER_CERT_V_{when}": (_certificate_time(tls, field), False, False)
        for direction, tls in (("DOWNSTREAM", "s.connection.tls"), ("UPSTREAM", "v.upstream_tls(s)"))
        for when, field in (("START", "not_before"), ("END", "not_after"))
    },
}

COMMANDS = frozenset(_SIMPLE) | frozenset(_WITH_PARAMETERS)
