"""Which way requests over HTTP/2 take: those that can go by a plan do (`http.plan`), also when they are all different. The data plane runs in this process."""

from __future__ import annotations

import asyncio
import collections
import json
import sys

import pytest
import uvloop

from benchmarks import load
from benchmarks.backend import Backend
from benchmarks.configs import Spec
from meshproxy.http.plan import Plan
from meshproxy.http.shape_plan import ShapedPlan
from tests.budgets.test_garbage import data_plane

FEW, MANY = 300, 500
ALMOST_ALL = 0.95  # of the requests; some find no host with a connection that has room, or come while a table changes


async def send(port: int, what: load.Load, requests: int) -> None:
    """So many requests from another process."""
    pipe = asyncio.subprocess.PIPE
    sender = await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.h2_sender", stdin=pipe, stdout=pipe)
    output, _ = await sender.communicate(json.dumps(load.http2_job(what, port) | {"requests": requests}).encode())
    assert sender.returncode == 0
    assert json.loads(output)["requests"] == requests


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (load.REPEATED_H2, Plan),
        (load.VARYING_LITERALS_H2, ShapedPlan),
        (load.VARYING_H2, ShapedPlan),
        (load.UNARY, Plan),
    ],
    ids=["repeated", "varying", "varying-indexed", "unary"],
)
def test_requests_go_by_plans(what, kind, folder, tmp_path, monkeypatch):
    ways: collections.Counter[type[Plan]] = collections.Counter()
    start = Plan.start

    def counted(plan, *arguments):
        ways[type(plan)] += 1
        return start(plan, *arguments)

    async def measure(port: int) -> None:
        async with data_plane(Spec(http2=True), port, tmp_path) as listener:
            await send(listener, what, FEW)
            monkeypatch.setattr(Plan, "start", counted)
            await send(listener, what, MANY)

    with Backend(folder / "plans", what.service) as service, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(service.port))
    assert ways[kind] >= MANY * ALMOST_ALL, ways
