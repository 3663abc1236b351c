"""The network filter ext_authz."""

from typing import Any

from tests.differential.authz import GRPC, TLS, allows, denies, errs, grpc_play
from tests.differential.harness import (
    Case,
    Echo,
    Ended,
    Eof,
    Play,
    Rst,
    Script,
    Tls,
    Until,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    h2_cluster,
    listener,
)

TCP_LOG = file_log("%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %DYNAMIC_METADATA(envoy.filters.network.ext_authz:said)% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n")


def network(name: str, *before: Any, tls: bool = False, **fields: Any) -> dict[str, Any]:
    """A plain listener with the network filter."""
    config = {"transport_api_version": "V3", "grpc_service": GRPC, "stat_prefix": name} | fields
    made = listener(name, *before, filter_("network_ext_authz", **config), filter_("tcp_proxy", stat_prefix=name, cluster="a", access_log=[TCP_LOG]))
    if tls:
        made["filter_chains"][0]["transport_socket"] = TLS
        made["listener_filters"] = [filter_("tls_inspector")]
    return made


SHADOW = {"action": "DENY", "policies": {"of-shadow": {"permissions": [{"any": True}], "principals": [{"any": True}]}}}
CONFIG = bootstrap(
    network("tcp"),
    network("tcp_open", failure_mode_allow=True),
    network("tcp_labelled", bootstrap_metadata_labels_key="labels", metadata_context_namespaces=["envoy.filters.network.rbac"]),
    network("tcp_tls", tls=True, include_peer_certificate=True, include_tls_session=True),
    network("tcp_slow", grpc_service={"envoy_grpc": {"cluster_name": "h2authz"}}),
    *[
        network(
            f"tcp_{name}",
            filter_("network_rbac", stat_prefix="x.", shadow_rules=SHADOW, shadow_rules_stat_prefix="istio_ext_authz_"),
            filter_enabled_metadata={
                "filter": "envoy.filters.network.rbac",
                "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
                "value": {"string_match": {"prefix": prefix}},
            },
        )
        for name, prefix in (("enabled", "of-"), ("disabled", "not-"))
    ],
    clusters=[cluster("a"), h2_cluster("h2authz")],
) | {"node": {"id": "test-node", "cluster": "test-cluster", "metadata": {"labels": {"app": "a", "n": 1}}}}


def tcp(on: str, name: str, *said: Script, steps: Script | None = None, **fields: Any) -> Case:
    script = steps or [b"hello", Until(b"hello")]
    return Case(f"{on}_{name}", script, {"h2authz": grpc_play(*said), "a": Play([[Echo()]], on_connect=True)}, on=on, then="leave", **fields)


METADATA = {"dynamic_metadata": {"said": "yes"}}
ENDED: Script = [b"hello", Eof()]
CASES = [
    tcp("tcp", "allowed"),
    tcp("tcp", "allowed_with_metadata", allows(rest=METADATA)),
    tcp("tcp", "denied", denies(), steps=ENDED),
    tcp("tcp", "denied_with_metadata", denies(rest=METADATA), steps=ENDED),
    tcp("tcp", "error", errs(), steps=ENDED),
    tcp("tcp", "reset", [Ended(), Rst()], steps=ENDED),
    tcp("tcp_open", "error", errs()),
    tcp("tcp_open", "denied", denies(), steps=ENDED),
    tcp("tcp_slow", "timeout", [Ended(), Wait("never")], steps=ENDED),
    tcp("tcp_labelled", "allowed"),
    tcp("tcp_tls", "client", tls=Tls(certificate="client")),
    tcp("tcp_enabled", "denied", denies(), steps=ENDED),
    tcp("tcp_disabled", "denied", denies(), skip_stats=(".disabled",), note="Envoy counts each piece of data"),
]
test_case = check_cases(CASES)
