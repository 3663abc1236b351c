"""Which protocol a cluster speaks, and which of a host's pools a request gets."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead
from meshproxy.upstream.cluster_manager import validate
from meshproxy.upstream.http1_pool import Http1Pool, RawPool
from meshproxy.upstream.http2_pool import AutoPool, Http2Pool
from tests.unit import upstream_help as up

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
TLS = {"transport_socket": {"name": "tls", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"}}}
RAW = {"name": "raw", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}}
HEADS = {version: RequestHead(b"GET", b"/", b"a.test", [], version=version) for version in (10, 11, 20)}


def cluster(options: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    if options is not None:
        fields["typed_extension_protocol_options"] = {HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}", **options}}
    return up.static(up.group("127.0.0.1:1"), **fields)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (cluster(), (Http1Pool,) * 3),
        (cluster({"explicit_http_config": {"http_protocol_options": {}}}), (Http1Pool,) * 3),
        (cluster({"explicit_http_config": {"http2_protocol_options": {}}}), (Http2Pool,) * 3),
        (cluster({"use_downstream_protocol_config": {"http_protocol_options": {}}}), (Http1Pool, Http1Pool, Http2Pool)),
        (cluster({"auto_config": {}}, **TLS), (AutoPool,) * 3),
        (cluster(http2_protocol_options={}), (Http2Pool,) * 3),
        (cluster(http_protocol_options={}), (Http1Pool,) * 3),
        (cluster(http_protocol_options={}, http2_protocol_options={}, protocol_selection="USE_DOWNSTREAM_PROTOCOL"), (Http1Pool, Http1Pool, Http2Pool)),
    ],
)
def test_the_protocol_of_requests(config, kinds):
    made = up.cluster(config)
    host = made.hosts[0]
    pools = [made.pool_for(host, 0, HEADS[version]) for version in (10, 11, 20)]
    assert tuple(type(pool) for pool in pools) == kinds
    assert [made.pool_for(host, 0, HEADS[version]) for version in (10, 11, 20)] == pools, "they are kept"
    assert made.pool_for(host, 1, HEADS[11]) is not pools[1], "priorities have their own"
    assert type(made.pool_for(host, 0, HEADS[20], raw=True)) is RawPool
    assert made.one_pool is (len(set(kinds)) == 1)
    if made.one_pool:
        assert host.pools[0] is pools[0], "where lanes look for it"


def test_options_of_http2():
    limits = {"max_headers_count": 7, "max_response_headers_kb": 9}
    made = up.cluster(cluster({"explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 3}}, "common_http_protocol_options": limits}))
    options = made.h2_options
    assert (options.max_concurrent_streams, options.max_headers, options.max_head_bytes) == (3, 7, 9 * 1024)
    assert made.h2_options is options
    assert up.cluster(cluster(http2_protocol_options={})).h2_options.max_head_bytes == 60 * 1024
    options.stats.rx_reset.n += 2
    assert made.context.stats.value("cluster.c.http2.rx_reset") == 2


@pytest.mark.parametrize(
    ("config", "path", "why"),
    [
        (cluster({"auto_config": {}}), "transport_socket", "ALPN configured for cluster c which has a non-ALPN transport socket"),
        (
            cluster({"auto_config": {}}, **TLS, transport_socket_matches=[{"name": "m", "match": {"a": "b"}, "transport_socket": RAW}]),
            "transport_socket_matches[0].transport_socket.typed_config",
            "ALPN configured for cluster c which has a non-ALPN transport socket matcher",
        ),
        (cluster(http_protocol_options={}, http2_protocol_options={}), "http2_protocol_options", "Both HTTP1 and HTTP2 options may only be configured"),
        (
            cluster({"explicit_http_config": {"http3_protocol_options": {}}}),
            f'typed_extension_protocol_options["{HTTP_OPTIONS}"].explicit_http_config.http3_protocol_options',
            "HTTP/3 is not supported",
        ),
        (
            cluster(http2_protocol_options={"custom_settings_parameters": [{"identifier": 2, "value": 1}]}),
            "http2_protocol_options.custom_settings_parameters[0]",
            "server push is not supported",
        ),
        (
            cluster({"explicit_http_config": {"http2_protocol_options": {"custom_settings_parameters": [{"identifier": 8, "value": 1}]}}}),
            f'typed_extension_protocol_options["{HTTP_OPTIONS}"].explicit_http_config.http2_protocol_options.custom_settings_parameters[0]',
            "must only be configured through the named field",
        ),
    ],
)
def test_mistakes(config, path, why):
    with pytest.raises(ConfigError) as error:
        validate(up.proto(config), up.context())
    (problem,) = error.value.problems
    assert problem.path == path
    assert why in problem.why
