"""Which files of a folder are read, and when."""

from __future__ import annotations

import os

import pytest

from control.kinds.store import Store
from control.sources.folder import Folder

SERVICE = "{{apiVersion: v1, kind: Service, metadata: {{name: {}}}, spec: {{ports: [{{port: 80}}]}}}}"
OLD = 1_000_000_000_000_000_000  # when the files were written
NOW = OLD + 60_000_000_000


def write(path, text, when=OLD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(when, when))


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path), Store())


def names(folder):
    folder.store.settle()
    return [identity[3] for identity in folder.store.objects]


def test_yaml_and_json_of_the_folder_and_below(folder, tmp_path):
    for name in ("a.yaml", "below/b.yml", "below/further/c.json", "d.txt", ".hidden.yaml", ".git/e.yaml"):
        write(tmp_path / name, SERVICE.format(name.rpartition("/")[2][0]))
    assert folder.scan(NOW)
    assert sorted(names(folder)) == ["a", "b", "c"]
    assert not folder.scan(NOW)


def test_changes_new_files_and_removed_ones(folder, tmp_path):
    write(tmp_path / "a.yaml", SERVICE.format("a"))
    folder.scan(NOW)
    write(tmp_path / "b.yaml", SERVICE.format("b"))
    write(tmp_path / "a.yaml", SERVICE.format("a2"))
    assert folder.scan(NOW)
    assert names(folder) == ["a2", "b"]
    (tmp_path / "a.yaml").unlink()
    assert folder.scan(NOW)
    assert names(folder) == ["b"]


def test_a_second_write_within_one_tick_of_the_clock_is_seen(folder, tmp_path):
    write(tmp_path / "a.yaml", SERVICE.format("a"), NOW)
    folder.scan(NOW)
    with (tmp_path / "a.yaml").open("r+") as file:  # the same inode, size and time
        file.write(SERVICE.format("b"))
    os.utime(tmp_path / "a.yaml", ns=(NOW, NOW))
    assert folder.scan(NOW)
    assert names(folder) == ["b"]


def test_a_file_that_was_touched_and_says_the_same_is_no_change(folder, tmp_path):
    write(tmp_path / "a.yaml", SERVICE.format("a"))
    folder.scan(NOW)
    write(tmp_path / "a.yaml", SERVICE.format("a"), OLD + 1)
    assert not folder.scan(NOW)


def test_a_link_that_is_pointed_elsewhere(folder, tmp_path):
    write(tmp_path / "..one/a.yaml", SERVICE.format("a"))
    write(tmp_path / "..two/a.yaml", SERVICE.format("b"))
    (tmp_path / "data").symlink_to("..one")
    folder.scan(NOW)
    assert names(folder) == ["a"]
    (tmp_path / "new").symlink_to("..two")
    (tmp_path / "new").rename(tmp_path / "data")
    assert folder.scan(NOW)
    assert names(folder) == ["b"]


def test_links_in_a_circle_end(folder, tmp_path):
    write(tmp_path / "below/a.yaml", SERVICE.format("a"))
    (tmp_path / "below/up").symlink_to("..")
    folder.scan(NOW)
    assert names(folder) == ["a"]


def test_a_file_that_cannot_be_opened_is_trouble(folder, tmp_path):
    write(tmp_path / "a.yaml", SERVICE.format("a"))
    folder.scan(NOW)
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    assert folder.scan(NOW)
    assert names(folder) == ["a"]
    assert "symbolic links" in str(folder.store.troubles[0])


def test_without_the_folder_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Folder(str(tmp_path / "none"), Store()).scan(NOW)


def test_what_is_no_file_is_a_complaint_and_holds_up_nobody(folder, tmp_path):
    write(tmp_path / "a.yaml", SERVICE.format("a"))
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes into it
    (tmp_path / "link.yaml").symlink_to("nothing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert folder.scan(NOW)
    assert names(folder) == ["a"]
    assert [str(one) for one in folder.store.troubles] == ["folder.yaml: Is a directory", "link.yaml: Is a link to nothing", "pipe.yaml: Is not a regular file"]
    assert not folder.scan(NOW)
    write(tmp_path / "nothing.yaml", SERVICE.format("b"))
    assert folder.scan(NOW)
    assert names(folder) == ["a", "b"]
