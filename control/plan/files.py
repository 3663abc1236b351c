"""Documents of a folder as they would be with others put over them; and putting them there, all at once or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping

from control.kinds.store import Store, Trouble
from control.progress import each
from control.sources import journal
from control.sources.folder import ENDINGS, Folder, check_regular


class Unreadable(Exception):
    """What is named is no folder or file of documents; says why."""


def read(path: str) -> dict[str, bytes]:
    """Name within the folder -> content of all its files; of a file, itself. Raises Unreadable."""
    try:
        if not os.path.isdir(path):
            os.stat(path)
            if not path.endswith(ENDINGS):
                raise Unreadable(f"{path}: documents are in files that end in {', '.join(ENDINGS)}")
            return {os.path.basename(path): _content(path)}
        found = {name: _content(place) for name, place in Folder(path, Store()).files().items()}
    except OSError as error:
        raise Unreadable(f"{error.filename or path}: {error.strerror or error}") from error
    return found


def _content(path: str) -> bytes:
    check_regular(path, os.stat(path))
    with open(path, "rb") as file:
        return file.read()


def store_of(files: Mapping[str, bytes], trust_domain: str = "") -> Store:
    """What files say. `trust_domain`: see Store."""
    store = Store(trust_domain)
    for name, content in each(files.items(), "reading files"):
        store.put(name, content)
    store.settle()
    return store


def new_troubles(before: Store, after: Store, files: Mapping[str, bytes]) -> list[Trouble]:
    """What is wrong with `files`, and what they make wrong elsewhere."""
    known = {str(one) for one in before.troubles}
    return [one for one in after.troubles if one.file in files or str(one) not in known]


def write(root: str, files: Mapping[str, bytes], gone: frozenset[str] = frozenset()) -> None:
    """Put files into a folder, made if need be, and take others away. For who reads it through `sources.journal` this happens at one moment, or, with an
    OSError before that, never; after it the rest is done by this or the next call."""
    os.makedirs(root, exist_ok=True)
    with _alone(root):
        finish(root)
        put: dict[str, str] = {}
        try:
            for name, content in files.items():
                put[name] = _write_beside(root, name, content)
            text = json.dumps({"put": put, "gone": sorted(gone)}).encode()
            scratch = _write_beside(root, journal.NAME, text)
            put[journal.NAME] = scratch
            os.rename(os.path.join(root, scratch), os.path.join(root, journal.NAME))
        except OSError:
            for scratch in put.values():
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(root, scratch))
            raise
        _sync(root)
        finish(root)


def finish(root: str) -> None:
    """Put in place what a journal says. Raises OSError; then it can be tried again."""
    under_way = journal.read(root)
    for name, scratch in under_way.put.items():
        with contextlib.suppress(FileNotFoundError):  # done already
            os.rename(os.path.join(root, scratch), os.path.join(root, name))
    for name in under_way.gone:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, name))
    if under_way is not journal.NOTHING:
        for below in {os.path.dirname(name) for name in (*under_way.put, *under_way.gone)} | {""}:
            with contextlib.suppress(FileNotFoundError):
                _sync(os.path.join(root, below))
        os.unlink(os.path.join(root, journal.NAME))
        _sync(root)


def _write_beside(root: str, name: str, content: bytes) -> str:
    """Write what is to become a file under a hidden name beside it, with its mode; returns that name, within the folder."""
    place = os.path.join(root, name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    scratch = os.path.join(os.path.dirname(name), f".{os.path.basename(name).lstrip('.')}.{secrets.token_hex(6)}")
    try:
        mode = stat.S_IMODE(os.stat(place).st_mode)
    except FileNotFoundError:
        mode = 0
    path = os.path.join(root, scratch)
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            if mode:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return scratch


@contextlib.contextmanager
def _alone(root: str) -> Iterator[None]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
