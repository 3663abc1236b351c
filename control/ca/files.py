"""An identity as files, for programs that read theirs from some: gRPC's `file_watcher` for one.

    FOLDER/cert-chain.pem, key.pem, root-cert.pem -> ..data/... -> ..<number>/...

The three always belong together: a version is a folder of its own, and what is in use changes by one rename, as in a volume of Kubernetes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path

from meshproxy.identity.provider import pem
from meshproxy.identity.svid import Svid

log = logging.getLogger("meshctl.agent")

CHAIN, KEY, ROOTS = "cert-chain.pem", "key.pem", "root-cert.pem"
_NOW = "..data"


class IdentityFiles:
    """One folder, the owner's alone. What cannot be written is said in the log, and the version before stays whole."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._numbers = itertools.count(1)
        self.failed = 0  # versions that could not be written

    def publish(self, svid: Svid) -> None:
        """Another version."""
        try:
            self._write({CHAIN: pem(svid.chain), KEY: svid.key_pem, ROOTS: pem(svid.bundle)})
        except OSError as error:
            self.failed += 1
            log.error("%s: the new certificate cannot be written: %s", self._folder, error.strerror)

    def _write(self, contents: dict[str, bytes]) -> None:
        folder = self._folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = {path.name for path in folder.iterdir() if path.name.startswith("..") and path.name[2:].isdigit()}
        name = next(name for number in self._numbers if (name := f"..{number}") not in old)
        made = folder / name
        try:
            made.mkdir(mode=0o700)
            for file, content in contents.items():
                with open(made / file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
            _point(folder / _NOW, name)
            for file in contents:
                if not (folder / file).is_symlink():
                    _point(folder / file, f"{_NOW}/{file}")
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        for gone in old:
            shutil.rmtree(folder / gone, ignore_errors=True)


def _point(link: Path, target: str) -> None:
    """A symbolic link, in the place of another."""
    scratch = link.with_name(f"..new-{link.name.lstrip('.')}")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    scratch.symlink_to(target)
    scratch.rename(link)
