"""What a request needs (JwtRequirement): the token of a provider, of any or of all of several, or none at all.

Verification is a generator: it runs through to its verdict, its return value, unless keys must be fetched; then it yields the futures of which any one makes
it worth going on. So a request whose keys are at hand, which is nearly every one, takes no task and no await. Where several requirements wait at the same
time, their fetches run at the same time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.http.jwt.locations import Extractor, Location
from meshproxy.http.jwt.provider import Audiences, Provider
from meshproxy.http.jwt.status import Bad, Status
from meshproxy.http.jwt.token import Jwt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from meshproxy.codec.headers import RequestHead

Waiting = tuple["asyncio.Future[Any]", ...]
Verdict = Generator[Waiting, None, Status]


class Verification:
    """What becomes of one request: its head is changed in place; `extracted` goes to its dynamic metadata."""

    __slots__ = ("clears_route", "extracted", "head")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.extracted: dict[str, Any] = {}
        self.clears_route = False


class Providers:
    """All providers of a filter, and what verification needs besides. `wall`: Unix time."""

    def __init__(self, protos: Any, providers: dict[str, Provider], wall: Callable[[], float], stats: Any) -> None:
        self.protos = protos
        self.by_name = providers
        self.wall = wall
        self.stats = stats
        self._by_issuer: dict[str, Provider] = {}
        for provider in providers.values():
            self._by_issuer.setdefault(provider.issuer, provider)
        self.only = next(iter(providers.values())) if len(providers) == 1 else None

    def of_issuer(self, issuer: str) -> Provider | None:
        """The first provider of that issuer, or else the first that takes any."""
        return self._by_issuer.get(issuer) or self._by_issuer.get("")


class Requirement:
    """One node of a requirement."""

    def verify(self, verification: Verification) -> Verdict:
        """The verdict; see above."""
        raise NotImplementedError


class Tokens(Requirement):
    """Every token in some places must be good: of one provider, or, where tokens may be missing or bad, of whichever their issuers name."""

    def __init__(
        self,
        providers: Providers,
        name: str | None,
        audiences: Audiences | None = None,
        *,
        allow_missing: bool = False,
        allow_failed: bool = False,
    ) -> None:
        """`name`: of the one provider. `audiences`: instead of the provider's."""
        self._providers = providers
        self._provider = None if name is None else providers.by_name[name]
        self._extractor = Extractor([providers.protos[one] for one in (sorted(providers.protos) if name is None else [name])])
        self._audiences = audiences
        self._allow_missing = allow_missing or allow_failed
        self._allow_failed = allow_failed

    def verify(self, verification: Verification) -> Verdict:
        """Tokens are taken from the last to the first. A bad one ends it, unless that is allowed: an upstream might take it for the good one."""
        self._extractor.sanitise(verification.head)
        tokens = self._extractor.extract(verification.head)
        provider = self._provider if tokens else None
        status = Status.MISSING
        while True:
            if tokens:
                token, location = tokens.pop()
                status, provider = yield from self._verify_one(token, location, provider, verification)
            if status != Status.OK:
                teller = provider or self._providers.only
                if teller is not None and teller.failed_key:
                    verification.extracted[teller.failed_key] = {"code": int(status), "message": status.text}
            if not tokens or (status != Status.OK and not self._allow_missing):
                break
        if self._allow_failed or (self._allow_missing and status == Status.MISSING):
            return Status.OK
        return status

    def _verify_one(
        self, token: bytes, location: Location, before: Provider | None, verification: Verification
    ) -> Generator[Waiting, None, tuple[Status, Provider | None]]:
        """The verdict on one token and the provider that it was taken for; `before`: the one of the token before it."""
        providers = self._providers
        provider = self._provider
        now = providers.wall()
        jwt = None
        if provider is not None:
            jwt = provider.cache.get(token, int(now)) if provider.cache is not None else None
            providers.stats["jwt_cache_miss" if jwt is None else "jwt_cache_hit"].n += 1
        cached = jwt is not None
        if jwt is None:
            try:
                jwt = Jwt(token)
            except Bad as bad:
                return bad.status, provider or before
        if not location.allows(jwt.issuer):
            return Status.UNKNOWN_ISSUER, provider or before
        if provider is None:
            provider = providers.of_issuer(jwt.issuer)
            if provider is None:
                return Status.UNKNOWN_ISSUER, None
        status = provider.check_claims(jwt, now, self._audiences)
        if status == Status.OK and not cached:
            status = yield from _verify_signature(jwt, provider)
        if status != Status.OK:
            return status, provider
        provider.accept(jwt, verification)
        provider.remove(location, verification.head)
        if self._provider is not None and not cached and provider.cache is not None:
            provider.cache.put(token, jwt)
        return Status.OK, provider


def _verify_signature(jwt: Jwt, provider: Provider) -> Verdict:
    keys = provider.keys()
    if keys is None:
        fetching = provider.fetch()
        if fetching is None:
            return Status.JWKS_NO_VALID_KEYS
        while not fetching.done():
            yield (fetching,)
        keys = fetching.result()
        if keys is None:
            return Status.FETCH_FAILED
    return keys.verify(jwt)


