"""The folder of keys: permissions, atomic writes, a full disk."""

from __future__ import annotations

import errno
import os

import pytest

from control.ca.keystore import KeyStore, StoreError


def test_what_is_written_is_for_us_only(tmp_path):
    folder = str(tmp_path / "a" / "ca")
    store = KeyStore(folder)
    store.write("key", b"secret")
    store.write("key", b"another")
    assert (KeyStore(folder).read("key"), store.names(), "key" in store, "other" in store) == (b"another", ["key"], True, False)
    assert (os.stat(folder).st_mode & 0o777, os.stat(f"{folder}/key").st_mode & 0o777) == (0o700, 0o600)


def test_folders_that_others_can_read_are_refused(tmp_path):
    (tmp_path / "ca").mkdir(0o755)
    with pytest.raises(StoreError, match=r"is open to others \(mode 0755, must be 0700\)"):
        KeyStore(str(tmp_path / "ca"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_files_that_others_can_read_or_write_are_refused(tmp_path, mode):
    store = KeyStore(str(tmp_path / "ca"))
    store.write("key", b"secret")
    os.chmod(tmp_path / "ca" / "key", mode)
    with pytest.raises(StoreError, match="is open to others"):
        store.read("key")


def test_links_and_folders_are_no_keys(tmp_path):
    store = KeyStore(str(tmp_path / "ca"))
    (tmp_path / "elsewhere").write_bytes(b"x")
    os.chmod(tmp_path / "elsewhere", 0o600)
    os.symlink(tmp_path / "elsewhere", tmp_path / "ca" / "key")
    with pytest.raises(StoreError, match="it is a link"):
        store.read("key")
    (tmp_path / "ca" / "folder").mkdir(0o700)
    with pytest.raises(StoreError):
        store.read("folder")
    os.symlink(tmp_path / "ca", tmp_path / "linked")
    with pytest.raises(StoreError, match="is not a folder"):
        KeyStore(str(tmp_path / "linked"))


def test_other_peoples_folders_are_refused(tmp_path, monkeypatch):
    KeyStore(str(tmp_path / "ca"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match="we are user 12345"):
        KeyStore(str(tmp_path / "ca"))


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fails):
    store = KeyStore(str(tmp_path / "ca"))
    store.write("key", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(StoreError, match="the disk is full"):
        store.write("key", b"new")
    monkeypatch.undo()
    assert (store.read("key"), os.listdir(tmp_path / "ca")) == (b"old", ["key"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    store = KeyStore(str(tmp_path / "ca"))
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: opened("/dev/full" if flags & os.O_EXCL else path, flags & ~os.O_EXCL, mode))
    with pytest.raises(StoreError, match="the disk is full"):
        store.write("key", b"new")


def test_what_an_interrupted_writer_left_goes(tmp_path):
    store = KeyStore(str(tmp_path / "ca"))
    (tmp_path / "ca" / ".new-0").write_bytes(b"half")
    assert store.names() == []
    with store.locked():
        store.clean()
    assert sorted(os.listdir(tmp_path / "ca")) == ["lock"]


def test_one_of_several_renames_a_file(tmp_path):
    store = KeyStore(str(tmp_path / "ca"))
    store.write("a", b"x")
    assert [store.rename("a", "b"), store.rename("a", "c"), store.remove("b"), store.remove("b")] == [True, False, True, False]
