"""Server names that follow requests (auto_sni, auto_san_validation, override_auto_sni_header) on upstream connections that many requests share, or hosts."""

from __future__ import annotations

from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Head,
    Response,
    Script,
    Until,
    ask,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    filter_,
    get,
    h2_case,
    http,
    listener,
    to,
)


def upstream(name: str, server: str, how: dict[str, Any], *, trusted: bool = False, **names: Any) -> dict[str, Any]:
    """A cluster with TLS; `how`: explicit_http_config or auto_config; `names`: upstream_http_protocol_options."""
    context: dict[str, Any] = {"@": "upstream_tls"}
    if trusted:
        context["common_tls_context"] = {"validation_context": {"trusted_ca": {"filename": "${pem:ca}"}}}
    options = {"@": "http_options", "upstream_http_protocol_options": {"auto_sni": True, **names}, **how}
    return cluster(
        name,
        server,
        transport_socket={"name": "tls", "typed_config": context},
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    )


def by_host(name: str, server: str, how: dict[str, Any], hostname: str = "host.test", **names: Any) -> dict[str, Any]:
    """A cluster whose host says by which name it is to be called."""
    context = {"@": "upstream_tls", "auto_host_sni": True, "sni": "configured.test"}
    options = {"@": "http_options", "upstream_http_protocol_options": names, **how}
    return cluster(
        name,
        endpoint(server, **({"hostname": hostname} if hostname else {})),
        transport_socket={"name": "tls", "typed_config": context},
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    )


H2 = {"explicit_http_config": {"http2_protocol_options": {}}}
AUTO = {"auto_config": {"http2_protocol_options": {}}}
VERIFIED = {"auto_san_validation": True}
CLUSTERS = [
    upstream("h2", "tls_h2", H2),
    upstream("auto", "tls_h2", AUTO),
    upstream("auto-h1", "tls_a", AUTO),
    upstream("named", "tls_h2", H2, override_auto_sni_header="x-name"),
    upstream("auto-named", "tls_h2", AUTO, override_auto_sni_header="x-name"),
    upstream("verified", "tls_h2", H2, trusted=True, **VERIFIED),
    upstream("auto-verified", "tls_h2", AUTO, trusted=True, **VERIFIED),
    upstream("named-verified", "tls_h2", H2, trusted=True, override_auto_sni_header="x-name", **VERIFIED),
]
CLUSTERS += [
    by_host("host-h1", "tls_a", {"explicit_http_config": {"http_protocol_options": {}}}),
    by_host("host-h2", "tls_h2", H2),
    by_host("host-auto", "tls_h2", AUTO),
    by_host("host-and-auto-sni", "tls_h2", H2, auto_sni=True),
    by_host("host-nameless", "tls_h2", H2, hostname=""),
]
NAMES = [one["name"] for one in CLUSTERS]
TUNNEL = filter_("tcp_proxy", stat_prefix="tunnel", cluster="host-h1", tunneling_config={"hostname": "target.test:443"})
CONFIG = bootstrap(*[http(name, to(name)) for name in NAMES], listener("tunnel", TUNNEL), clusters=CLUSTERS)
# Sessions are not resumed here, and a connection whose protocol ALPN decides is counted twice by Envoy.
LOOSE: dict[str, Any] = {"skip_stats": ("ssl.session_reused",)}


def of(on: str) -> list[Case]:
    """Requests for names, one after the other on one downstream connection."""
    made = {
        "one": [ask(authority="a.test")],
        "same": [ask(authority="a.test"), ask(authority="a.test"), ask("POST", authority="a.test", body=b"x")],
        "different": [ask(authority="a.test"), ask(authority="b.test"), ask(authority="a.test")],
        "port": [ask(authority="a.test:8443"), ask(authority="a.test")],
        "upper_case": [ask(authority="C.Test"), ask(authority="c.test")],
        "address": [ask(authority="127.0.0.1"), ask(authority="[::1]:80")],
        "header": [ask("GET", "/", "x-name: b.test", authority="a.test"), ask("GET", "/", "x-name: a.test", authority="b.test")],
        "two_headers": [ask("GET", "/", "x-name: a.test", "x-name: b.test", authority="a.test")],
        "empty_header": [ask("GET", "/", "x-name: ", authority="a.test")],
    }
    if on.startswith("host"):
        made = {"different": made["different"]}
    if on.endswith("verified"):
        del made["upper_case"]  # fails, and our log names it as it was written first
    cases = [h2_case(f"{on}_{name}", *steps, on=on, **LOOSE) for name, steps in made.items()]
    return [*cases, Case(f"{on}_http1", [get(host="a.test"), Response(), get(host="b.test"), Response()], on=on, **LOOSE)]


TUNNELLED: Script = [Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"x"), b"y", Close()]
CASES = [
    *[case for name in NAMES for case in of(name)],
    Case("host_of_a_tunnel", [b"x", Until(b"y")], TUNNELLED, on="tunnel", then="closed", **LOOSE),
]

test_case = check_cases(CASES)