class _Group(Requirement):
    """Several requirements at once: each runs until it must wait, then whichever can goes on."""

    def __init__(self, children: Sequence[Requirement]) -> None:
        self._children = children

    def _decide(self, statuses: dict[int, Status], last: Status) -> Status | None:
        """The verdict, once there is one: by the verdicts of the children so far, by their positions, of which `last` is the latest."""
        raise NotImplementedError

    def verify(self, verification: Verification) -> Verdict:
        """See `Requirement.verify`."""
        statuses: dict[int, Status] = {}
        waiting: dict[int, tuple[Verdict, Waiting]] = {}
        try:
            for position, child in enumerate(self._children):
                decided = self._go_on(position, child.verify(verification), statuses, waiting)
                if decided is not None:
                    return decided
            while waiting:
                yield tuple(future for _, futures in waiting.values() for future in futures)
                for position, (run, futures) in list(waiting.items()):
                    if any(future.done() for future in futures):
                        del waiting[position]
                        decided = self._go_on(position, run, statuses, waiting)
                        if decided is not None:
                            return decided
        finally:
            for run, _ in waiting.values():
                run.close()
        raise AssertionError("a group without a verdict")

    def _go_on(self, position: int, run: Verdict, statuses: dict[int, Status], waiting: dict[int, tuple[Verdict, Waiting]]) -> Status | None:
        try:
            waiting[position] = run, next(run)
        except StopIteration as done:
            statuses[position] = done.value
            return self._decide(statuses, done.value)
        return None


class AnyOf(_Group):
    """One is enough. Of several failures the most telling one is told: neither that a token is missing nor that its issuer is another's, if there is one."""

    def __init__(self, children: Sequence[Requirement], *, allow_missing: bool, allow_failed: bool) -> None:
        super().__init__(children)
        self._allow_missing = allow_missing
        self._allow_failed = allow_failed

    def _decide(self, statuses: dict[int, Status], last: Status) -> Status | None:
        if last == Status.OK:
            return last
        if len(statuses) < len(self._children):
            return None
        verdict = Status.MISSING
        for position in range(len(self._children)):
            status = statuses[position]
            if verdict == Status.MISSING or status not in (Status.MISSING, Status.UNKNOWN_ISSUER):
                verdict = status
        if self._allow_failed or (self._allow_missing and verdict == Status.MISSING):
            return Status.OK
        return verdict


class AllOf(_Group):
    """All are needed."""

    def _decide(self, statuses: dict[int, Status], last: Status) -> Status | None:
        return last if last != Status.OK or len(statuses) == len(self._children) else None


class Nothing(Requirement):
    """A requirement that asks for nothing."""

    def verify(self, verification: Verification) -> Verdict:
        """Always good."""
        return Status.OK
        yield ()


def compile_requirement(proto: Any, providers: Providers) -> Requirement:
    """From a JwtRequirement. Raises ConfigError."""
    match proto.WhichOneof("requires_type"):
        case "provider_name":
            return _of_provider(proto.provider_name, (), providers, "provider_name")
        case "provider_and_audiences":
            wanted = proto.provider_and_audiences
            return _of_provider(wanted.provider_name, wanted.audiences, providers, "provider_and_audiences.provider_name")
        case "requires_any":
            return _any_of(proto.requires_any.requirements, providers)
        case "requires_all":
            with errors.under("requires_all"):
                return AllOf(_children(proto.requires_all.requirements, providers))
        case "allow_missing":
            return Tokens(providers, None, allow_missing=True)
        case "allow_missing_or_failed":
            return Tokens(providers, None, allow_failed=True)
        case _:
            return Nothing()


def _of_provider(name: str, audiences: Any, providers: Providers, path: str) -> Requirement:
    if name not in providers.protos:
        errors.fail(path, f"Required provider ['{name}'] is not configured.")
    return Tokens(providers, name, Audiences(audiences) if audiences else None)


def _any_of(protos: Any, providers: Providers) -> Requirement:
    kinds = [proto.WhichOneof("requires_type") for proto in protos]
    failed, missing = "allow_missing_or_failed" in kinds, "allow_missing" in kinds
    with errors.under("requires_any"):
        children = _children(protos, providers, ("allow_missing_or_failed", "allow_missing"))
    if not children:
        children = [Tokens(providers, None, allow_missing=missing, allow_failed=failed)]
    return AnyOf(children, allow_missing=missing, allow_failed=failed)


def _children(protos: Any, providers: Providers, without: tuple[str, ...] = ()) -> list[Requirement]:
    if len(protos) < 2:
        errors.fail("requirements", "must have at least 2 items")
    found = []
    for index, proto in enumerate(protos):
        if proto.WhichOneof("requires_type") not in without:
            with errors.under(f"requirements[{index}]"):
                found.append(compile_requirement(proto, providers))
    return found
