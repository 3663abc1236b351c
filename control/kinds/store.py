"""Files of documents, and the last good state of every object in them.

A file's text goes in, objects and problems come out; or documents that somebody else has read already, each for itself (`read_object`, `place`). A document
that is wrong never takes down one that is right: its object keeps the state in which it was last right. When a document cannot even be read, one cannot know
which object it was; then all objects that its file had last time, and has no longer, stay.
A document whose text did not change gives the same object again, which is how `translate` knows what it need not do twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from control.kinds import registry
from control.kinds.fields import FLAW
from control.kinds.registry import Identity
from meshproxy.api import document
from meshproxy.api.errors import ConfigError, Problem

MAX_FILE_BYTES = 64 << 20
_BETWEEN = re.compile(r"^---(?:[ \t].*)?\r?$", re.MULTILINE)  # at the start of a line, it always ends a document


class Trouble(NamedTuple):
    """What is wrong with a document. `place` counts the documents of a file from 0; -1 is the file itself, or the one object that it is. `kept`: an earlier
    state of the object is served."""

    file: str
    place: int
    identity: Identity | None
    problem: Problem
    kept: bool
    closed: str = ""  # what is served in its place, which opens nothing

    def __str__(self) -> str:
        where = self.file if self.place < 0 else f"{self.file}: document {self.place + 1}"
        who = f" ({self.identity})" if self.identity is not None and self.place >= 0 else ""
        served = " [its last good state is kept]" if self.kept else f" [until it is right, {self.closed}]" if self.closed else ""
        served = " [the rest of it is served]" if self.problem.kind == FLAW and not self.kept else served
        return f"{where}{who}: {self.problem}{served}"


@dataclass(slots=True)
class Document:
    """One document of a file: what it said when it was last read. `value` is None for what is not for us, and for what is wrong.

    `text` is the same only if the document is: what is written, or a digest of it. `closed`: what is served of what is wrong from the start.
    """

    text: str
    line: int
    identity: Identity | None
    value: Any
    problems: list[Problem]
    closed: Any = None


@dataclass(slots=True)
class _File:
    documents: list[Document] = field(default_factory=list)
    problem: str = ""  # why it could not be read at all
    content: bytes | None = None
    good: dict[Identity, Any] = field(default_factory=dict)  # what is served of it
    troubles: list[Trouble] = field(default_factory=list)
    single: bool = False  # it is one object, and no file at all


class Store:
    """All files. `files` name them as they are named in messages; the order of names decides between two documents of one object. `trust_domain`: see
    `registry.parse`."""

    def __init__(self, trust_domain: str = "") -> None:
        self._trust_domain = trust_domain
        self._files: dict[str, _File] = {}
        self._served: dict[Identity, Any] = {}
        self._troubles: list[Trouble] = []
        self._changed: set[str] = set()  # files, since `settle`
        self._gone: dict[Identity, Any] = {}  # what was served of files that went, since then
        self._taken: dict[Identity, str] = {}  # which file has an object
        self._owned: dict[str, list[Identity]] = {}  # the same by file
        self._contested = False  # whether several have one
        self._wrong: list[tuple[str, Document]] = []  # where `settle` finds objects that were never right there
        self._begun = False
        self._troubled: set[str] = set()

    @property
    def objects(self) -> dict[Identity, Any]:
        """What is served."""
        return self._served

    @property
    def right(self) -> int:
        """How many objects are served as somebody has written them."""
        return sum(not _stands_in(one) for one in self._served.values())

    @property
    def places(self) -> dict[Identity, tuple[str, int]]:
        """Where the objects are that are served: file, and document, counted from 0."""
        found = ((one.identity, (name, index)) for name, file in self._files.items() for index, one in enumerate(file.documents))
        return {identity: place for identity, place in found if identity is not None and self._taken.get(identity) == place[0]}

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
        self._changed.add(file)
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
        known.documents = [made for line, piece in _split(text) for made in _read(piece, line, before, self._trust_domain)]
        return True

    def unreadable(self, file: str, why: str) -> bool:
        """A file is there and cannot be read: what it had stays. Returns whether that is new."""
        known = self._files.setdefault(file, _File())
        if known.content is None and known.problem == why:
            return False
        known.problem, known.content = why, None
        self._changed.add(file)
        return True

    def remove(self, file: str) -> None:
        """A file is gone, and with it its objects."""
        known = self._files.pop(file, None)
        if known is not None:
            self._changed.add(file)
            self._gone.update(known.good)

    # --- objects one by one

    def read_object(self, name: str, text: str, value: Any) -> Document:
        """What an API server says of an object, for `place`. `name` stands for it as a file's does; `text`: see Document. Changes nothing."""
        known = self._files.get(name)
        if known is not None and known.documents and known.documents[0].text == text:
            return known.documents[0]
        made, problems = registry.parse(value, pruned=True, trust_domain=self._trust_domain)
        return Document(text, 0, registry.identity(value), made, problems, registry.closed(value) if problems else None)

    def place(self, name: str, one: Document) -> bool:
        """An object is there, or has changed; returns whether it says something else than before."""
        known = self._files.get(name)
        if known is None:
            known = self._files[name] = _File(single=True)
        elif known.documents and known.documents[0] is one:
            return False
        known.documents = [one]
        self._changed.add(name)
        return True

    # --- what is served

    def settle(self) -> bool:
        """After some changes: decide what is served now. Returns whether anything but troubles is different."""
        changed, self._changed = self._changed, set()
        before, self._gone = self._gone, {}
        if self._contested or any(self._contests(name, changed) for name in changed):
            changed, before = set(self._files), dict(self._served)  # who has an object may be another now, wherever it is
            self._taken, self._owned, self._troubled, self._contested = {}, {}, set(), False
        for name in changed:
            if name in self._files:
                before.update(self._files[name].good)
            for identity in self._owned.pop(name, ()):
                del self._taken[identity]
        self._troubled -= changed
        served: dict[Identity, Any] = {}
        for name in sorted(changed & self._files.keys()):
            served.update(self._settle_file(name, self._files[name]))
        served.update(self._settle_wrong(before))
        self._troubles = [one for name in sorted(self._troubled) for one in self._files[name].troubles]
        if len(served) == len(before) and all(before.get(identity) is value for identity, value in served.items()):
            return False
        self._served = {identity: value for identity, value in self._served.items() if identity not in before} | served
        return True

    def _contests(self, name: str, changed: set[str]) -> bool:
        """Whether a file has an object that one has which did not change."""
        file = self._files.get(name)
        owners = [self._taken.get(one.identity, name) for one in file.documents if one.identity is not None] if file is not None else []
        return any(owner not in changed for owner in owners)

    def _settle_file(self, name: str, file: _File) -> dict[Identity, Any]:
        """What is served of it."""
        taken, troubles, owned = self._taken, [], self._owned.setdefault(name, [])
        before, good = file.good, {}
        unknown = bool(file.problem)
        if file.problem:
            troubles.append(Trouble(name, -1, None, Problem("", file.problem), bool(before)))
        for index, one in enumerate(file.documents):
            identity = one.identity
            problems = one.problems
            if identity is not None and one.value is None and problems and (identity not in before or _stands_in(before[identity])):
                self._wrong.append((name, one))  # which takes nothing from one that is right, wherever that is
            elif identity is not None and identity in taken:
                problems = [Problem("metadata.name", f"{identity} is in {taken[identity]} already")]
                self._contested = True
            elif identity is not None:
                taken[identity] = name
                owned.append(identity)
                if one.value is not None:
                    good[identity] = one.value
                elif problems and identity in before:
                    good[identity] = before[identity]
            else:
                unknown |= bool(problems)
            kept = identity in good and identity in before and any(problem.kind != FLAW for problem in problems)
            troubles += [Trouble(name, -1 if file.single else index, identity, problem, kept) for problem in problems]
        if unknown:  # a document that cannot be read may be any of those that are missed
            for identity, value in before.items():
                if identity not in taken:
                    taken[identity] = name
                    owned.append(identity)
                    good[identity] = value
        file.good, file.troubles = good, troubles
        if troubles:
            self._troubled.add(name)
        return good

    def _settle_wrong(self, before: dict[Identity, Any]) -> dict[Identity, Any]:
        """What is served of objects that are only where they are wrong: what was served of them before, from another file. When we begin nobody knows what
        that was, and rules about access must not be less than none."""
        wrong, self._wrong, served = self._wrong, [], {}
        for name, written in wrong:
            identity = written.identity
            assert identity is not None
            if identity in self._taken:
                self._contested = True
                continue
            value = before.get(identity)
            if (value is None and not self._begun) or _stands_in(value):
                value = written.closed
            if value is not None:
                file, closed = self._files[name], _stands_in(value)
                served[identity] = file.good[identity] = value
                self._taken[identity] = name
                self._owned[name].append(identity)
                file.troubles = [one._replace(kept=not closed, closed=closed) if one.identity == identity else one for one in file.troubles]
        self._begun = True
        return served


