"""What a defect of ours costs: the update or the report that it is in, not those that follow."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

from meshproxy.api import messages
from meshproxy.dynamic import _all_ready
from meshproxy.xds import health, loads
from meshproxy.xds.files import FileSubscription
from meshproxy.xds.inotify import Watches
from meshproxy.xds.resources import CLUSTER, WILDCARD
from meshproxy.xds.subscription import Rules
from tests.unit import upstream_help as up

LoadStatsResponse = messages.known("envoy.service.load_stats.v3.LoadStatsResponse")
Specifier = messages.known("envoy.service.health.v3.HealthCheckSpecifier")
LIMIT = 20


class Server:
    """In the place of a GrpcClient: each of its streams says one thing. `begun`: how many there were."""

    cluster_name = "reports"

    def __init__(self, says):
        self._says = says.SerializeToString()
        self.begun = asyncio.Semaphore(0)

    @contextlib.asynccontextmanager
    async def stream(self, method):
        self.begun.release()
        yield SimpleNamespace(send=self._send, read=self._read)

    async def _send(self, data):
        """Nobody looks at it."""

    async def _read(self):
        return self._says


@pytest.fixture
def api():
    return SimpleNamespace(cluster="reports", authority="", metadata=[], base=0.001, max=0.001)


async def two_streams(server, reporter):
    reporter.start()
    async with asyncio.timeout(LIMIT):
        await server.begun.acquire()
        await server.begun.acquire()
    reporter.close()


async def test_load_reports_go_on(api, monkeypatch, caplog):
    async def gather():
        raise RuntimeError("on purpose")

    monkeypatch.setattr(loads, "RETRY_DELAY", 0.0)
    context = up.context()
    reporter = loads.LoadReporter(api, context, gather)
    reporter._client = server = Server(LoadStatsResponse(clusters=["a"]))
    await two_streams(server, reporter)
    assert "load reports to reports failed" in caplog.text
    assert context.stats.scope("load_reporter.").counter("errors").n >= 1


async def test_health_reports_go_on(api, monkeypatch, caplog):
    def take(self, specifier):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(health.Checks, "take", take)
    context = up.context()
    context.clusters = {}
    reporter = health.HealthReporter(api, context, Rules(), lambda cluster, ready: lambda: None)
    reporter._client = server = Server(Specifier())
    await two_streams(server, reporter)
    assert "health reports to reports failed" in caplog.text


class Watcher:
    """Fails as often as it is told."""

    def __init__(self, times):
        self._times = times
        self.failures = 0
        self.seen = asyncio.Event()

    def updated(self, update):
        if self._times:
            self._times -= 1
            raise RuntimeError("on purpose")
        self.seen.set()

    def failed(self):
        self.failures += 1


async def test_files_are_read_again(tmp_path, caplog):
    """And whoever else is told of the same folder is told of it."""
    context = up.context()
    context.loop = asyncio.get_running_loop()
    watches = Watches(context.loop)
    path = tmp_path / "cds.json"

    def write(version):
        (tmp_path / "new").write_text(json.dumps({"version_info": version, "resources": [{"@type": CLUSTER.url, "name": "a"}]}))
        (tmp_path / "new").rename(path)

    write("1")
    first, second = Watcher(2), Watcher(1)
    for number, watcher in enumerate((first, second)):
        scope = context.stats.scope(f"{number}.")
        FileSubscription(str(path), "", watches, CLUSTER, WILDCARD, watcher, scope, context, Rules()).start()
    assert (first.failures, second.failures) == (1, 1)
    write("2")
    async with asyncio.timeout(LIMIT):
        await second.seen.wait()
    assert first.failures == 2
    write("3")
    async with asyncio.timeout(LIMIT):
        await first.seen.wait()
    watches.close()
    assert context.stats.scope("0.").counter("update_rejected").n == 2
    assert "could not be taken" in caplog.text


async def test_what_listeners_need_is_asked_for_together():
    """Otherwise what does not come would be waited for as often as there are listeners."""
    asked = {}
    waiting = asyncio.ensure_future(_all_ready(asked.__setitem__, ["a", "b", "c"]))
    await asyncio.sleep(0)
    assert list(asked) == ["a", "b", "c"]
    for name in "cab":
        assert not waiting.done()
        asked[name]()
        await asyncio.sleep(0)
    await asyncio.wait_for(waiting, LIMIT)
