"""What all subscriptions have in common, wherever their updates come from: statistics, the first answer and how long to wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from xxhash import xxh64_intdigest

from meshproxy.api import support, unknown
from meshproxy.api.durations import seconds
from meshproxy.api.errors import INVALID, Collector, ConfigError, Problem
from meshproxy.record import Record
from meshproxy.scheduling import turns
from meshproxy.upstream import endpoints
from meshproxy.upstream.shapes import Shapes
from meshproxy.xds.resources import ENDPOINTS, EXTENSION, ROUTES, WILDCARD, Update

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.resources import Resource, ResourceType

log = logging.getLogger("meshproxy.config")

TOGETHER = 4  # resources that are looked at in one go: as many cost less each, and take longer
MAX_UNKNOWN = 1000  # sorts of unknown fields that are remembered
INIT_TIMEOUT = 15.0  # seconds for the first answer, unless the source says otherwise
_COUNTERS = ("init_fetch_timeout", "update_attempt", "update_failure", "update_rejected", "update_success")
_GAUGES = ("update_time", "version")

# Of these, that there is none says only that there is none yet: who waits for the first one goes on until the time is over. In Envoy, for ever.
_MAY_COME_YET = (ROUTES, EXTENSION)
_ASSIGNMENT = ENDPOINTS.message.DESCRIPTOR


class Watcher(Protocol):
    """Who subscribed."""

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError to refuse it; what was good of it may be in use nevertheless."""

    def failed(self) -> None:
        """No (good) answer came: whoever waits for the first one waits no longer. May be called again."""


class Refused(Record):
    """What was wrong with a resource the last time that it came. `when`: Unix time."""

    version: str
    when: float
    details: str


class _Nobody:
    """Who does not watch any longer."""

    def updated(self, update: Update) -> None:
        """It is no longer of interest."""

    def failed(self) -> None:
        """Nor is this."""


_NOBODY = _Nobody()


