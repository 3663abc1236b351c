"""VirtualServices that delegate to others: what Istio puts together, and what it does not."""

from __future__ import annotations

import pytest

from control.kinds.store import Store
from control.translate.resource import ROUTES
from control.translate.translator import Translator
from tests.unit.control_help import MESH, WEB, istio, routes, snapshot, view_of
from tests.unit.test_control_kinds import complaints


def virtual_service(name: str, spec: str, namespace: str = "default") -> str:
    return istio("VirtualService", name, spec).replace(f"name: {name}", f"name: {name}, namespace: {namespace}")


def made(root: str, delegate: str, **where: str):
    texts = virtual_service("root", f"hosts: [reviews]\nhttp:\n{root}"), virtual_service("child", f"http:\n{delegate}", **where)
    return routes(view_of(*texts))


TO_V1, TO_V2 = (f"route: [{{destination: {{host: reviews, subset: {subset}}}}}]" for subset in ("v1", "v2"))


def target(route) -> str:
    return route["route"]["cluster"].split("|")[2]


def test_a_delegates_routes_stand_in_the_place_that_names_it():
    root = f"- {{match: [{{uri: {{prefix: /a}}}}], delegate: {{name: child}}}}\n- {{{TO_V2}}}"
    found = made(root, f"- {{match: [{{uri: {{prefix: /a/b}}}}], {TO_V1}}}\n- {{{TO_V1}, timeout: 2s}}")
    assert [(route["match"]["prefix"], target(route)) for route in found] == [("/a/b", "v1"), ("/a", "v1"), ("/", "v2")]


def test_what_a_delegate_leaves_open_is_as_the_root_says():
    root = "- {name: r, timeout: 5s, retries: {attempts: 7}, headers: {request: {set: {x: root}}}, rewrite: {uri: /}, delegate: {name: child}}"
    first, second = made(
        root, f"- {{name: own, match: [{{uri: {{prefix: /c}}}}], timeout: 1s, headers: {{request: {{set: {{y: own}}}}}}, {TO_V1}}}\n- {{{TO_V2}}}"
    )
    assert (first["name"], first["route"]["timeout"], first["route"]["retry_policy"]["num_retries"]) == ("r-own", "1s", 7)
    assert [one["header"]["key"] for one in first["request_headers_to_add"]] == ["y"]
    assert (second["name"], second["route"]["timeout"], second["route"]["prefix_rewrite"]) == ("r", "5s", "/")
    assert [one["header"]["key"] for one in second["request_headers_to_add"]] == ["x"]


def test_matches_are_put_together():
    root = "- {match: [{uri: {prefix: /a}, headers: {x: {exact: '1'}}}, {uri: {prefix: /b}}], delegate: {name: child}}"
    found = made(root, f"- {{match: [{{uri: {{exact: /a/x}}, headers: {{y: {{prefix: z}}}}}}], {TO_V1}}}")
    (route,) = found
    assert route["match"]["path"] == "/a/x"
    assert [header["name"] for header in route["match"]["headers"]] == ["x", "y"]


@pytest.mark.parametrize(
    ("root", "child"),
    [
        ("uri: {prefix: /a}", "uri: {prefix: /b}"),
        ("uri: {exact: /a}", "uri: {prefix: /a}"),
        ("uri: {regex: /a}", "uri: {prefix: /a}"),
        ("method: {exact: GET}", "method: {exact: PUT}"),
        ("headers: {x: {exact: a}}", "headers: {x: {exact: b}}"),
        ("port: 1", "port: 2"),
        ("sourceLabels: {a: b}", "sourceLabels: {a: c}"),
        ("ignoreUriCase: true", "name: x"),
    ],
)
def test_routes_that_no_request_could_reach_are_left_out(root, child):
    found = made(f"- {{match: [{{{root}}}], delegate: {{name: child}}}}\n- {{{TO_V2}}}", f"- {{match: [{{{child}}}], {TO_V1}}}")
    assert [target(route) for route in found] == ["v2"]


def test_a_delegate_that_is_missing_or_hidden_says_nothing():
    rest = f"\n- {{{TO_V2}}}"
    assert [target(route) for route in made("- {delegate: {name: missing}}" + rest, f"- {{{TO_V1}}}")] == ["v2"]
    elsewhere = "- {delegate: {name: child, namespace: shop}}" + rest
    assert [target(route) for route in made(elsewhere, f"- {{{TO_V1}}}", namespace="shop")] == ["v1"]
    assert [target(route) for route in made(elsewhere, f"- {{{TO_V1}}}\nexportTo: [.]", namespace="shop")] == ["v2"]


def test_a_delegate_alone_is_no_rule():
    assert routes(view_of(virtual_service("child", f"http: [{{{TO_V1}}}]")))[0]["name"] == "default"


def test_the_same_documents_give_the_same_rules():
    store, translator = Store(), Translator()
    texts = virtual_service("root", "hosts: [reviews]\nhttp: [{delegate: {name: child}}]"), virtual_service("child", f"http: [{{{TO_V1}}}]")
    first = snapshot(MESH, *texts, store=store)
    translator.view(WEB, first)
    more = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: r3, labels: {app: reviews}}}"
    second = snapshot(MESH, *texts, more, before=first, store=store)
    assert second.config is first.config
    changed = snapshot(MESH, texts[0], virtual_service("child", f"http: [{{{TO_V2}}}]"), more, before=second, store=store)
    before, after = translator.view(WEB, second), translator.view(WEB, changed)
    assert any(new.since(old) for new, old in zip(after.parts(ROUTES), before.parts(ROUTES), strict=True))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (f"hosts: [a]\nhttp: [{{delegate: {{name: b}}, {TO_V1}}}]", "spec.http[0].delegate: there is 'route' already"),
        ("hosts: [a]\nhttp: [{delegate: {}}]", "spec.http[0].delegate.name: is needed"),
        ("http: [{delegate: {name: b}}]", "spec.http[0].delegate: a delegate cannot delegate further"),
        (f"gateways: [g]\nhttp: [{{{TO_V1}}}]", "spec.gateways: hosts are needed"),
        ("tcp: [{route: [{destination: {host: a}}]}]", "spec.tcp: hosts are needed"),
    ],
)
def test_mistakes(spec, complaint):
    found = complaints(virtual_service("v", spec))
    assert any(one.startswith(complaint) for one in found), found
