"""What a route does with a request: expectations are what Envoy 1.40 did with the same configuration."""

from __future__ import annotations

from collections import Counter

import pytest

from meshproxy.http.route import NO_LIMIT
from meshproxy.http.route_rewrite import update_authority
from tests.unit.route_help import cluster_of, context, one_host, only_route, problems, stream, table, to


def forwarded(route_fields: dict, path: bytes, *items: tuple[bytes, bytes], match: dict | str = "/", host: bytes = b"h", **fields):
    """The head after the only route has finalized it."""
    routes = table(one_host(to("c", match, route=route_fields, **fields)))
    one = stream(path, *items, host=host)
    route = routes.match(one)
    if route.finalize_request is not None:
        route.finalize_request(one)
    return one.request


def regex(pattern: str, substitution: str) -> dict:
    return {"pattern": {"regex": pattern}, "substitution": substitution}


# -- paths


@pytest.mark.parametrize(
    ("match", "rewrite", "path", "new"),
    [
        ("/pw/", {"prefix_rewrite": "/"}, b"/pw/a?b", b"/a?b"),
        ({"prefix": "/PI", "case_sensitive": False}, {"prefix_rewrite": "/z"}, b"/pix?b", b"/zx?b"),
        ({"path": "/ex"}, {"prefix_rewrite": "/whole"}, b"/ex?b", b"/whole?b"),
        ({"safe_regex": {"regex": "/re/.*"}}, {"prefix_rewrite": "/whole"}, b"/re/a/b?c", b"/whole?c"),
        ({"path_separated_prefix": "/se"}, {"prefix_rewrite": "/whole"}, b"/se/x?b", b"/whole/x?b"),
        ("/rr", {"regex_rewrite": regex("r", "q")}, b"/rr/rr?r", b"/qq/qq?r"),
        ("/rr", {"regex_rewrite": regex("^/rr/([^/]+)/(.*)$", r"/\2/\1")}, b"/rr/a/b/c?d", b"/b/c/a?d"),
    ],
)
def test_path_rewrites(match, rewrite, path, new):
    head = forwarded(rewrite, path, match=match)
    assert head.path == new
    assert head.items == [(b"x-envoy-original-path", path)]


def test_regex_rewrite_that_does_not_match_keeps_the_path():
    head = forwarded({"regex_rewrite": regex("zzz", "q")}, b"/a")
    assert (head.path, head.items) == (b"/a", [(b"x-envoy-original-path", b"/a")])


@pytest.mark.parametrize(
    ("rewrite", "items", "new"),
    [
        ("/f/%REQ(x-y)%", [(b"x-y", b"yy")], b"/f/yy?b=1"),
        ("%REQ(x-zz)%", [], b"/o?b=1"),
        ("%REQ(x-zz)%/b", [], b"/b?b=1"),
        ("/constant", [], b"/constant?b=1"),
    ],
)
def test_formatted_path_rewrite(rewrite, items, new):
    assert forwarded({"path_rewrite": rewrite}, b"/o?b=1", *items).path == new


def uri_template(kind: str, field: str, text: str) -> dict:
    return {
        "name": kind,
        "typed_config": {
            "@type": f"type.googleapis.com/envoy.extensions.path.{kind}.uri_template.v3.{field}",
            **({"path_template": text} if kind == "match" else {"path_template_rewrite": text}),
        },
    }


def test_uri_template_rewrite():
    match = {"path_match_policy": uri_template("match", "UriTemplateMatchConfig", "/ut/{a}/{b=**}")}
    rewrite = {"path_rewrite_policy": uri_template("rewrite", "UriTemplateRewriteConfig", "/n/{b}/{a}")}
    assert forwarded(rewrite, b"/ut/1/2/3?q", match=match).path == b"/n/2/3/1?q"
    rewrite = {"path_rewrite_policy": uri_template("rewrite", "UriTemplateRewriteConfig", "/n/{c}")}
    (path, why), *_ = problems(one_host(to("a", match, route=rewrite)))
    assert path == "virtual_hosts[0].routes[0].route.path_rewrite_policy.typed_config.path_template_rewrite"
    assert "mismatch between variables" in why
    assert problems(one_host(to("a", route=rewrite)))
    assert problems(one_host(to("a", match, route={"prefix_rewrite": "/x"})))


