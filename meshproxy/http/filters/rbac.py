"""Role based access control of requests (envoy.extensions.filters.http.rbac.v3.RBAC).

A request that the rules do not allow is answered 403. Shadow rules only count and leave their verdict in dynamic metadata. Everything that a verdict of
one policy brings along (counters, metadata, reply) is made once, when that policy first decides.

A route's RBACPerRoute replaces the rules whole (without `rbac`, the filter is off there); counters keep the names of the filter's own configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, rbac_engine
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBAC, RBACPerRoute

    from meshproxy.api.rbac_engine import Engine, TreeEngine
    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.stats import Counter, Scope
    from meshproxy.observe.stream_info import StreamInfo

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"
ROUTE_TYPE_URLS = ("type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBACPerRoute",)
HONOURS = {
    "envoy.extensions.filters.http.rbac.v3.RBAC": ("rules rules_stat_prefix matcher shadow_rules shadow_matcher shadow_rules_stat_prefix track_per_rule_stats"),
    "envoy.extensions.filters.http.rbac.v3.RBACPerRoute": "rbac",
    **rbac_engine.HONOURS,
}

METADATA = "envoy.filters.http.rbac"
LOG_METADATA = "envoy.common"
_MAX_KNOWN = 1024
_STATS = ("allowed", "denied")
_SHADOW_STATS = ("shadow_allowed", "shadow_denied")


Hook = Callable[["StreamInfo", bool], Reply | None]


class Verdict:
    """What follows when one policy (or none) decides: counters to count, metadata to set, and the reply that ends a denied request."""

    __slots__ = ("allowed", "counters", "hint", "metadata", "reply")

    def __init__(self, policy: str | None, allowed: bool, counters: list[Counter], metadata: dict[str, str], hint: bool | None) -> None:
        self.allowed = allowed
        self.hint = hint
        self.counters = counters
        self.metadata = metadata  # of many streams: never changed
        self.reply = None if allowed else Reply(403, b"RBAC: access denied", details=rbac_engine.response_details(policy))


class Rules:
    """An engine with the names that its verdicts go by."""

    __slots__ = ("_key_prefix", "_per_rule", "_scope", "_shadow", "engine", "hints", "verdicts")

    def __init__(self, engine: Engine | TreeEngine, scope: Scope, *, key_prefix: str, shadow: bool, per_rule: bool) -> None:
        self.engine = engine
        self.hints = engine.logs and not shadow  # verdicts are for the access log
        self._scope = scope
        self._key_prefix = key_prefix
        self._shadow = shadow
        self._per_rule = per_rule
        self.verdicts: dict[Any, Verdict] = {}  # by what the engine's `match` was

    def verdict(self, stream: StreamInfo) -> Verdict:
        """The verdict on a request, not yet counted."""
        matched: Any = self.engine.match(stream)
        verdict = self.verdicts.get(matched)
        if verdict is None:
            verdict = self.verdicts[matched] = self._make(matched)
        return verdict

    def only_pass(self) -> Verdict | None:
        """The verdict on every request that may pass; None when that depends."""
        passing = self.engine.passing()
        if len(passing) != 1:
            return None
        return self.verdicts.setdefault(passing[0], self._make(passing[0]))

    def decide(self, stream: StreamInfo) -> Verdict:
        """The verdict on a request, counted."""
        verdict = self.verdict(stream)
        for counter in verdict.counters:
            counter.n += 1
        if self.hints and verdict.hint is not None:
            stream.metadata.setdefault(LOG_METADATA, {})["access_log_hint"] = verdict.hint
        return verdict

    def _make(self, matched: Any) -> Verdict:
        policy, allowed = self.engine.name(matched), self.engine.allowed(matched)
        result = "allowed" if allowed else "denied"
        stat, kind = (f"shadow_{result}", "shadow_") if self._shadow else (result, "enforced_")
        counters = [self._scope.counter(stat)]
        metadata = {f"{self._key_prefix}{kind}engine_result": result}
        if policy:
            metadata[f"{self._key_prefix}{kind}effective_policy_id"] = policy
            if self._per_rule:
                counters.append(self._scope.counter(f"policy.{policy}.{stat}"))
        return Verdict(policy, allowed, counters, metadata, self.engine.hint(matched))


class Rbac:
    """The filter. `rules` and `shadow` are None when not configured; `names` are the stat prefixes of both, which routes' rules use as well.

    `request_headers_repeated(stream)` is there where the verdict on a request is that on an equal one of the same connection, and so is
    `request_headers_varying(stream)`, for which some fields may be hidden.
    """

    __slots__ = ("name", "names", "request_headers", "request_headers_repeated", "request_headers_varying", "rules", "shadow")

    def __init__(self, names: tuple[str, str], rules: Rules | None, shadow: Rules | None) -> None:
        self.names = names
        self.rules = rules
        self.shadow = shadow
        self.request_headers: Hook = self._decide_all
        if rules is not None and shadow is None and not rules.hints:
            self.request_headers = _enforcing(rules)
            if rules.engine.repeatable:
                self.request_headers_repeated = _repeated(rules)
                self.request_headers_varying = self.request_headers

    def _decide_all(self, stream: StreamInfo, end_stream: bool) -> Reply | None:
        reply, metadata = None, {}
        if self.shadow is not None:
            metadata = self.shadow.decide(stream).metadata
        if self.rules is not None:
            verdict = self.rules.decide(stream)
            reply = verdict.reply
            metadata = metadata | verdict.metadata
        # After both: the rules do not see what the shadow rules have to say.
        _note(stream, metadata)
        return reply


def _enforcing(rules: Rules) -> Hook:
    """The hook of rules alone."""
    match, known, learn = rules.engine.match, rules.verdicts, rules.verdict

    def enforce(stream: StreamInfo, end_stream: bool = True) -> Reply | None:
        # HOT; nothing is done before the verdict is there
        verdict = known.get(match(stream)) or learn(stream)
        for counter in verdict.counters:
            counter.n += 1
        if stream._metadata is None:
            stream._metadata = {METADATA: verdict.metadata}
        else:
            _note(stream, verdict.metadata)
        return verdict.reply

    return enforce


def _repeated(rules: Rules) -> Callable[[StreamInfo], Reply | None]:
    """The hook for a request like one that has passed, without looking at it."""
    verdict = rules.only_pass()
    if verdict is None:
        return _repeated_by_plan(rules)
    metadata = verdict.metadata
    counter, *others = verdict.counters

    def repeated(stream: StreamInfo) -> None:
        # HOT
        counter.n += 1
        for other in others:
            other.n += 1
        if stream._metadata is None:
            stream._metadata = {METADATA: metadata}
        else:
            _note(stream, metadata)

    return repeated


def _repeated_by_plan(rules: Rules) -> Callable[[StreamInfo], Reply | None]:
    """The same where several policies may have let it pass: which one did is remembered for each plan (http.plan) on each connection."""
    known: dict[tuple[Any, int], Verdict] = {}

    def repeated(stream: Any) -> Reply | None:
        key = stream.plan, stream.connection.id
        verdict = known.get(key)
        if verdict is None:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            verdict = known[key] = rules.verdict(stream)
        for counter in verdict.counters:
            counter.n += 1
        _note(stream, verdict.metadata)
        return verdict.reply

    return repeated


def _note(stream: StreamInfo, metadata: dict[str, str]) -> None:
    """Add to the stream's metadata of this filter, without changing what other streams may share."""
    everything = stream.metadata
    everything[METADATA] = everything.get(METADATA, {}) | metadata


