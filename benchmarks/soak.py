"""`python -m benchmarks.soak [--seconds 600]`: a long run of mixed HTTP/2 and gRPC near saturation, after which nothing is lost and memory is where it was.

Clients reset streams, close connections with requests under way, and connect anew (`soak_client`); the service says GOAWAY now and then. The verdict:
each request was answered exactly once and completely, unless its client took it back; nothing of the requests is left in the proxy; and its PSS at the end
is within 5 % of where it stood after the first minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import measure, processes, proxies
from benchmarks.backend import Backend
from benchmarks.configs import Spec
from benchmarks.errors import BenchmarkError
from benchmarks.proxies import Chain, Proxy
from benchmarks.soak_client import Clients

GROWTH = 0.05
_SATURATE_S = 10.0
_FIRST_S = 60.0  # until the memory is taken that the end is compared with; a quarter of a shorter run
_SAMPLE_S = 5  # one figure of memory in so many seconds
_QUIET_S = 2.0  # after the last request, before what is left is looked for
_ACTIVE = ("downstream_cx_active", "downstream_rq_active", "upstream_rq_active", "upstream_rq_pending_active", "http2.streams_active", "pending_send_bytes")
_COUNTED = ("upstream_rq_retry_success", "upstream_cx_total", "upstream_cx_close_notify", "downstream_rq_rx_reset", "downstream_cx_destroy_remote_active_rq")


@dataclass(slots=True)
class Watch:
    """Memory of the proxy's processes, sampled while clients run. `samples`: (seconds since the start, PSS in MB)."""

    proxy: Proxy | Chain
    clients: Clients
    started: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, float]] = field(default_factory=list)
    _calls: int = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % _SAMPLE_S == 0:
            now = time.monotonic() - self.started
            self.samples.append((now, measure.memory(self.proxy.pids()).pss))
            tally = self.clients.tally
            print(f"  {now:5.0f} s  PSS {self.samples[-1][1]:6.1f} MB  answered {tally.answered:,}  lost {tally.lost.total()}", flush=True)

    def around(self, moment: float) -> float:
        """The median of the three samples nearest to a moment."""
        return median(pss for _, pss in sorted(self.samples, key=lambda sample: abs(sample[0] - moment))[:3])


def soak(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Everything but the verdict."""
    kind = proxies.KINDS[options.proxy]
    spec = Spec("soak", http2=True, sidecars=options.sidecars)
    with Backend(folder / "backend", "mixed", goaway_after=options.goaway_after) as backend, proxies.start(kind, spec, backend.port, folder) as proxy:
        clients = Clients(proxy.port)
        saturation = _saturation(proxy, clients)
        rate = saturation * options.load
        print(f"saturation {saturation:,.0f} requests a second; now {rate:,.0f} for {options.seconds:.0f} s", flush=True)
        watch = Watch(proxy, clients)
        cpu = sum(measure.cpu_seconds(proxy.pids()))
        begun = clients.tally.started
        clients.run(options.seconds, rate, watch)
        achieved = (clients.tally.started - begun) / options.seconds
        cpu = sum(measure.cpu_seconds(proxy.pids())) - cpu
        clients.finish()
        time.sleep(_QUIET_S)
        stats = [*_stats(proxy)]
    tally = clients.tally
    first, last = watch.around(min(_FIRST_S, options.seconds / 4)), watch.around(options.seconds)
    return {
        "seconds": options.seconds,
        "rate": rate,
        "rate achieved": achieved,
        "CPU, share of a core": cpu / options.seconds,
        "requests": tally.started,
        "answered": tally.answered,
        "reset by the client": tally.reset,
        "abandoned by the client": tally.abandoned,
        "connections": tally.connections,
        "lost": dict(tally.lost),
        "PSS after the first minute, MB": first,
        "PSS at the end, MB": last,
        "growth": last / first - 1,
        "left": {name: value for name, value in stats if name.partition(", ")[0].endswith(_ACTIVE)},
        "counted": {name: value for name, value in stats if name.partition(", ")[0].endswith(_COUNTED)},
        "PSS": watch.samples,
    }


def _saturation(proxy: Proxy | Chain, clients: Clients) -> float:
    """Requests a second of a proxy that is busy all the time. If the load's core is busy first, they are reckoned from the proxy's share of its own."""
    clients.run(_SATURATE_S / 5)
    pids = proxy.pids()
    answered, cpu, start = clients.tally.answered, sum(measure.cpu_seconds(pids)), time.monotonic()
    clients.run(_SATURATE_S)
    seconds = time.monotonic() - start
    rate = (clients.tally.answered - answered) / seconds
    return rate / min(1.0, (sum(measure.cpu_seconds(pids)) - cpu) / seconds)


def _stats(proxy: Proxy | Chain) -> Iterator[tuple[str, int]]:
    """Counters and gauges that are not zero, of every proxy, the client's first. To further ones, the one before has connections that are to stay."""
    for position, port in enumerate(proxy.admin_ports()):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats?usedonly&filter=%5E(http.main|cluster.backend)", timeout=10) as response:
            for line in response.read().decode().splitlines():
                name, _, value = line.partition(": ")
                if value.isdecimal() and int(value) and not (position and name.endswith("downstream_cx_active")):
                    yield f"{name}, proxy {position}" if position else name, int(value)


def verdict(outcome: dict[str, object]) -> list[str]:
    """What is wrong with an outcome."""
    wrong = []
    if outcome["lost"]:
        wrong.append(f"requests were lost: {outcome['lost']}")
    if outcome["left"]:
        wrong.append(f"something is left: {outcome['left']}")
    growth = outcome["growth"]
    assert isinstance(growth, float)
    if growth > GROWTH:
        wrong.append(f"PSS has grown by {growth:.1%}")
    return wrong


def main() -> int:
    """The exit status: 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Mixed HTTP/2 and gRPC for a long time: nothing is lost, nothing grows.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--load", type=float, default=0.7, help="share of saturation")
    parser.add_argument("--goaway-after", type=int, default=20_000, help="streams of an upstream connection")
    parser.add_argument("--proxy", choices=("meshproxy", "envoy"), default="meshproxy")
    parser.add_argument("--sidecars", type=int, choices=(1, 2), default=1, help="2: in a row, with TLS between them")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.sched_setaffinity(0, [processes.LOAD_CPU])
    with tempfile.TemporaryDirectory(prefix="meshproxy-soak-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            outcome = soak(options, folder)
        except BenchmarkError as error:
            print(f"FAILED: {error}")
            return 1
        said = "".join(file.read_text(errors="replace") for file in [*folder.glob("output"), *folder.glob("hop*/output")])
    for key, value in outcome.items():
        if key != "PSS":
            print(f"{key:<32} {f'{value:,.3f}' if isinstance(value, float) else value}")
    if said:
        print(f"The proxy said:\n{said[-4000:]}")
    if options.out:
        options.out.write_text(json.dumps(outcome, indent=1) + "\n")
    wrong = verdict(outcome)
    for text in wrong:
        print(f"WRONG: {text}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
