"""One process that is kept running: started again with back-off when it ends, in a session of its own, so that all that it starts can be ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

_log = logging.getLogger("meshctl.up")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
STEADY_S = 10.0  # who ran for so long has not failed at starting
PATIENCE_S = 5.0  # from being asked to end to being ended


class Process:
    """`run` until cancelled. Output of all its lives goes to the end of `log`.

    `starts`: called before each start; `started` and `ended`: with its process id, the latter while nobody else can have that id.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: str,
        log: str,
        *,
        starts: Callable[[], None] = lambda: None,
        started: Callable[[int], None] = lambda pid: None,
        ended: Callable[[int], None] = lambda pid: None,
        stop: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.pid = 0  # while it runs
        self.restarts = 0
        self._command = command
        self._environment = environment
        self._folder = folder
        self._log = log
        self._starts = starts
        self._started = started
        self._ended = ended
        self._stop = stop

    async def run(self) -> None:
        """Keep it running. Cancelled, it ends the process and what is left of what that has started."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            began = loop.time()
            try:
                process = self._start()
            except OSError as error:
                _log.error("%s: %s: %s; trying again in %.1f s", self.name, error.filename or self._command[0], error.strerror, pause)
            except ValueError as error:  # words that no process can be given
                _log.error("%s: %s", self.name, error)
                return
            else:
                status = await self._wait(process)
                if loop.time() - began >= STEADY_S:
                    pause = FIRST_PAUSE_S
                _log.warning("%s ended (%s), see %s; starting it again in %.1f s", self.name, _describe(status), self._log, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            self.restarts += 1

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts()
        with open(self._log, "ab") as output:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def _wait(self, process: subprocess.Popen[bytes]) -> int:
        loop = asyncio.get_running_loop()
        fd = os.pidfd_open(process.pid)
        exited = asyncio.Event()
        loop.add_reader(fd, exited.set)
        self.pid = process.pid
        self._started(process.pid)
        try:
            await exited.wait()
        except asyncio.CancelledError:
            signal.pidfd_send_signal(fd, self._stop)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await exited.wait()
            except TimeoutError:
                _log.warning("%s does not end within %.0f s, and is killed", self.name, PATIENCE_S)
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                await exited.wait()
            raise
        finally:
            loop.remove_reader(fd)
            os.close(fd)
            self.pid = 0
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody has waited for it yet: the group's number is still its own
                os.killpg(process.pid, signal.SIGKILL)
            self._ended(process.pid)
            status = process.wait()
        return status


def _describe(status: int) -> str:
    return f"status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
