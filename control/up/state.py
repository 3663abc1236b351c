"""The folder beside a mesh's folder: logs, the authority's keys, and who runs. Who runs the mesh holds its lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PAUSE_S = 0.02
SOCKETS = "meshctl-up-"  # how the folders of sockets begin


def default_folder(mesh: str) -> str:
    """`mesh/` -> `mesh.state/`."""
    return f"{os.path.abspath(mesh)}.state"


class State:
    """One state folder, made if need be. Raises OSError."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.logs = self.path / "logs"
        self.sidecars = self.path / "sidecars"
        self.authority = self.path / "ca"
        self._file = self.path / "up.json"
        self._lock_fd = -1

    def lock(self) -> bool:
        """Take the mesh for this process; False when another one has it."""
        for folder in (self.path, self.logs, self.sidecars):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def unlock(self) -> None:
        """Let others have it."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def write(self, said: dict[str, Any]) -> None:
        """What runs, for `down` and for programs."""
        scratch = self._file.with_suffix(".new")
        scratch.write_text(json.dumps(said, indent=2), encoding="utf-8")
        scratch.replace(self._file)

    def read(self) -> dict[str, Any]:
        """What was written last; empty when there is nothing to be read."""
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def clear(self) -> None:
        """Nothing runs. Takes away what an `up` that was killed has left elsewhere."""
        sockets = str(self.read().get("sockets", ""))
        if os.path.basename(sockets).startswith(SOCKETS):
            shutil.rmtree(sockets, ignore_errors=True)
        self._file.unlink(missing_ok=True)


def running(folder: str) -> str:
    """The address of the control plane of a mesh that is up, by its folder or its state folder; "" for one that is not."""
    for path in (default_folder(folder), folder):
        said = State(path).read()
        if said and is_alive({"pid": said.get("pid", 0), "born": said.get("born", 0)}):
            return str(said.get("control", ""))
    return ""


def said_by(folder: str, control: str) -> dict[str, Any]:
    """What the file of a mesh says that is up with that control plane, by its folder or its state folder; empty if it has another one."""
    for path in (default_folder(folder), folder):
        said = State(path).read()
        if said.get("control") == control:
            return said
    return {}


def birth(pid: int) -> int:
    """When a process was started, in ticks since the machine was, which with its id tells it from all others; 0 for none, and for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(one: dict[str, Any]) -> bool:
    """Whether a process of `up.json` is still the one that it was."""
    return bool(one.get("born")) and birth(int(one.get("pid", 0))) == one["born"]


def end(processes: Iterable[dict[str, Any]], patience_s: float, *, groups: bool = True) -> None:
    """Ask them to end, and kill those that do not, each with its group."""
    left = [one for one in processes if is_alive(one)]
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one["pid"], signal.SIGTERM)
    if not gone(left, patience_s):
        for one in left:
            if is_alive(one):
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if groups else os.kill)(one["pid"], signal.SIGKILL)
        gone(left, patience_s)


def gone(processes: Iterable[dict[str, Any]], patience_s: float) -> bool:
    """Wait until none of them is there; False after `patience_s`."""
    deadline = time.monotonic() + patience_s
    left = list(processes)
    while left := [one for one in left if is_alive(one)]:
        if time.monotonic() > deadline:
            return False
        pause()
    return True


def pause() -> None:
    """Between two looks at what announces nothing: processes of others."""
    time.sleep(_PAUSE_S)  # noqa: TID251  # commands only; the mesh itself has an event loop
