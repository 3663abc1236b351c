"""The RBAC policy engine and the HTTP and network filters that use it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api import rbac_engine
from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.http.filters import rbac
from meshproxy.net.address import Address
from meshproxy.tcp.filters import rbac as network_rbac
from tests.unit.filter_help import Route, Stream, connection, context, counters, network_context, proto

RBAC = "envoy.extensions.filters.http.rbac.v3.RBAC"
PER_ROUTE = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"
NETWORK = "envoy.extensions.filters.network.rbac.v3.RBAC"


def engine(permission: str = "any: true", principal: str = "any: true", action: str = "ALLOW", **kwargs: Any) -> rbac_engine.Engine:
    text = f"{{action: {action}, policies: {{p: {{permissions: [{{{permission}}}], principals: [{{{principal}}}]}}}}}}"
    return rbac_engine.compile_rules(proto("envoy.config.rbac.v3.RBAC", text), **kwargs)


def matches(permission: str = "any: true", principal: str = "any: true", stream: Any = None) -> bool:
    return engine(permission, principal).match(stream or Stream(b"/a/b?q=1", [(b"x-a", b"1")])) == "p"


# -- engine


@pytest.mark.parametrize(
    ("permission", "expected"),
    [
        ("any: true", True),
        ("header: {name: x-a, string_match: {exact: '1'}}", True),
        ("header: {name: x-a, string_match: {exact: '2'}}", False),
        ("header: {name: ':path', string_match: {exact: '/a/b?q=1'}}", True),  # :path has its query
        ("url_path: {path: {exact: /a/b}}", True),  # url_path has not
        ("url_path: {path: {exact: '/a/b?q=1'}}", False),
        ("destination_ip: {address_prefix: 10.0.0.0, prefix_len: 8}", True),
        ("destination_ip: {address_prefix: 11.0.0.0, prefix_len: 8}", False),
        ("destination_port: 80", True),
        ("destination_port: 81", False),
        ("destination_port_range: {start: 80, end: 81}", True),
        ("destination_port_range: {start: 79, end: 80}", False),  # the end is not part of it
        ("not_rule: {destination_port: 81}", True),
        ("not_rule: {any: true}", False),
        ("and_rules: {rules: [{destination_port: 80}, {any: true}, {url_path: {path: {prefix: /a}}}]}", True),
        ("and_rules: {rules: [{destination_port: 80}, {destination_port: 81}, {any: true}]}", False),
        ("or_rules: {rules: [{destination_port: 81}, {destination_port: 80}]}", True),
        ("or_rules: {rules: [{destination_port: 81}, {destination_port: 82}]}", False),
        ("metadata: {filter: f, path: [{key: k}], value: {string_match: {exact: v}}}", True),
        ("metadata: {filter: f, path: [{key: k}], value: {string_match: {exact: w}}}", False),
        ("sourced_metadata: {metadata_source: ROUTE, metadata_matcher: {filter: f, path: [{key: k}], value: {string_match: {exact: r}}}}", True),
        ("sourced_metadata: {metadata_source: DYNAMIC, metadata_matcher: {filter: f, path: [{key: k}], value: {string_match: {exact: r}}}}", False),
        ("requested_server_name: {exact: sni.example}", True),
        ("requested_server_name: {exact: other}", False),
        (
            (
                "uri_template: {name: t, typed_config: {'@type': type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, "
                "path_template: '/a/{x}'}}"
            ),
            True,
        ),
        (
            (
                "uri_template: {name: t, typed_config: {'@type': type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, "
                "path_template: '/b/*'}}"
            ),
            False,
        ),
    ],
)
def test_permissions(permission: str, expected: bool) -> None:
    stream = Stream(b"/a/b?q=1", [(b"x-a", b"1")], route=Route(metadata={"f": {"k": "r"}}))
    stream.metadata["f"] = {"k": "v"}
    stream.connection.server_name = "sni.example"
    assert matches(permission, stream=stream) is expected


@pytest.mark.parametrize(
    ("principal", "expected"),
    [
        ("any: true", True),
        ("source_ip: {address_prefix: 10.0.0.1, prefix_len: 32}", True),  # the connection's peer
        ("direct_remote_ip: {address_prefix: 192.0.2.1, prefix_len: 32}", True),  # the socket's
        ("remote_ip: {address_prefix: 203.0.113.7, prefix_len: 32}", True),  # the trusted client's
        ("remote_ip: {address_prefix: 10.0.0.1, prefix_len: 32}", False),
        ("remote_ip: {address_prefix: '2001:db8::', prefix_len: 32}", False),
        ("header: {name: x-a, present_match: true}", True),
        ("url_path: {path: {prefix: /b}}", False),
        ("filter_state: {key: k, string_match: {exact: v}}", True),
        ("filter_state: {key: other, string_match: {exact: v}}", False),
        ("not_id: {header: {name: x-b, present_match: true}}", True),
        ("and_ids: {ids: [{any: true}, {header: {name: x-a, present_match: true}}]}", True),
        ("or_ids: {ids: [{header: {name: x-b, present_match: true}}, {header: {name: x-c, present_match: true}}]}", False),
        ("authenticated: {}", False),  # plaintext
        ("sourced_metadata: {metadata_matcher: {filter: f, path: [{key: k}], value: {present_match: true}}}", False),
    ],
)
def test_principals(principal: str, expected: bool) -> None:
    stream = Stream(b"/a", [(b"x-a", b"1")])
    stream.remote = Address.parse("203.0.113.7:1")
    stream.connection.direct_remote = Address.parse("192.0.2.1:5")
    stream.filter_state["k"] = "v"
    assert matches(principal=principal, stream=stream) is expected


def tls(uri: tuple[str, ...] = (), dns: tuple[str, ...] = (), subject: str = "", validated: bool = True) -> Any:
    return SimpleNamespace(peer_certificate=SimpleNamespace(uri_sans=uri, dns_sans=dns, subject=subject), validated=validated)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (tls(("spiffe://mesh/ns/a",)), True),
        (tls(("spiffe://mesh/ns/b", "spiffe://mesh/ns/a")), True),
        (tls((), ("spiffe://mesh/ns/a",)), True),
        (tls((), (), "spiffe://mesh/ns/a"), True),
        (tls(("spiffe://mesh/ns/a\0evil",)), False),  # the whole name counts
        (tls(("spiffe://mesh/ns/b",), ("b",), "CN=b"), False),
        (SimpleNamespace(peer_certificate=None, validated=False), False),
    ],
)
def test_authenticated(info: Any, expected: bool) -> None:
    stream = Stream()
    stream.connection.tls = info
    assert matches(principal="authenticated: {principal_name: {exact: 'spiffe://mesh/ns/a'}}", stream=stream) is expected
    assert matches(principal="authenticated: {}", stream=stream)


def test_mtls_authenticated() -> None:
    config = "'@type': type.googleapis.com/envoy.extensions.rbac.principals.mtls_authenticated.v3.Config"
    by_san = f"custom: {{name: m, typed_config: {{{config}, san_matcher: {{san_type: URI, matcher: {{prefix: 'spiffe://mesh/'}}}}}}}}"
    stream = Stream()
    assert not matches(principal=by_san, stream=stream)
    stream.connection.tls = tls(("spiffe://mesh/a",))
    assert matches(principal=by_san, stream=stream)
    stream.connection.tls = tls(("spiffe://mesh/a",), validated=False)
    assert not matches(principal=by_san, stream=stream)
    any_one = f"custom: {{name: m, typed_config: {{{config}, any_validated_client_certificate: true}}}}"
    assert not matches(principal=any_one, stream=stream)
    stream.connection.tls = tls(("other",))
    assert matches(principal=any_one, stream=stream)
    stream.connection.tls = SimpleNamespace(peer_certificate=None, validated=True)
    assert not matches(principal=any_one, stream=stream)
    assert not matches(principal=by_san, stream=stream)
    stream.connection.tls = SimpleNamespace(peer_certificate=SimpleNamespace(ip_sans=(b"\x0a\1\2\3",), dns_sans=("*.mesh.test",)), validated=True)
    for kind, value, expected in (
        ("IP_ADDRESS", "10.1.2.3", True),
        ("IP_ADDRESS", "10.1.2.4", False),
        ("DNS", "web.mesh.test", True),
        ("DNS", "mesh.test", False),
    ):
        one = f"custom: {{name: m, typed_config: {{{config}, san_matcher: {{san_type: {kind}, matcher: {{exact: {value}}}}}}}}}"
        assert matches(principal=one, stream=stream) is expected


def test_policies_in_the_order_of_their_names() -> None:
    policy = "{permissions: [{any: true}], principals: [{any: true}]}"
    never = "{permissions: [{destination_port: 1}], principals: [{any: true}]}"
    rules = proto("envoy.config.rbac.v3.RBAC", f"{{policies: {{c: {policy}, a: {never}, b: {policy}}}}}")
    assert rbac_engine.compile_rules(rules).match(Stream()) == "b"


def test_empty_policies() -> None:
    for action, allowed in (("ALLOW", False), ("DENY", True), ("LOG", True)):
        compiled = rbac_engine.compile_rules(proto("envoy.config.rbac.v3.RBAC", f"{{action: {action}}}"))
        assert compiled.match(Stream()) is None
        assert compiled.allowed(None) is allowed


@pytest.mark.parametrize(
    ("text", "path", "kind"),
    [
        ("policies: {p: {permissions: [{any: true}], principals: [{any: true}], condition: {id: 1}}}", 'policies["p"].condition', UNSUPPORTED),
        ("policies: {p: {permissions: [{any: true}, {matcher: {name: m}}], principals: [{any: true}]}}", 'policies["p"].permissions[1].matcher', UNSUPPORTED),
        ("policies: {p: {permissions: [{destination_port_range: {start: 5, end: 5}}]}}", 'policies["p"].permissions[0].destination_port_range', "invalid"),
        (
            "policies: {p: {permissions: [{destination_ip: {address_prefix: x}}]}}",
            'policies["p"].permissions[0].destination_ip[0].address_prefix',
            "invalid",
        ),
        ("policies: {p: {principals: [{and_ids: {ids: [{any: true}, {}]}}]}}", 'policies["p"].principals[0].and_ids[1]', "invalid"),
    ],
)
def test_errors_name_their_path(text: str, path: str, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rbac_engine.compile_rules(proto("envoy.config.rbac.v3.RBAC", f"{{{text}}}"))
    assert [(problem.path, problem.kind) for problem in caught.value.problems] == [(path, kind)]


def test_all_errors_at_once() -> None:
    text = "{policies: {a: {permissions: [{}], principals: [{}]}, b: {permissions: [{}]}}}"
    with pytest.raises(ConfigError) as caught:
        rbac_engine.compile_rules(proto("envoy.config.rbac.v3.RBAC", text))
    assert [problem.path for problem in caught.value.problems] == [
        'policies["a"].permissions[0]',
        'policies["a"].principals[0]',
        'policies["b"].permissions[0]',
    ]


# -- the HTTP filter

BAD = "{permissions: [{header: {name: x-bad, present_match: true}}], principals: [{any: true}]}"
OK = "{permissions: [{url_path: {path: {prefix: /ok}}}], principals: [{any: true}]}"
SAMPLE = f"""
rules: {{action: DENY, policies: {{a pol: {BAD}}}}}
rules_stat_prefix: rp_
shadow_rules: {{policies: {{s: {OK}}}}}
shadow_rules_stat_prefix: sp.
track_per_rule_stats: true
"""


def test_denied() -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, SAMPLE), ctx)
    assert isinstance(filter, rbac.Rbac)
    stream = Stream(headers=[(b"x-bad", b"1")])
    reply = filter.request_headers(stream, True)
    assert reply is not None
    assert (reply.status, reply.body, reply.details, reply.flag) == (403, b"RBAC: access denied", "rbac_access_denied_matched_policy[a_pol]", 0)
    assert stream.metadata["envoy.filters.http.rbac"] == {
        "rp_enforced_effective_policy_id": "a pol",
        "rp_enforced_engine_result": "denied",
        "sp.shadow_engine_result": "denied",
    }
    assert counters(ctx) == {
        "http.ing.rbac.rp_.denied": 1,
        "http.ing.rbac.rp_.policy.a pol.denied": 1,
        "http.ing.rbac.sp.shadow_denied": 1,
    }


def test_allowed() -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, SAMPLE), ctx)
    assert isinstance(filter, rbac.Rbac)
    stream = Stream(b"/ok")
    stream.metadata["envoy.filters.http.rbac"] = {"kept": 1}
    assert filter.request_headers(stream, True) is None
    assert stream.metadata["envoy.filters.http.rbac"] == {
        "kept": 1,
        "rp_enforced_engine_result": "allowed",
        "sp.shadow_effective_policy_id": "s",
        "sp.shadow_engine_result": "allowed",
    }
    assert counters(ctx) == {"http.ing.rbac.rp_.allowed": 1, "http.ing.rbac.sp.shadow_allowed": 1, "http.ing.rbac.sp.policy.s.shadow_allowed": 1}


def test_metadata_of_one_request_is_not_that_of_another() -> None:
    filter = rbac.compile(proto(RBAC, SAMPLE), context())
    assert isinstance(filter, rbac.Rbac)
    first, second = Stream(b"/ok"), Stream(b"/ok")
    filter.request_headers(first, True)
    first.metadata["envoy.filters.http.rbac"]["more"] = 1
    filter.request_headers(second, True)
    assert "more" not in second.metadata["envoy.filters.http.rbac"]


def test_log_only_marks() -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, f"{{rules: {{action: LOG, policies: {{l: {BAD}}}}}}}"), ctx)
    assert isinstance(filter, rbac.Rbac)
    marked, unmarked = Stream(headers=[(b"x-bad", b"1")]), Stream()
    assert filter.request_headers(marked, True) is None
    assert filter.request_headers(unmarked, True) is None
    assert marked.metadata["envoy.common"] == {"access_log_hint": True}
    assert unmarked.metadata["envoy.common"] == {"access_log_hint": False}
    assert counters(ctx) == {"http.ing.rbac.allowed": 2}


def test_shadow_log_marks_nothing() -> None:
    filter = rbac.compile(proto(RBAC, f"{{shadow_rules: {{action: LOG, policies: {{l: {BAD}}}}}}}"), context())
    assert isinstance(filter, rbac.Rbac)
    stream = Stream()
    assert filter.request_headers(stream, True) is None
    assert "envoy.common" not in stream.metadata


def test_nothing_configured_is_no_filter() -> None:
    assert rbac.compile(proto(RBAC), context()) is None


def test_names_without_rules_are_kept_for_routes() -> None:
    ctx = context()
    base = rbac.compile(proto(RBAC, "{rules_stat_prefix: rp}"), ctx)
    assert not hasattr(base, "request_headers")
    filter = rbac.specialise(base, [proto(PER_ROUTE, "{rbac: {rules: {action: ALLOW}}}")], ctx)
    assert filter is not None
    assert filter.request_headers(Stream(), True) is not None
    assert counters(ctx) == {"http.ing.rbac.rp.denied": 1}


def test_route_replaces_the_rules() -> None:
    ctx = context()
    base = rbac.compile(proto(RBAC, SAMPLE), ctx)
    deny_all = proto(PER_ROUTE, "{rbac: {rules: {action: ALLOW}, rules_stat_prefix: route_}}")
    filter = rbac.specialise(base, [proto(PER_ROUTE), deny_all], ctx)
    assert filter is not None
    stream = Stream()
    reply = filter.request_headers(stream, True)
    assert reply is not None
    assert reply.details == "rbac_access_denied_matched_policy[none]"
    assert stream.metadata["envoy.filters.http.rbac"] == {"route_enforced_engine_result": "denied"}
    assert counters(ctx) == {"http.ing.rbac.rp_.denied": 1}


def test_route_switches_it_off() -> None:
    ctx = context()
    assert rbac.specialise(rbac.compile(proto(RBAC, SAMPLE), ctx), [proto(PER_ROUTE)], ctx) is None


def test_route_without_a_base() -> None:
    ctx = context()
    filter = rbac.specialise(None, [proto(PER_ROUTE, f"{{rbac: {{{SAMPLE.strip().splitlines()[0]}}}}}")], ctx)
    assert filter is not None
    assert filter.request_headers(Stream(headers=[(b"x-bad", b"1")]), True) is not None


# -- the network filter


def network(text: str, ctx: Any, **kwargs: Any) -> network_rbac.Rbac:
    return network_rbac.Rbac(proto(NETWORK, f"{{stat_prefix: tcp., {text}}}"), ctx, **kwargs)


ANY = "{permissions: [{any: true}], principals: [{any: true}]}"
FIRST_PORT = "{permissions: [{destination_port: 1}], principals: [{any: true}]}"


def test_network_denied() -> None:
    ctx = network_context()
    filter = network(
        f"rules: {{action: DENY, policies: {{my pol: {FIRST_PORT}, p 2: {ANY}}}}}, shadow_rules: {{policies: {{s1: {ANY}}}}}, shadow_rules_stat_prefix: sh_",
        ctx,
    )
    conn = connection()
    assert filter.on_first_data(conn) is False
    assert conn.termination_details == "rbac_access_denied_matched_policy[p_2]"
    assert conn.metadata == {"envoy.filters.network.rbac": {"sh_shadow_effective_policy_id": "s1", "sh_shadow_engine_result": "allowed"}}
    assert counters(ctx) == {"tcp.rbac.denied": 1, "tcp.rbac.sh_.shadow_allowed": 1}


def test_network_allowed_and_logged() -> None:
    ctx = network_context()
    filter = network(f"rules: {{action: LOG, policies: {{p: {ANY}}}}}", ctx)
    conn = connection()
    assert filter.on_first_data(conn) is None
    assert conn.metadata == {"envoy.common": {"access_log_hint": True}}
    assert counters(ctx) == {"tcp.rbac.allowed": 1}


def test_network_denies_later() -> None:
    async def scenario() -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waited = []

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            await woken

        filter = network(f"delay_deny: 0.25s, rules: {{action: DENY, policies: {{p: {ANY}}}}}", network_context(), sleep=sleep)
        verdict = asyncio.ensure_future(filter.on_first_data(connection()))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert not verdict.done()
        woken.set_result(None)
        assert await verdict is False
        assert waited == [0.25]

    asyncio.run(scenario())


def test_network_has_no_headers() -> None:
    for rule in ("header: {name: x, present_match: true}", "not_rule: {header: {name: x, present_match: true}}"):
        with pytest.raises(ConfigError, match="headers"):
            network(f"rules: {{policies: {{p: {{permissions: [{{{rule}}}], principals: [{{any: true}}]}}}}}}", network_context())


def test_network_url_path_matches_nothing() -> None:
    ctx = network_context()
    filter = network("rules: {policies: {p: {permissions: [{url_path: {path: {prefix: /}}}], principals: [{any: true}]}}}", ctx)
    assert filter.on_first_data(connection()) is False


# -- match trees in place of policies

TREE = "xds.type.matcher.v3.Matcher"
T = "'@type': type.googleapis.com/"


def leaf(name: str, action: str = "ALLOW") -> str:
    return f"{{action: {{name: a, typed_config: {{{T}envoy.config.rbac.v3.Action, name: {name}, action: {action}}}}}}}"


def of_header(name: str, exact: str) -> str:
    given = f"{{name: h, typed_config: {{{T}envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: {name}}}}}"
    return f"{{single_predicate: {{input: {given}, value_match: {{exact: '{exact}'}}}}}}"


def network_input(kind: str, fields: str = "") -> str:
    return f"{{name: i, typed_config: {{{T}envoy.extensions.matching.common_inputs.network.v3.{kind}Input{fields}}}}}"


def listed(*branches: tuple[str, str], otherwise: str = "") -> str:
    matchers = ", ".join(f"{{predicate: {predicate}, on_match: {on_match}}}" for predicate, on_match in branches)
    return f"{{matcher_list: {{matchers: [{matchers}]}}{f', on_no_match: {otherwise}' if otherwise else ''}}}"


BY_HEADER = listed((of_header("x-a", "1"), leaf("one")), (of_header("x-a", "2"), leaf("two", "DENY")), (of_header("x-a", "3"), leaf("three", "LOG")))


@pytest.mark.parametrize(
    ("value", "status", "policy", "hint"),
    [(b"1", None, "one", False), (b"2", 403, "two", False), (b"3", None, "three", True), (b"4", 403, None, None)],
)
def test_tree_decides(value: bytes, status: int | None, policy: str | None, hint: bool | None) -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, f"{{matcher: {BY_HEADER}, rules: {{action: ALLOW}}, track_per_rule_stats: true}}"), ctx)
    assert isinstance(filter, rbac.Rbac)
    stream = Stream(headers=[(b"x-a", value)])
    reply = filter.request_headers(stream, True)
    assert (reply and reply.status) == status
    assert reply is None or reply.details == f"rbac_access_denied_matched_policy[{policy or 'none'}]"
    verdict = "denied" if status else "allowed"
    assert stream.metadata["envoy.filters.http.rbac"] == {"enforced_engine_result": verdict} | ({"enforced_effective_policy_id": policy} if policy else {})
    assert stream.metadata.get("envoy.common") == (None if hint is None else {"access_log_hint": hint})
    assert counters(ctx) == {f"http.ing.rbac.{verdict}": 1} | ({f"http.ing.rbac.policy.{policy}.{verdict}": 1} if policy else {})


def test_shadow_tree_only_notes() -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, f"{{shadow_matcher: {BY_HEADER}, shadow_rules_stat_prefix: dry_}}"), ctx)
    assert isinstance(filter, rbac.Rbac)
    stream = Stream(headers=[(b"x-a", b"3")])
    assert filter.request_headers(stream, True) is None
    assert stream.metadata == {"envoy.filters.http.rbac": {"dry_shadow_effective_policy_id": "three", "dry_shadow_engine_result": "allowed"}}
    assert counters(ctx) == {"http.ing.rbac.dry_.shadow_allowed": 1}


def test_empty_tree_denies() -> None:
    filter = rbac.compile(proto(RBAC, "{matcher: {}}"), context())
    assert isinstance(filter, rbac.Rbac)
    assert filter.request_headers(Stream(), True) is not None


def test_rules_do_not_see_what_shadow_rules_say() -> None:
    seen = "metadata: {filter: envoy.filters.http.rbac, path: [{key: shadow_engine_result}], value: {present_match: true}}"
    policies = f"{{p: {{permissions: [{{{seen}}}], principals: [{{any: true}}]}}}}"
    filter = rbac.compile(proto(RBAC, f"{{rules: {{action: DENY, policies: {policies}}}, shadow_rules: {{action: ALLOW}}}}"), context())
    assert isinstance(filter, rbac.Rbac)
    stream = Stream()
    assert filter.request_headers(stream, True) is None
    assert stream.metadata["envoy.filters.http.rbac"] == {"shadow_engine_result": "denied", "enforced_engine_result": "allowed"}


def test_without_tls_a_tree_that_asks_for_certificates_ends() -> None:
    subject = f"{{single_predicate: {{input: {{name: s, typed_config: {{{T}envoy.extensions.matching.common_inputs.ssl.v3.SubjectInput}}}}, \
value_match: {{prefix: CN=}}}}}}"
    tree = listed((subject, leaf("certified")), (of_header("x-a", "1"), leaf("one")), otherwise=leaf("other"))
    compiled = rbac_engine.compile_tree(proto(TREE, tree))
    stream = Stream(headers=[(b"x-a", b"1")])
    assert compiled.match(stream) is None
    stream.connection.tls = SimpleNamespace(peer_certificate=None, validated=False)
    assert compiled.match(stream) == ("one", rbac_engine.ALLOW)
    stream.connection.tls = tls(subject="CN=a")
    assert compiled.match(stream) == ("certified", rbac_engine.ALLOW)


@pytest.mark.parametrize(
    ("given", "repeatable"),
    [
        (network_input("SourceIP"), True),
        (network_input("FilterState", ", key: k"), False),
        (f"{{name: h, typed_config: {{{T}envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x-a}}}}", True),
        (f"{{name: h, typed_config: {{{T}envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: X-Request-Id}}}}", False),
    ],
)
def test_what_a_tree_depends_on(given: str, repeatable: bool) -> None:
    tree = f"{{matcher_tree: {{input: {given}, exact_match_map: {{map: {{k: {leaf('l')}}}}}}}}}"
    assert rbac_engine.compile_tree(proto(TREE, tree)).repeatable is repeatable


IN_LIST = "matcher_list.matchers[0]"
CEL_INPUT = f"{{name: c, typed_config: {{{T}xds.type.matcher.v3.HttpAttributesCelMatchInput}}}}"


@pytest.mark.parametrize(
    ("tree", "path", "kind"),
    [
        (listed((of_header("x", "1"), leaf("a").replace("{action", "{keep_matching: true, action", 1))), f"{IN_LIST}.on_match.keep_matching", "invalid"),
        (
            listed((f"{{single_predicate: {{input: {CEL_INPUT}, value_match: {{exact: a}}}}}}", leaf("a"))),
            f"{IN_LIST}.predicate.single_predicate.input.typed_config",
            UNSUPPORTED,
        ),
        (
            f"{{matcher_tree: {{input: {network_input('SourceType')}, prefix_match_map: {{map: {{a: {leaf('a')}}}}}}}}}",
            "matcher_tree.input.typed_config",
            UNSUPPORTED,
        ),
        (
            f"{{matcher_tree: {{input: {network_input('DynamicMetadata', ', filter: f, path: [{key: k}]')}, exact_match_map: {{map: {{a: {leaf('a')}}}}}}}}}",
            "matcher_tree.input",
            UNSUPPORTED,
        ),
        (f"{{on_no_match: {leaf('a').replace('envoy.config.rbac.v3.Action, name: a, action: ALLOW', TREE)}}}", "on_no_match.action.typed_config", UNSUPPORTED),
        ("{on_no_match: {}}", "on_no_match.on_match", "invalid"),
    ],
)
def test_errors_in_trees_name_their_path(tree: str, path: str, kind: str) -> None:
    for field in ("matcher", "shadow_matcher"):
        with pytest.raises(ConfigError) as caught:
            rbac.compile(proto(RBAC, f"{{{field}: {tree}}}"), context())
        assert [(problem.path, problem.kind) for problem in caught.value.problems] == [(f"{field}.{path}", kind)]


def test_a_tree_of_a_route() -> None:
    filter = rbac.specialise(None, [proto(PER_ROUTE, f"{{rbac: {{matcher: {BY_HEADER}}}}}")], context())
    assert filter is not None
    assert filter.request_headers(Stream(headers=[(b"x-a", b"2")]), True) is not None
    assert filter.request_headers(Stream(headers=[(b"x-a", b"1")]), True) is None


def test_tree_of_the_network_filter() -> None:
    ctx = network_context()
    tree = f"{{matcher_tree: {{input: {network_input('SourceIP')}, exact_match_map: {{map: {{'10.0.0.1': {leaf('seen', 'LOG')}}}}}}}}}"
    filter = network(f"matcher: {tree}, shadow_matcher: {{on_no_match: {leaf('my pol', 'DENY')}}}, shadow_rules_stat_prefix: sh_", ctx)
    conn = connection()
    assert filter.on_first_data(conn) is None
    assert conn.metadata == {
        "envoy.filters.network.rbac": {"sh_shadow_effective_policy_id": "my pol", "sh_shadow_engine_result": "denied"},
        "envoy.common": {"access_log_hint": True},
    }
    other = connection(remote="10.0.0.9:1")
    assert filter.on_first_data(other) is False
    assert other.termination_details == "rbac_access_denied_matched_policy[none]"
    assert counters(ctx) == {"tcp.rbac.allowed": 1, "tcp.rbac.denied": 1, "tcp.rbac.sh_.shadow_denied": 2}


def test_network_trees_have_no_headers() -> None:
    with pytest.raises(ConfigError, match="no input of the network RBAC filter"):
        network(f"matcher: {BY_HEADER}", network_context())


# -- requests that come again


@pytest.mark.parametrize(
    ("permission", "principal", "repeatable"),
    [
        ("url_path: {path: {prefix: /a}}", "not_id: {remote_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}", True),
        ("and_rules: {rules: [{any: true}, {header: {name: x-a, present_match: true}}]}", "or_ids: {ids: [{any: true}]}", True),
        ("header: {name: X-Request-Id, present_match: true}", "any: true", False),
        ("not_rule: {or_rules: {rules: [{destination_port: 80}]}}", "authenticated: {principal_name: {exact: a}}", True),
        ("any: true", "and_ids: {ids: [{filter_state: {key: k, string_match: {exact: a}}}]}", False),
        ("metadata: {filter: f, path: [{key: k}], value: {string_match: {exact: v}}}", "any: true", False),
    ],
)
def test_what_a_verdict_depends_on(permission: str, principal: str, repeatable: bool) -> None:
    assert engine(permission, principal).repeatable is repeatable


def policies(action: str, prefix: str) -> str:
    return f"{{action: {action}, policies: {{p: {{permissions: [{{url_path: {{path: {{prefix: {prefix}}}}}}}], principals: [{{any: true}}]}}}}}}"


class Repeated(Stream):
    """A request that is not looked at."""

    plan: Any = None

    def __init__(self, plan: Any = None) -> None:
        super().__init__()
        self.plan = plan
        self.request = None  # type: ignore[assignment]


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_repeated_request(action: str) -> None:
    ctx = context()
    filter = rbac.compile(proto(RBAC, f"{{rules: {policies(action, '/a')}, track_per_rule_stats: true, rules_stat_prefix: x}}"), ctx)
    first = Stream(b"/a/1" if action == "ALLOW" else b"/b")
    assert filter.request_headers(first, True) is None
    second, third = Repeated(), Repeated()
    third.metadata["f"] = {"k": "v"}
    assert filter.request_headers_repeated(second) is None
    assert filter.request_headers_repeated(third) is None
    assert second.metadata == first.metadata
    assert third.metadata == {"f": {"k": "v"}} | first.metadata
    expected = {"http.ing.rbac.x.allowed": 3, "http.ing.rbac.x.policy.p.allowed": 3}
    assert counters(ctx) == (expected if action == "ALLOW" else {"http.ing.rbac.x.allowed": 3})


def test_a_repeated_request_that_one_of_several_policies_allowed() -> None:
    one, other = (f"{{permissions: [{{url_path: {{path: {{prefix: {prefix}}}}}}}], principals: [{{any: true}}]}}" for prefix in ("/a", "/b"))
    filter = rbac.compile(proto(RBAC, f"{{rules: {{action: ALLOW, policies: {{one: {one}, other: {other}}}}}}}"), context())
    plan, other_plan = object(), object()
    for path, of, policy in ((b"/a", plan, "one"), (b"/b", other_plan, "other")):
        first = Repeated(of)
        first.request = Stream(path).request
        assert filter.request_headers_repeated(first) is None
        again = Repeated(of)
        again.connection = first.connection
        assert filter.request_headers_repeated(again) is None
        assert again.metadata == first.metadata
        assert again.metadata[rbac.METADATA]["enforced_effective_policy_id"] == policy


@pytest.mark.parametrize("text", [f"rules: {policies('LOG', '/a')}", f"shadow_rules: {policies('DENY', '/b')}"])
def test_verdicts_for_others_are_made_anew(text: str) -> None:
    assert not hasattr(rbac.compile(proto(RBAC, f"{{{text}}}"), context()), "request_headers_repeated")


def test_streams_share_no_metadata_that_changes() -> None:
    filter = rbac.compile(proto(RBAC, f"{{rules: {policies('ALLOW', '/a')}, shadow_rules: {policies('DENY', '/a')}}}"), context())
    plain = rbac.compile(proto(RBAC, f"{{rules: {policies('ALLOW', '/a')}}}"), context())
    first, second = Stream(b"/a"), Stream(b"/a")
    plain.request_headers(first, True)
    filter.request_headers(first, True)
    plain.request_headers(second, True)
    assert first.metadata[rbac.METADATA]["shadow_engine_result"] == "denied"
    assert "shadow_engine_result" not in second.metadata[rbac.METADATA]
