"""Streams to control planes: one for all types (ADS), or one for each subscription; over clusters of ours, begun again when they end.

A `Mux` keeps the session of a stream (`session.py`) and hands answers to those who subscribed. Times to live of resources are watched here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import seconds, seconds_of
from meshproxy.api.errors import UNSUPPORTED, Collector, ConfigError, Problem, fail, under
from meshproxy.codec import grpc
from meshproxy.net.tasks import spawn
from meshproxy.net.token_bucket import TokenBucket
from meshproxy.scheduling import turns
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError
from meshproxy.xds.resources import VIRTUAL_HOST, WILDCARD, Update
from meshproxy.xds.session import TOGETHER, ProtocolError, Refusal, Session
from meshproxy.xds.subscription import Rules, Subscription

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.grpc_stream import GrpcStream
    from meshproxy.xds.cache import Entry
    from meshproxy.xds.resources import Resource, ResourceType
    from meshproxy.xds.subscription import Watcher

log = logging.getLogger("meshproxy.config")

BASE_INTERVAL, MAX_INTERVAL = 0.5, 30.0  # seconds between streams
ASK_AGAIN = 0.2  # seconds that a server has to say by itself what is asked for again
MAX_TOKENS, FILL_RATE = 100, 10.0  # requests at once, and a second, where they are limited and nothing else is said
GRPC, DELTA_GRPC = 2, 3  # envoy.config.core.v3.ApiConfigSource.ApiType
_ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"


class Backoff:
    """Seconds until the next attempt: at random below an interval that doubles with each attempt, up to a maximum."""

    def __init__(self, random: Callable[[], float], base: float = BASE_INTERVAL, maximum: float = MAX_INTERVAL) -> None:
        self._random = random
        self._base = base
        self._max = maximum
        self._next = base

    def delay(self) -> float:
        """How long to wait now."""
        interval = self._next
        self._next = min(interval * 2, self._max)
        return interval * self._random()

    def reset(self) -> None:
        """There was a success."""
        self._next = self._base


class Api:
    """An ApiConfigSource, read: whom to call, and how. Raises ConfigError.

    `is_static(name)`: whether there is such a cluster, and it needs no control plane.
    """

    def __init__(self, source: Any, is_static: Callable[[str], bool]) -> None:
        if source.api_type not in (GRPC, DELTA_GRPC):
            fail("api_type", f"{type(source).DESCRIPTOR.enum_types_by_name['ApiType'].values_by_number[source.api_type].name} is not supported", UNSUPPORTED)
        # Any transport_api_version: V2 and AUTO are old names for what is spoken, which is V3.
        if not source.grpc_services:
            fail("grpc_services", "API configs must have either a gRPC service or a cluster name defined")
        if len(source.grpc_services) > 1:
            fail("grpc_services[1]", "only one gRPC service is supported", UNSUPPORTED)
        service = source.grpc_services[0]
        with under("grpc_services[0]"):
            if service.WhichOneof("target_specifier") != "envoy_grpc":
                fail("google_grpc", "only envoy_grpc is supported", UNSUPPORTED)
        target = service.envoy_grpc
        self.cluster: str = target.cluster_name
        if not is_static(self.cluster):
            fail(
                "grpc_services[0].envoy_grpc.cluster_name",
                f"must have a statically defined non-EDS cluster: '{self.cluster}' does not exist, was added via api, or is an EDS cluster",
            )
        self.delta: bool = source.api_type == DELTA_GRPC
        self.node_once: bool = source.set_node_on_first_message_only
        self.authority: str = target.authority
        self.metadata = [(one.key.lower(), one.raw_value or one.value) for one in service.initial_metadata]
        retry = target.retry_policy
        for field, _ in retry.ListFields():
            if field.name != "retry_back_off":
                fail(f"grpc_services[0].envoy_grpc.retry_policy.{field.name}", "plays no part in streams of a control plane", UNSUPPORTED)
        self.base, self.max = BASE_INTERVAL, MAX_INTERVAL
        if retry.HasField("retry_back_off"):
            backoff = retry.retry_back_off
            self.base = seconds(backoff.base_interval)
            self.max = seconds_of(backoff, "max_interval", max(self.base * 10, self.base))

        self.rate: tuple[int, float] | None = None  # requests at once, and a second
        if source.HasField("rate_limit_settings"):
            settings = source.rate_limit_settings
            rate = settings.fill_rate.value if settings.HasField("fill_rate") else FILL_RATE
            if not math.isfinite(rate):
                fail("rate_limit_settings.fill_rate", f"The value of fill_rate in RateLimitSettings ({rate}) must not be NaN nor Inf")
            self.rate = settings.max_tokens.value if settings.HasField("max_tokens") else MAX_TOKENS, rate

    def mux(self, method: str, scope: Scope, context: Context) -> Mux:
        """A stream to it, not begun. `scope`: of its `control_plane.*`."""
        client = GrpcClient(context.clusters, self.cluster, authority=self.authority, metadata=self.metadata)
        session = Session(context.node, delta=self.delta, node_once=self.node_once, give_way=turns.give_way)
        return Mux(client, method, session, scope, context, Backoff(context.random.random, self.base, self.max), self.rate)

    def ads(self, context: Context) -> Mux:
        """The stream of all types."""
        return self.mux(f"{_ADS}{'Delta' if self.delta else 'Stream'}AggregatedResources", context.stats.scope(""), context)

    def single(self, type: ResourceType, scope: Scope, context: Context) -> Mux:
        """A stream of one type."""
        return self.mux(f"/{type.service}/{'Delta' if self.delta else 'Stream'}{type.kind}", scope, context)


class Mux:
    """A stream, those that replace it, and the subscriptions on it. `start` it inside the running loop.

    `rate`: requests at once, and a second; None for as many as there are. Refusals are limited in any case: many a control plane answers each with the same
    resources at once.
    """

    def __init__(
        self, client: GrpcClient, method: str, session: Session, scope: Scope, context: Context, backoff: Backoff, rate: tuple[int, float] | None = None
    ) -> None:
        self.delta = session.delta
        self._client = client
        self._method = method
        self._session = session
        self._context = context
        self._backoff = backoff
        self._subscriptions: dict[str, dict[str, list[StreamSubscription]]] = {}  # type URL -> name -> whose
        self._expiries: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stream: GrpcStream | None = None
        self._receiving = False
        self._patient = False  # something is to be asked for again, after a while
        self._patience: asyncio.TimerHandle | None = None
        self._rate = TokenBucket(*rate, context.clock) if rate is not None else None
        self._refusals = TokenBucket(MAX_TOKENS, FILL_RATE, context.clock)
        self._enforced = scope.counter("control_plane.rate_limit_enforced")
        self._pending = scope.gauge("control_plane.pending_requests")
        self._connected = scope.gauge("control_plane.connected_state")
        self._identifier = scope.text("control_plane.identifier")

    def start(self) -> None:
        """Begin, unless that was done."""
        if self._task is None:
            self._task = spawn(f"xds {self._client.cluster_name}", self._run())

    def close(self) -> None:
        """End for good."""
        if self._task is not None:
            self._task.cancel()
        for timer in self._expiries.values():
            timer.cancel()
        if self._patience is not None:
            self._patience.cancel()
        self._connected.n = 0

    # -- subscriptions

    def add(self, one: StreamSubscription) -> None:
        """Ask for what it wants."""
        self._subscriptions.setdefault(one.type.url, {}).setdefault(one.name, []).append(one)
        if self._session.subscribe(one.type, one.name, patient=self.delta):
            # A cluster has changed. Most control planes say its endpoints again by themselves; by delta they do not have to.
            self._patient = True
            if not self._receiving:
                self._be_patient()
        else:
            self._wake.set()

    def _be_patient(self) -> None:
        """From now on, not from when a long answer began."""
        if self._patient and self._patience is None:
            self._patience = self._context.loop.call_later(ASK_AGAIN, self._ask_again)

    def _ask_again(self) -> None:
        self._patience = None
        self._patient = False
        self._session.ask_again()
        self._wake.set()

    def discard(self, one: StreamSubscription) -> None:
        """It wants nothing any more."""
        names = self._subscriptions.get(one.type.url, {})
        found = names.get(one.name, [])
        if one in found:
            found.remove(one)
            if not found:
                del names[one.name]
                self._session.unsubscribe(one.type, one.name)
                self._forget_expiry(one.type.url, one.name)
                self._wake.set()

    def ask(self, type: ResourceType, name: str) -> None:
        """Ask for one resource more, for who subscribed to all."""
        self._session.subscribe(type, name)
        self._wake.set()

    def let_go(self, type: ResourceType, name: str) -> None:
        """No longer ask for it, nor say that we have it."""
        self._session.unsubscribe(type, name)
        self._session.forget(type, name)
        self._wake.set()

    def remember(self, type: ResourceType, versions: dict[str, str]) -> None:
        """Say that we have these versions, which nobody has told us on a stream: by another one, as only its first request can."""
        self._session.remember(type, versions)
        if self._stream is not None:
            self._stream.cancel()

    def _all(self) -> list[StreamSubscription]:
        return [one for names in self._subscriptions.values() for found in names.values() for one in found]

    # -- the stream

    async def _run(self) -> None:
        while True:
            try:
                await self._one_stream()
                log.info("%s to %s was closed by the server", self._method, self._client.cluster_name)
            except GrpcError as error:
                log.warning("%s to %s ended: %s", self._method, self._client.cluster_name, error)
            except Exception:  # a defect shall not be the end of all updates
                log.exception("%s to %s failed", self._method, self._client.cluster_name)
            finally:
                self._stream = None
                self._connected.n = 0
                self._session.closed()
            for one in self._all():
                one.lost()
            await asyncio.sleep(self._backoff.delay())

    async def _one_stream(self) -> None:
        async with self._client.stream(self._method) as stream:
            self._stream = stream
            self._connected.n = 1
            self._session.opened()
            self._wake.set()
            sender = spawn(f"xds requests to {self._client.cluster_name}", self._send(stream))
            try:
                async for data in stream:
                    self._backoff.reset()
                    before = self._session.refusals
                    self._receiving = True
                    self._receive(data)
                    self._receiving = False
                    self._be_patient()
                    self._wake.set()
                    while self._session.refusals > before and not self._refusals.consume():
                        await _pause(self._refusals.next_token())
            finally:
                self._receiving = False
                sender.cancel()

    async def _send(self, stream: GrpcStream) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while (request := next(self._session.requests(), None)) is not None:
                    if self._rate is not None:
                        await self._may_send(self._rate)
                    await stream.send(request)
        except GrpcError:
            return  # whoever reads hears of it, too
        except Exception:
            log.exception("requests to %s failed", self._client.cluster_name)
            stream.cancel()
        finally:
            self._pending.n = 0

    async def _may_send(self, rate: TokenBucket) -> None:
        """Wait for a token."""
        while not rate.consume():
            self._enforced.n += 1
            self._pending.n = 1 + self._session.pending
            await _pause(rate.next_token())
        self._pending.n = 0

    def _receive(self, data: bytes) -> None:
        try:
            update = self._session.receive(data)
        except ProtocolError as error:
            raise GrpcError(grpc.INTERNAL, str(error)) from error
        if self._session.identifier != self._identifier.value:
            self._identifier.value = self._session.identifier
        if update is None:
            return
        if isinstance(update, Refusal):
            log.warning("%s from %s: refused: %s", update.type.kind, self._client.cluster_name, update.why)
            for subscription in [one for found in self._subscriptions.get(update.type.url, {}).values() for one in found]:
                subscription.attempts.n += 1
                subscription.spoilt()
            return
        if self._expiries or any(one.ttl for one in update.resources):
            for one in update.resources:
                self._watch_expiry(update.type, one.name, one.ttl)
        problems = self._distribute(update)
        if problems:
            self._session.reject(update, "\n".join(problems))
        else:
            self._session.accept(update)
        while update.resources:  # nobody needs the list any more: what a long answer was made of goes piece by piece, too
            del update.resources[-TOGETHER:]
            turns.give_way()

    def _distribute(self, update: Update) -> list[str]:
        """Give everybody their part; returns what is wrong."""
        names = self._subscriptions.get(update.type.url, {})
        by_name = {one.name: one for one in update.resources}
        removed = set(update.removed)
        concerned = [name for name in names if name == WILDCARD or name in by_name or name in removed]
        rules = next((one.rules for name in concerned for one in names[name]), None)
        if rules is not None and len(concerned) > 1:
            with rules.prepared(_unseen(update.resources, names)):
                return self._tell(update, concerned, by_name, removed)
        return self._tell(update, concerned, by_name, removed)

    def _tell(self, update: Update, concerned: list[str], by_name: dict[str, Resource], removed: set[str]) -> list[str]:
        problems = []
        names = self._subscriptions.get(update.type.url, {})
        for name in concerned:
            turns.give_way()
            part = update
            if name != WILDCARD:
                found = [by_name[name]] if name in by_name else []
                if found and found[0].message is None and update.type is not VIRTUAL_HOST:
                    continue  # a heartbeat: who waits for a resource waits on
                part = Update(update.type, update.version, found, [name] if name in removed else [])
            for one in list(names.get(name, ())):
                try:
                    one.answered(part)
                except ConfigError as error:
                    problems += [str(problem if name == WILDCARD else _of(name, problem)) for problem in error.problems]
                except Exception as error:
                    log.exception("%s %s could not be taken", update.type.url, name)
                    problems.append(f"internal error: {type(error).__name__}")
        return problems

    # -- times to live

    def _watch_expiry(self, type: ResourceType, name: str, seconds: float) -> None:
        self._forget_expiry(type.url, name)
        if seconds:
            self._expiries[type.url, name] = self._context.loop.call_later(seconds, self._expired, type, name)

    def _forget_expiry(self, url: str, name: str) -> None:
        timer = self._expiries.pop((url, name), None)
        if timer is not None:
            timer.cancel()

    def _expired(self, type: ResourceType, name: str) -> None:
        """The server has not said in time that a resource lives on: it is gone."""
        del self._expiries[type.url, name]
        self._session.forget(type, name)
        self._distribute(Update(type, "", [], [name]))


def _unseen(resources: list[Resource], names: dict[str, list[StreamSubscription]]) -> list[Resource]:
    """Those that somebody is going to look at, since they are others than before."""
    found = []
    for number, resource in enumerate(resources):
        if not number % TOGETHER:
            turns.give_way()
        if not all(one.has_checked(resource) for name in (resource.name, WILDCARD) for one in names.get(name, ())):
            found.append(resource)
    return found


def _of(name: str, problem: Problem) -> Problem:
    """The same, which says what resource it is of: others may be in the same refusal."""
    said = f"{name}: "
    return problem if problem.why.startswith(said) else Problem(problem.path, said + problem.why, problem.kind)


async def _pause(seconds: float) -> None:
    await asyncio.sleep(max(seconds, 0.001))


class StreamSubscription(Subscription):
    """What a stream brings. `own`: the stream is for this subscription alone, and begins and ends with it. `kept`: its part of the cache on disk."""

    def __init__(
        self,
        mux: Mux,
        own: bool,
        type: ResourceType,
        name: str,
        watcher: Watcher,
        scope: Scope,
        context: Context,
        rules: Rules,
        init_timeout: float,
        kept: Entry | None = None,
    ) -> None:
        super().__init__(type, name, watcher, scope, context, rules, init_timeout)
        self._kept = kept
        self._fresh = True  # nothing has come yet
        self._mux = mux
        self._own = own
        self.in_parts = mux.delta

    def start(self) -> None:
        super().start()
        self.attempts.n += 1
        self._mux.add(self)
        if self._own:
            self._mux.start()

    def ask(self, name: str) -> None:
        """Of a subscription to all: ask for one resource by its name."""
        self.attempts.n += 1
        self._mux.ask(self.type, name)

    def let_go(self, name: str) -> None:
        """No longer ask for it."""
        self._mux.let_go(self.type, name)

    def close(self) -> None:
        super().close()
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        self._mux.discard(self)
        if self._own:
            self._mux.close()

    def answered(self, update: Update) -> None:
        self._fresh = False
        try:
            super().answered(update)
        finally:
            self.attempts.n += 1
        if self._kept is not None:
            self._kept.accepted(update, self._context.wall())

    def _timed_out(self) -> None:
        self.attempts.n += 1
        self._use_kept()
        super()._timed_out()

    def lost(self) -> None:
        super().lost()
        self.attempts.n += 1
        self._use_kept()

    def _use_kept(self) -> None:
        """The control plane is away, or does not answer: go on with what an earlier process was told."""
        found = self._kept.read() if self._kept is not None and self._fresh else None
        self._fresh = False
        if found is None:
            return
        update, when = found
        log.warning("%s: the control plane does not answer; using what was accepted %s", self, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)))
        self.scope.counter("config_cache_used").n += 1
        self._answer_has_come()
        versions = {one.name: one.version for one in update.resources}
        outermost = self.rules.begin()
        try:
            invalid = self._invalid(update)
            problems = Collector()
            problems.problems += [problem for found in invalid.values() for problem in found]
            update.resources = [one for one in update.resources if one.name not in invalid]
            with problems.under(""):
                self._watcher.updated(update)
            problems.raise_any()
        except Exception as error:  # another version of us has written it, and may have known more, or less
            log.warning("%s: not all of it can be used: %s", self, error, exc_info=not isinstance(error, ConfigError))
            self._watcher.failed()
            versions = dict.fromkeys(versions, "")  # let it be said again
        finally:
            if outermost:
                self.rules.forget()
        if self._mux.delta and self.name == WILDCARD:
            self._mux.remember(self.type, versions)
