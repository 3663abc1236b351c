"""Workloads that register themselves: what nodes say, what becomes of it, and who is believed."""

from __future__ import annotations

import json

import pytest

from control import bootstrap, cli
from control.ads.hub import Hub
from control.ads.registrations import GRACE_S, Registrations, registration_of
from control.kinds.store import Store
from control.model.health import TCP, Probe
from control.model.registration import Registration
from control.model.service import Locality
from control.model.snapshot import build
from control.translate.proxy import of_node
from control.translate.resource import CLUSTER, ENDPOINTS
from meshproxy.api import convert, messages
from meshproxy.api.spiffe import SpiffeId
from tests.unit.control_help import istio, snapshot
from tests.unit.test_control_kinds import complaints

SERVICE = "{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {selector: {app: s}, ports: [{name: http, port: 80, targetPort: http}]}}"
GROUP = """
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: g}
spec:
  metadata:
    labels: {app: s, tier: back}
    annotations: {meshproxy/sidecar: '{"inbound": [{"port": 8000, "listen": 18000}], "identity": true}'}
  template: {ports: {http: 8000}, labels: {app: other, version: v1}, serviceAccount: vm, weight: 3, locality: eu/a, network: n}
  probe: {tcpSocket: {port: 8000}}
"""
ONE = Registration("vm-1", "default", "g", "10.0.0.7")
KEY = ("default", "vm-1")


def node(name: str = "vm-1.default", **metadata: object):
    return convert.to_message({"id": name, "metadata": {"AUTO_REGISTER_GROUP": "g", **metadata}}, messages.known("envoy.config.core.v3.Node"))


def said(one) -> Registration | None:
    return registration_of(one, of_node(one))


def with_them(*registered: Registration, texts: tuple[str, ...] = (SERVICE, GROUP)):
    store = Store()
    snapshot(*texts, store=store)
    return build(store.objects, registered=registered)


# --- what nodes say


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (node(INSTANCE_IPS="10.0.0.7,fe80::1"), ONE),
        (node(INSTANCE_IPS=["10.0.0.7"]), ONE),
        (node("sidecar~10.0.0.7~vm-1.default~default.svc.cluster.local"), ONE),
        (node(INSTANCE_IPS="host.test"), Registration("vm-1", "default", "g", "")),
        (node("x", NAME="vm-1", NAMESPACE="shop", INSTANCE_IPS="::1", LABELS={"a": "b"}), Registration("vm-1", "shop", "g", "::1", (("a", "b"),))),
        (node(AUTO_REGISTER_GROUP=""), None),
        (node(AUTO_REGISTER_GROUP=["g"]), None),
    ],
)
def test_what_a_node_says(one, expected):
    assert said(one) == expected


def test_a_bootstrap_says_it():
    made = bootstrap.envoy("vm-1", "shop", [("127.0.0.1", 1)], locality=Locality("eu", "b"), group=bootstrap.Group("g", "10.0.0.7", {"a": "b"}))
    found = said(convert.to_message(made["node"], messages.known("envoy.config.core.v3.Node")))
    assert found == Registration("vm-1", "shop", "g", "10.0.0.7", (("a", "b"),), Locality("eu", "b"))


def test_the_command_says_it(capsys):
    flags = ["bootstrap", "vm-1", "--server", "127.0.0.1:1", "-o", "json", "--group", "g"]
    assert cli.main([*flags, "--address", "10.0.0.7", "--label", "a=b"]) == 0
    assert json.loads(capsys.readouterr().out)["node"]["metadata"] == {"AUTO_REGISTER_GROUP": "g", "INSTANCE_IPS": "10.0.0.7", "LABELS": {"a": "b"}}
    for wrong, why in (([], "--address"), (["--address", "x"], "--address x"), (["--address", "::1", "--label", "a"], "--label a")):
        assert cli.main([*flags, *wrong]) == 2
        assert why in capsys.readouterr().err
    assert cli.main([*flags[:6], "--label", "a=b"]) == 2
    assert "--group" in capsys.readouterr().err


# --- what becomes of it


