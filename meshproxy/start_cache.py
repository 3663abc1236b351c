"""The modules of a start in one file, so that importing them is one read in place of a thousand.

A start imports the same 350 modules every time. Finding each in its folders, reading its `.pyc` and making its strings again takes a fifth of the time until
a sidecar is ready. So the first start writes their code, as one piece in which they share what they have in common, beside the `.pyc` files of this package
(where PYTHONPYCACHEPREFIX says, and not at all with PYTHONDONTWRITEBYTECODE); later ones find them there first. As with `.pyc` files, a module whose source
has another time or size is imported as if there were no such file, and the file is written anew after the start. It belongs to one interpreter and one module
path. Without it, or where it cannot be written, everything works as well, and slower. docs/decisions/0005-start-up.md.
"""

from __future__ import annotations

import marshal
import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from mmap import PROT_READ, mmap

TYPE_CHECKING = False  # what this file imports does not come from the cache; typing and all behind it shall
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, ModuleType
    from typing import Any

# Modules are kept in groups, each read at once, when the first of them is imported: what is needed before the first child is forked; by every process that
# looks at messages; by the second child and main; by main; and by children only. `launch` says where all but the last two end.
_GROUPS = 5
_LENGTH = 8  # bytes of each number before the index: its length, then those of the groups
_DAMAGED = (OSError, EOFError, ValueError, TypeError)  # what reading something else than was written gives
_MAX_FILES = 4  # of one package, for different interpreters and module paths: each is six megabytes
_MAX_WRITING = 600  # seconds that it takes to write one


_ends: list[int] = []  # how many modules there were at the end of each group so far


class _Loader(SourceFileLoader):
    """A loader that may have the code already: `take` returns it, if it is still there."""

    take: Callable[[], CodeType | None] | None = None

    def get_code(self, fullname: str) -> CodeType | None:
        take, self.take = self.take, None  # who asks again wants what is in the files by then
        code = take() if take is not None else None
        return super().get_code(fullname) if code is None else code


class _Finder:
    """Finds the modules of the cache, each once, as long as their sources are as they were."""

    def __init__(self, descriptor: int) -> None:
        """Raises one of `_DAMAGED` if that is no cache."""
        # Mapped, not read: five megabytes need not be copied, nor memory be found for them.
        self._file = mmap(descriptor, 0, prot=PROT_READ)
        ends = [_LENGTH * (1 + _GROUPS)]
        for start in range(0, ends[0], _LENGTH):
            ends.append(ends[-1] + int.from_bytes(self._file[start : start + _LENGTH], "little"))
        if len(self._file) != ends[-1]:
            raise ValueError("not as long as it says")
        self._ends = ends
        # Name -> file, modification time in s (images of containers keep no fractions), size, whether a package, group and place in it; None for an extension.
        self._index: dict[str, tuple[str, int, int, bool, int | None, int]] = self._load(0)
        self._groups: list[list[CodeType | None] | None] = [None] * _GROUPS
        self.stale = False

    def _load(self, piece: int) -> Any:
        start, end = self._ends[piece : piece + 2]
        with memoryview(self._file) as whole, whole[start:end] as part:
            return marshal.loads(part)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        entry = self._index.pop(name, None)
        if entry is None:
            return None
        file, modified, size, is_package, group, place = entry
        try:
            status = os.stat(file)
        except OSError:
            status = None
        if status is None or int(status.st_mtime) != modified or status.st_size != size:
            self.stale = True
            return None
        loader: _Loader | ExtensionFileLoader
        if group is None:
            loader = ExtensionFileLoader(name, file)
        else:
            loader = _Loader(name, file)
            # Not before it is executed: a module that is deferred may be in a group that nobody needs so far.
            loader.take = lambda: self._take(group, place)
        spec = ModuleSpec(name, loader, origin=file, is_package=is_package)
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations = [file.rpartition("/")[0]]
        return spec

    def _take(self, group: int, place: int) -> CodeType | None:
        if self._file.closed:
            return None
        codes = self._groups[group]
        if codes is None:
            try:
                codes = self._groups[group] = self._load(1 + group)
            except _DAMAGED:
                self.stale = True
                self._index.clear()
                return None
        code, codes[place] = codes[place], None
        return code

    def close(self) -> None:
        """Find no more."""
        self._file.close()
        self._index.clear()
        self._groups.clear()


