"""The Gateway API by its features, by the names that its conformance suite has for them (v1.6): requests through a gateway, ours and a real Envoy.

A row is documents and what becomes of requests. All rows are there at once, each with a listener of its own, so that none may disturb another. Which features
are refused is in tests/unit/test_control_gateway_features.py.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.differential.pki import with_clients
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, write
from tests.e2e.proxy import PATIENCE, Proxy, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

ONE, TWO = ("backendRefs: [{name: %s, port: 80}]" % name for name in ("one", "two"))  # noqa: UP031
THERE = "backendRefs: [{name: far, namespace: there, port: 80}]"


@dataclass
class Ask:
    """A request and what becomes of it. `name`: of the backend that answers; `has`: headers of the answer, None for one that must not be there; `sent`: the
    same of the request as the backend sees it; `path`: as the backend sees it."""

    target: str = "/"
    host: str = "a.test"
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    name: str = ""
    path: str = ""
    sent: dict[str, str | None] = field(default_factory=dict)
    has: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Row:
    """`listener`: what it has besides name, port and protocol, unless there are several `listeners`. `routes`: (hostnames, rules) of HTTPRoutes."""

    routes: list[tuple[str, str]]
    asks: list[Ask]
    listener: str = ""
    listeners: list[str] = field(default_factory=list)
    kind: str = "HTTPRoute"
    namespace: str = "default"
    sections: list[str] = field(default_factory=list)


def matching(match: str, backend: str = ONE) -> str:
    return f"{{matches: [{{{match}}}], {backend}}}"


def filtered(kind: str, name: str, value: str, match: str = "", backend: str = ONE) -> str:
    matches = f"matches: [{{{match}}}], " if match else ""
    return f"{{{matches}filters: [{{type: {kind}, {name}: {value}}}], {backend}}}"


def redirect(value: str, match: str = "") -> str:
    return filtered("RequestRedirect", "requestRedirect", value, match, "backendRefs: []")


CORS = "{allowOrigins: ['https://www.foo.test', 'https://*.bar.test'], allowMethods: [GET, OPTIONS], allowHeaders: [x-a], allowCredentials: true}"


def preflight(origin: str, **expected) -> Ask:
    headers = {"origin": origin, "access-control-request-method": "GET"}
    return Ask(method="OPTIONS", headers=headers, **expected)


ROWS = {
    "HTTPRouteSimpleSameNamespace": Row([("", f"{{{ONE}}}")], [Ask(name="one"), Ask("/any", "b.test", name="one")]),
    "HTTPRouteExactPathMatching": Row(
        [("", f"{matching('path: {type: Exact, value: /one}')}, {matching('path: {type: Exact, value: /two}', TWO)}")],
        [Ask("/one", name="one"), Ask("/two", name="two"), Ask("/one/", status=404), Ask("/one/x", status=404), Ask("/Two", status=404), Ask(status=404)],
    ),
    "HTTPRoutePathMatchOrder": Row(
        [
            (
                "",
                f"{matching('path: {value: /m}')}, {matching('path: {value: /m/prefix}', TWO)}, {matching('path: {type: Exact, value: /m/prefix/x}')}",
            )
        ],
        [Ask("/m/a", name="one"), Ask("/m/prefix/a", name="two"), Ask("/m/prefix/x", name="one"), Ask("/matching", status=404)],
    ),
    "HTTPRouteHeaderMatching": Row(
        [
            (
                "",
                (
                    f"{matching('headers: [{name: version, value: one}]')}, {matching('headers: [{name: version, value: two}]', TWO)}, "
                    f"{matching('headers: [{name: version, value: two}, {name: color, value: orange}]')}, "
                    f"{matching('headers: [{name: shape, type: RegularExpression, value: (round|square)}]', TWO)}"
                ),
            )
        ],
        [
            Ask(headers={"version": "one"}, name="one"),
            Ask(headers={"Version": "two"}, name="two"),
            Ask(headers={"version": "two", "color": "orange"}, name="one"),
            Ask(headers={"shape": "square"}, name="two"),
            Ask(headers={"shape": "squares"}, status=404),
            Ask(status=404),
        ],
    ),
    "HTTPRouteQueryParamMatching": Row(
        [
            (
                "",
                (
                    f"{matching('queryParams: [{name: animal, value: whale}]')}, {matching('queryParams: [{name: animal, value: dolphin}]', TWO)}, "
                    f"{matching('queryParams: [{name: animal, value: dolphin}, {name: color, value: blue}]')}"
                ),
            )
        ],
        [
            Ask("/?animal=whale", name="one"),
            Ask("/?animal=dolphin", name="two"),
            Ask("/?animal=dolphin&color=blue", name="one"),
            Ask("/?animal=Whale", status=404),
            Ask("/?color=blue", status=404),
        ],
    ),
    "HTTPRouteMethodMatching": Row(
        [("", f"{matching('method: POST')}, {matching('method: GET', TWO)}, {matching('method: POST, path: {value: /x}', TWO)}")],
        [Ask(method="POST", name="one"), Ask(name="two"), Ask("/x", method="POST", name="two"), Ask(method="PUT", status=404)],
    ),
    "HTTPRouteMatchingAcrossRoutes": Row(
        [
            ("[a.test, b.test]", f"{{matches: [{{path: {{value: /}}}}, {{headers: [{{name: version, value: one}}]}}], {ONE}}}"),
            ("[a.test]", f"{{matches: [{{path: {{value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}], {TWO}}}"),
        ],
        [
            Ask(name="one"),
            Ask("/v2", name="two"),
            Ask(headers={"version": "two"}, name="two"),
            Ask("/v2/x", headers={"version": "one"}, name="two"),
            Ask("/v2", "b.test", name="one"),
            Ask(host="c.test", status=404),
        ],
    ),
    "HTTPRouteHostnameIntersection": Row(
        [("[very.specific.test, not.test, '*.wide.wild.test']", f"{{{ONE}}}"), ("['*.test']", f"{{matches: [{{path: {{value: /two}}}}], {TWO}}}")],
        [
            Ask(host="very.specific.test", name="one"),
            Ask(host="x.wide.wild.test", name="one"),
            Ask("/two", "y.wild.test", name="two"),
            Ask("/two", "x.wide.wild.test", name="one"),  # the more exact name has it
            Ask(host="not.test", status=404),
            Ask("/two", "not.test", status=404),
            Ask(host="y.wild.test", status=404),
        ],
        listeners=["name: a, protocol: HTTP, hostname: very.specific.test", "name: b, protocol: HTTP, hostname: '*.wild.test'"],
    ),
    "HTTPRouteListenerHostnameMatching": Row(
        [("", f"{{{ONE}}}"), ("", f"{{{TWO}}}")],
        [Ask(host="bar.test", name="one"), Ask(host="x.foo.test", name="two"), Ask(host="x.y.foo.test", name="two"), Ask(host="foo.test", status=404)],
        listeners=["name: a, protocol: HTTP, hostname: bar.test", "name: b, protocol: HTTP, hostname: '*.foo.test'"],
        sections=["a", "b"],
    ),
    "GatewayHTTPListenerIsolation": Row(
        [
            ("['*.test', '*.a.test', x.a.test]", f"{{matches: [{{path: {{value: /{name}}}}}], {backend}}}")
            for name, backend in (("a", ONE), ("b", TWO), ("c", ONE))
        ],
        [
            Ask("/a", "y.test", name="one"),
            Ask("/b", "y.test", status=404),
            Ask("/b", "y.a.test", name="two"),
            Ask("/a", "y.a.test", status=404),
            Ask("/c", "x.a.test", name="one"),
            Ask("/a", "x.a.test", status=404),
            Ask("/b", "x.a.test", status=404),
        ],
        listeners=["name: a, protocol: HTTP", "name: b, protocol: HTTP, hostname: '*.a.test'", "name: c, protocol: HTTP, hostname: x.a.test"],
        sections=["a", "b", "c"],
    ),
    "HTTPRouteRequestHeaderModifier": Row(
        [("", filtered("RequestHeaderModifier", "requestHeaderModifier", "{set: [{name: x-s, value: s}], add: [{name: x-a, value: a}], remove: [x-r]}"))],
        [
            Ask(headers={"x-r": "1"}, name="one", sent={"x-s": "s", "x-a": "a", "x-r": None}),
            Ask(headers={"x-s": "0", "x-r": "1"}, name="one", sent={"x-s": "s", "x-r": None}),
        ],
    ),
    "HTTPRouteBackendRequestHeaderModification": Row(
        [("", "{backendRefs: [{name: one, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-s, value: s}]}}]}]}")],
        [Ask(headers={"x-s": "0"}, name="one", sent={"x-s": "s"})],
    ),
    "HTTPRouteResponseHeaderModification": Row(
        [("", filtered("ResponseHeaderModifier", "responseHeaderModifier", "{set: [{name: server, value: s}], add: [{name: x-a, value: a}], remove: [date]}"))],
        [Ask(name="one", has={"x-a": "a"})],
    ),
    "HTTPRouteRedirect": Row(
        [
            (
                "",
                f"{redirect('{hostname: b.test}', 'path: {value: /host}')}, {redirect('{scheme: https}', 'path: {value: /scheme}')}, "
                f"{redirect('{port: 8083}', 'path: {value: /port}')}, "
                f"{redirect('{path: {type: ReplaceFullPath, replaceFullPath: /full}}', 'path: {value: /path}')}, "
                f"{redirect('{path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}', 'path: {value: /prefix}')}, "
                + ", ".join(redirect(f"{{statusCode: {code}, hostname: b.test, scheme: https}}", f"path: {{value: /{code}}}") for code in (301, 303, 307, 308)),
            )
        ],
        [
            Ask("/host", status=302, has={"location": "http://b.test:PORT/host"}),
            Ask("/scheme/x", status=302, has={"location": "https://a.test/scheme/x"}),
            Ask("/port", status=302, has={"location": "http://a.test:8083/port"}),
            Ask("/path/x", status=302, has={"location": "http://a.test:PORT/full"}),
            Ask("/prefix/x", status=302, has={"location": "http://a.test:PORT/new/x"}),
            *(Ask(f"/{code}", status=code, has={"location": f"https://b.test/{code}"}) for code in (301, 303, 307, 308)),
        ],
    ),
    "HTTPRouteRewriteHost": Row([("", filtered("URLRewrite", "urlRewrite", "{hostname: b.test}"))], [Ask(name="one", sent={"host": "b.test"})]),
    "HTTPRouteRewritePath": Row(
        [
            (
                "",
                (
                    f"{filtered('URLRewrite', 'urlRewrite', '{path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}', 'path: {value: /prefix}')}, "
                    f"{filtered('URLRewrite', 'urlRewrite', '{path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}', 'path: {value: /strip}')}, "
                    f"{filtered('URLRewrite', 'urlRewrite', '{path: {type: ReplaceFullPath, replaceFullPath: /full}}', 'path: {value: /full}')}"
                ),
            )
        ],
        [
            Ask("/prefix/a?b=c", name="one", path="/x/a?b=c"),
            Ask("/prefix", name="one", path="/x"),
            Ask("/strip/a", name="one", path="/a"),
            Ask("/strip", name="one", path="/"),
            Ask("/full/a/b", name="one", path="/full"),
        ],
    ),
    "HTTPRouteBackendURLRewrite": Row(
        [("", "{backendRefs: [{name: one, port: 80, filters: [{type: URLRewrite, urlRewrite: {hostname: b.test}}]}]}")],
        [Ask(name="one", sent={"host": "b.test"})],
    ),
    "HTTPRouteBackendRequestRedirect": Row(
        [("", "{backendRefs: [{name: one, port: 80, filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]}]}")],
        [Ask(status=302, has={"location": "https://a.test/"})],
    ),
    "HTTPRouteCORS": Row(
        [("", filtered("CORS", "cors", CORS))],
        [
            preflight("https://www.foo.test", has={"access-control-allow-origin": "https://www.foo.test", "access-control-max-age": "5"}),
            preflight("https://x.y.bar.test", has={"access-control-allow-methods": "GET, OPTIONS", "access-control-allow-credentials": "true"}),
            preflight("https://foobar.test", has={"access-control-allow-origin": None}),
            Ask(headers={"origin": "https://www.foo.test"}, name="one", has={"access-control-allow-origin": "https://www.foo.test"}),
            Ask(headers={"origin": "https://foobar.test"}, name="one", has={"access-control-allow-origin": None}),
        ],
    ),
    "HTTPRouteCORS of anything with credentials": Row(
        [("", filtered("CORS", "cors", "{allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], allowCredentials: true}"))],
        [
            Ask(
                method="OPTIONS",
                headers={"origin": "https://any.test", "access-control-request-method": "PUT", "access-control-request-headers": "x-a, x-b"},
                has={
                    "access-control-allow-origin": "https://any.test",
                    "access-control-allow-methods": "PUT",
                    "access-control-allow-headers": "x-a, x-b",
                    "access-control-allow-credentials": "true",
                },
            ),
            Ask(method="OPTIONS", name="one"),  # which is none, and so the application's
            Ask(headers={"origin": "https://any.test"}, name="one", has={"access-control-allow-origin": "https://any.test"}),
        ],
    ),
    "HTTPRouteReferenceGrant": Row([("", f"{{{THERE}}}")], [Ask(name="two")]),
    "HTTPRouteInvalidReferenceGrant": Row([("", "{backendRefs: [{name: near, namespace: there, port: 80}]}")], [Ask(status=500)]),
    "HTTPRouteInvalidNonExistentBackendRef": Row([("", "{backendRefs: [{name: nobody, port: 80}]}")], [Ask(status=500)]),
    "HTTPRouteNoBackendRefs": Row([("", "{}")], [Ask(status=500)]),
    "HTTPRouteWeightZero": Row([("", "{backendRefs: [{name: one, port: 80, weight: 0}]}")], [Ask(status=500)]),
    "HTTPRouteCrossNamespace not allowed": Row([("", "{backendRefs: [{name: far, port: 80}]}")], [Ask(status=404)], namespace="there"),
    "HTTPRouteCrossNamespace": Row(
        [("", "{backendRefs: [{name: far, port: 80}]}")], [Ask(name="two")], listener="allowedRoutes: {namespaces: {from: All}}", namespace="there"
    ),
    "GatewayAllowedRoutesSelector": Row(
        [("", "{backendRefs: [{name: far, port: 80}]}")],
        [Ask(name="two")],
        listener="allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {backend: 'true'}}}}",
        namespace="there",
    ),
    "GatewayAllowedRoutesSelector of others": Row(
        [("", f"{{{ONE}}}")], [Ask(status=404)], listener="allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {backend: 'true'}}}}"
    ),
    "HTTPRouteDisallowedKind": Row([("", f"{{{ONE}}}")], [Ask(status=404)], listener="allowedRoutes: {kinds: [{kind: GRPCRoute}]}"),
    "HTTPRouteInvalidParentRefNotMatchingSectionName": Row([("", f"{{{ONE}}}")], [Ask(status=404)], sections=["nowhere"]),
    "HTTPRouteNamedRouteRule": Row([("", f"{{name: my-rule, {ONE}}}")], [Ask(name="one")]),
    "HTTPRouteServiceTypes": Row([("", "{backendRefs: [{name: headless, port: 80}]}")], [Ask(name="one")]),
    "GRPCExactMethodMatching": Row(
        [("", f"{{matches: [{{method: {{service: a.B, method: C}}}}], {ONE}}}, {{matches: [{{method: {{service: a.B}}}}], {TWO}}}")],
        [
            Ask("/a.B/C", method="POST", headers={"content-type": "application/grpc"}, name="one"),
            Ask("/a.B/D", method="POST", headers={"content-type": "application/grpc"}, name="two"),
            Ask("/a.X/C", method="POST", headers={"content-type": "application/json"}, status=404),
        ],
        kind="GRPCRoute",
    ),
    "GRPCRouteHeaderMatching": Row(
        [("", f"{matching('headers: [{name: version, value: two}]', TWO)}, {{{ONE}}}")],
        [Ask("/a.B/C", method="POST", headers={"version": "two"}, name="two"), Ask("/a.B/C", method="POST", name="one")],
        kind="GRPCRoute",
    ),
    "GRPCRouteRequestHeaderModifier": Row(
        [("", filtered("RequestHeaderModifier", "requestHeaderModifier", "{set: [{name: x-s, value: s}]}"))],
        [Ask("/a.B/C", method="POST", headers={"x-s": "0"}, name="one", sent={"x-s": "s"})],
        kind="GRPCRoute",
    ),
}
WEIGHTS = Row([("", "{backendRefs: [{name: one, port: 80, weight: 9}, {name: two, port: 80, weight: 1}, {name: slow, port: 80, weight: 0}]}")], [])
MIRRORS = Row(
    [
        (
            "",
            "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: mirror, port: 80}}}, "
            "{type: RequestMirror, requestMirror: {backendRef: {name: other-mirror, port: 80}, percent: 100}}, "
            "{type: RequestMirror, requestMirror: {backendRef: {name: slow, port: 80}, fraction: {numerator: 0}}}], " + ONE + "}",
        )
    ],
    [],
)
TIMEOUTS = Row(
    [
        (
            "",
            "{matches: [{path: {value: /request}}], timeouts: {request: 300ms}, backendRefs: [{name: slow, port: 80}]}, "
            "{matches: [{path: {value: /backend}}], timeouts: {backendRequest: 300ms}, backendRefs: [{name: slow, port: 80}]}, "
            "{matches: [{path: {value: /none}}], timeouts: {request: 0s}, " + ONE + "}",
        )
    ],
    [],
)
RETRIES = Row([("", "{retry: {codes: [503], attempts: 2, backoff: 5ms}, backendRefs: [{name: flaky, port: 80}]}")], [])
SPECIAL = {"HTTPRouteWeight": WEIGHTS, "HTTPRouteRequestMultipleMirrors": MIRRORS, "HTTPRouteTimeoutRequest": TIMEOUTS, "HTTPRouteRetry": RETRIES}


def document(kind: str, name: str, spec: str, namespace: str = "default") -> str:
    return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{{spec}}}}}"


def service(name: str, port: int, namespace: str = "default", spec: str = "") -> str:
    meta = f"metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}"
    return (
        f"{{apiVersion: v1, kind: Service, {meta}, spec: {{selector: {{app: {name}}}, {spec} ports: [{{name: http, port: 80, targetPort: http}}]}}}}\n---\n"
        f"{{apiVersion: meshproxy/v1, kind: Workload, {meta}, spec: {{ports: {{http: {port}}}}}}}"
    )


class Edge:
    """Backends, a control plane with all rows, and a gateway. `ports`: by row."""

    def __init__(self, work: Path, kind: str, pki: Path) -> None:
        self.held = Ports()
        self.services = {name: Service(name) for name in ("one", "two", "mirror", "other-mirror", "flaky")}
        self.deaf = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
        self.ports = {name: self.held.take() for name in (*ROWS, *SPECIAL)}
        folder = work / "mesh"
        folder.mkdir()
        documents = [service(name, one.port) for name, one in self.services.items()]
        documents.append(service("slow", self.deaf.getsockname()[1]))
        documents.append(service("headless", self.services["one"].port, spec="clusterIP: None,"))
        documents += [service(name, self.services["two"].port, "there") for name in ("far", "near")]
        documents.append("{apiVersion: v1, kind: Namespace, metadata: {name: there, labels: {backend: 'true'}}}")
        origin = "{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: default}"
        documents.append(document("ReferenceGrant", "grant", f"from: [{origin}], to: [{{group: '', kind: Service, name: far}}]", "there"))
        documents.append("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}")
        listeners = []
        for index, (name, row) in enumerate({**ROWS, **SPECIAL}.items()):
            made = row.listeners or [f"name: only, protocol: HTTP{', ' if row.listener else ''}{row.listener}"]
            listeners += [f"{{{one.replace('name: ', f'name: r{index}-', 1)}, port: {self.ports[name]}}}" for one in made]
            for number, (hostnames, rules) in enumerate(row.routes):
                section = f", sectionName: r{index}-{row.sections[number]}" if row.sections else ""
                parents = f"parentRefs: [{{name: g, namespace: default, port: {self.ports[name]}{section}}}]"
                spec = f"{parents}, {f'hostnames: {hostnames}, ' if hostnames else ''}rules: [{rules}]"
                documents.append(document(row.kind, f"r{index}-{number}", spec, row.namespace))
        documents.append(document("Gateway", "g", f"gatewayClassName: mesh, addresses: [{{value: 127.0.0.1}}], listeners: [{', '.join(listeners)}]"))
        write(folder, "all.yaml", "\n---\n".join(documents))
        self.control = ControlPlane(folder, work)
        self.control.start()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else None
        (work / "edge").mkdir()
        self.proxy = Proxy(work / "edge", self.control.bootstrap("edge"), "--concurrency", "1", "-l", "error", command=command)

    def ask(self, row: str, ask: Ask) -> tuple[int, dict, dict[str, str]]:
        """Status, what the backend says (nothing, when it was none) and headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[row], timeout=PATIENCE)
        try:
            connection.request(ask.method, ask.target, headers={"host": ask.host, **ask.headers})
            response = connection.getresponse()
            body = response.read()
            headers = {key.lower(): value.replace(f":{self.ports[row]}", ":PORT") for key, value in response.getheaders()}
            return response.status, json.loads(body) if body.startswith(b"{") else {}, headers
        finally:
            connection.close()

    def close(self) -> None:
        self.proxy.__exit__()
        self.control.kill()
        for one in self.services.values():
            one.close()
        self.deaf.close()
        self.held.close()


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    return with_clients(tmp_path_factory.mktemp("pki"), "a")


