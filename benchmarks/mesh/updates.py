"""What traffic feels of updates: latency at a fixed rate while a thousand clusters, or their endpoints, change every second, and while nothing does."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks import configs, load, measure, processes, proxies
from benchmarks.configs import Place, Spec
from benchmarks.errors import BenchmarkError
from benchmarks.mesh import CLUSTERS_CHANGE, ENDPOINTS_CHANGE, QUIET
from benchmarks.mesh.plane import Helper, need_grpc
from benchmarks.mesh.pusher import CLUSTERS, ENDPOINTS
from benchmarks.proxies import Proxy
from control import bootstrap

if TYPE_CHECKING:
    from benchmarks.runner import Run

COUNT = 1000
RATE = 2000
_PATIENCE_S = 60.0
_PUSHED = {QUIET: "", ENDPOINTS_CHANGE: ENDPOINTS, CLUSTERS_CHANGE: CLUSTERS}


def updates(run: Run) -> None:
    """The proxy on one core, main and worker; load, service and control plane on the other."""
    need_grpc()
    with run.backend() as backend:
        for name in run.scenario.proxies:
            kind = proxies.KINDS[name]
            with run.attempt(name), ExitStack() as stack:
                work = run.folder / name
                work.mkdir()
                pusher = stack.enter_context(Helper("benchmarks.mesh.pusher", work, [processes.LOAD_CPU], str(COUNT), str(backend.port)))
                configured = proxies.Kind(kind.name, kind.find, kind.arguments, _configured(pusher.hear(_PATIENCE_S)), kind.file, kind.version_arguments)
                proxy = stack.enter_context(Proxy(configured, Spec(), backend.port, work))
                _turns(run, name, proxy, pusher)


def _configured(port: int) -> Callable[[Spec, Place], str]:
    """The bootstrap of a proxy whose clusters come from that port."""

    def configure(spec: Spec, place: Place) -> str:
        made = json.loads(configs.envoy(spec, place))
        theirs = bootstrap.envoy("web", "default", [("127.0.0.1", port)], admin_port=place.admin_port)
        del theirs["dynamic_resources"]["lds_config"]
        made["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["validate_clusters"] = False
        made["static_resources"]["clusters"] = theirs["static_resources"]["clusters"]
        return json.dumps({**theirs, "static_resources": made["static_resources"]})

    return configure


def _turns(run: Run, name: str, proxy: Proxy, pusher: Helper) -> None:
    cases = run.scenario.cases
    for case in cases:  # what is made at first use is made
        _turn(case.load, proxy, pusher, _PUSHED[case.label], 2)
    for _ in range(run.rounds):
        for case in cases:
            run.result.add(case.key(name), **_turn(case.load, proxy, pusher, _PUSHED[case.label], run.seconds))


def _turn(what: load.Load, proxy: Proxy, pusher: Helper, push: str, seconds: float) -> dict[str, float]:
    """Some seconds of load, during which something changes or nothing does."""
    pusher.tell(push=push)
    pusher.hear(_PATIENCE_S)
    before = sum(measure.cpu_seconds(proxy.pids()))
    outcome = load.at_rate(what, proxy.port, RATE, seconds)
    cpu = sum(measure.cpu_seconds(proxy.pids())) - before
    pusher.tell(push="")
    landed = pusher.hear(_PATIENCE_S)
    if landed["refused"] or (push and landed["updates"] < seconds):
        raise BenchmarkError(f"{landed['updates']} updates were sent, {landed['refused']} responses refused")
    # One comes at once: of what comes every second, there are six in five seconds and a half.
    rate = (landed["updates"] - 1) / int(landed["seconds"]) if landed["updates"] > 1 else 0.0
    return {"p50_us": outcome.p50_us, "p99_us": outcome.p99_us, "updates": rate, "cpu_share": cpu / outcome.seconds}