def install() -> None:
    """Import from the cache, if there is one, until `leave` or `keep`."""
    path = _path()
    if path is None:
        return
    try:
        with open(path, "rb") as file:
            sys.meta_path.insert(0, _Finder(file.fileno()))
    except _DAMAGED:
        return


def leave() -> bool:
    """Import from the cache no more; returns whether it was good for what was asked so far."""
    finder = sys.meta_path[0]
    if not isinstance(finder, _Finder):
        return False
    del sys.meta_path[0]
    finder.close()
    return not finder.stale


def end_group() -> None:
    """What is imported from now on is another group."""
    _ends.append(len(sys.modules))


def keep(wait: bool) -> None:
    """What every start imports has been imported: stop looking into the cache, and write it if there was none, or a stale one, in a process of its own.

    `wait` for that, or leave it alone with its work.
    """
    if leave():
        return
    path = _path()
    if path is None or sys.dont_write_bytecode or not os.access(os.path.dirname(path), os.W_OK):
        return
    import traceback

    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if wait or not os.fork():
            os.setpriority(os.PRIO_PROCESS, 0, 19)
            _write(path)
    except OSError:
        pass  # a full disk, for instance: the next start tries again
    except BaseException:  # noqa: BLE001  nothing may return into the parent's stack
        traceback.print_exc()
    finally:
        os._exit(0)


def _path() -> str | None:
    """Where the cache of this interpreter with this module path is; None when this package does not come from files."""
    cached = sys.modules[__package__].__spec__.cached  # type: ignore[union-attr]
    if cached is None:
        return None
    # The first entry is where the command is, or was called: nothing of a start comes from there.
    key = f"{sys.version} {sys.flags.optimize} {sys.path[1:]}".encode()
    return f"{os.path.dirname(cached)}/start-{int.from_bytes(key, 'little') % (2**61 - 1):x}.{sys.implementation.cache_tag}.cache"


def _write(path: str) -> None:
    """Raises OSError."""
    ends = [*_ends, len(sys.modules)]
    from meshproxy.api import bootstrap, semantics, support  # noqa: F401  what the children need

    index: dict[str, tuple[str, int, int, bool, int | None, int]] = {}
    groups: list[list[CodeType | None]] = [[] for _ in range(_GROUPS)]
    for number, (name, module) in enumerate([*sys.modules.items()]):  # in the order in which they were complete
        # Of a module that is still deferred, even looking at an attribute would load it.
        spec = module.__spec__ if type(module) is type(sys) else None
        if spec is None or spec.origin is None or name == "__main__":
            continue
        if not isinstance(spec.loader, SourceFileLoader | ExtensionFileLoader):
            continue
        status = os.stat(spec.origin)  # before it is read: if it changes meanwhile, the next start shall see that
        group, place = None, 0
        if isinstance(spec.loader, SourceFileLoader):
            group = sum(number >= end for end in ends)
            place = len(groups[group])
            groups[group].append(SourceFileLoader(name, spec.origin).get_code(name))
        index[name] = (spec.origin, int(status.st_mtime), status.st_size, spec.submodule_search_locations is not None, group, place)
    everything: list[Any] = [index, *groups]
    pieces = [marshal.dumps(piece) for piece in everything]
    new = f"{path}.{os.getpid()}"
    try:
        # As for `.pyc` files, whoever starts a proxy trusts what is in there: nobody else may write it, whatever the umask says.
        with open(new, "xb", opener=lambda name, how: os.open(name, how, 0o644)) as file:
            file.writelines(len(piece).to_bytes(_LENGTH, "little") for piece in pieces)
            file.writelines(pieces)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
    _clear(path)


def _clear(path: str) -> None:
    """Remove those that are too many, and what was left half-written long ago."""
    entries = [entry for entry in os.scandir(os.path.dirname(path)) if entry.name.startswith("start-") and ".cache" in entry.name]
    oldest_first = sorted(entries, key=lambda entry: entry.stat().st_mtime_ns)
    long_ago = oldest_first[-1].stat().st_mtime - _MAX_WRITING
    whole = [entry for entry in oldest_first if entry.name.endswith(".cache")]
    left = [entry for entry in oldest_first if entry not in whole and entry.stat().st_mtime < long_ago]
    for entry in whole[:-_MAX_FILES] + left:
        os.unlink(entry.path)
