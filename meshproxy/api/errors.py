"""What is wrong with a configuration, and where: every problem found, not only the first, each with the path of its field.

Code that compiles a proto names paths relative to that proto; whoever called it puts its own path in front with `under`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from meshproxy.record import Record

INVALID = "invalid"  # Envoy would reject it as well
UNSUPPORTED = "unsupported"  # correct, but this proxy does not honour it; `--unsupported warn` lets it pass
UNKNOWN = "unknown"  # no field of the API; `--allow-unknown-static-fields` lets it pass
DEPRECATED = "deprecated"  # honoured, but newer versions of the API will not have it: a warning


class Problem(Record, frozen=True):
    """One thing that is wrong. `path` is as in the YAML file (`static_resources.listeners[0].name`); "" means the whole document."""

    path: str
    why: str
    kind: str = INVALID

    def __str__(self) -> str:
        return f"{self.path}: {self.why}" if self.path else self.why

    def under(self, prefix: str) -> Problem:
        """The same problem, seen from the message that holds this one at `prefix`."""
        return Problem(join(prefix, self.path), self.why, self.kind)


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` is never empty; `str()` is one `path: why` line for each."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems: list[Problem] = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__(*self.problems)

    @classmethod
    def at(cls, path: str, why: str, kind: str = INVALID) -> ConfigError:
        """The error of a single field."""
        return cls([Problem(path, why, kind)])

    def under(self, prefix: str) -> ConfigError:
        """A new error with `prefix` in front of every path."""
        return ConfigError(problem.under(prefix) for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def join(prefix: str, path: str) -> str:
    """Two paths put together: `a` and `b` give `a.b`, `a` and `[0]` give `a[0]`."""
    if not prefix or not path:
        return prefix or path
    return prefix + path if path[0] == "[" else f"{prefix}.{path}"


def fail(path: str, why: str, kind: str = INVALID) -> NoReturn:
    """Raise the error of a single field."""
    raise ConfigError.at(path, why, kind)


class under:
    """Put `prefix` in front of the paths of a ConfigError raised inside; a function is asked for it only then.

    Not a generator: large route tables are compiled while requests wait for them, and pass here a dozen times a route.
    """

    __slots__ = ("_prefix",)

    def __init__(self, prefix: str | Callable[[], str]) -> None:
        self._prefix = prefix

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, ConfigError):
            prefix = self._prefix
            raise error.under(prefix if isinstance(prefix, str) else prefix()) from error.__cause__


class Collector:
    """Gathers the problems of several independent parts, so that they are reported together.

    >>> errors = Collector()
    >>> for i, proto in enumerate(protos):
    ...     with errors.under(f"clusters[{i}]"):
    ...         compile_cluster(proto)
    >>> errors.raise_any()
    """

    __slots__ = ("problems",)

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, path: str, why: str, kind: str = INVALID) -> None:
        """Note one problem and go on."""
        self.problems.append(Problem(path, why, kind))

    @contextmanager
    def under(self, prefix: str) -> Iterator[None]:
        """Catch a ConfigError raised inside, with `prefix` in front of its paths, and go on after the block."""
        try:
            yield
        except ConfigError as error:
            self.problems.extend(problem.under(prefix) for problem in error.problems)

    def raise_any(self) -> None:
        """Raise everything noted so far as one ConfigError; do nothing when all is well."""
        if self.problems:
            raise ConfigError(self.problems)