class Rules:
    """How resources are looked at before anybody gets them. `unsupported` is "reject" or "warn", see `api.support.check`.

    Unknown fields are refused, or told of and counted (each sort of them once, however often it comes), or, without `warn_unknown`, nobody's business.
    """

    def __init__(
        self, unsupported: str = "reject", reject_unknown: bool = False, count_unknown: Callable[[], None] = lambda: None, *, warn_unknown: bool = True
    ) -> None:
        self.unsupported = unsupported
        self.reject_unknown = reject_unknown
        self._warn_unknown = warn_unknown
        self._count_unknown = count_unknown
        self._seen_unknown: set[str] = set()
        self._shapes = Shapes()
        self._looked: dict[int, tuple[Message, list[Problem], list[Problem]]] = {}  # what was found wrong with messages of the answer under way, by their ids
        self._right: set[int] = set()  # ids of those of which there is nothing more to find out

    def unknown(self, what: str) -> None:
        """There are fields that nobody knows."""
        if self._warn_unknown and what not in self._seen_unknown:
            if len(self._seen_unknown) < MAX_UNKNOWN:
                self._seen_unknown.add(what)
            log.warning("Unexpected field: %s", what)
            self._count_unknown()

    def invalid(self, resources: list[Resource]) -> dict[str, list[Problem]]:
        """What breaks a declared constraint: name of a resource -> problems."""
        found = {}
        self._look_at_all(resources)
        for number, one in enumerate(resources):
            if not number % TOGETHER:
                turns.give_way()
            problems = [problem for problem in self._look(one.message) if problem.kind == INVALID] if one.message is not None else []
            looks = one.message is not None and (self.reject_unknown or self._warn_unknown) and id(one.message) not in self._right
            for what in unknown.find(one.message) if looks else ():
                if self.reject_unknown:
                    problems.append(Problem("", f"Protobuf message ({what}) has unknown fields"))
                else:
                    self.unknown(what)
            if problems:
                found[one.name] = [Problem(problem.path, f"{one.name}: {problem.why}", problem.kind) for problem in problems]
        return found

    def check(self, message: Message) -> None:
        """Raise ConfigError for fields that are set and not honoured; log what is deprecated."""
        found = self._looked.get(id(message))
        _, problems, warnings = found if found is not None else (message, *support.check(message))
        if self.unsupported != "reject":
            problems, warnings = [one for one in problems if one.kind == INVALID], [one for one in problems if one.kind != INVALID] + warnings
        for warning in warnings:
            log.warning("%s", warning)
        if problems:
            raise ConfigError(problems)

    def _look(self, message: Message) -> list[Problem]:
        """Problems, those of what is not honoured among them. `check` will want to know, too, and a look is most of what an answer costs."""
        found = self._looked.get(id(message))
        if found is None:
            found = self._looked[id(message)] = message, *support.check(message)
        return found[1]

    @contextlib.contextmanager
    def prepared(self, resources: list[Resource]) -> Iterator[None]:
        """Within the block, which an answer is given to its watchers in, what was found out about its resources is remembered. Those of one type are looked at
        in one go: mostly there is nothing to say of any of them."""
        outermost = self.begin()
        self._look_at_all(resources)
        try:
            yield
        finally:
            if outermost:
                self.forget()

    def begin(self) -> bool:
        """What is found out from now on is remembered; whether the caller is the one to `forget` it."""
        return not self._looked

    def forget(self) -> None:
        """An answer was dealt with."""
        self._looked.clear()
        self._right.clear()

    def _look_at_all(self, resources: list[Resource]) -> None:
        found = [one.message for one in resources if one.message is not None and id(one.message) not in self._looked]
        if found and found[0].DESCRIPTOR is _ASSIGNMENT:
            found = [message for message in found if not self._is_known(message)]
        if len(found) > 1:
            for start in range(0, len(found), TOGETHER):
                turns.give_way()
                some = found[start : start + TOGETHER]
                if support.all_right(some):
                    self._looked.update((id(message), (message, [], [])) for message in some)

    def _is_known(self, assignment: Message) -> bool:
        """Whether one like it was right; then there is nothing to find out."""
        turns.give_way()
        if assignment not in self._shapes:
            return False
        self._looked[id(assignment)] = assignment, [], []
        self._right.add(id(assignment))
        return True

    def check_endpoints(self, assignment: Any) -> None:
        """Raise ConfigError for what is wrong with a ClusterLoadAssignment, or not honoured; log what is deprecated."""
        if id(assignment) in self._right:
            return
        self.check(assignment)
        endpoints.check(assignment)
        _, problems, warnings = self._looked.get(id(assignment), (None, [None], []))
        if not problems and not warnings and not unknown.find(assignment):
            self._shapes.learn(assignment)


