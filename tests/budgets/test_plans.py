"""Which way requests take: those that can go by a plan do (`http.plan`), also when they are all different. The data plane runs in this process."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from benchmarks import load
from benchmarks.backend import Backend
from benchmarks.configs import Spec
from meshproxy.http.plan import Plan
from meshproxy.http.planned_stream import PlannedStream
from meshproxy.http.shape_plan import ShapedPlan
from tests.budgets.test_garbage import data_plane

FEW, MANY = 300, 500
ALMOST_ALL = 0.95  # of the requests; some find no host with a connection that has room, or come while a table changes


MESH, HTTP2 = Spec("mesh"), Spec(http2=True)


async def send(port: int, what: load.Load, requests: int) -> None:
    """So many requests from another process."""
    outcome = await asyncio.to_thread(load.exactly, what, port, requests, 60.0)
    assert outcome.requests == requests


def traffic(spec: Spec, what: load.Load, folder: Path, work: Path, watch: Callable[[], None]) -> None:
    """A few requests, and when `watch` was called many."""

    async def run(port: int) -> None:
        async with data_plane(spec, port, work) as listener:
            await send(listener, what, FEW)
            watch()
            await send(listener, what, MANY)

    with Backend(folder, what.service) as service, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(service.port))


@pytest.mark.parametrize(
    ("spec", "what", "kind"),
    [
        (HTTP2, load.REPEATED_H2, Plan),
        (HTTP2, load.VARYING_LITERALS_H2, ShapedPlan),
        (HTTP2, load.VARYING_H2, ShapedPlan),
        (HTTP2, load.UNARY, Plan),
        (MESH, replace(load.ELEVEN, connections=8), Plan),
        (MESH, replace(load.VARYING, connections=8), ShapedPlan),
        (Spec("mesh", http2=True), load.VARYING_LITERALS_H2, ShapedPlan),
    ],
    ids=["repeated", "varying", "varying-indexed", "unary", "http1-repeated", "http1-varying", "varying-with-filters"],
)
def test_requests_go_by_plans(spec, what, kind, folder, tmp_path, monkeypatch):
    ways: collections.Counter[type[Plan]] = collections.Counter()
    start = Plan.start

    def counted(plan, *arguments):
        ways[type(plan)] += 1
        return start(plan, *arguments)

    traffic(spec, what, folder / "plans", tmp_path, lambda: monkeypatch.setattr(Plan, "start", counted))
    assert ways[kind] >= MANY * ALMOST_ALL, ways


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (MESH, replace(load.ELEVEN, connections=8)),
        (MESH, replace(load.TAGGED, connections=8)),
        (HTTP2, load.REPEATED_H2),
        (HTTP2, load.TAGGED_H2),
    ],
    ids=["repeated", "tagged", "http2-repeated", "http2-tagged"],
)
def test_answers_go_by_plans(spec, what, folder, tmp_path, monkeypatch):
    """Also those with a tag that never comes twice."""
    left = 0
    leave = PlannedStream.leave_plan

    def counted(stream):
        nonlocal left
        left += 1
        leave(stream)

    traffic(spec, what, folder / "answers", tmp_path, lambda: monkeypatch.setattr(PlannedStream, "leave_plan", counted))
    assert left <= MANY * (1 - ALMOST_ALL)