def _stands_in(value: Any) -> str:
    """What somebody has to know of an object that stands in for a wrong document; "" for others."""
    return getattr(value, "stands_in", "")


def _split(text: str) -> Iterator[tuple[int, str]]:
    """The documents of a YAML stream: number of the line before each, and its text."""
    start = line = 0
    for mark in _BETWEEN.finditer(text):
        yield line, text[start : mark.start()]
        line += text.count("\n", start, mark.end())
        start = mark.end()
    yield line, text[start:]


def _read(text: str, line: int, before: dict[str, Document], trust_domain: str) -> list[Document]:
    known = before.get(text)
    if known is not None and (known.line == line or known.identity is not None):
        return [known]
    try:
        value = document.parse("\n" * line + text)  # so that messages count the lines of the file
    except ConfigError as error:
        return [Document(text, line, None, None, error.problems)]
    if value is None:
        return []
    if isinstance(value, dict) and value.get("kind") == "List" and isinstance(value.get("items"), list):
        return [_document(f"{text}\0{index}", line, item, trust_domain) for index, item in enumerate(value["items"])]
    return [_document(text, line, value, trust_domain)]


def _document(text: str, line: int, value: Any, trust_domain: str) -> Document:
    made, problems = registry.parse(value, trust_domain=trust_domain)
    return Document(text, line, registry.identity(value), made, problems, registry.closed(value) if problems else None)