class Subscription:
    """A watcher's wish for one resource, or for all of a type, and what became of it. Sources call `answered` and `lost`.

    `refusals`: by name, what is wrong with what came last of a resource. `absent`: the server says that there is no such resource. `timed_out`: there was time
    enough for a first answer, and none.

    `in_parts`: what is right in an answer is used although other parts break declared constraints. Servers say everything again in the next answer, but for
    delta streams, on which what was right in a refused answer is not repeated.
    """

    in_parts = False

    def __init__(self, type: ResourceType, name: str, watcher: Watcher, scope: Scope, context: Context, rules: Rules, init_timeout: float) -> None:
        self.type = type
        self.name = name
        self._watcher = watcher
        self._context = context
        self.rules = rules
        self._init_timeout = init_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._checked: dict[str, int] = {}  # name -> digest of what keeps the declared constraints
        scope.declare("counter", _COUNTERS)
        scope.declare("gauge", _GAUGES)
        scope.declare("histogram", ("update_duration",))
        self.scope = scope
        self.attempts = scope.counter("update_attempt", shared=True)
        self._success = scope.counter("update_success", shared=True)
        self._version = scope.text("version_text")
        self.version = ""  # what was accepted last
        self.refusals: dict[str, Refused] = {}
        self.absent = False
        self.timed_out = False
        self.closed = False

    def start(self) -> None:
        """Begin."""
        if self._init_timeout:
            self._timer = self._context.loop.call_later(self._init_timeout, self._timed_out)

    def close(self) -> None:
        """No longer wanted."""
        self.closed = True
        self._watcher = _NOBODY  # it knows us, and would wait for the collector
        self._answer_has_come()

    def _timed_out(self) -> None:
        self._timer = None
        self.timed_out = True
        log.warning("%s: no answer within %g s", self, self._init_timeout)
        self.scope.counter("init_fetch_timeout").n += 1
        self._watcher.failed()

    def _answer_has_come(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def answered(self, update: Update) -> None:
        """Pass an answer on. Raises ConfigError when it is refused."""
        outermost = self.rules.begin()
        try:
            self._answered(update)
        finally:
            if outermost:
                self.rules.forget()

    def _answered(self, update: Update) -> None:
        self.absent = not update.resources and bool(update.removed)
        if not (self.absent and self.type in _MAY_COME_YET):
            self._answer_has_come()
            self.timed_out = False
        whole = update
        invalid = self._invalid(update)
        problems = Collector()
        problems.problems += [problem for found in invalid.values() for problem in found]
        problems.problems += [Problem("", f"{name}: duplicate {self.type.kind.lower()[:-1]} {name} found") for name in update.repeated]
        if invalid and self.in_parts:
            good = [one for one in update.resources if one.name not in invalid]
            update = Update(update.type, update.version, good, update.removed, update.complete, update.nonce)
        if not invalid or (self.in_parts and (update.resources or update.removed)):
            with problems.under(""):
                self._watcher.updated(update)
        try:
            problems.raise_any()
        except ConfigError as error:
            self._note_refusals(whole, error)
            self.refused(error)
            raise
        if self.refusals:
            self._note_refusals(whole)
        self.version = update.resources[0].version if len(update.resources) == 1 else update.version
        self._success.n += 1
        self.scope.gauge("update_time").n = int(self._context.wall() * 1000)
        self.scope.gauge("version").n = xxh64_intdigest(update.version.encode())
        self._version.value = update.version

    def _invalid(self, update: Update) -> dict[str, list[Problem]]:
        """What breaks a declared constraint, by name. What was right in the last answer and is the same is not looked at again: an answer of the state of the
        world says everything each time."""
        digests = {one.name: one.digest or xxh64_intdigest(one.message.SerializeToString()) for one in update.resources if one.message is not None}
        invalid = self.rules.invalid([one for one in update.resources if one.name in digests and self._checked.get(one.name) != digests[one.name]])
        if update.complete:
            self._checked.clear()
        self._checked.update(digests)
        for name in (*invalid, *update.removed):
            self._checked.pop(name, None)
        return invalid

    def _note_refusals(self, update: Update, error: ConfigError | None = None) -> None:
        """Remember what was wrong with which resources of an answer, and forget what was wrong with them before."""
        if update.complete:
            self.refusals.clear()
        for name in update.removed:
            self.refusals.pop(name, None)
        for one in update.resources:
            said = f"{one.name}: "
            problems = error.problems if error is not None else []
            found = [str(problem) for problem in problems if self.name != WILDCARD or problem.why.startswith(said)]
            if found:
                self.refusals[one.name] = Refused(one.version, self._context.wall(), "\n".join(found))
            else:
                self.refusals.pop(one.name, None)

    @property
    def updated(self) -> float:
        """When that was; Unix time, 0.0 where nothing was accepted."""
        return self.scope.gauge("update_time").n / 1000

    def has_checked(self, resource: Resource) -> bool:
        """Whether it is what it was, and was right then."""
        return bool(resource.digest) and self._checked.get(resource.name) == resource.digest

    def refused(self, error: ConfigError) -> None:
        """Count and tell a refusal."""
        log.warning("%s: refused: %s", self, error)
        self.spoilt()

    def spoilt(self) -> None:
        """An answer came that was no good, and has been told of."""
        self._answer_has_come()
        self.scope.counter("update_rejected").n += 1
        self._watcher.failed()

    def lost(self) -> None:
        """Nothing came, and nothing will for now."""
        self.scope.counter("update_failure", shared=True).n += 1

    def __str__(self) -> str:
        return f"{self.type.kind} {self.name!r}"


def init_timeout(source: Any) -> float:
    """Seconds that a ConfigSource gives the first answer; 0.0 for ever."""
    if not source.HasField("initial_fetch_timeout"):
        return INIT_TIMEOUT
    duration = source.initial_fetch_timeout
    return seconds(duration)