def test_original_headers_can_be_suppressed():
    routes = table(one_host(to("a", route={"prefix_rewrite": "/x/", "host_rewrite_literal": "lit"})), insert_original=False)
    one = stream(b"/a")
    routes.match(one).finalize_request(one)
    assert (one.request.path, one.request.authority, one.request.items) == (b"/x/a", b"lit", [])


# -- hosts


@pytest.mark.parametrize(
    ("rewrite", "path", "items", "host"),
    [
        ({"host_rewrite_literal": "lit"}, b"/", [], b"lit"),
        ({"host_rewrite_header": "x-y"}, b"/", [(b"x-y", b"yy")], b"yy"),
        ({"host_rewrite_header": "x-y"}, b"/", [], b"h"),
        ({"host_rewrite_path_regex": regex("^/hp/(.+)$", r"\1.com")}, b"/hp/foo?x", [], b"foo.com"),
        ({"host_rewrite_path_regex": regex("^/hp/(.+)$", r"\1.com")}, b"/hp?x", [], b"/hp"),
        ({"host_rewrite": "%REQ(x-y)%.svc"}, b"/", [(b"x-y", b"yy")], b"yy.svc"),
        ({"host_rewrite": "%REQ(x-zz)%"}, b"/", [], b"-"),
    ],
)
def test_host_rewrites(rewrite, path, items, host):
    head = forwarded(rewrite, path, *items)
    assert head.authority == host
    assert head.get(b"x-envoy-original-host") == (None if host == b"h" else b"h")


@pytest.mark.parametrize(("before", "after"), [(None, b"h"), (b"a, h", b"a, h,h"), (b"h,a", b"h,a,h"), (b"a,h", b"a,h"), (b"h, ", b"h, ")])
def test_forwarded_host(before, after):
    items = [] if before is None else [(b"x-forwarded-host", before)]
    head = forwarded({"host_rewrite_literal": "lit", "append_x_forwarded_host": True}, b"/", *items)
    assert head.get_all(b"x-forwarded-host") == [after]


def test_auto_host_rewrite_is_left_to_the_router():
    route = only_route("c", route={"auto_host_rewrite": True, "append_x_forwarded_host": True})
    assert (route.auto_host_rewrite, route.append_x_forwarded_host, route.finalize_request) == (True, True, None)
    one = stream(host=b"old")
    update_authority(one.request, b"new", append_forwarded=True, keep_original=True)
    assert one.request.items == [(b"x-envoy-original-host", b"old"), (b"x-forwarded-host", b"old")]
    assert one.request.authority == b"new"


# -- header mutations


def option(key: str, value: str, action: str | None = None, **fields) -> dict:
    return {"header": {"key": key, "value": value}, **({"append_action": action} if action else {}), **fields}


