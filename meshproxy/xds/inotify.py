"""Files that are replaced: who is told when something is moved into a folder, by the kernel's inotify.

As Envoy, only renames count: whoever writes a file in place is not done when its first bytes are there. A mounted ConfigMap moves a symbolic link.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

_MOVED_TO = 0x80
_ONLY_DIRECTORIES = 0x0100_0000
_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


class Watches:
    """All watches of a process, over one descriptor that is opened with the first of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._fd = -1
        self._listeners: dict[int, list[tuple[str, Callable[[], None]]]] = {}  # watch -> (name, or "" for all names; whom to tell)

    def file(self, path: str, moved: Callable[[], None]) -> Callable[[], None]:
        """Call `moved` when something takes the place of the file. Returns what ends the watch. Raises OSError."""
        folder, name = os.path.split(path)
        return self._add(folder or ".", name, moved)

    def folder(self, path: str, moved: Callable[[], None]) -> Callable[[], None]:
        """Call `moved` when anything is moved into the folder. Returns what ends the watch. Raises OSError."""
        return self._add(path, "", moved)

    def _add(self, folder: str, name: str, moved: Callable[[], None]) -> Callable[[], None]:
        libc = ctypes.CDLL(None, use_errno=True)
        if self._fd < 0:
            self._fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._loop.add_reader(self._fd, self._on_readable)
        number = libc.inotify_add_watch(self._fd, os.fsencode(folder), _MOVED_TO | _ONLY_DIRECTORIES)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
        entry = name, moved
        listeners = self._listeners.setdefault(number, [])
        listeners.append(entry)

        def end() -> None:
            if entry in listeners:
                listeners.remove(entry)
                if not listeners and self._fd >= 0:
                    del self._listeners[number]
                    libc.inotify_rm_watch(self._fd, number)

        return end

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        told: list[Callable[[], None]] = []  # once each, however many events there were
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            name = os.fsdecode(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
            at += _EVENT.size + length
            if mask & _OVERFLOW:  # there were more events than the kernel keeps: of anything
                told = [moved for listeners in self._listeners.values() for _, moved in listeners]
                break
            told += [moved for wanted, moved in self._listeners.get(number, ()) if wanted in ("", name) and moved not in told]
        for moved in told:
            moved()

    def close(self) -> None:
        """Watch nothing any more."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._listeners.clear()
