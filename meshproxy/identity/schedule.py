"""When to renew, and how long to wait after a failure. Pure."""

from __future__ import annotations

from collections.abc import Callable

_JITTER = 0.1  # of the life: what was issued at one moment is not renewed at one
_FIRST_S = 0.5
_MOST_S = 30.0
LOOK_S = 60.0  # the clock may be set while we wait, so nothing is waited for longer than this without looking


def renew_at(received: float, not_after: float, random: Callable[[], float]) -> float:
    """Half of what is left of the certificate's life, give or take a twentieth of it. `random`: 0 to 1; times in seconds since 1970."""
    return received + (not_after - received) * (0.5 + _JITTER * (random() - 0.5))


def is_due(now: float, not_before: float, at: float) -> bool:
    """Whether to renew: it is time, or the clock was set back before the certificate's beginning."""
    return now >= at or now < not_before


def back_off(failures: int, random: Callable[[], float]) -> float:
    """Seconds to wait after that many failures in a row (1 or more): doubling up to half a minute, and half of it by chance."""
    return float(min(_FIRST_S * 2 ** min(failures - 1, 10), _MOST_S) * (0.5 + random() / 2))