def mutated(fields: dict, *items: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return forwarded({}, b"/p", *items, **fields).items


def test_nothing_to_do_is_none():
    route = only_route("c")
    assert route.finalize_request is None
    assert route.finalize_response is None


def test_append_actions():
    items = [(b"b", b"1"), (b"a", b"1"), (b"c", b"1"), (b"c", b"2")]
    add = [
        option("a", "2"),
        option("B", "2", "OVERWRITE_IF_EXISTS_OR_ADD"),
        option("c", "3", "OVERWRITE_IF_EXISTS"),
        option("d", "1", "OVERWRITE_IF_EXISTS"),
        option("e", "1", "ADD_IF_ABSENT"),
        option("a", "3", "ADD_IF_ABSENT"),
        option("f", "1", append=False),
        option("f", "2", append=True),
    ]
    assert mutated({"request_headers_to_add": add}, *items) == [
        (b"a", b"1"),
        (b"b", b"2"),
        (b"c", b"3"),
        (b"f", b"1"),
        (b"a", b"2"),
        (b"e", b"1"),
        (b"f", b"2"),
    ]


def test_both_ways_to_say_append_are_one_too_many():
    bad = option("a", "b", "ADD_IF_ABSENT", append=True)
    assert problems(one_host(to("c", request_headers_to_add=[bad])))[0][0] == "virtual_hosts[0].routes[0].request_headers_to_add[0].append"


def test_removals_come_first():
    fields = {"request_headers_to_add": [option("a", "new"), option("b", "x", "ADD_IF_ABSENT")], "request_headers_to_remove": ["A", "b", "zz"]}
    assert mutated(fields, (b"a", b"1"), (b"b", b"1"), (b"a", b"2")) == [(b"a", b"new"), (b"b", b"x")]


def test_empty_values():
    add = [
        option("x-e", "%REQ(NO)%"),
        option("x-e2", "%REQ(NO)%", keep_empty_value=True),
        option("x-e3", ""),
        option("x-e4", "", keep_empty_value=True),
        option("X-Pct", "a%%b"),
    ]
    assert mutated({"request_headers_to_add": add}) == [(b"x-e2", b""), (b"x-e4", b""), (b"x-pct", b"a%b")]


def test_values_are_computed_before_anything_changes():
    add = [option("a", "%REQ(b)%", "OVERWRITE_IF_EXISTS_OR_ADD"), option("b", "%REQ(a)%", "OVERWRITE_IF_EXISTS_OR_ADD")]
    assert mutated({"request_headers_to_add": add}, (b"a", b"1"), (b"b", b"2")) == [(b"a", b"2"), (b"b", b"1")]


def test_headers_that_exist_once_are_joined():
    add = [option("x-forwarded-for", "9.9.9.9"), option("user-agent", "two"), option("cookie", "b=2"), option("x-own", "2")]
    items = [(b"x-forwarded-for", b"1.1.1.1"), (b"user-agent", b"one"), (b"cookie", b"a=1"), (b"x-own", b"1")]
    assert mutated({"request_headers_to_add": add}, *items) == [
        (b"x-forwarded-for", b"1.1.1.1,9.9.9.9"),
        (b"user-agent", b"one,two"),
        (b"cookie", b"a=1"),
        (b"x-own", b"1"),
        (b"cookie", b"b=2"),
        (b"x-own", b"2"),
    ]


LEVELS = {
    "request_headers_to_add": [option("x", "global", "OVERWRITE_IF_EXISTS_OR_ADD"), option("list", "global")],
    "virtual_hosts": [
        {
            "name": "v",
            "domains": ["*"],
            "request_headers_to_add": [option("x", "vhost", "OVERWRITE_IF_EXISTS_OR_ADD"), option("list", "vhost")],
            "routes": [
                {
                    "match": {"prefix": "/"},
                    "request_headers_to_add": [option("x", "route", "OVERWRITE_IF_EXISTS_OR_ADD"), option("list", "route")],
                    "route": {
                        "weighted_clusters": {
                            "clusters": [
                                {
                                    "name": "c",
                                    "weight": 1,
                                    "request_headers_to_add": [option("x", "cluster", "OVERWRITE_IF_EXISTS_OR_ADD"), option("list", "cluster")],
                                }
                            ]
                        }
                    },
                }
            ],
        }
    ],
}


@pytest.mark.parametrize(
    ("most_specific_wins", "x", "order"),
    [(False, b"global", [b"cluster", b"route", b"vhost", b"global"]), (True, b"route", [b"cluster", b"global", b"vhost", b"route"])],
)
def test_levels(most_specific_wins, x, order):
    routes = table(LEVELS | {"most_specific_header_mutations_wins": most_specific_wins})
    one = stream()
    routes.match(one).finalize_request(one)
    assert one.request.get_all(b"x") == [x]
    assert one.request.get_all(b"list") == order


def test_response_headers():
    fields = {"response_headers_to_add": [option("a", "%RESPONSE_CODE%"), option("via", "1.1 us")], "response_headers_to_remove": ["Server"]}
    route = only_route("c", **fields)
    one = stream(status=503)
    one.response.items = [(b"server", b"x"), (b"via", b"1.0 them")]
    route.finalize_response(one)
    assert one.response.items == [(b"via", b"1.0 them,1.1 us"), (b"a", b"503")]


# -- answers


def answer(action: dict, path: bytes, match: dict | str = "/", **kwargs):
    routes = table(one_host({"match": {"prefix": match} if isinstance(match, str) else match, **action}))
    one = stream(path, host=kwargs.pop("host", b"h"), **kwargs)
    route = routes.match(one)
    reply = route.reply(one)
    return reply, one, route


REDIRECTS = [
    ("/rp", {"prefix_rewrite": "/new"}, b"/rp/a?b=1", b"http://h/new/a?b=1"),
    ("/rh", {"host_redirect": "other:8080", "https_redirect": True, "port_redirect": 9443}, b"/rh/a?b=1", b"https://other:8080:9443/rh/a?b=1"),
    ("/rx", {"regex_rewrite": regex("^/rx/(.*)$", r"/y/\1")}, b"/rx/a?b=1", b"http://h/y/a?b=1"),
    ("/rx", {"regex_rewrite": regex("^/rx/(.*)$", r"/y/\1")}, b"/rxa", b"http://h/rxa"),
    ("/pq", {"path_redirect": "/p?z=1", "strip_query": True}, b"/pq?b=2", b"http://h/p?z=1"),
    ("/pn", {"path_redirect": "pn2"}, b"/pn?b=2", b"http://h/pn2?b=2"),
    ("/ps", {"path_redirect": "/p", "strip_query": True}, b"/ps?b=2", b"http://h/p"),
    ("/sc", {"scheme_redirect": "foo"}, b"/sc?b=2", b"foo://h/sc?b=2"),
    ("/hs", {"https_redirect": True}, b"/hs?", b"https://h/hs?"),
    ("/sq", {"strip_query": True, "host_redirect": "o"}, b"/sq?a", b"http://o/sq"),
]


@pytest.mark.parametrize(("match", "redirect", "path", "location"), REDIRECTS)
def test_redirects(match, redirect, path, location):
    reply, _, route = answer({"redirect": redirect}, path, match)
    assert (reply.status, reply.details, reply.headers, reply.body) == (301, "direct_response", ((b"location", location),), b"")
    assert route.action == "redirect"


@pytest.mark.parametrize(
    ("host", "redirect", "location"),
    [
        (b"h:80", {"https_redirect": True}, b"https://h/x"),
        (b"h:8080", {"https_redirect": True}, b"https://h:8080/x"),
        (b"[::1]:80", {"https_redirect": True}, b"https://[::1]/x"),
        (b"[::1]", {"https_redirect": True}, b"https://[::1]/x"),
        (b"h:80", {"port_redirect": 81}, b"http://h:81/x"),
        (b"h:80", {"path_redirect": "/x"}, b"http://h:80/x"),
        (b"h:80", {"scheme_redirect": "foo"}, b"foo://h/x"),
    ],
)
def test_ports_in_redirects(host, redirect, location):
    reply, *_ = answer({"redirect": redirect}, b"/x", host=host)
    assert reply.headers == ((b"location", location),)


@pytest.mark.parametrize(("name", "status"), [("FOUND", 302), ("SEE_OTHER", 303), ("TEMPORARY_REDIRECT", 307), ("PERMANENT_REDIRECT", 308)])
def test_redirect_status(name, status):
    assert answer({"redirect": {"path_redirect": "/x", "response_code": name}}, b"/")[0].status == status


def test_redirect_rewrites_the_request_for_the_log():
    _, one, _ = answer({"redirect": {"prefix_rewrite": "/new"}}, b"/rp/a?b", "/rp")
    assert (one.request.path, one.request.items) == (b"/new/a?b", [(b"x-envoy-original-path", b"/rp/a?b")])


def test_direct_responses():
    reply, _, route = answer({"direct_response": {"status": 418, "body": {"inline_string": "tea"}}}, b"/")
    assert (reply.status, reply.body, reply.headers, reply.details, route.action) == (418, b"tea", (), "direct_response", "direct_response")
    assert answer({"direct_response": {"status": 302}}, b"/d?q")[0].headers == ((b"location", b"http://h/d?q"),)
    assert answer({"direct_response": {"status": 201, "body": {"inline_bytes": "AP8="}}}, b"/d")[0].headers == ((b"location", b"http://h/d"),)


def test_direct_response_format():
    body = {"inline_string": "orig"}
    text = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%|%REQ(:PATH)%\n"}, "content_type": "text/html"}
    reply, *_ = answer({"direct_response": {"status": 200, "body": body, "body_format": text}}, b"/bf?a")
    assert (reply.body, reply.headers) == (b"orig|/bf?a\n", ((b"content-type", b"text/html"),))
    reply, *_ = answer({"direct_response": {"status": 200, "body": body, "body_format": {"json_format": {"b": "%LOCAL_REPLY_BODY%"}}}}, b"/")
    assert (reply.body, reply.headers) == (b'{"b":"orig"}\n', ((b"content-type", b"application/json"),))


def test_direct_response_body_limit(tmp_path):
    (tmp_path / "body").write_bytes(b"x" * 5000)
    config = one_host({"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"filename": str(tmp_path / "body")}}})
    assert problems(config)[0][0] == "virtual_hosts[0].routes[0].direct_response.body.filename"
    routes = table(config | {"max_direct_response_body_size_bytes": 5000})
    assert len(routes.match(stream()).reply(stream()).body) == 5000


def test_non_forwarding():
    route = table(one_host({"match": {"prefix": "/"}, "non_forwarding_action": {}})).match(stream())
    assert (route.action, route.cluster_name, route.reply) == ("non_forwarding", "", None)


# -- clusters


class Clusters(dict):
    pass


def test_cluster_header():
    routes = table(
        one_host({"match": {"prefix": "/"}, "route": {"cluster_header": "X-To", "cluster_not_found_response_code": "NOT_FOUND"}}),
        context(clusters=Clusters(a=1, b=2)),
    )
    first = routes.match(stream(b"/", (b"x-to", b"a"), (b"x-to", b"b")))
    assert first.cluster_name == "a"
    assert routes.match(stream(b"/", (b"x-to", b"a"))) is first
    assert cluster_of(routes, b"/", (b"x-to", b"b")) == "b"
    missing = routes.match(stream())
    assert (missing.cluster_name, missing.cluster_not_found_status) == ("", 404)
    # Names that clients make up take no memory.
    assert routes.match(stream(b"/", (b"x-to", b"zzz"))) is missing


def weighted(*clusters: dict, **fields) -> dict:
    return one_host({"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": list(clusters), **fields}, **fields.pop("route", {})}})


def shares(routes, count: int = 2000) -> Counter:
    return Counter(cluster_of(routes) for _ in range(count))


def test_weights():
    found = shares(table(weighted({"name": "a", "weight": 1}, {"name": "b", "weight": 3}, {"name": "c", "weight": 0})))
    assert 400 < found["a"] < 600
    assert set(found) == {"a", "b"}


def test_weighted_choice_is_stable_for_a_stream():
    routes = table(weighted({"name": "a", "weight": 50}, {"name": "b", "weight": 50}))
    for _ in range(20):
        one = stream()
        assert len({routes.match(one) for _ in range(5)}) == 1


def test_weighted_by_header():
    routes = table(weighted({"name": "a", "weight": 10}, {"name": "b", "weight": 90}, header_name="X-Random"))
    for value, found in ((b"9", "a"), (b"10", "b"), (b"109", "a"), (b"18446744073709551615", "b")):
        assert {cluster_of(routes, b"/", (b"x-random", value)) for _ in range(5)} == {found}
    for items in ([(b"x-random", b"x")], [(b"x-random", b"1"), (b"x-random", b"1")], [(b"x-random", b"-1")], [(b"x-random", b"18446744073709551616")]):
        assert {cluster_of(routes, b"/", *items) for _ in range(200)} == {"a", "b"}


def test_weighted_by_hash():
    config = weighted({"name": "a", "weight": 50}, {"name": "b", "weight": 50}, use_hash_policy=True)
    config["virtual_hosts"][0]["routes"][0]["route"]["hash_policy"] = [{"header": {"header_name": "x-user"}}]
    routes = table(config)
    users = {user: {cluster_of(routes, b"/", (b"x-user", b"%d" % user)) for _ in range(5)} for user in range(20)}
    assert all(len(found) == 1 for found in users.values())
    assert set().union(*users.values()) == {"a", "b"}
    assert {cluster_of(routes) for _ in range(100)} == {"a", "b"}


def test_weights_from_runtime():
    config = weighted({"name": "a", "weight": 1}, {"name": "b", "weight": 1}, runtime_key_prefix="w")
    assert set(shares(table(config, context({"w.a": "0"})), 100)) == {"b"}
    ctx = context(mutable=True)
    routes = table(config, ctx)
    assert set(shares(routes, 100)) == {"a", "b"}
    ctx.runtime.modify({"w.b": "0"})
    assert set(shares(routes, 100)) == {"a"}


def test_weighted_clusters_have_their_own_headers_host_and_filters():
    override = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
    cluster = {
        "name": "echo",
        "weight": 1,
        "host_rewrite_literal": "wh",
        "request_headers_to_add": [option("o", "%REQ(:AUTHORITY)%")],
        "response_headers_to_remove": ["r"],
        "typed_per_filter_config": {"f": override},
        "metadata_match": {"filter_metadata": {"envoy.lb": {"version": "2"}}},
    }
    config = weighted(cluster)
    config["virtual_hosts"][0]["routes"][0]["route"]["metadata_match"] = {"filter_metadata": {"envoy.lb": {"version": "1", "stage": "prod"}}}
    config["virtual_hosts"][0]["routes"][0]["request_headers_to_add"] = [option("p", "%REQ(:AUTHORITY)%")]
    one = stream(host=b"h")
    route = table(config).match(one)
    route.finalize_request(one)
    assert one.request.authority == b"wh"
    assert one.request.items == [(b"o", b"h"), (b"p", b"wh")]
    assert route.metadata_match == {"version": "2", "stage": "prod"}
    assert [level["f"].disabled for level in route.filter_configs] == [True]
    one.response.items = [(b"r", b"1")]
    route.finalize_response(one)
    assert one.response.items == []


def test_weighted_cluster_header():
    routes = table(weighted({"cluster_header": "x-to", "weight": 1}))
    assert cluster_of(routes, b"/", (b"x-to", b"z")) == "z"
    assert cluster_of(routes) == ""


@pytest.mark.parametrize(
    ("clusters", "why"),
    [
        ([{"name": "a", "weight": 0}], "Sum of weights in the weighted_cluster must be greater than 0."),
        ([{"name": "a", "weight": 4294967295}, {"name": "b", "weight": 1}], "The sum of weights of all weighted clusters exceeds 4294967295"),
        ([{"name": "a", "cluster_header": "b", "weight": 1}], "Only one of name or cluster_header can be specified"),
        ([{"weight": 1}], "At least one of name or cluster_header need to be specified"),
    ],
)
def test_weight_errors(clusters, why):
    (path, found), *_ = problems(weighted(*clusters))
    assert path.startswith("virtual_hosts[0].routes[0].route.weighted_clusters")
    assert found == why


# -- policies of three levels


def test_retry_policy_of_the_route_replaces_the_virtual_hosts():
    host = {"retry_policy": {"retry_on": "5xx", "num_retries": 5}, "hedge_policy": {"hedge_on_per_try_timeout": True}}
    routes = table(one_host(to("a", "/a", route={"retry_policy": {"retry_on": "reset"}, "hedge_policy": {}}), to("b"), **host))
    first, second = routes.match(stream(b"/a")), routes.match(stream(b"/b"))
    assert (first.retry.num_retries, first.hedge_on_per_try_timeout) == (1, False)
    assert (second.retry.num_retries, second.hedge_on_per_try_timeout) == (5, True)


def test_mirrors_of_the_most_specific_level_win():
    config = one_host(to("a", "/a", route={"request_mirror_policies": [{"cluster": "ra"}]}), to("b"), request_mirror_policies=[{"cluster": "v"}])
    routes = table(config | {"request_mirror_policies": [{"cluster": "g"}]})
    assert [policy.cluster_name(stream()) for policy in routes.match(stream(b"/a")).mirrors] == ["ra"]
    assert [policy.cluster_name(stream()) for policy in routes.match(stream(b"/b")).mirrors] == ["v"]
    only_global = table(one_host(to("b")) | {"request_mirror_policies": [{"cluster": "g"}]})
    assert [policy.cluster_name(stream()) for policy in only_global.match(stream()).mirrors] == ["g"]


def test_mirror_policy():
    policies = [
        {"cluster_header": "X-Shadow", "runtime_fraction": {"default_value": {"numerator": 0}}},
        {
            "cluster": "c",
            "disable_shadow_host_suffix_append": True,
            "host_rewrite_literal": "elsewhere",
            "request_headers_mutations": [{"remove": "secret"}, {"append": {"header": {"key": "x-copy", "value": "1"}}}],
        },
    ]
    first, second = only_route("a", route={"request_mirror_policies": policies}).mirrors
    assert (first.chosen(), second.chosen()) == (False, True)
    assert (first.shadow_suffix, second.shadow_suffix) == (True, False)
    assert first.cluster_name(stream()) is None
    assert first.cluster_name(stream(b"/", (b"x-shadow", b"s"))) == "s"
    one = stream(b"/", (b"secret", b"1"))
    copy = one.request.copy()
    second.change(one, copy)
    assert (copy.authority, copy.items) == (b"elsewhere", [(b"x-copy", b"1")])
    assert one.request.items == [(b"secret", b"1")]


@pytest.mark.parametrize("policy", [{}, {"cluster": "a", "cluster_header": "b"}])
def test_mirror_errors(policy):
    assert problems(one_host(to("a", route={"request_mirror_policies": [policy]})))[0][0].startswith(
        "virtual_hosts[0].routes[0].route.request_mirror_policies[0]"
    )


def test_filter_overrides_of_all_levels():
    def level(value: bool) -> dict:
        return {"f": {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", **({"disabled": True} if value else {"config": {}})}}

    buffer = {"@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute", "buffer": {"max_request_bytes": 5}}
    config = one_host(to("a", typed_per_filter_config={"f": buffer}), typed_per_filter_config=level(False))
    route = table(config | {"typed_per_filter_config": level(True)}).match(stream())
    assert [(one["f"].disabled, one["f"].config is None) for one in route.filter_configs] == [(True, True), (False, True), (False, False)]
    assert route.filter_configs[2]["f"].config.buffer.max_request_bytes.value == 5


def test_filter_override_errors():
    unknown = {"@type": "type.googleapis.com/envoy.config.core.v3.Node"}
    wrapped = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": unknown}
    assert problems(one_host(to("a", typed_per_filter_config={"f": unknown})))[0][0] == "virtual_hosts[0].routes[0].typed_per_filter_config[f]"
    assert problems(one_host(to("a", typed_per_filter_config={"f": wrapped})))[0][0] == "virtual_hosts[0].routes[0].typed_per_filter_config[f].config"
    assert table(one_host(to("a", typed_per_filter_config={"f": wrapped | {"is_optional": True}}))).match(stream()).filter_configs == ()


def test_limits_and_flags():
    host = {
        "per_request_buffer_limit_bytes": 10,
        "include_request_attempt_count": True,
        "include_attempt_count_in_response": True,
        "include_is_timeout_retry_header": True,
    }
    routes = table(
        one_host(
            to("a", "/a", per_request_buffer_limit_bytes=5),
            to("b", "/b", request_body_buffer_limit=1 << 40),
            to("c", route={"priority": "HIGH", "upgrade_configs": [{"upgrade_type": "WebSocket"}, {"upgrade_type": "x", "enabled": False}]}),
            **host,
        )
    )
    assert [routes.match(stream(path)).buffer_limit for path in (b"/a", b"/b", b"/c")] == [5, 1 << 40, 10]
    route = routes.match(stream())
    assert (route.include_attempt_count_in_request, route.include_attempt_count_in_response, route.include_is_timeout_retry_header) == (True, True, True)
    assert (route.priority, route.upgrades) == (1, {"websocket": True, "x": False})
    assert only_route("a").buffer_limit == NO_LIMIT
    assert only_route("a").upgrades is None


def test_connect_config():
    upgrade = {"upgrade_type": "CONNECT", "connect_config": {"allow_post": True}}
    assert only_route("a", route={"upgrade_configs": [upgrade]}).connect_config.allow_post
    wrong = {"upgrade_type": "websocket", "connect_config": {}}
    assert problems(one_host(to("a", route={"upgrade_configs": [wrong]})))[0][1] == "Non-CONNECT upgrade type websocket has ConnectConfig"


def test_metadata_decorator_and_rate_limits():
    limits = [{"actions": [{"generic_key": {"descriptor_value": "x"}}]}]
    config = one_host(
        to(
            "a",
            metadata={"filter_metadata": {"f": {"k": [1, "x"]}}},
            decorator={"operation": "op"},
            route={"rate_limits": limits, "include_vh_rate_limits": True},
        ),
        rate_limits=limits,
        metadata={"filter_metadata": {"g": {}}},
    )
    route = table(config).match(stream())
    assert route.metadata == {"f": {"k": [1.0, "x"]}}
    assert route.decorator == ("op", True)
    assert (len(route.rate_limits), len(route.virtual_host.rate_limits), route.include_vh_rate_limits) == (1, 1, True)
    assert route.virtual_host.metadata == {"g": {}}
    assert problems(one_host(to("a", route={"rate_limits": [{}]})))[0][0] == "virtual_hosts[0].routes[0].route.rate_limits[0].actions"


def test_virtual_clusters():
    clusters = [{"name": "posts", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]}, {"name": "x", "headers": [{"name": "x"}]}]
    ctx = context()
    route = table(one_host(to("a"), virtual_clusters=clusters), ctx).match(stream())
    names = route.virtual_cluster
    assert (names(stream(method=b"POST")), names(stream(b"/", (b"x", b"1"))), names(stream())) == ("posts", "x", None)
    one = stream(method=b"POST")
    names.charge(one, 503)
    names.charge(one, 503)
    names.count(one, "upstream_rq_total")
    assert one.virtual_cluster_name == "posts"
    scope = ctx.stats.scope("vhost.host.vcluster.posts.")
    assert [scope.counter(f"upstream_rq_{name}").n for name in ("completed", "5xx", "503", "total")] == [2, 2, 2, 1]
    assert only_route("a").virtual_cluster is None


def test_randomness_comes_from_the_context():
    config = weighted({"name": "a", "weight": 50}, {"name": "b", "weight": 50})
    one, two = (table(config, context(seed=7)) for _ in range(2))
    assert [cluster_of(one) for _ in range(50)] == [cluster_of(two) for _ in range(50)]
