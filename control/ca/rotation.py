"""Who signs and what is trusted at a given time. Pure: everything follows from state and time, so a clock that is set back undoes what it had done.

A root is trusted (published in the bundle) from the moment it is made, and signs once every workload must know it. Workloads learn of it at the latest when
they renew, so that is after the longest life of a leaf. From then on its predecessor signs no more, and stays trusted until the last leaf below it has expired:
one longest life later. Intermediates need no such care, since each leaf comes with its own.

    roots        A signs ----------------------| B signs ------------------
    bundle       A ......| A and B ............................| B .........
                         B is made             longest life    longest life
"""

from __future__ import annotations

from control.ca.certificates import BACKDATED_S
from meshproxy.record import Record, replace

DAY = 86400.0
_KEPT_ROOTS = 16
_KEPT_INTERMEDIATES = 64


class Settings(Record, frozen=True):
    """Lives in seconds. `life_s`: of a leaf that asks for none; `max_life_s`: of one that asks for more."""

    life_s: float = DAY
    max_life_s: float = DAY
    intermediate_life_s: float = 30 * DAY
    root_life_s: float = 3650 * DAY


class Validity(Record, frozen=True):
    """A certificate's: seconds since 1970."""

    begin: float
    end: float


class Root(Record, frozen=True):
    """`signs_at`: when it becomes the one that signs. `has_key`: intermediates can be made here; otherwise they are brought, too."""

    id: str
    validity: Validity
    signs_at: float
    has_key: bool


class Intermediate(Record, frozen=True):
    """Signs leaves for `root`."""

    id: str
    validity: Validity
    root: str


class State(Record, frozen=True):
    """Everything that is known, oldest first. `longest_life_s`: that any leaf may have been given, ever."""

    trust_domain: str
    longest_life_s: float
    roots: tuple[Root, ...] = ()
    intermediates: tuple[Intermediate, ...] = ()


def trusted(state: State, now: float) -> tuple[Root, ...]:
    """The bundle."""
    return tuple(
        root for at, root in enumerate(state.roots) if not any(now >= later.signs_at + state.longest_life_s + BACKDATED_S for later in state.roots[at + 1 :])
    )


def signing_root(state: State, now: float) -> Root:
    """The root whose intermediates sign."""
    return next((root for root in reversed(state.roots) if root.signs_at <= now), state.roots[0])


def signer(state: State, now: float) -> Intermediate | None:
    """The intermediate that signs: the newest of the signing root that is valid now. None when there is none."""
    root = signing_root(state, now)
    for one in reversed(state.intermediates):
        if one.root == root.id and one.validity.begin <= now < one.validity.end:
            return one
    return None


def needs_intermediate(state: State, settings: Settings, now: float) -> tuple[Root, ...]:
    """The roots that should get a new intermediate now: the signing one, and those that will sign."""
    first = state.roots.index(signing_root(state, now))
    return tuple(
        root for root in state.roots[first:] if root.has_key and root.validity.begin <= now < root.validity.end and not _has_long(state, settings, root, now)
    )


def needs_root(state: State, settings: Settings, now: float) -> bool:
    """Whether the newest root is in the last fifth of its life (or in the time that a change takes, if that is longer), and its successor can be made here."""
    newest = state.roots[-1]
    life = newest.validity.end - newest.validity.begin
    ahead = max(life / 5, 2 * state.longest_life_s + settings.intermediate_life_s)
    return newest.has_key and newest.validity.begin <= now and newest.validity.end - now < min(ahead, life / 2)


def with_root(state: State, root: Root, intermediate: Intermediate) -> State:
    """A root is added, with what will sign for it."""
    return replace(state, roots=(*state.roots, root), intermediates=(*state.intermediates, intermediate))


def with_intermediate(state: State, intermediate: Intermediate) -> State:
    """An intermediate is added."""
    return replace(state, intermediates=(*state.intermediates, intermediate))


def forget(state: State, now: float) -> State:
    """Without what has been of no use for a month. The last ones are kept whatever the clock says: it may be wrong, and nothing brings them back."""
    gone = now - 30 * DAY
    kept = trusted(state, gone)
    roots = tuple(root for root in state.roots if root in kept or root in state.roots[-_KEPT_ROOTS:])
    names = {root.id for root in roots}
    last = state.intermediates[-_KEPT_INTERMEDIATES:]
    intermediates = tuple(one for one in state.intermediates if one.root in names and (one.validity.end > gone or one in last))
    return replace(state, roots=roots, intermediates=intermediates)


def _has_long(state: State, settings: Settings, root: Root, now: float) -> bool:
    """Whether one of the root's intermediates is valid for long enough: a third of its life, and two of a leaf (so that a leaf has its whole life)."""
    for one in state.intermediates:
        if one.root != root.id or one.validity.begin > now:
            continue
        life = one.validity.end - one.validity.begin
        ahead = min(max(life / 3, 2 * settings.max_life_s), life / 2)
        if one.validity.end - now >= ahead or one.validity.end >= root.validity.end:
            return True
    return False
