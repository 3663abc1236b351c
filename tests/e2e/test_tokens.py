"""Keys that the background fetches, in real processes: they are there before the first request, and again before they are too old."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Ports, Service, fetch
from tests.e2e.proxy import ADMIN, Proxy, cluster, listener, wait_until
from tests.e2e.test_control_tokens import KeyServer
from tests.jwt_help import ISSUER, token

pytestmark = [pytest.mark.slow, pytest.mark.envoy]


@pytest.mark.parametrize("fast", [False, True], ids=["listener_waits", "fast_listener"])
@pytest.mark.parametrize("kind", ["envoy", "ours"])
def test_keys_are_fetched_in_the_background(tmp_path: Path, kind: str, fast: bool) -> None:
    if kind == "envoy" and envoy_binary() is None:
        pytest.skip("no envoy binary")
    ports, keys, service = Ports(), KeyServer(), Service("a")
    try:
        port = ports.take()
        uri = {"uri": "http://keys.test/jwks", "cluster": "keys", "timeout": "5s"}
        provider = {"issuer": ISSUER, "remote_jwks": {"http_uri": uri, "cache_duration": "1s", "async_fetch": {"fast_listener": fast}}}
        config = {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": {"p": provider},
            "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
        }
        filters = f"- {json.dumps({'name': 'jwt', 'typed_config': config})}"
        listeners = listener(port, "{match: {prefix: /}, route: {cluster: a}}", filters=filters)
        text = f"{ADMIN}static_resources:\n  listeners:{listeners}  clusters:{cluster('a', service.port)}{cluster('keys', keys.port)}"
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else None
        ports.close()
        with Proxy(tmp_path, text, "--concurrency", "1", "-l", "error", command=command):
            wait_until(lambda: keys.served)
            assert fetch(port, authorization=f"Bearer {token()}")[0] == 200
            assert fetch(port, authorization=f"Bearer {token('rsa2')}")[0] == 401
            wait_until(lambda: len(keys.served) >= 3)  # once a second, whether anybody asks or not
            assert set(keys.served) == {"/jwks"}
            assert fetch(port, authorization=f"Bearer {token()}")[0] == 200
    finally:
        keys.close()
        service.close()
