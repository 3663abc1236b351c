"""An identity in files: what belongs together changes together, and a full disk leaves what was there."""

from __future__ import annotations

import errno
import os

import pytest

from control.ca import files
from control.ca.authority import Authority
from control.ca.files import CHAIN, KEY, ROOTS, IdentityFiles
from control.ca.rotation import Settings
from meshproxy.identity.svid import read_pem
from tests.unit.test_identity import svid_of


@pytest.fixture
def authority(tmp_path):
    return Authority(str(tmp_path / "ca"), "mesh.test", Settings())


def content(folder) -> tuple[str, str, str]:
    return tuple((folder / name).read_text() for name in (CHAIN, KEY, ROOTS))


def test_versions_replace_each_other_as_a_whole(authority, tmp_path):
    folder = tmp_path / "identity"
    written = IdentityFiles(str(folder))
    seen = set()
    for _ in range(3):
        svid = svid_of(authority)
        written.publish(svid)
        chain, key, roots = content(folder)
        assert read_pem(chain) == list(svid.chain)
        assert key.encode() == svid.key_pem
        assert read_pem(roots) == list(svid.bundle)
        seen.add((folder / "..data").resolve())
    assert len(seen) == 3
    assert len([path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]) == 1
    assert {path.stat().st_mode & 0o077 for path in (folder, *(folder / name for name in (CHAIN, KEY, ROOTS)))} == {0}


def test_another_process_goes_on_where_one_ended(authority, tmp_path):
    folder = tmp_path / "identity"
    IdentityFiles(str(folder)).publish(svid_of(authority))
    before = content(folder)
    IdentityFiles(str(folder)).publish(svid_of(authority))
    assert content(folder) != before


def test_a_full_disk_leaves_what_was_there(authority, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "identity"
    written = IdentityFiles(str(folder))
    written.publish(svid_of(authority))
    before = content(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        written.publish(svid_of(authority))
    assert content(folder) == before
    assert written.failed == 1
    assert "the new certificate cannot be written: No space left on device" in caplog.text
    assert len([path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]) == 1
    written.publish(svid_of(authority))
    assert content(folder) != before
