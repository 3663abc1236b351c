"""What a worker asks main for: once for all who wait, and those who went away are not told."""

import asyncio

from meshproxy.http.demand import CLUSTER, HOST, Demand, What

A: What = (HOST, b"routes", "a.test")
B: What = (CLUSTER, b"source", "b")


async def test_main_is_asked_once_for_all_who_wait():
    asked = []
    demand = Demand(lambda what, timeout: asked.append((what, timeout)))
    waiting = [asyncio.ensure_future(demand.wait(A)), asyncio.ensure_future(demand.wait(A)), asyncio.ensure_future(demand.wait(B, 5.0))]
    await asyncio.sleep(0)
    assert asked == [(A, 0.0), (B, 5.0)]
    demand.answered(A, found=True)
    assert await waiting[0]
    assert await waiting[1]
    assert not waiting[2].done()
    demand.answered(B, found=False)
    assert not await waiting[2]


async def test_an_answer_that_nobody_waits_for_is_none():
    asked = []
    demand = Demand(lambda what, timeout: asked.append(what))
    demand.answered(A, found=True)
    gone = asyncio.ensure_future(demand.wait(A))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    again = asyncio.ensure_future(demand.wait(A))
    await asyncio.sleep(0)
    assert asked == [A, A], "whoever comes next asks anew"
    demand.answered(A, found=True)
    assert await again


async def test_an_answer_at_once():
    demand = Demand(lambda what, timeout: demand.answered(what, found=True))
    assert await demand.wait(A)
