"""Files of documents, and the last good state of every object in them.

A file's text goes in, objects and problems come out. A document that is wrong never takes down one that is right: its object keeps the state in which it was
last right. When a document cannot even be read, one cannot know which object it was; then all objects that its file had last time, and has no longer, stay.
A document whose text did not change gives the same object again, which is how `translate` knows what it need not do twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from control.kinds import registry
from control.kinds.registry import Identity
from meshproxy.api import document
from meshproxy.api.errors import ConfigError, Problem

MAX_FILE_BYTES = 64 << 20
_BETWEEN = re.compile(r"^---(?:[ \t].*)?\r?$", re.MULTILINE)  # at the start of a line, it always ends a document


class Trouble(NamedTuple):
    """What is wrong with a document. `place` counts the documents of a file from 0; -1 is the file itself. `kept`: an earlier state of the object is served."""

    file: str
    place: int
    identity: Identity | None
    problem: Problem
    kept: bool

    def __str__(self) -> str:
        where = self.file if self.place < 0 else f"{self.file}: document {self.place + 1}"
        who = f" ({self.identity})" if self.identity is not None else ""
        return f"{where}{who}: {self.problem}" + (" [its last good state is kept]" if self.kept else "")


@dataclass(slots=True)
class _Document:
    """One document of a file: what it said when it was last read. `value` is None for what is not for us, and for what is wrong."""

    text: str
    line: int
    identity: Identity | None
    value: Any
    problems: list[Problem]


@dataclass(slots=True)
class _File:
    documents: list[_Document] = field(default_factory=list)
    problem: str = ""  # why it could not be read at all
    content: bytes | None = None
    good: dict[Identity, Any] = field(default_factory=dict)  # what is served of it


class Store:
    """All files. `files` name them as they are named in messages; the order of names decides between two documents of one object."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._order: list[str] = []
        self._served: dict[Identity, Any] = {}
        self._troubles: list[Trouble] = []

    @property
    def objects(self) -> dict[Identity, Any]:
        """What is served."""
        return self._served

    @property
    def texts(self) -> dict[Identity, str]:
        """What documents say of what is served, as it is written; without those that are served as they were before."""
        return {one.identity: one.text for file in self._files.values() for one in file.documents if one.identity in self._served}

    @property
    def troubles(self) -> list[Trouble]:
        """What is wrong, by file."""
        return self._troubles

    def put(self, file: str, content: bytes) -> bool:
        """A file is there, or has changed; returns whether it says something else than before."""
        known = self._files.setdefault(file, _File())
        if known.content == content:
            return False
        known.problem = ""
        known.content = content
        before = {one.text: one for one in known.documents}
        if len(content) > MAX_FILE_BYTES:
            known.problem = f"is longer than {MAX_FILE_BYTES} bytes"
            return True
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            known.problem = f"not UTF-8: byte {error.start} is 0x{content[error.start]:02x}"
            return True
        known.documents = [made for line, piece in _split(text) for made in _read(piece, line, before)]
        return True

    def unreadable(self, file: str, why: str) -> None:
        """A file is there and cannot be read: what it had stays."""
        known = self._files.setdefault(file, _File())
        known.problem, known.content = why, None

    def remove(self, file: str) -> None:
        """A file is gone, and with it its objects."""
        self._files.pop(file, None)

    def settle(self) -> bool:
        """After some changes: decide what is served now. Returns whether anything but troubles is different."""
        troubles: list[Trouble] = []
        taken: dict[Identity, str] = {}
        served: dict[Identity, Any] = {}
        for name in sorted(self._files):
            served.update(self._settle_file(name, self._files[name], taken, troubles))
        self._troubles = troubles
        same = len(served) == len(self._served) and all(self._served.get(identity) is value for identity, value in served.items())
        self._served = served
        return not same

    def _settle_file(self, name: str, file: _File, taken: dict[Identity, str], troubles: list[Trouble]) -> Iterator[tuple[Identity, Any]]:
        before, good = file.good, {}
        unknown = bool(file.problem)
        if file.problem:
            troubles.append(Trouble(name, -1, None, Problem("", file.problem), bool(before)))
        for index, one in enumerate(file.documents):
            identity = one.identity
            problems = one.problems
            if identity is not None and identity in taken:
                problems = [Problem("metadata.name", f"{identity} is in {taken[identity]} already")]
            elif identity is not None:
                taken[identity] = name
                if one.value is not None:
                    good[identity] = one.value
                elif problems and identity in before:
                    good[identity] = before[identity]
            else:
                unknown |= bool(problems)
            troubles += [Trouble(name, index, identity, problem, identity in good and identity in before) for problem in problems]
        if unknown:  # a document that cannot be read may be any of those that are missed
            for identity, value in before.items():
                if identity not in taken:
                    taken[identity] = name
                    good[identity] = value
        file.good = good
        yield from good.items()


def _split(text: str) -> Iterator[tuple[int, str]]:
    """The documents of a YAML stream: number of the line before each, and its text."""
    start = line = 0
    for mark in _BETWEEN.finditer(text):
        yield line, text[start : mark.start()]
        line += text.count("\n", start, mark.end())
        start = mark.end()
    yield line, text[start:]


def _read(text: str, line: int, before: dict[str, _Document]) -> list[_Document]:
    known = before.get(text)
    if known is not None and (known.line == line or known.identity is not None):
        return [known]
    try:
        value = document.parse("\n" * line + text)  # so that messages count the lines of the file
    except ConfigError as error:
        return [_Document(text, line, None, None, error.problems)]
    if value is None:
        return []
    if isinstance(value, dict) and value.get("kind") == "List" and isinstance(value.get("items"), list):
        return [_document(f"{text}\0{index}", line, item) for index, item in enumerate(value["items"])]
    return [_document(text, line, value)]


def _document(text: str, line: int, value: Any) -> _Document:
    made, problems = registry.parse(value)
    return _Document(text, line, registry.identity(value), made, problems)
