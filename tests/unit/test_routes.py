"""Which route a request gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from meshproxy.http import route_index
from meshproxy.http.route_match import EXACT, OTHER, PREFIX
from meshproxy.http.virtual_host import strip_parameters
from tests.unit.route_help import cluster_of, context, one_host, problems, stream, table, to


def hosts(**domains: list[str]):
    return {"virtual_hosts": [{"name": name, "domains": found, "routes": [to(name)]} for name, found in domains.items()]}


# -- virtual hosts


@pytest.mark.parametrize(
    ("host", "found"),
    [
        (b"api.example.com", "exact"),
        (b"API.Example.COM", "exact"),
        (b"x.example.com", "suffix"),
        (b"a-bar.example.com", "longer_suffix"),
        (b"-bar.example.com", "suffix"),
        (b".example.com", "default"),
        (b"example.com", "default"),
        (b"www.foo.org", "prefix"),
        (b"www.foo.com", "longer_prefix"),
        (b"www.", "default"),
        (b"www.example.com", "suffix"),
        (b"api.example.com:80", "port"),
        (b"api.example.com:81", "default"),
        (b"[::1]:80", "v6"),
        (b"", None),
        (b"other", "default"),
    ],
)
def test_virtual_host_by_host(host, found):
    routes = table(
        hosts(
            default=["*"],
            exact=["api.example.com"],
            port=["API.example.com:80"],
            suffix=["*.example.com"],
            longer_suffix=["*-bar.example.com"],
            prefix=["www.*"],
            longer_prefix=["www.foo.c*"],
            v6=["[::1]:80"],
        )
    )
    for _ in range(2):  # the second answer comes from memory
        assert cluster_of(routes, host=host) == found


def test_only_the_default_host_serves_requests_without_host():
    assert cluster_of(table(hosts(default=["*"])), host=b"") == "default"


def test_no_virtual_host():
    assert cluster_of(table(hosts(a=["a"])), host=b"b") is None


def test_a_miss_does_not_fall_through_to_the_default_host():
    config = hosts(default=["*"])
    config["virtual_hosts"].append({"name": "a", "domains": ["a"], "routes": [to("a", "/only")]})
    routes = table(config)
    assert cluster_of(routes, b"/x", host=b"a") is None
    assert cluster_of(routes, b"/x", host=b"b") == "default"


@pytest.mark.parametrize(
    ("host", "found"), [(b"a:80", "a"), (b"A:1", "a"), (b"a", "a"), (b"[::1]:80", "v6"), (b"[::1]", "v6"), (b"x.b:8", "b"), (b":80", None)]
)
def test_ignore_port(host, found):
    assert cluster_of(table(hosts(a=["a"], v6=["[::1]"], b=["*.b"]) | {"ignore_port_in_host_matching": True}), host=host) == found


def test_memory_of_hosts_is_bounded():
    routes = table(hosts(a=["*.a"], default=["*"]))
    for number in range(10_000):
        assert cluster_of(routes, host=b"%d.a" % number) == "a"
    assert len(routes._memo) <= 4096


def test_host_by_header():
    routes = table(hosts(one=["one"], two=["two"], default=["*"]) | {"vhost_header": "X-Vh"})
    assert cluster_of(routes, b"/", (b"x-vh", b"TWO"), host=b"one") == "two"
    assert cluster_of(routes, b"/", (b"x-vh", b"zzz"), host=b"one") == "default"
    assert cluster_of(routes, b"/", (b"x-vh", b"one"), (b"x-vh", b"two")) == "one"
    assert cluster_of(routes, b"/", host=b"one") is None


def test_domains_must_be_unique():
    assert problems(hosts(a=["x", "*"], b=["X"], c=["*.y", "*"], d=["*.Y", "z*"], e=["z*"])) == [
        ("virtual_hosts[1].domains[0]", "Only unique values for domains are permitted. Duplicate entry of domain x in route table"),
        ("virtual_hosts[2].domains[1]", "Only a single wildcard domain is permitted in route table"),
        ("virtual_hosts[3].domains[0]", "Only unique values for domains are permitted. Duplicate entry of domain *.y in route table"),
        ("virtual_hosts[4].domains[0]", "Only unique values for domains are permitted. Duplicate entry of domain z* in route table"),
    ]


# -- paths

PATHS = [
    ({"path": "/exact"}, [b"/exact", b"/exact?q", b"/exact?"], [b"/exact/", b"/Exact", b"/exac", b"/exact%20"]),
    ({"path": "/exact?q"}, [], [b"/exact?q"]),
    ({"path": "/Exact", "case_sensitive": False}, [b"/exact", b"/EXACT?Q"], [b"/exactly"]),
    ({"prefix": "/pre"}, [b"/pre", b"/prefix", b"/pre/x?q", b"/pre?q"], [b"/pr", b"/Pre", b"/x/pre"]),
    ({"prefix": "/p?q"}, [], [b"/p?q=1"]),
    ({"prefix": "/Pre", "case_sensitive": False}, [b"/pre", b"/PREX"], [b"/pr"]),
    ({"prefix": ""}, [b"/", b"/x"], []),
    ({"path_separated_prefix": "/a/b"}, [b"/a/b", b"/a/b/", b"/a/b/c?q", b"/a/b?q"], [b"/a/bc", b"/a/b;x", b"/a", b"/A/b"]),
    ({"path_separated_prefix": "/A", "case_sensitive": False}, [b"/a", b"/a/x"], [b"/ab"]),
    ({"safe_regex": {"regex": "/r/[0-9]+"}}, [b"/r/12", b"/r/1?x"], [b"/r/1x", b"/r/", b"/x/r/1"]),
    ({"safe_regex": {"regex": ".*"}, "case_sensitive": False}, [b"/", b"/\xff\x80"], []),
]


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize(("match", "yes", "no"), PATHS)
def test_paths(match, yes, no, padding):
    """Alone, and among enough others that the index is used."""
    others = [to("other", f"/unrelated-{number}/") for number in range(padding)]
    routes = table(one_host(*others[: padding // 2], to("it", match), *others[padding // 2 :]))
    assert [cluster_of(routes, path) for path in yes] == ["it"] * len(yes)
    assert [cluster_of(routes, path) for path in no] == [None] * len(no)


def template(text: str) -> dict:
    return {
        "path_match_policy": {
            "name": "envoy.path.match.uri_template.uri_template_matcher",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", "path_template": text},
        }
    }


def test_uri_template():
    routes = table(one_host(to("it", template("/api/{version}/*/{rest=**}"))))
    assert cluster_of(routes, b"/api/v1/users/a/b?q") == "it"
    assert cluster_of(routes, b"/api/v1/users") is None
    assert problems(one_host(to("it", template("/a//b"))))[0][0] == "virtual_hosts[0].routes[0].match.path_match_policy.typed_config.path_template"


@pytest.mark.parametrize("padding", [0, 20])
def test_first_match_wins(padding):
    others = [to("other", f"/unrelated-{number}/") for number in range(padding)]
    routes = table(
        one_host(
            to("regex", {"safe_regex": {"regex": "/a/x"}}),
            to("prefix", "/a/"),
            *others,
            to("exact", {"path": "/a/y"}),
            to("exact_b", {"path": "/b"}),
            to("longer", "/b/longer/"),
            to("b", "/b"),
            to("never", "/b/longer/still/"),
            to("rest", "/"),
        )
    )
    found = {path: cluster_of(routes, path) for path in (b"/a/x", b"/a/y", b"/b", b"/b/longer/still/1", b"/b/lo", b"/c")}
    assert found == {b"/a/x": "regex", b"/a/y": "prefix", b"/b": "exact_b", b"/b/longer/still/1": "longer", b"/b/lo": "b", b"/c": "rest"}


@pytest.mark.parametrize("padding", [0, 20])
def test_further_conditions_let_later_routes_match(padding):
    header = {"name": "x-canary", "string_match": {"exact": "1"}}
    others = [to("other", f"/unrelated-{number}/") for number in range(padding)]
    routes = table(
        one_host(
            *others,
            to("canary", {"prefix": "/", "headers": [header]}),
            to("query", {"path": "/p", "query_parameters": [{"name": "debug", "string_match": {"exact": "1"}}]}),
            to("post", {"prefix": "/p", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]}),
            to("grpc", {"prefix": "/", "grpc": {}}),
            to("rest"),
        )
    )
    assert cluster_of(routes, b"/p", (b"x-canary", b"1")) == "canary"
    assert cluster_of(routes, b"/p", (b"x-canary", b"2")) == "rest"
    assert cluster_of(routes, b"/p?debug=1&debug=2") == "query"
    assert cluster_of(routes, b"/p?debug=2&debug=1") == "rest"
    assert cluster_of(routes, b"/p", method=b"POST") == "post"
    for content_type, found in ((b"application/grpc", "grpc"), (b"application/grpc+proto", "grpc"), (b"application/grpc-web", "rest"), (b"text/x", "rest")):
        assert cluster_of(routes, b"/s/m", (b"content-type", content_type)) == found


@pytest.mark.parametrize("padding", [0, 20])
def test_connect(padding):
    others = [to("other", f"/unrelated-{number}/") for number in range(padding)]
    routes = table(one_host(*others, to("all", "/"), to("connect", {"connect_matcher": {}}), to("late", "/x")))
    assert cluster_of(routes, b"", method=b"CONNECT") == "connect"
    assert cluster_of(routes, b"/", method=b"CONNECT") == "all"
    assert cluster_of(routes, b"/") == "all"
    assert cluster_of(table(one_host(to("all", ""))), b"", method=b"CONNECT") is None


def test_path_parameters_can_be_ignored():
    config = one_host(to("exact", {"path": "/a/b"}), to("prefix", "/p/q"), to("regex", {"safe_regex": {"regex": "/r/[a-z]+"}}))
    routes = table(config | {"ignore_path_parameters_in_path_matching": True})
    for path in (b"/a/b;x=1", b"/a;x/b", b"/a/b;x?q", b"/a/b?;x"):
        assert cluster_of(routes, path) == "exact", path
    assert cluster_of(routes, b"/p;a/q;z/zz") == "prefix"
    assert cluster_of(routes, b"/r/ab;c") == "regex"
    for path in (b"/a/b;x/c", b"/;/a/b", b"/r;x/ab;d/e"):
        assert cluster_of(routes, path) is None, path
    assert cluster_of(table(config), b"/a/b;x") is None
    assert strip_parameters(b"/a;b/c;d;e/;f/g") == b"/a/c//g"


# -- conditions on the stream


def test_tls_context():
    routes = table(
        one_host(
            to("validated", {"prefix": "/", "tls_context": {"presented": True, "validated": True}}),
            to("presented", {"prefix": "/", "tls_context": {"presented": True}}),
            to("anonymous", {"prefix": "/", "tls_context": {"presented": False}}),
        )
    )

    def over(presented: bool, validated: bool) -> str | None:
        found = stream()
        found.connection.tls = SimpleNamespace(presented=presented, validated=validated)
        return routes.match(found).cluster_name

    assert over(True, True) == "validated"
    assert over(True, False) == "presented"
    assert over(False, False) == "anonymous"
    assert cluster_of(routes) == "anonymous"


def test_metadata_and_filter_state():
    metadata = {"filter": "f", "path": [{"key": "k"}], "value": {"string_match": {"exact": "v"}}}
    state = {"key": "s", "string_match": {"prefix": "x"}}
    routes = table(
        one_host(
            to("both", {"prefix": "/", "dynamic_metadata": [metadata], "filter_state": [state]}), to("one", {"prefix": "/", "dynamic_metadata": [metadata]})
        )
    )
    found = stream()
    assert routes.match(found) is None
    found.metadata["f"] = {"k": "v"}
    assert routes.match(found).cluster_name == "one"
    found.filter_state["s"] = "xy"
    assert routes.match(found).cluster_name == "both"


def test_runtime_fraction_is_stable_for_a_stream():
    fraction = {"default_value": {"numerator": 30}, "runtime_key": "share"}
    config = one_host(to("some", {"prefix": "/", "runtime_fraction": fraction}), to("rest"))
    routes = table(config)
    found = 0
    for _ in range(1000):
        one = stream()
        first = routes.match(one)
        assert routes.match(one) is first
        found += first.cluster_name == "some"
    assert 220 < found < 380
    assert cluster_of(table(config, context({"share": "0"}))) == "rest"
    assert cluster_of(table(config, context({"share": "100"}))) == "some"


def test_require_tls():
    config = one_host(to("a"), require_tls="ALL")
    reply = table(config).match(stream(b"/x?y", (b"x-forwarded-proto", b"http"), host=b"one:80")).reply(stream(b"/x?y", host=b"one:80"))
    assert (reply.status, reply.headers) == (301, ((b"location", b"https://one:80/x?y"),))
    assert cluster_of(table(config), b"/", (b"x-forwarded-proto", b"https")) == "a"
    external = table(one_host(to("a"), require_tls="EXTERNAL_ONLY"))
    assert cluster_of(external, b"/", (b"x-envoy-internal", b"true")) == "a"
    assert external.match(stream()).action == "redirect"
    # A virtual host without routes redirects all the same.
    assert table(one_host(require_tls="ALL")).match(stream()).action == "redirect"


# -- many routes


def test_routes_are_compiled_when_first_tried():
    routes = table(one_host(*(to(f"c{number}", f"/{number}/") for number in range(1000))))
    assert cluster_of(routes, b"/998/x") == "c998"
    host = routes.match(stream(b"/5/")).virtual_host
    assert sum(entry is not None for entry in host._entries) == 2


def test_index():
    index = route_index.PathIndex([(PREFIX, b"/"), (EXACT, b"/a"), (OTHER, b""), (PREFIX, b"/a"), (EXACT, b"/a"), (PREFIX, b"/ab")])
    assert index.candidates(b"/a") == (0, 1, 2, 3, 4)
    assert index.candidates(b"/ab") == (0, 2, 3, 5)
    assert index.candidates(b"x") == (2,)


# -- errors


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (one_host({"match": {"prefix": "/"}}), "virtual_hosts[0].routes[0].action"),
        (one_host({"route": {"cluster": "a"}}), "virtual_hosts[0].routes[0].match.path_specifier"),
        (one_host(to("a", {"safe_regex": {"regex": "("}})), "virtual_hosts[0].routes[0].match.safe_regex.regex"),
        (
            one_host(to("a", {"prefix": "/", "headers": [{"name": "a", "string_match": {}}]})),
            "virtual_hosts[0].routes[0].match.headers[0].string_match.match_pattern",
        ),
        (one_host({"match": {"prefix": "/"}, "filter_action": {}}), "virtual_hosts[0].routes[0].filter_action"),
        (one_host(to("a", route={"prefix_rewrite": "/x", "path_rewrite": "/y"})), "virtual_hosts[0].routes[0].route.path_rewrite"),
        (one_host(to("a", route={"retry_policy": {"retriable_headers": [{}]}})), "virtual_hosts[0].routes[0].route.retry_policy.retriable_headers[0].name"),
        (
            one_host(to("a"), retry_policy={"retry_back_off": {"base_interval": "2s", "max_interval": "1s"}}),
            "virtual_hosts[0].retry_policy.retry_back_off.max_interval",
        ),
        (one_host(to("a"), virtual_clusters=[{"name": "v"}]), "virtual_hosts[0].virtual_clusters[0].headers"),
        (one_host(to("a"), request_headers_to_remove=["Host"]), "virtual_hosts[0].request_headers_to_remove[0]"),
        (one_host() | {"request_headers_to_add": [{"header": {"key": ":path", "value": "x"}}]}, "request_headers_to_add[0].header.key"),
        (
            one_host(to("a", route={"upgrade_configs": [{"upgrade_type": "a"}, {"upgrade_type": "A"}]})),
            "virtual_hosts[0].routes[0].route.upgrade_configs[1].upgrade_type",
        ),
        (
            one_host(to("a", typed_per_filter_config={"f": {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig"}})),
            "virtual_hosts[0].routes[0].typed_per_filter_config[f].config",
        ),
    ],
)
def test_errors_name_the_field(config, path):
    assert [where for where, _ in problems(config)] == [path]


def test_all_errors_are_reported():
    bad = {"match": {"safe_regex": {"regex": "("}}, "route": {"cluster": "a"}}
    found = problems({"virtual_hosts": [{"name": "a", "domains": ["a"], "routes": [bad, to("x"), bad]}, {"name": "b", "domains": ["b"], "routes": [bad]}]})
    assert [path.split(".match")[0] for path, _ in found] == ["virtual_hosts[0].routes[0]", "virtual_hosts[0].routes[2]", "virtual_hosts[1].routes[0]"]


def test_every_virtual_host_of_one_kind_is_reported():
    hosts = [{"name": name, "domains": [name], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}, "name": name}]} for name in "abc"]
    table({"virtual_hosts": hosts}).check()
    hosts[0]["routes"][0]["route"]["regex_rewrite"] = hosts[2]["routes"][0]["route"]["regex_rewrite"] = {"pattern": {"regex": "("}, "substitution": ""}
    assert [path.partition(".")[0] for path, _ in problems({"virtual_hosts": hosts})] == ["virtual_hosts[0]", "virtual_hosts[2]"]
