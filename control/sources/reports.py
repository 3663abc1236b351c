"""What replicas of the control plane tell each other of applications' health, by a folder that they share.

Each writes one file, which is replaced at once: what its sidecars report now. Who reads it believes it for as long as it is written anew, which its writer does
every few seconds; that is measured by the reader's own clock alone, so that clocks of other machines do not matter. There is no lock, and nobody leads.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from control.model.snapshot import Key

AGAIN_S = 3.0  # how often a file is written that says the same
STALE_S = 10.0  # what is said of a workload counts for so long after it was said last, as with a stream that has ended
LEFT_S = 60.0  # a file that was not written for so long is nobody's any more
MAX_BYTES = 4 << 20
_SUFFIX = ".ready.json"
_Stamp = tuple[int, int, int]


@dataclass(slots=True)
class _File:
    stamp: _Stamp
    seen: float  # when it was found to have been written
    said: dict[Key, bool] = field(default_factory=dict)


class SharedReports:
    """The folder, for one replica. `clock`: monotonic, in seconds. Raises OSError where the folder cannot be read or written."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._own = folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        self._written: tuple[dict[Key, bool], float] | None = None
        self._files: dict[str, _File] = {}
        self._heard: dict[Key, tuple[bool, float]] = {}  # what others say of a workload, and when they said it last

    def write(self, ready: Mapping[Key, bool]) -> None:
        """Tell the others what is reported here, by namespace and name of workloads."""
        now = self._clock()
        if self._written is not None and self._written[0] == ready and now < self._written[1] + AGAIN_S:
            return
        scratch = self._own.with_suffix(".new")
        scratch.write_text(json.dumps({"ready": sorted([namespace, name, value] for (namespace, name), value in ready.items())}))
        scratch.replace(self._own)
        self._written = dict(ready), now

    def read(self) -> dict[Key, bool]:
        """What others say. Of two that say something else of one workload, the one that changed its mind last counts."""
        now, there = self._clock(), set()
        with os.scandir(self._folder) as found:
            for entry in found:
                if entry.name.endswith(_SUFFIX) and entry.name != self._own.name:
                    there.add(entry.name)
                    with contextlib.suppress(FileNotFoundError):  # another reader has taken it away
                        self._look(entry, now)
        for name in self._files.keys() - there:
            del self._files[name]
        self._heard = {key: one for key, one in self._heard.items() if now < one[1] + STALE_S}
        return {key: ready for key, (ready, _) in self._heard.items()}

    def _look(self, entry: os.DirEntry[str], now: float) -> None:
        about = entry.stat()
        stamp = (about.st_ino, about.st_mtime_ns, about.st_size)
        known = self._files.get(entry.name)
        if known is None or known.stamp != stamp:
            said = _parsed(Path(entry.path)) if about.st_size <= MAX_BYTES else {}
            self._files[entry.name] = _File(stamp, now, said)
            before = known.said if known is not None else {}
            for key, ready in said.items():
                if before.get(key) is not ready or self._heard.get(key, (ready, now))[0] is ready:
                    self._heard[key] = ready, now
        elif now >= known.seen + LEFT_S:
            Path(entry.path).unlink(missing_ok=True)


def _parsed(path: Path) -> dict[Key, bool]:
    """What a file says; nothing where it is none of ours."""
    try:
        ready = json.loads(path.read_bytes())["ready"]
        return {(str(namespace), str(name)): value is True for namespace, name, value in ready}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
