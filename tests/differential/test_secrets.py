"""Certificates and validation contexts that are named once, as static secrets, and referred to; what the stats and the admin interface say of them."""

import json
from typing import Any

from tests.differential.harness import Case, Response, Rig, Tls, bootstrap, check_cases, cluster, get, hcm, listener, to


def certificate(name: str) -> dict:
    return {"certificate_chain": {"filename": f"${{pem:{name}}}"}, "private_key": {"filename": f"${{key:{name}}}"}}


def secure(name: str, common: dict, **context: Any) -> dict:
    """A TLS listener with a connection manager."""
    tls = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": common, **context}}
    return listener(name, chains=[{"filters": [hcm(name, to("a"))], "transport_socket": tls}])


def origin(name: str, to_upstream: str, common: dict) -> dict:
    """A cluster that speaks TLS."""
    return cluster(name, to_upstream, transport_socket={"name": "tls", "typed_config": {"@": "upstream_tls", "common_tls_context": common}})


def named(*names: str) -> dict:
    return {"tls_certificate_sds_secret_configs": [{"name": name} for name in names]}


AUTHORITY = {"validation_context_sds_secret_config": {"name": "the ca"}}
WEB_ONLY = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "web.mesh.test"}}]}
OTHER_ONLY = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "other.test"}}]}


def combined(default: dict) -> dict:
    return {"combined_validation_context": {"default_validation_context": default, **AUTHORITY}}


CONFIG = bootstrap(
    secure("one", named("server.cert")),
    secure("two", named("server.cert", "other/cert") | AUTHORITY, require_client_certificate=True),
    secure("combined", {"tls_certificates": [certificate("server")]} | combined(WEB_ONLY), require_client_certificate=True),
    secure("refused", {"tls_certificates": [certificate("server")]} | combined(OTHER_ONLY), require_client_certificate=True),
    secure("files", {"tls_certificates": [certificate("other"), certificate("server")]}),
    listener("to_origin", hcm("to_origin", to("mutual"))),
    listener("to_other", hcm("to_other", to("other"))),
    clusters=[
        cluster("a"),
        origin("mutual", "mtls", named("client:cert") | combined({})),
        origin("other", "tls", combined(OTHER_ONLY)),
        cluster("unused", transport_socket_matches=[{"name": "any", "match": {}, "transport_socket": {
            "name": "tls", "typed_config": {"@": "upstream_tls", "common_tls_context": named("client:cert")}}}]),
    ],
)  # fmt: skip
CONFIG["static_resources"]["secrets"] = [
    {"name": "server.cert", "tls_certificate": certificate("server")},
    {"name": "other/cert", "tls_certificate": certificate("other")},
    {"name": "client:cert", "tls_certificate": certificate("client")},
    {"name": "the ca", "validation_context": {"trusted_ca": {"filename": "${pem:ca}"}}},
    {"name": "unused", "validation_context": {}},
]


async def stats(rig: Rig) -> Any:
    """Everything that TLS contexts bring along, before and after they are used."""
    lines = (await rig.proxy.admin("GET", r"/stats?filter=expiration_unix|ssl_socket_factory|\.ssl\."))[1].splitlines()
    return [line.partition(": ")[0] if "expiration_unix" not in line else line for line in lines]


async def prometheus(rig: Rig) -> Any:
    return sorted((await rig.proxy.admin("GET", "/stats/prometheus?filter=expiration_unix"))[1].splitlines())


async def certs(rig: Rig) -> Any:
    """In no order: Envoy keeps its contexts in a set."""
    return sorted(json.dumps(entry, sort_keys=True) for entry in json.loads((await rig.proxy.admin("GET", "/certs"))[1])["certificates"])


async def config_dump(rig: Rig) -> Any:
    configs = json.loads((await rig.proxy.admin("GET", "/config_dump?resource=static_secrets"))[1])["configs"]
    return sorted(json.dumps(entry, sort_keys=True) for entry in configs)


CLIENT = Tls(certificate="client")
CASES = [
    Case("stats", stats),
    Case("prometheus", prometheus),
    Case("certs", certs),
    Case("config_dump", config_dump),
    Case("server_certificate", get(), on="one", tls=Tls()),
    Case("client_verified", get(), on="two", tls=CLIENT),
    Case("client_refused", [get(), Response()], on="two", tls=Tls(certificate="rogue"), then="leave"),
    Case("combined_passes", get(), on="combined", tls=CLIENT),
    Case("combined_refuses", [get(), Response()], on="refused", tls=CLIENT, then="leave"),
    Case("certificate_for_upstream", get(), on="to_origin"),
    Case("upstream_with_another_name", get(), on="to_other"),
]  # fmt: skip

test_case = check_cases(CASES)