@pytest.fixture(scope="module", params=["envoy", "ours"])
def edge(request, tmp_path_factory, pki):
    made = Edge(tmp_path_factory.mktemp("edge"), request.param, pki)
    yield made
    made.close()


def within(expected: dict[str, str | None], headers: dict[str, str]) -> dict[str, str | None]:
    return {name: headers.get(name) for name in expected}


def plain_list(text: str | None) -> str | None:
    return None if text is None else ", ".join(one.strip() for one in text.split(","))


def test_nothing_is_refused(edge):
    assert "all.yaml" not in edge.control.log()
    assert edge.proxy.stat("listener_manager.listener_create_failure") == 0


@pytest.mark.parametrize("name", ROWS)
def test_feature(edge, name):
    for ask in ROWS[name].asks:
        status, seen, headers = edge.ask(name, ask)
        assert (status, seen.get("name", "") if ask.name else "") == (ask.status, ask.name), (ask, seen)
        assert {key: plain_list(value) for key, value in within(ask.has, headers).items()} == ask.has, ask
        assert within(ask.sent, seen.get("headers", {})) == ask.sent, ask
        assert seen.get("path", "") == (ask.path or seen.get("path", "")), ask


def test_weights(edge):
    found = Counter(edge.ask("HTTPRouteWeight", Ask())[1]["name"] for _ in range(300))
    assert set(found) == {"one", "two"}
    assert 8 <= found["two"] <= 65  # a tenth: five standard deviations of 300 are 26


def test_mirrors(edge):
    mirrors = [edge.services[name] for name in ("mirror", "other-mirror")]
    before = [one.requests for one in mirrors]
    for _ in range(5):
        assert edge.ask("HTTPRouteRequestMultipleMirrors", Ask())[1]["name"] == "one"
    wait_until(lambda: [one.requests for one in mirrors] == [count + 5 for count in before])
    assert edge.proxy.stat("cluster.outbound.80..slow.default.svc.cluster.local.upstream_rq_total") == 0


def test_timeouts(edge):
    assert edge.ask("HTTPRouteTimeoutRequest", Ask("/request"))[0] == 504
    assert edge.ask("HTTPRouteTimeoutRequest", Ask("/backend"))[0] == 504
    assert edge.ask("HTTPRouteTimeoutRequest", Ask("/none"))[0] == 200


def test_retries(edge):
    flaky = edge.services["flaky"]
    for failures, status in ((2, 200), (3, 503)):
        flaky.statuses, before = [503] * failures, flaky.requests
        assert edge.ask("HTTPRouteRetry", Ask())[0] == status
        assert flaky.requests - before == 3
    flaky.statuses = [500]
    assert edge.ask("HTTPRouteRetry", Ask())[0] == 500  # none of the codes
