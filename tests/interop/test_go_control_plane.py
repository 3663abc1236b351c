"""go-control-plane's snapshot cache and server drive our sidecar: live where Go and the module are, and from a recording everywhere.

`python -m tests.interop.test_go_control_plane` records the sessions in tests/data/xds_sessions anew.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.interop import ads_story
from tests.interop.ads_tape import Player, Tap, load, save

SOURCE = Path(__file__).parent / "go_control_plane"
TAPES = Path(__file__).parent.parent / "data" / "xds_sessions"
KINDS = ["sotw", "delta"]
NOTE = (
    "A session of go-control-plane v0.14.0 (tests/interop/go_control_plane, snapshot cache with ADS) with this sidecar, recorded on the way between the two by "
    "`python -m tests.interop.test_go_control_plane`: requests as they are compared, responses as they were on the wire "
    "(base64), one after the other, each with the requests that follow from it. The story is in "
    "tests/interop/ads_story.py."
)


def go() -> str:
    """The go command, or an empty string."""
    beside = "/usr/local/go/bin/go"
    return shutil.which("go") or (beside if os.access(beside, os.X_OK) else "")


def build(folder: Path) -> Path:
    """Compile the control plane. Raises subprocess.CalledProcessError, for example when its modules cannot be had."""
    made = folder / "control-plane"
    subprocess.run([go(), "build", "-o", str(made), "."], cwd=SOURCE, check=True, capture_output=True, timeout=600)
    return made


class GoControlPlane:
    """The process."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self.port = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(self._binary, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        self.port = int(await self._line())

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            return await self._process.stdout.readline()

    async def serve(self, version: str, resources: list[dict[str, Any]]) -> None:
        """Serve these resources from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"version": version, "resources": resources}).encode() + b"\n")
        assert (await self._line()).decode().strip() == version

    async def stop(self) -> None:
        self._process.kill()
        await self._process.wait()


async def live(binary: Path, folder: Path, *, delta: bool) -> list[list[Any]]:
    """The story from the real one; returns what was recorded."""
    plane = GoControlPlane(binary)
    await plane.start()
    tap = Tap(plane.port)
    await tap.start()
    sidecar = ads_story.Sidecar(folder, tap.port, delta=delta)

    async def serve(step: str, version: str, resources: list[dict[str, Any]]) -> None:
        tap.step(step)
        if step == "cut":
            await tap.cut()
            await tap.until(lambda: any(event[0] == "request" for event in tap.events[tap.events.index(["cut"]) :]))
        else:
            await plane.serve(version, resources)
            if step != "a listener that is wrong":
                tap.release()

    try:
        await ads_story.tell(sidecar, serve, tap.settled)
    finally:
        sidecar.stop()
        await tap.stop()
        await plane.stop()
    return tap.events


async def replay(tape: Path, folder: Path, *, delta: bool) -> None:
    """The story from a recording."""
    player = Player(load(tape))
    await player.start()
    sidecar = ads_story.Sidecar(folder, player.port, delta=delta)

    async def serve(step: str, version: str, resources: list[dict[str, Any]]) -> None:
        await player.begin(step)

    try:
        await ads_story.tell(sidecar, serve, player.finished)
        assert player.over
    finally:
        sidecar.stop()
        await player.stop()
    assert not player.wrong


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    if not go():
        pytest.skip("GO IS MISSING: go-control-plane itself was not asked, only its recording")
    try:
        return build(tmp_path_factory.mktemp("go"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"GO-CONTROL-PLANE CANNOT BE BUILT: it was not asked, only its recording: {error.stderr.decode()[-300:]}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_drives_our_sidecar(kind, binary, tmp_path):
    events = asyncio.run(live(binary, tmp_path, delta=kind == "delta"))
    assert [event[1] for event in events if event[0] == "step"] == list(ads_story.STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_session(kind, tmp_path):
    """The same bytes lead to the same requests: versions, nonces, names, what is accepted and what is refused."""
    asyncio.run(replay(TAPES / f"go-control-plane-{kind}.json", tmp_path, delta=kind == "delta"))


def record() -> None:
    """Write the recordings anew."""
    TAPES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder))
        for kind in KINDS:
            place = Path(folder) / kind
            place.mkdir()
            save(TAPES / f"go-control-plane-{kind}.json", NOTE, asyncio.run(live(made, place, delta=kind == "delta")))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    sys.exit(record())
