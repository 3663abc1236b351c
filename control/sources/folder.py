"""A folder of YAML and JSON files, looked at again and again.

Looking is one `stat` a file and no more: it works on every file system, with files that are replaced by a rename, and with folders that are symbolic links
which somebody points elsewhere (Kubernetes mounts ConfigMaps so). A file is read when its time, size or inode number is another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from errno import EINVAL
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

from control.kinds.store import Store
from control.sources import journal

ENDINGS = (".yaml", ".yml", ".json")


class _Seen(NamedTuple):
    """What a file looked like. `young`: it was written so recently that another write might not show in its time."""

    mtime_ns: int
    size: int
    inode: int
    young: bool


_LOOKS = 3  # at a folder that changes all the time
_YOUNG_NS = 20_000_000  # the coarsest clock that file systems in use stamp with, and some


def check_regular(path: str, stat: os.stat_result) -> None:
    """To open a pipe would wait for somebody who writes, a device may never end. Raises OSError."""
    if not S_ISREG(stat.st_mode):
        raise OSError(EINVAL, "Is a directory" if S_ISDIR(stat.st_mode) else "Is not a regular file", path)


class Folder:
    """One folder, with all below it. Hidden files and folders, and those that end otherwise, are not looked at. `each` goes through the files."""

    def __init__(self, path: str, store: Store, each: Callable[[Collection[str]], Iterable[str]] = iter) -> None:
        self.path = path
        self.store = store
        self._seen: dict[str, _Seen] = {}
        self._each = each

    def scan(self, now_ns: int) -> bool:
        """Bring the store up to date; returns whether anything was new. `now_ns`: wall clock, as files' times are. Raises OSError without the folder."""
        changed = False
        for _ in range(_LOOKS):
            before = os.stat(self.path).st_mtime_ns
            changed |= self._scan(now_ns)
            if os.stat(self.path).st_mtime_ns == before:  # otherwise files may have been put there while we read others
                break
        return changed

    def _scan(self, now_ns: int) -> bool:
        changed = False
        there = self.files()
        for name in self._each(there):
            changed |= self._look(name, there[name], now_ns)
        for name in self._seen.keys() - there.keys():
            del self._seen[name]
            self.store.remove(name)
            changed = True
        return changed

    def _look(self, name: str, path: str, now_ns: int) -> bool:
        before = self._seen.get(name)
        try:
            stat = os.stat(path)
            check_regular(path, stat)
            looks = _Seen(stat.st_mtime_ns, stat.st_size, stat.st_ino, now_ns - stat.st_mtime_ns < _YOUNG_NS)
            if before is not None and looks[:3] == before[:3] and not before.young:
                return False
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:  # it went between the two; the next look will see that
            own = os.path.join(self.path, name)
            if path != own:
                return self._look(name, own, now_ns)  # new contents may just have been put in place
            if not os.path.islink(path):
                return False
            return self._cannot(name, "Is a link to nothing")
        except OSError as error:
            return self._cannot(name, error.strerror or "cannot be read")
        self._seen[name] = looks
        return self.store.put(name, content)

    def _cannot(self, name: str, why: str) -> bool:
        """A file cannot be read: what it had stays."""
        self._seen[name] = _Seen(0, -1, 0, False)
        return self.store.unreadable(name, why)

    def files(self) -> dict[str, str]:
        """Name -> path of every file. Of changes that are being made at once it has all, or none."""
        under_way = journal.read(self.path)
        there = {name: path for name, path in self._files() if name not in under_way.gone}
        for name in under_way.put:
            there[name] = under_way.path(self.path, name)
        return there

    def _files(self) -> Iterator[tuple[str, str]]:
        """(name within the folder, path) of every file."""
        root = self.path
        os.stat(root)
        visited: set[str] = set()
        todo = [""]
        while todo:
            below = todo.pop()
            real = os.path.realpath(os.path.join(root, below))
            if real in visited:
                continue  # a link to a folder above would go on for ever
            visited.add(real)
            try:
                entries = sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name)
            except OSError:
                if not below:
                    raise
                continue
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.name.startswith("."):
                    continue
                if not entry.name.endswith(ENDINGS) and entry.is_dir():
                    todo.append(name)
                elif entry.name.endswith(ENDINGS):
                    yield name, entry.path
