"""The bootstrap: from a file, or from text on the command line, to a checked message.

`load` reads, `validate` also checks; both report every problem that they find at once, each with its path.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import convert, document, messages
from meshproxy.api.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap

_Bootstrap = messages.known("envoy.config.bootstrap.v3.Bootstrap")
# The type of an Any in text format: [type.googleapis.com/package.Message]
_TEXT_TYPE = re.compile(r"\[[\w.\-]+/([\w.]+)\]")


def load(path: str | None = None, config_yaml: str = "", unknown: list[Problem] | None = None) -> Bootstrap:
    """The bootstrap in the file at `path`, with `config_yaml` merged into it: see `document.read`. Raises ConfigError."""
    return from_sources(document.read(path, config_yaml), unknown)


def from_sources(sources: Iterable[document.Source], unknown: list[Problem] | None = None) -> Bootstrap:
    """The bootstrap of what `document.read` read, merged as protobuf does: scalars are replaced, messages merged, lists appended.

    Fields of YAML or JSON that the API does not have go to the list `unknown`; without one they are errors. Raises ConfigError.
    """
    whole = None
    for form, content in sources:
        bootstrap = from_value(content, unknown) if form == "value" else _READERS[form](content)
        if whole is None:
            whole = bootstrap
        else:
            whole.MergeFrom(bootstrap)
    assert whole is not None
    return whole


def parse(text: str | bytes, *, json_only: bool = False) -> Bootstrap:
    """The bootstrap that a YAML or JSON text describes. Raises ConfigError."""
    return from_value(document.parse(text, json_only=json_only))


def from_value(value: Any, unknown: list[Problem] | None = None) -> Bootstrap:
    """The bootstrap that a plain value describes; `unknown` as for `from_sources`. Raises ConfigError."""
    if value is None:
        raise ConfigError("the configuration is empty")
    return convert.to_message(value, _Bootstrap, unknown)


def validate(
    path: str | None = None,
    config_yaml: str = "",
    *,
    unsupported: str = "reject",
    allow_unknown: bool = False,
    dry_run: Callable[[Bootstrap], None] | None = None,
) -> tuple[Bootstrap, list[Problem]]:
    """Load and check a bootstrap. Returns it with the warnings; see `check`. Raises ConfigError with all problems.

    `allow_unknown`: fields that the API does not have are only warned about.
    """
    unknown: list[Problem] = []
    bootstrap = load(path, config_yaml, unknown if allow_unknown else None)
    return bootstrap, unknown + check(bootstrap, unsupported, dry_run)


def check(bootstrap: Bootstrap, unsupported: str = "reject", dry_run: Callable[[Bootstrap], None] | None = None) -> list[Problem]:
    """Check a bootstrap as far as it can be done without serving. Returns the warnings.

    `unsupported` is "reject" or "warn": what to do about fields that are not honoured. `dry_run` compiles everything, to find what only compiling shows, and
    raises ConfigError; it is called only with a bootstrap that keeps the declared constraints. Raises ConfigError with all problems.
    """
    from meshproxy.api import semantics, support  # the process that reads a large configuration does not check it

    problems, warnings = support.check(bootstrap, unsupported)
    if not problems:
        problems = semantics.check(bootstrap)
        if dry_run is not None:
            try:
                dry_run(bootstrap)
            except ConfigError as error:
                known = {problem.path for problem in problems}
                problems += [problem for problem in error.problems if problem.path not in known]
    if problems:
        raise ConfigError(problems)
    return warnings


def from_binary(data: bytes) -> Bootstrap:
    """The bootstrap of a serialised message. Raises ConfigError."""
    try:
        return _Bootstrap.FromString(data)
    except DecodeError as error:
        raise ConfigError("not a serialised envoy.config.bootstrap.v3.Bootstrap") from error


def from_text_format(data: bytes) -> Bootstrap:
    """The bootstrap of a message in protobuf's text format. Raises ConfigError."""
    from google.protobuf import text_format  # large, and seldom needed

    try:
        text = data.decode()
        for name in _TEXT_TYPE.findall(text):
            messages.descriptor(name)  # the parser finds only types that are loaded
        return text_format.Parse(text, _Bootstrap())
    except (UnicodeDecodeError, text_format.ParseError, RecursionError) as error:
        raise ConfigError(f"not text format: {error}") from error


_READERS = {"pb": from_binary, "pb_text": from_text_format}
