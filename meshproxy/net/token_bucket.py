"""Token buckets (envoy.type.v3.TokenBucket), filled when they are looked at rather than by a timer.

The state is one number: the time at which the bucket would have been empty had it filled steadily since. Tokens are what has flowed in from then till
now, at most `max_tokens`; taking some moves that time forward. So an idle bucket costs nothing, fractions of tokens are never lost, and the number can be
shared between workers.

Envoy's bucket belongs to the process. With one worker so does ours. With several, the number is in a shared cell (`net.shared.Cells`) when the context
has cells and the bucket has a key that all workers agree on; a decision then costs two system calls more. Else each worker has an equal share of the bucket
(rate divided by the number of workers, size divided and rounded up): right in sum when connections are spread evenly, stricter for a single connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.durations import seconds

if TYPE_CHECKING:
    from meshproxy.net.shared import Cells

MIN_FILL_INTERVAL = 0.05  # seconds; Envoy's lower bound
_ROUNDING = 1e-9  # of a token: the last one must not get lost in the last bit of a double
_MIN_RATE = 1 / (365 * 24 * 60 * 60)  # one token a year, as in Envoy: a rate of zero would never refill and divide by zero


class TokenBucket:
    """At most `max_tokens`, full at the start, with `fill_rate` tokens a second flowing in. Times are of `clock`, in seconds."""

    __slots__ = ("_clock", "_empty_at", "fill_rate", "max_tokens")

    def __init__(self, max_tokens: float, fill_rate: float, clock: Callable[[], float]) -> None:
        self.max_tokens = max_tokens
        self.fill_rate = max(fill_rate, _MIN_RATE)
        self._clock = clock
        self._empty_at = clock() - max_tokens / self.fill_rate

    def consume(self, tokens: float = 1) -> bool:
        """Take `tokens`, all or none; whether they were there."""
        now = self._clock()
        available = min(self.max_tokens, (now - self._empty_at) * self.fill_rate)
        if available + _ROUNDING < tokens:
            return False
        self._empty_at = now - (available - tokens) / self.fill_rate
        return True

    def taker(self) -> Callable[[], bool]:
        """`consume` of one token as a function, for hot code: the same comparison in times instead of tokens, which divides nothing."""
        clock = self._clock
        interval = 1 / self.fill_rate
        filling = (self.max_tokens - 1) / self.fill_rate
        rounding = _ROUNDING / self.fill_rate

        def take() -> bool:
            # HOT
            now = clock()
            empty_at = self._empty_at + interval
            if empty_at < now - filling:  # noqa: PLR1730  # a call costs more
                empty_at = now - filling
            if empty_at - now > rounding:
                return False
            self._empty_at = empty_at
            return True

        return take

    def remaining(self) -> float:
        """Tokens that could be taken now."""
        return min(self.max_tokens, (self._clock() - self._empty_at) * self.fill_rate)

    def next_token(self) -> float:
        """Seconds until a whole token is there; 0.0 when one is."""
        remaining = self.remaining()
        return 0.0 if remaining >= 1 else (1 - remaining) / self.fill_rate

    def __repr__(self) -> str:
        return f"TokenBucket({self.remaining():.1f} of {self.max_tokens:g}, {self.fill_rate:g}/s)"


class SharedTokenBucket(TokenBucket):
    """A token bucket whose state is a shared cell."""

    __slots__ = ("_cells", "_index")

    def __init__(self, max_tokens: float, fill_rate: float, clock: Callable[[], float], cells: Cells, index: int) -> None:
        self.max_tokens = max_tokens
        self.fill_rate = max(fill_rate, _MIN_RATE)
        self._clock = clock
        self._cells = cells
        self._index = index

    def consume(self, tokens: float = 1) -> bool:
        index = self._index
        cells = self._cells
        values = cells.values
        cells.lock(index)
        try:
            now = self._clock()
            available = min(self.max_tokens, (now - values[index]) * self.fill_rate)
            if available + _ROUNDING < tokens:
                return False
            values[index] = now - (available - tokens) / self.fill_rate
            return True
        finally:
            cells.unlock(index)

    def taker(self) -> Callable[[], bool]:
        return self.consume

    def remaining(self) -> float:
        return min(self.max_tokens, (self._clock() - self._cells.values[self._index]) * self.fill_rate)


def compile_bucket(proto: Any, context: Any, key: bytes = b"") -> TokenBucket:
    """A TokenBucket proto compiled for this worker. `context` is the `meshproxy.context.Context`.

    `key`: what names this bucket in every worker; empty when there is no such name. Raises ConfigError when the fill interval is too short.
    """
    maximum, rate = parse_bucket(proto)
    workers = context.concurrency
    if workers <= 1:
        return TokenBucket(maximum, rate, context.clock)
    cells = context.cells
    if cells is not None and key:
        key = b"bucket:%d:%r:%b" % (maximum, rate, key)
        index = cells.find(key, lambda: context.clock() - maximum / max(rate, _MIN_RATE))
        if index is not None:
            return SharedTokenBucket(maximum, rate, context.clock, cells, index)
    return TokenBucket(-(-maximum // workers), rate / workers, context.clock)


def parse_bucket(proto: Any) -> tuple[int, float]:
    """(max_tokens, tokens a second) of a TokenBucket proto. Raises ConfigError."""
    interval = seconds(proto.fill_interval)
    if interval < MIN_FILL_INTERVAL:
        errors.fail("fill_interval", "must be at least 50ms")
    tokens = proto.tokens_per_fill.value if proto.HasField("tokens_per_fill") else 1
    return proto.max_tokens, tokens / interval
