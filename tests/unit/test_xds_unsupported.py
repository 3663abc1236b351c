"""Ways of discovery that this proxy does not have are refused with their paths, wherever they are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api import support
from meshproxy.http import manager  # noqa: F401  declares what is honoured of routes, as in every process with dynamic configuration
from tests.unit.net_help import message

ADS = {"ads": {}, "resource_api_version": "V3"}
TYPE = "type.googleapis.com/"
FILTERS = f"{TYPE}envoy.extensions.filters."
FIRST = "filter_chains[0].filters[0]"
MANAGER = f"{FIRST}.typed_config"


def listener(*filters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "in", "address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}, "filter_chains": [{"filters": list(filters)}], **fields}


def hcm(**fields: Any) -> dict[str, Any]:
    return {
        "name": "hcm",
        "typed_config": {
            "@type": f"{FILTERS}network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            **(fields or {"route_config": {}}),
        },
    }


SCOPED = {"name": "s", "scope_key_builder": {"fragments": [{"header_value_extractor": {"name": "h"}}]}, "rds_config_source": ADS,
          "scoped_rds": {"scoped_rds_config_source": ADS}}  # fmt: skip
ON_DEMAND = {"name": "on_demand", "typed_config": {"@type": f"{FILTERS}http.on_demand.v3.OnDemand", "odcds": {"resources_locator": "xdstp://a/b"}}}
BY_DISCOVERY = {"name": "x", "config_discovery": {"config_source": ADS, "type_urls": [f"{TYPE}a.B"]}}


@pytest.mark.parametrize(
    ("name", "document", "path"),
    [
        ("listener.v3.Listener", listener(hcm(scoped_routes=SCOPED)), f"{MANAGER}.scoped_routes"),
        ("listener.v3.Listener", listener(hcm(route_config={}, http_filters=[ON_DEMAND])),
         f"{MANAGER}.http_filters[0].typed_config.odcds.resources_locator"),
        ("listener.v3.Listener", listener(BY_DISCOVERY), f"{FIRST}.config_discovery"),
        ("listener.v3.Listener", listener(hcm(), listener_filters=[BY_DISCOVERY]), "listener_filters[0].config_discovery"),
        ("cluster.v3.Cluster", {"name": "c", "lrs_server": ADS, "filters": [{"name": "f"}]}, "filters"),
    ],
)  # fmt: skip
def test_is_refused_where_it_is(name, document, path):
    problems, _ = support.check(message(f"envoy.config.{name}", document))
    assert [problem.path for problem in problems] == [path]
