"""Filters of a type of upgrade: what of them is refused. What they do is compared with Envoy's in tests/differential/test_upgrades.py."""

import pytest

from meshproxy.api.errors import ConfigError
from tests.unit.http2_downstream_help import Client

T = "type.googleapis.com/envoy.extensions.filters.http."
ROUTER = f"{{name: router, typed_config: {{'@type': {T}router.v3.Router}}}}"
PLAIN = f"{{name: router, typed_config: {{'@type': {T}router.v3.Router, suppress_envoy_headers: true}}}}"
BUFFER = f"{{name: buffer, typed_config: {{'@type': {T}buffer.v3.Buffer, max_request_bytes: 5}}}}"


@pytest.mark.parametrize(
    ("filters", "path", "why"),
    [
        (f"[{BUFFER}]", "[0]", "buffer: the last filter must be a terminal filter (the router)"),
        (f"[{ROUTER}, {ROUTER}]", "[0]", "router: terminal filter must be the last in the chain"),
        (f"[{BUFFER}, {PLAIN}]", "[1].typed_config.suppress_envoy_headers", "is not what the router of http_filters has"),
    ],
)
def test_refused(filters, path, why):
    with pytest.raises(ConfigError) as caught:
        Client(f"upgrade_configs: [{{upgrade_type: a}}, {{upgrade_type: b, filters: {filters}}}]")
    (problem,) = caught.value.problems
    assert (problem.path, problem.why) == (f"upgrade_configs[1].filters{path}", why)


def test_one_type_twice():
    with pytest.raises(ConfigError, match="multiple upgrade configurations of the same type"):
        Client(f"upgrade_configs: [{{upgrade_type: a}}, {{upgrade_type: A, filters: [{ROUTER}]}}]")