def test_it_is_what_its_group_says():
    made = with_them(ONE)
    workload = made.workloads[KEY]
    assert (workload.address, dict(workload.ports), workload.service_account, workload.weight) == ("10.0.0.7", {"http": 8000}, "vm", 3)
    assert dict(workload.labels) == {"app": "s", "tier": "back", "version": "v1"}
    assert workload.locality == Locality("eu", "a")
    assert workload.readiness == Probe(TCP, 8000)
    (endpoint,) = made.endpoints["s.default.svc.cluster.local", 80]
    assert (endpoint.address, endpoint.port, endpoint.mtls) == ("10.0.0.7", 18000, True)
    assert made.config.security.identities == {"s.default.svc.cluster.local": ("spiffe://cluster.local/ns/default/sa/vm",)}
    assert not made.unregistered


def test_what_it_says_itself_goes_first():
    one = Registration("vm-1", "default", "g", "10.0.0.7", (("app", "mine"), ("x", "y")), Locality("us"))
    workload = with_them(one).workloads[KEY]
    assert dict(workload.labels) == {"app": "mine", "tier": "back", "version": "v1", "x": "y"}
    assert workload.locality == Locality("us")


def test_a_second_one_leaves_the_first_and_the_configuration_as_they_are():
    store = Store()
    snapshot(SERVICE, GROUP, store=store)
    first = build(store.objects, registered=(ONE,))
    other = Registration("vm-2", "default", "g", "10.0.0.8")
    second = build(store.objects, first, registered=(ONE, other))
    assert second.config is first.config
    assert second.workloads[KEY] is first.workloads[KEY]
    assert [one.address for one in second.endpoints["s.default.svc.cluster.local", 80]] == ["10.0.0.7", "10.0.0.8"]


DOCUMENT = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: vm-1}, spec: {address: 10.9.9.9}}"


@pytest.mark.parametrize(
    ("one", "texts", "why"),
    [
        (ONE, (SERVICE,), "there is no WorkloadGroup default/g"),
        (ONE, (SERVICE, GROUP, DOCUMENT), "a document describes a workload of this name"),
        (Registration("vm-1", "shop", "g", "10.0.0.7"), (SERVICE, GROUP), "there is no WorkloadGroup shop/g"),
        (Registration("vm-1", "default", "g", ""), (SERVICE, GROUP), "its node says no address: INSTANCE_IPS is needed"),
        (
            Registration("vm-1", "default", "g", "10.0.0.7", account="web"),
            (SERVICE, GROUP),
            "its service account is web, and that of WorkloadGroup default/g is vm",
        ),
    ],
)
def test_who_is_none(one, texts, why):
    made = with_them(one, texts=texts)
    assert made.unregistered == {one: why}
    assert made.endpoints["s.default.svc.cluster.local", 80] == ()
    assert {one.address for one in made.workloads.values()} <= {"10.9.9.9"}


def test_who_has_proved_the_account_of_its_group():
    assert with_them(Registration("vm-1", "default", "g", "10.0.0.7", account="vm")).workloads.keys() == {KEY}


# --- who has come


def test_who_leaves_is_known_for_a_while():
    now, told = [100.0], []
    here = Registrations(lambda: now[0], lambda: told.append(set(here.known)))
    here.came(1, ONE, None)
    here.came(2, ONE, None)  # one stream for each type
    here.left(1)
    here.left(2)
    assert told == [{KEY}]
    now[0] += GRACE_S - 0.1
    here.tidy()
    assert here.known == {KEY: ONE}
    here.came(3, ONE, None)
    now[0] += 2 * GRACE_S
    here.tidy()
    here.left(3)
    here.left(99)
    now[0] += GRACE_S
    here.tidy()
    assert told == [{KEY}, set()]


def test_of_two_of_one_name_the_last_one_counts():
    here = Registrations(lambda: 0.0)
    moved = Registration("vm-1", "default", "g", "10.0.0.8")
    here.came(1, ONE, None)
    here.came(2, moved, "vm")
    assert here.known[KEY].address == "10.0.0.8"
    assert here.known[KEY].account == "vm"
    here.left(2)
    assert here.known[KEY] == ONE


