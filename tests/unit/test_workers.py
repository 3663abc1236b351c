"""The pool of workers, with processes that only pretend."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from meshproxy import channel, workers
from meshproxy.channel import Channel, Kind
from meshproxy.workers import BACKOFF, Events, Pool
from tests.polling import PATIENCE


class Processes:
    """Instead of fork: hands out process ids, keeps the workers' ends of the channels, and lets them die."""

    def __init__(self, monkeypatch):
        self.started = []
        self.ends = {}
        self.sockets = []
        self.killed = []
        pair = channel.pair

        def remember():
            self.sockets.append(pair())
            return self.sockets[-1]

        monkeypatch.setattr(workers.channel, "pair", remember)
        monkeypatch.setattr(workers.process, "fork", self.fork)
        monkeypatch.setattr(workers.os, "kill", lambda pid, number: self.killed.append((pid, number)))

    def fork(self, run, keep):
        pid = 1000 + len(self.started)
        self.started.append(pid)
        theirs = self.sockets[-1][1]
        self.ends[pid] = Channel(theirs.dup(), asyncio.get_running_loop(), self.answer(pid), lambda: None)
        return pid, os.open(os.devnull, os.O_RDONLY)

    def answer(self, pid):
        def on_message(kind, body, fds, request_id):
            if request_id:
                self.ends[pid].reply(request_id, b"%d" % pid)

        return on_message


@pytest.fixture
async def processes(monkeypatch):
    return Processes(monkeypatch)


@pytest.fixture
async def pool(processes):
    events = []
    loop = asyncio.get_running_loop()
    pool = Pool(
        2,
        loop,
        lambda index, sock: None,
        lambda index: set(),
        Events(
            on_ready=lambda worker: events.append(("ready", worker.index)),
            on_stats=lambda worker, frame: events.append(("stats", worker.index, frame)),
            on_gone=lambda worker: events.append(("gone", worker.index)),
            on_message=lambda worker, kind, body: events.append((kind, worker.index, body)),
            replay=lambda worker: worker.channel.send(Kind.DRAIN, b"replayed"),
        ),
    )
    pool.events = events
    pool.start()
    yield pool
    for worker in pool.workers:
        if worker.restart is not None:
            worker.restart.cancel()
        if worker.channel is not None:
            worker.channel.close()
        if worker.pid:
            os.close(worker.lifeline)
    for end in processes.ends.values():
        end.close()


async def settle():
    """Let frames travel: what one end of a socket pair has sent is there for the other in the next turn of the loop."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_messages_come_with_their_worker(pool, processes):
    processes.ends[1001].send(Kind.READY)
    processes.ends[1001].send(Kind.STATS, b"frame")
    processes.ends[1000].send(Kind.EJECTED, b"x")
    await settle()
    assert ("ready", 1) in pool.events
    assert ("stats", 1, b"frame") in pool.events
    assert (Kind.EJECTED, 0, b"x") in pool.events
    assert [worker.ready for worker in pool.workers] == [False, True]


async def test_a_first_crash_is_replaced_at_once_and_told_what_happened(pool, processes):
    pool.on_exit(1000, -signal.SIGSEGV)
    assert processes.started == [1000, 1001, 1002]
    assert pool.workers[0].pid == 1002
    assert ("gone", 0) in pool.events


async def test_crashes_in_a_row_are_slowed_down(pool, monkeypatch):
    delays = []
    monkeypatch.setattr(pool._loop, "call_later", lambda delay, callback, *args: delays.append(delay) or asyncio.get_running_loop().call_at(1e12, callback))
    for _ in range(3):
        if pool.workers[0].pid == 0:
            pool.workers[0].restart.cancel()
            pool._fork(pool.workers[0])
        pool.on_exit(pool.workers[0].pid, 1)
    assert delays == list(BACKOFF[1:3])


async def test_a_worker_that_lived_long_starts_over(pool, monkeypatch):
    worker = pool.workers[0]
    worker.crashes = 5
    worker.started -= workers.STABLE_AFTER + 1
    pool.on_exit(worker.pid, 1)
    assert worker.crashes == 1
    assert worker.pid == 1002


async def test_orphans_of_others_are_nobodys_worker(pool, processes):
    pool.on_exit(4711, 0)
    assert processes.started == [1000, 1001]


async def test_a_worker_that_closes_its_channel_is_killed(pool, processes):
    processes.ends[1000].close()
    processes.sockets[0][1].close()
    await settle()
    assert (1000, signal.SIGKILL) in processes.killed


async def test_gather_asks_those_that_are_ready(pool, processes):
    processes.ends[1001].send(Kind.READY)
    await settle()
    assert await pool.gather(Kind.COLLECT, b"x", timeout=PATIENCE) == [b"1001"]


async def test_broadcast_can_leave_one_out(pool, processes):
    received = []
    await settle()  # what each worker is told at first
    for pid, end in processes.ends.items():
        end._on_message = lambda kind, body, fds, request_id, pid=pid: received.append((pid, kind, body))
    pool.broadcast(Kind.EJECTED, b"host", but=pool.workers[0])
    await settle()
    assert received == [(1001, Kind.EJECTED, b"host")]


async def test_stop_ends_replacing(pool, processes):
    pool.stop()
    pool.on_exit(1000, 0)
    assert processes.started == [1000, 1001]
    assert pool.alive == 1
