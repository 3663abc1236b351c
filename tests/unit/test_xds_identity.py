"""The bootstrap's Workload extension: what it may say, and who is answered by it."""

from __future__ import annotations

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.xds import identity
from tests.unit.net_help import message

BOOTSTRAP = "envoy.config.bootstrap.v3.Bootstrap"
SOURCE = "envoy.config.core.v3.ConfigSource"


def bootstrap(*extensions: dict):
    return message(BOOTSTRAP, {"bootstrap_extensions": [{"name": "identity", "typed_config": {"@type": identity.TYPE_URL, **one}} for one in extensions]})


def found(**fields):
    return identity.find(bootstrap(fields))


def test_one_or_none():
    assert identity.find(message(BOOTSTRAP, {})) is None
    assert found(authority="a").authority.value == "a"
    with pytest.raises(ConfigError, match=r"bootstrap_extensions\[1\]: a process has one identity"):
        identity.find(bootstrap({"authority": "a"}, {"workload_api": "a"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"authority": "here"},
        {"authority": "here", "identity": "spiffe://mesh.test/ns/a/sa/b", "life": "60s", "token_file": "/a"},
        {"authority": "here", "join_token_file": "/a", "serves": "sds"},
        {"workload_api": "here", "identity": "spiffe://mesh.test/any/path"},
    ],
)
def test_what_is_right(fields):
    identity.check(found(**fields), {"here"}.__contains__)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "authority"),
        ({"authority": "here", "workload_api": "here"}, "authority"),
        ({"authority": "there"}, "authority"),
        ({"workload_api": "there"}, "workload_api"),
        ({"authority": "here", "identity": "web"}, "identity"),
        ({"workload_api": "here", "token_file": "/a"}, "token_file"),
        ({"workload_api": "here", "join_token_file": "/a"}, "join_token_file"),
        ({"workload_api": "here", "life": "60s"}, "life"),
        ({"authority": "here", "token_file": "/a", "join_token_file": "/b"}, "join_token_file"),
    ],
)
def test_what_is_wrong(fields, path):
    with pytest.raises(ConfigError) as caught:
        identity.check(found(**fields), {"here"}.__contains__)
    assert [problem.path for problem in caught.value.problems] == [path]


def test_who_is_answered():
    def source(cluster: str):
        service = {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": cluster}}]}
        return message(SOURCE, {"resource_api_version": "V3", "api_config_source": service})

    usual = identity.LocalIdentity(found(authority="a"), None)
    assert [usual.answers(source(name)) for name in ("sds-grpc", "sds", "a")] == [True, False, False]
    named = identity.LocalIdentity(found(authority="a", serves="sds"), None)
    assert [named.answers(source(name)) for name in ("sds-grpc", "sds", "a")] == [False, True, False]
    assert not usual.answers(message(SOURCE, {"ads": {}, "resource_api_version": "V3"}))
