"""The line between main and a worker."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshproxy import channel
from meshproxy.channel import Channel, ChannelClosed, Kind
from tests.polling import PATIENCE, until


class End:
    """One end, with what it received."""

    def __init__(self, sock, answer=None):
        self.messages = []
        self.closed = 0
        self.answer = answer
        self.arrived = asyncio.Event()
        self.channel = Channel(sock, asyncio.get_running_loop(), self.on_message, self.on_close)

    def on_message(self, kind, body, fds, request_id):
        self.messages.append((kind, body, fds))
        if request_id and self.answer is not None:
            self.channel.reply(request_id, self.answer(body))
        self.arrived.set()

    def on_close(self):
        self.closed += 1
        self.arrived.set()

    async def wait_messages(self, count):
        while len(self.messages) < count:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), PATIENCE)
        return self.messages


@pytest.fixture
async def ends():
    left, right = channel.pair()
    pair = End(left), End(right, answer=lambda body: body.upper())
    yield pair
    for end in pair:
        end.channel.close()


async def test_frames_arrive_whole_and_in_order(ends):
    left, right = ends
    left.channel.send(Kind.DRAIN)
    left.channel.send(Kind.ENDPOINTS, b"x" * 3_000_000)
    left.channel.send(Kind.HEALTH, b"last")
    messages = await right.wait_messages(3)
    assert [(kind, len(body)) for kind, body, _ in messages] == [(Kind.DRAIN, 0), (Kind.ENDPOINTS, 3_000_000), (Kind.HEALTH, 4)]


async def test_descriptors_travel_with_their_frame_even_behind_a_full_buffer(ends):
    left, right = ends
    read_end, write_end = os.pipe()
    left.channel.send(Kind.ENDPOINTS, b"x" * 2_000_000)
    left.channel.send(Kind.DRAIN, b"a", [write_end])
    left.channel.send(Kind.HEALTH, b"none")
    os.close(write_end)  # the channel has its own duplicate
    messages = await right.wait_messages(3)
    assert [len(fds) for _, _, fds in messages] == [0, 1, 0]
    [received] = messages[1][2]
    os.write(received, b"through")
    assert os.read(read_end, 100) == b"through"
    os.close(received)
    os.close(read_end)


async def test_requests_are_answered_by_id(ends):
    left, _ = ends
    answers = await asyncio.gather(*(left.channel.request(Kind.COLLECT, b"q%d" % n, timeout=PATIENCE) for n in range(20)))
    assert answers == [b"Q%d" % n for n in range(20)]


async def test_a_request_that_nobody_answers_times_out(ends):
    left, right = ends
    with pytest.raises(TimeoutError):
        await right.channel.request(Kind.COLLECT, timeout=0.01)
    assert left.messages == [(Kind.COLLECT, b"", [])]


async def test_a_peer_that_goes_ends_requests_and_is_reported_once(ends):
    left, right = ends
    request = asyncio.ensure_future(right.channel.request(Kind.COLLECT, timeout=PATIENCE))
    await left.wait_messages(1)
    left.channel.close()
    with pytest.raises(ChannelClosed):
        await request
    with pytest.raises(ChannelClosed):
        await right.channel.request(Kind.COLLECT, timeout=PATIENCE)
    right.channel.send(Kind.DRAIN)
    assert (left.closed, right.closed) == (1, 1)


async def test_back_pressure_shows_when_the_peer_does_not_read(ends):
    left, right = ends
    assert left.channel.writable
    sent = 0
    while left.channel.writable:
        left.channel.send(Kind.ENDPOINTS, b"x" * 500_000)
        sent += 1
    await until(lambda: left.channel.writable)  # its own buffer is empty: the rest is in the socket's
    assert len(await right.wait_messages(sent)) == sent


async def test_too_many_descriptors_are_refused_by_the_sender(ends):
    left, _ = ends
    with pytest.raises(ValueError, match="at most"):
        left.channel.send(Kind.DRAIN, b"", [0] * (channel.MAX_FDS + 1))


async def test_a_malformed_frame_closes_the_channel():
    left, right = channel.pair()
    end = End(right)
    left.send(b"\xff" * 8)
    await asyncio.wait_for(end.arrived.wait(), PATIENCE)
    assert end.closed == 1
    left.close()


async def test_what_is_queued_can_be_sent_before_the_process_ends():
    left, right = channel.pair()
    end = End(left)
    for _ in range(3):
        end.channel.send(Kind.STATS, b"x" * 400_000)
    received = []

    def read_all():
        right.settimeout(PATIENCE)
        while data := right.recv(1 << 20):
            received.append(len(data))

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read_all)
        end.channel.flush_blocking(PATIENCE)
        end.channel.close()
        reader.result(PATIENCE)
    right.close()
    assert sum(received) == 3 * (400_000 + 8)


async def test_small_frames_go_together_and_descriptors_keep_their_place(ends):
    """The first at once, in one call what is said in one go with it, and in order with what goes alone."""
    left, right = ends
    calls = []
    sock = left.channel._sock

    class Counting:
        def sendmsg(self, *arguments):
            calls.append(len(arguments[0]))
            return sock.sendmsg(*arguments)

        def __getattr__(self, name):
            return getattr(sock, name)

    left.channel._sock = Counting()
    with open(os.devnull, "rb") as file:
        for number in range(10):
            left.channel.send(Kind.HEALTH, b"%d" % number)
        left.channel.send(Kind.LISTENER, b"10", [file.fileno()])
        for number in range(11, 20):
            left.channel.send(Kind.HEALTH, b"%d" % number)
    messages = await right.wait_messages(20)
    assert [body for _, body, _ in messages] == [b"%d" % number for number in range(20)]
    assert [len(fds) for _, _, fds in messages] == [0] * 10 + [1] + [0] * 9
    assert calls == [1, 9, 1, 9]
    os.close(messages[10][2][0])


async def test_many_frames_behind_a_full_buffer_arrive_in_order(ends):
    left, right = ends
    for number in range(5000):
        left.channel.send(Kind.ENDPOINTS, b"%d " % number + b"x" * (number % 700))
    messages = await right.wait_messages(5000)
    assert [int(body.partition(b" ")[0]) for _, body, _ in messages] == list(range(5000))
    assert left.channel.writable
