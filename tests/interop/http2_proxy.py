"""A running proxy for other people's HTTP/2: a plaintext listener `l1`, a TLS listener `tls` with ALPN, and clusters that speak HTTP/2 or HTTP/1.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.differential import pki
from tests.differential.config import bootstrap, hcm, http, listener, render
from tests.e2e.proxy import Proxy

HTTP2 = {"http2_protocol_options": {"allow_connect": True}}
BODY = "hello, world\n"


def cluster(name: str, port: int, *, http2: bool) -> dict[str, Any]:
    """A static cluster of one host."""
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
    made: dict[str, Any] = {
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "circuit_breakers": {"thresholds": [{"max_requests": 5000, "max_pending_requests": 5000}]},
    }
    if http2:
        options = {"@": "http_options", "explicit_http_config": HTTP2}
        made["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
    return made


def start(folder: Path, *, port: int = 0, http2: bool = True, codec: str = "AUTO", **manager: Any) -> Proxy:
    """Everything goes to the upstream on `port`, if there is one; /hello is answered by the proxy itself."""
    hello = {"match": {"path": "/hello"}, "direct_response": {"status": 200, "body": {"inline_string": BODY}}}
    up = {"match": {"prefix": "/"}, "route": {"cluster": "up", "timeout": "0s", "upgrade_configs": [{"upgrade_type": "websocket"}]}}
    hosts = [{"name": "all", "domains": ["*"], "routes": [hello, *([up] if port else [])]}]
    fields: dict[str, Any] = {"access_log": [], "codec_type": codec, "http2_protocol_options": {"allow_connect": True}, **manager}
    secret = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [secret], "alpn_protocols": ["h2", "http/1.1"]}}
    chain = {"filters": [hcm("tls", hosts, **fields)], "transport_socket": {"name": "tls", "typed_config": context}}
    config = bootstrap(http("l1", hosts, **fields), listener("tls", chains=[chain]), clusters=[cluster("up", port, http2=http2)] if port else [])
    pki.create(folder)
    return Proxy(folder, json.dumps(render(config, lambda kind, name: str(folder / f"{name}.{kind}"))), "--concurrency", "1")