@pytest.mark.parametrize(("identity", "account"), [(None, None), (SpiffeId("cluster.local", "/ns/default/sa/vm"), "vm")])
def test_the_hub_notes_who_comes(identity, account):
    hub = Hub(snapshot(SERVICE, GROUP))
    connection = hub.open(delta=True)
    connection.identity = identity
    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")(type_url=CLUSTER)
    request.node.CopyFrom(node(INSTANCE_IPS="10.0.0.7"))
    connection.receive(request.SerializeToString())
    assert hub.registrations.known == {KEY: Registration("vm-1", "default", "g", "10.0.0.7", account=account)}
    hub.close(connection)
    assert hub.registrations.known.keys() == {KEY}


# --- documents


def test_documents_of_groups_that_are_wrong():
    head = "apiVersion: networking.istio.io/v1, kind: WorkloadGroup, metadata: {name: g}"
    text = f"{{{head}, spec: {{template: {{ports: {{http: 0}}, typo: 1}}, metadata: {{annotations: {{meshproxy/sidecar: '{{inbund: []}}'}}}}}}}}"
    assert [one.partition(": ")[0] for one in complaints(text)] == [
        "spec.template.ports.http",
        "spec.metadata.annotations[meshproxy/sidecar].inbund",
        "spec.template.typo",
    ]


def test_a_workload_entry_may_say_how_its_sidecar_listens():
    text = istio("WorkloadEntry", "e", "{address: 10.0.0.9, ports: {http: 8000}, labels: {app: s}, serviceAccount: vm}")
    annotation = """{name: e, annotations: {meshproxy/sidecar: '{"inbound": [{"port": 8000, "listen": 18000}], "identity": true}'}}"""
    made = snapshot(SERVICE, text.replace("{name: e}", annotation))
    (endpoint,) = made.endpoints["s.default.svc.cluster.local", 80]
    assert (endpoint.port, endpoint.mtls) == (18000, True)


# --- a control plane that begins


def test_who_comes_back_keeps_endpoints_until_it_is_known_who_they_are():
    store = Store()
    snapshot(SERVICE, GROUP, store=store)
    name, url = "outbound|80||s.default.svc.cluster.local", ENDPOINTS
    hub = Hub(build(store.objects, expects=True))
    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")
    response = messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse")

    def told(connection) -> list[tuple[str, int]]:
        """(name, how many endpoints) of what is sent now, which is acknowledged."""
        sent = []
        for data in connection.responses():
            one = response.FromString(data)
            for resource in one.resources:
                assignment = messages.known("envoy.config.endpoint.v3.ClusterLoadAssignment").FromString(resource.resource.value)
                sent.append((resource.name, sum(len(group.lb_endpoints) for group in assignment.endpoints)))
            sent += [(gone, -1) for gone in one.removed_resources]
            connection.receive(request(type_url=url, response_nonce=one.nonce).SerializeToString())
        return sent

    def came(**more: object):
        connection = hub.open(delta=True)
        connection.receive(request(type_url=url, node={"id": "web.default"}, resource_names_subscribe=[name], **more).SerializeToString())
        return connection

    new, back = came(), came(initial_resource_versions={name: "some"})
    assert told(new) == [(name, 0)]
    assert told(back) == []
    hub.publish(build(store.objects, hub.snapshot, registered=(ONE,), expects=True))
    assert told(new) == told(back) == [(name, 1)]

    hub.publish(build(store.objects, None, expects=True))
    back = came(initial_resource_versions={name: "some"})
    assert told(back) == []
    hub.publish(build(store.objects, hub.snapshot))  # nobody came
    assert told(back) == [(name, 0)]


@pytest.mark.parametrize(("version", "expected"), [("", 1), ("1", 0)])
def test_the_same_by_the_state_of_the_world(version, expected):
    store = Store()
    snapshot(SERVICE, GROUP, store=store)
    hub = Hub(build(store.objects, expects=True))
    connection = hub.open(delta=False)
    request = messages.known("envoy.service.discovery.v3.DiscoveryRequest")
    names = ["outbound|80||s.default.svc.cluster.local"]
    connection.receive(request(type_url=ENDPOINTS, node={"id": "web.default"}, resource_names=names, version_info=version).SerializeToString())
    assert len(list(connection.responses())) == expected
    hub.publish(build(store.objects, hub.snapshot, registered=(ONE,)))
    assert len(list(connection.responses())) == 1 - expected  # one at a time: the first is not acknowledged
