"""A folder of secrets: who may read it is checked before anything is read, and what is written is there after a power cut, or not at all.

The folder must belong to us and be closed to others (0700), and so must each file (0600): a key that others could read is refused, not repaired, because it has
to be counted as lost. The file `lock` holds off other processes (several control planes may share a folder) while something is changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator

MAX_FILE = 1 << 20  # bytes; a bundle of a hundred certificates has two hundred thousand
_TEMPORARY = ".new-"


class StoreError(Exception):
    """The folder cannot be used; says what to do about it."""


class KeyStore:
    """The files of one folder, by name. Makes the folder when there is none. All methods raise StoreError."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with _explained(f"cannot make {folder}"):
            os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            self._check(folder, os.lstat(folder), 0o700)

    def __contains__(self, name: str) -> bool:
        return os.path.lexists(self._path(name))

    def names(self) -> list[str]:
        """Of all files, sorted; without those that were being written."""
        with _explained(f"cannot read {self.folder}"):
            return sorted(name for name in os.listdir(self.folder) if not name.startswith(_TEMPORARY))

    def read(self, name: str) -> bytes:
        """The file's contents. A link is refused: whoever can make one here decides what we read."""
        path = self._path(name)
        with _explained(f"cannot read {path}"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with open(fd, "rb") as file:
                found = os.fstat(fd)
                self._check(path, found, 0o600)
                data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise StoreError(f"{path} has more than {MAX_FILE} bytes")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put `data` into the place of the file, on the disk before this returns. What was there stays when it fails."""
        path = self._path(name)
        temporary = self._path(f"{_TEMPORARY}{secrets.token_hex(8)}")
        with _explained(f"cannot write {path}"):
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                os.rename(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            self._sync()

    def rename(self, name: str, new: str) -> bool:
        """Give a file another name, on the disk before this returns; False when there is no such file. Of several that try, one succeeds. Needs no space."""
        with _explained(f"cannot rename {self._path(name)}"):
            try:
                os.rename(self._path(name), self._path(new))
            except FileNotFoundError:
                return False
            self._sync()
            return True

    def remove(self, name: str) -> bool:
        """Delete a file; False when there is none."""
        with _explained(f"cannot delete {self._path(name)}"):
            try:
                os.unlink(self._path(name))
            except FileNotFoundError:
                return False
            self._sync()
            return True

    def version(self, name: str) -> tuple[int, int]:
        """Changes whenever the file is written; (0, 0) when there is none."""
        try:
            found = os.stat(self._path(name))
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the folder. Not reentrant."""
        with _explained(f"cannot lock {self.folder}"):
            fd = os.open(self._path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with _explained(f"cannot lock {self.folder}"):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def clean(self) -> None:
        """Delete what interrupted writers left. Under the lock."""
        for name in os.listdir(self.folder):
            if name.startswith(_TEMPORARY):
                self.remove(name)

    def _path(self, name: str) -> str:
        assert "/" not in name
        return os.path.join(self.folder, name)

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _check(self, path: str, found: os.stat_result, mode: int) -> None:
        if mode == 0o700:
            if not stat.S_ISDIR(found.st_mode):
                raise StoreError(f"{path} is not a folder")
        elif not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is not a regular file")
        if found.st_uid != os.geteuid():
            raise StoreError(f"{path} belongs to user {found.st_uid}, and we are user {os.geteuid()}: run as its owner, or chown it")
        if found.st_mode & 0o077:
            raise StoreError(
                f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}, must be {mode:04o}): "
                f"what is in it may be known to them. Replace it, or chmod {mode:o} it if you are sure"
            )

    def __repr__(self) -> str:
        return f"<KeyStore {self.folder}>"


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise StoreError(f"{what}: {why}") from error
