"""What this proxy honours of the Envoy API, and what a configuration asks for beyond it.

Each module declares in `HONOURS` the fields that it reads, next to the code that reads them: message name -> field names. A field that is set and that no
module declares is a problem, never silently ignored. `python -m meshproxy.api.support` prints docs/api-support.md from the same tables.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import TYPE_CHECKING

from meshproxy.api import honoured, messages, registry, rules
from meshproxy.api.errors import INVALID, UNSUPPORTED, Problem

if TYPE_CHECKING:
    from google.protobuf.message import Message

# Modules that every configuration needs; those of extensions are imported when a configuration names their type.
CORE_MODULES = (
    "meshproxy.api.honoured",
    "meshproxy.api.http2_options",
    "meshproxy.api.runtime",
    "meshproxy.api.datasource",
    "meshproxy.api.matchers",
    "meshproxy.api.regex",
    "meshproxy.api.cidr",
    "meshproxy.net.sockets",
    "meshproxy.net.listener",
    "meshproxy.net.inspect",
    "meshproxy.net.filter_chain",
    "meshproxy.net.filter_chain_match",
    "meshproxy.upstream.cluster",
    "meshproxy.upstream.limits",
    "meshproxy.observe.access_log",
    "meshproxy.observe.format",
    "meshproxy.observe.stats",
    "meshproxy.observe.tags",
    "meshproxy.http.header_mutations",
)

# Of what comes by streams: imported by whoever opens them.
STREAM_MODULES = ("meshproxy.xds.health",)


def check(message: Message, unsupported: str = "reject") -> tuple[list[Problem], list[Problem]]:
    """Check a message against the declared constraints and for what is not honoured. Returns problems and warnings, with paths relative to the message.

    Deprecated fields are warnings. With `unsupported` "warn", what is correct but not honoured is a warning instead of a problem.
    """
    found = checker().check(message)
    fatal = (INVALID, UNSUPPORTED) if unsupported == "reject" else (INVALID,)
    return [problem for problem in found if problem.kind in fatal], [problem for problem in found if problem.kind not in fatal]


def all_right(messages: list[Message]) -> bool:
    """Whether `check` has nothing to say of any of these messages of one type; far cheaper than to ask of each."""
    return checker().all_right(messages)


@cache
def checker() -> rules.Checker:
    """The checker of rules and support together."""
    for module in CORE_MODULES:
        importlib.import_module(module)
    return rules.Checker(Support())


class Support:
    """The policy of what is honoured, from the HONOURS of all modules that are loaded."""

    def __init__(self) -> None:
        self._fields: dict[str, frozenset[str]] = {}
        self._collected: set[str] = set()

    def fields(self, message: str) -> frozenset[str] | None:
        """The honoured fields of a message; None when no loaded module declares it."""
        if message not in self._fields:
            # An extension in a place where it does not belong: what is found out about it here counts where it does belong, too.
            extension = registry.EXTENSIONS.get(registry.TYPE_PREFIX + message)
            if extension is not None:
                importlib.import_module(extension)
            self._collect()
        return self._fields.get(message)

    def kind(self, field: str) -> str | None:
        """See rules.Policy."""
        return honoured.KIND_OF_FIELD.get(field)

    def refusal(self, kind: str | None, message: str) -> Problem | None:
        """See rules.Policy. An extension that fits is imported here, so that what it declares is known before its message is looked at."""
        table = registry.KINDS.get(kind or "", {})
        if message in table:
            importlib.import_module(table[message])
            return None
        if registry.TYPE_PREFIX + message in registry.EXTENSIONS and kind is not None:
            return Problem("", f"{message} cannot be used as {kind}", INVALID)
        return Problem("", f"{message} is not supported{f' as {kind}' if kind else ''}", UNSUPPORTED)

    def declared(self) -> dict[str, frozenset[str]]:
        """Message -> honoured fields, of all modules that are loaded."""
        self._collect()
        return dict(self._fields)

    def _collect(self) -> None:
        # Importing the module of an extension also loads the modules that it shares with others; their declarations count as well.
        for name, module in list(sys.modules.items()):
            if name.startswith("meshproxy.") and name not in self._collected and hasattr(module, "HONOURS"):
                self._collected.add(name)
                for message, fields in module.HONOURS.items():
                    self._fields[message] = self._fields.get(message, frozenset()) | frozenset(fields.split())


def all_modules() -> list[str]:
    """Every module that declares something or imports one that does, sorted."""
    return sorted({*CORE_MODULES, *STREAM_MODULES, *registry.EXTENSIONS.values()})


def render() -> str:
    """docs/api-support.md: the extensions, and per message the honoured fields and the others."""
    for module in all_modules():
        importlib.import_module(module)
    support = Support()
    lines = [
        "# What meshproxy honours of the Envoy API",
        "",
        "Generated by `python -m meshproxy.api.support > docs/api-support.md`; do not edit. A field that is set but not honoured is rejected with its",
        "path, and so is a message that is not in this list; `--unsupported warn` turns both into warnings.",
        "",
        "## Extensions",
        "",
        "| kind | types |",
        "|---|---|",
    ]
    lines += [f"| {kind} | {'<br>'.join(f'`{name}`' for name in table)} |" for kind, table in registry.KINDS.items()]
    lines += ["", "## Messages", ""]
    for name, fields in sorted(support.declared().items()):
        descriptor = messages.descriptor(name)
        known = [field.name for field in descriptor.fields] if descriptor is not None else []
        yes = [f"`{field}`" for field in known if field in fields]
        no = [f"`{field}`" for field in known if field not in fields]
        lines += [f"### {name}", "", f"Honoured: {', '.join(yes) or 'the message itself, which has no fields to honour'}."]
        lines += ["", f"Not honoured: {', '.join(no)}.", ""] if no else [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
