"""Watches of folders: who is told, what ends with the last of them, and what if the kernel has lost events."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

import pytest

from meshproxy.xds.inotify import Watches

LIMIT = 20


@pytest.fixture
async def watches():
    made = Watches(asyncio.get_running_loop())
    yield made
    made.close()


class Told:
    def __init__(self):
        self._more = asyncio.Event()

    def __call__(self):
        self._more.set()

    async def wait(self):
        async with asyncio.timeout(LIMIT):
            await self._more.wait()
        self._more.clear()

    @property
    def now(self):
        return self._more.is_set()


def put(path: Path) -> None:
    scratch = path.parent.parent / "scratch"
    scratch.write_text("")
    scratch.rename(path)


def watched(watches: Watches) -> int:
    """How many folders the kernel watches for it."""
    return Path(f"/proc/self/fdinfo/{watches._fd}").read_text().count("inotify wd")


async def test_a_file_and_a_folder_are_told_of_what_moves_there(watches, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    one, everything = Told(), Told()
    watches.file(str(folder / "one"), one)
    watches.folder(str(folder), everything)
    put(folder / "other")
    await everything.wait()
    assert not one.now
    put(folder / "one")
    await one.wait()
    await everything.wait()


async def test_the_kernel_watches_as_long_as_somebody_does(watches, tmp_path):
    told = Told()
    ends = [watches.file(str(tmp_path / "one"), Told()), watches.folder(str(tmp_path), told)]
    assert watched(watches) == 1
    ends[0]()
    ends[0]()
    assert watched(watches) == 1
    ends[1]()
    assert watched(watches) == 0
    again = watches.folder(str(tmp_path), told)
    (tmp_path / "below").mkdir()
    put(tmp_path / "below" / "x")
    (tmp_path / "below" / "x").rename(tmp_path / "x")
    await told.wait()
    again()


async def test_after_lost_events_everybody_looks(watches, tmp_path):
    told = [Told(), Told()]
    for number, one in enumerate(told):
        (tmp_path / str(number)).mkdir()
        watches.file(str(tmp_path / str(number) / "file"), one)
    reader, writer = os.pipe()
    os.write(writer, struct.pack("iIII", -1, 0x4000, 0, 0))
    real, watches._fd = watches._fd, reader
    watches._on_readable()
    watches._fd = real
    os.close(reader)
    os.close(writer)
    assert [one.now for one in told] == [True, True]
