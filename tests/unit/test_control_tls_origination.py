"""TLS that callers begin: DestinationRules with files and with Secrets, and who gets those."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from control.model.snapshot import MeshSnapshot
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ORDER, SECRET
from control.translate.translator import Translator
from meshproxy.api import support
from tests.differential.pki import Authority
from tests.unit.control_help import GRPC_CLIENT, MESH, WEB, istio, plain, snapshot
from tests.unit.test_control_kinds import complaints

NAME = "outbound|9080||reviews.default.svc.cluster.local"
EDGE = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}"
GATEWAY = istio("Gateway", "g", "selector: {istio: edge}\nservers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]")
AT_THE_EDGE = ProxyKey("sidecar", "edge", "default")
_SDS = {"ads": {}, "resource_api_version": "V3"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("pki")
    Authority(folder, "ca").issue("a", "a.test")
    return {path.name: path.read_text() for path in folder.iterdir()}


def secret(name: str, **data: str) -> str:
    encoded = {key.replace("_", "."): base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": {"name": name}, "data": encoded})


def rule(tls: str, more: str = "", host: str = "reviews") -> str:
    return istio("DestinationRule", "r", f"{{host: {host}, trafficPolicy: {{tls: {tls}}}, {more}}}")


def seen(snapshot: MeshSnapshot, proxy: ProxyKey = WEB):
    view = Translator().view(proxy, snapshot)
    for url in ORDER:
        for one in view.all(url):
            assert not support.check(one.message)[0], one
    return view


def view(*texts: str, proxy: ProxyKey = WEB):
    return seen(snapshot(MESH, *texts), proxy)


def tls_of(view, name: str = NAME):
    return plain(view, CLUSTER, name)["transport_socket"]["typed_config"]


def clusters(view) -> set[str]:
    return {one.name for one in view.all(CLUSTER)}


def secrets(view) -> set[str]:
    return {one.name for one in view.all(SECRET)}


# --- files


def test_files_come_by_their_names():
    files = "clientCertificate: /c/cert.pem, privateKey: /c/key.pem, caCertificates: /c/ca.pem, caCrl: /c/crl.pem"
    made = view(rule(f"{{mode: MUTUAL, {files}, sni: bank.test, subjectAltNames: [a.test]}}"))
    tls = tls_of(made)
    assert tls["sni"] == "bank.test"
    common = tls["common_tls_context"]
    assert common["tls_certificate_sds_secret_configs"] == [{"name": "file-cert:/c/cert.pem~/c/key.pem", "sds_config": _SDS}]
    combined = common["combined_validation_context"]
    assert combined["validation_context_sds_secret_config"] == {"name": "file-root:/c/ca.pem~/c/crl.pem", "sds_config": _SDS}
    assert {one["matcher"]["exact"] for one in combined["default_validation_context"]["match_typed_subject_alt_names"]} == {"a.test"}
    shown = plain(made, SECRET, "file-cert:/c/cert.pem~/c/key.pem")["tls_certificate"]
    assert shown == {"certificate_chain": {"filename": "/c/cert.pem"}, "private_key": {"filename": "/c/key.pem"}}
    trusted = plain(made, SECRET, "file-root:/c/ca.pem~/c/crl.pem")["validation_context"]
    assert trusted == {"trusted_ca": {"filename": "/c/ca.pem"}, "crl": {"filename": "/c/crl.pem"}}
    assert secrets(made.without_secrets()) == secrets(made)  # they say nothing but where files are


def test_simple_without_files_trusts_the_system():
    made = view(rule("{mode: SIMPLE}"))
    common = tls_of(made)["common_tls_context"]
    assert common == {"validation_context": {"trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"}}}
    assert secrets(made) == set()
    (options,) = plain(made, CLUSTER, NAME)["typed_extension_protocol_options"].values()
    assert options["upstream_http_protocol_options"] == {"auto_sni": True, "auto_san_validation": True}


def test_who_answers_is_not_looked_at():
    made = view(rule("{mode: MUTUAL, clientCertificate: /c, privateKey: /k, insecureSkipVerify: true}"))
    assert set(tls_of(made)["common_tls_context"]) == {"tls_certificate_sds_secret_configs"}
    assert secrets(made) == {"file-cert:/c~/k"}


def test_ports_and_subsets_have_their_own():
    ports = "portLevelSettings: [{port: {number: 9080}, tls: {mode: SIMPLE, caCertificates: /port}}]"
    subsets = "subsets: [{name: v1, trafficPolicy: {tls: {mode: SIMPLE, caCertificates: /v1}}}, {name: v2}]"
    text = istio("DestinationRule", "r", f"host: reviews\ntrafficPolicy: {{tls: {{mode: DISABLE}}, {ports}}}\n{subsets}")
    made = view(text)
    assert secrets(made) == {"file-root:/port"}  # a port's settings go before all others, as in Istio
    text = istio("DestinationRule", "r", f"host: reviews\ntrafficPolicy: {{tls: {{mode: DISABLE}}}}\n{subsets}")
    made = view(text)
    assert secrets(made) == {"file-root:/v1"}
    assert "transport_socket" not in plain(made, CLUSTER, NAME)
    assert "transport_socket" in plain(made, CLUSTER, NAME.replace("||", "|v1|"))


def test_a_service_entry_says_who_answers():
    entry = istio(
        "ServiceEntry",
        "outside",
        "{hosts: [a.test], ports: [{number: 443, name: http, protocol: HTTP}], resolution: DNS, subjectAltNames: [spiffe://x/a]}",
    )
    name = "outbound|443||a.test"
    text = rule("{mode: SIMPLE, sni: a.test}", host="a.test")
    names = tls_of(view(entry, text), name)["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"]
    assert {one["matcher"]["exact"] for one in names} == {"spiffe://x/a"}
    text = rule("{mode: SIMPLE, sni: a.test, subjectAltNames: [b.test]}", host="a.test")
    names = tls_of(view(entry, text), name)["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"]
    assert {one["matcher"]["exact"] for one in names} == {"b.test"}


def test_grpcs_own_clients_know_no_such_tls():
    assert NAME not in clusters(Translator().view(GRPC_CLIENT, snapshot(MESH, rule("{mode: SIMPLE}"))))


# --- Secrets


CREDENTIAL = "{mode: MUTUAL, credentialName: bank, sni: bank.test}"


def test_gateways_show_what_a_secret_of_their_namespace_has(pki):
    both = secret("bank", tls_crt=pki["a.pem"], tls_key=pki["a.key"], ca_crt=pki["ca.pem"])
    made = view(rule(CREDENTIAL), both, EDGE, GATEWAY, proxy=AT_THE_EDGE)
    common = tls_of(made)["common_tls_context"]
    assert [one["name"] for one in common["tls_certificate_sds_secret_configs"]] == ["kubernetes://bank"]
    assert common["combined_validation_context"]["validation_context_sds_secret_config"]["name"] == "kubernetes://bank-cacert"
    assert plain(made, SECRET, "kubernetes://bank")["tls_certificate"]["private_key"]["inline_string"] == pki["a.key"]
    assert plain(made, SECRET, "kubernetes://bank-cacert")["validation_context"]["trusted_ca"]["inline_string"] == pki["ca.pem"]
    assert not secrets(made.without_secrets())


def test_simple_asks_for_authorities_alone(pki):
    text = rule("{mode: SIMPLE, credentialName: bank}")
    for name in ("bank", "bank-cacert"):
        made = view(text, secret(name, cacert=pki["ca.pem"]), EDGE, GATEWAY, proxy=AT_THE_EDGE)
        assert secrets(made) == {"kubernetes://bank-cacert"}
    assert NAME not in clusters(view(text, EDGE, GATEWAY, proxy=AT_THE_EDGE))  # rather than a plain one


def test_a_sidecar_gets_a_secret_only_by_a_rule_that_selects_it(pki):
    both = secret("bank", tls_crt=pki["a.pem"], tls_key=pki["a.key"], ca_crt=pki["ca.pem"])
    made = view(rule(CREDENTIAL), both)
    assert secrets(made) == set()
    assert NAME not in clusters(made)
    for_all = istio("DestinationRule", "all", "{host: reviews, trafficPolicy: {tls: {mode: SIMPLE}}}")
    selected = snapshot(MESH, for_all, rule(CREDENTIAL, "workloadSelector: {matchLabels: {app: web}}"), both)
    made = seen(selected)
    assert secrets(made) == {"kubernetes://bank", "kubernetes://bank-cacert"}
    assert tls_of(made)["sni"] == "bank.test"
    other = seen(selected, ProxyKey("sidecar", "reviews-v1", "default"))
    assert secrets(other) == set()
    assert "sni" not in tls_of(other)
    liar = seen(selected, ProxyKey("sidecar", "reviews-v1", "default", (("app", "web"),)))
    assert secrets(liar) == set()
    elsewhere = seen(selected, ProxyKey("sidecar", "web", "elsewhere", (("app", "web"),)))
    assert secrets(elsewhere) == set()


def test_what_a_sidecar_imports_does_not_matter_for_its_secrets(pki):
    both = secret("bank", tls_crt=pki["a.pem"], tls_key=pki["a.key"], ca_crt=pki["ca.pem"])
    imports = istio("Sidecar", "default", "egress: [{hosts: [./reviews.default.svc.cluster.local]}]")
    whole = snapshot(MESH, rule(CREDENTIAL, "workloadSelector: {matchLabels: {app: web}}"), both, imports)
    translator = Translator()
    assert secrets(translator.view(WEB, whole)) == {"kubernetes://bank", "kubernetes://bank-cacert"}
    other = translator.view(ProxyKey("sidecar", "reviews-v1", "default"), whole)
    assert secrets(other) == set()
    assert "transport_socket" not in plain(other, CLUSTER, NAME)


@pytest.mark.parametrize(
    ("tls", "complaint"),
    [
        ("{mode: MUTUAL, clientCertificate: /c}", "privateKey: is needed for MUTUAL, or a credentialName"),
        ("{mode: SIMPLE, clientCertificate: /c}", "clientCertificate: is for MUTUAL, not for SIMPLE"),
        ("{mode: ISTIO_MUTUAL, credentialName: a}", "credentialName: is for SIMPLE and MUTUAL, not for ISTIO_MUTUAL"),
        ("{mode: SIMPLE, credentialName: sds://a}", "credentialName: 'sds://a': only names of Secrets are served"),
        ("{mode: SIMPLE, credentialName: a, caCertificates: /c}", "caCertificates: cannot go with credentialName, which is a Secret that has it"),
        ("{mode: SIMPLE, caCrl: /c}", "caCrl: needs caCertificates"),
        ("{mode: SIMPLE, insecureSkipVerify: true, caCertificates: /c}", "caCertificates: would not be looked at: insecureSkipVerify says so"),
        ("{mode: SIMPLE, insecureSkipVerify: true, subjectAltNames: [a]}", "subjectAltNames: would not be looked at: insecureSkipVerify says so"),
    ],
)
def test_what_cannot_be(tls, complaint):
    assert complaints(rule(tls)) == [f"spec.trafficPolicy.tls.{complaint}"]