class Idle:
    """A filter without rules of its own, which routes may give some: it has no hooks and keeps the names of the counters."""

    __slots__ = ("name", "names")

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names


def compile(proto: RBAC, context: FilterContext) -> Rbac | Idle | None:
    """The filter for an RBAC proto; None when it has neither rules nor names."""
    names = (proto.rules_stat_prefix, proto.shadow_rules_stat_prefix)
    compiled = _compile(proto, names, context)
    return Idle(names) if compiled is None and any(names) else compiled


def specialise(base: Rbac | Idle | None, overrides: list[RBACPerRoute], context: FilterContext) -> Rbac | None:
    """The filter for a route: the most specific override replaces the rules."""
    override = overrides[-1]
    if not override.HasField("rbac"):
        return None
    with errors.under("rbac"):
        return _compile(override.rbac, base.names if base is not None else ("", ""), context)


def _compile(proto: RBAC, names: tuple[str, str], context: FilterContext) -> Rbac | None:
    found = errors.Collector()
    compiled: list[Rules | None] = []
    for field, tree, name, shadow in (("rules", "matcher", names[0], False), ("shadow_rules", "shadow_matcher", names[1], True)):
        scope = context.scope.scope(f"rbac.{name.removesuffix('.')}." if name else "rbac.")
        scope.declare("counter", _SHADOW_STATS if shadow else _STATS)
        rules = None
        engine = rbac_engine.compile_either(proto, field, tree, found, context.context.stats.counter)
        if engine is not None:
            key_prefix = getattr(proto, f"{field}_stat_prefix") or name
            rules = Rules(engine, scope, key_prefix=key_prefix, shadow=shadow, per_rule=proto.track_per_rule_stats)
        compiled.append(rules)
    found.raise_any()
    return Rbac(names, *compiled) if any(compiled) else None
