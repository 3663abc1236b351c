"""Runs scenarios: starts what they need, takes turns, collects figures."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import callgrind, h2_sender, load, measure, processes, proxies
from benchmarks.backend import BULK_BYTES, Backend, find_nginx
from benchmarks.errors import BenchmarkError, Missing
from benchmarks.mesh import faultless
from benchmarks.mesh.edit import edit
from benchmarks.mesh.pair import Pair
from benchmarks.mesh.scale import scale
from benchmarks.mesh.updates import updates
from benchmarks.proxies import Chain, Proxy
from benchmarks.scenarios import ENVOY, Case, How, Scenario
from benchmarks.sender import SenderError

if TYPE_CHECKING:
    from benchmarks.load import Outcome

Running = Proxy | Chain | Pair
_SETTLE_S = 1.5  # until what follows a burst of connections is over
_BUSY_LOAD = 0.7  # one-minute load average above which the machine was not quiet


@dataclass(slots=True)
class Result:
    """Figures of one scenario: line -> metric -> one value a round. `notes` say what was skipped, what failed, and what to know when reading them."""

    name: str
    quick: bool
    at: str
    python: str  # that ours ran on
    cases: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, line: str, **values: float) -> None:
        """One round's values."""
        metrics = self.cases.setdefault(line, {})
        for metric, value in values.items():
            metrics.setdefault(metric, []).append(value)

    def note(self, text: str) -> None:
        """Say it now, and in the report."""
        print(f"  ! {text}", file=sys.stderr, flush=True)
        self.notes.append(text)


class Run:
    """One scenario being run. `folder` is for whatever it writes."""

    def __init__(self, scenario: Scenario, folder: Path, *, quick: bool) -> None:
        self.scenario = scenario
        self.folder = folder
        self.seconds = min(scenario.seconds, 1) if quick else scenario.seconds
        self.rounds = min(scenario.rounds, 1) if quick else scenario.rounds
        self.bursts = callgrind.Bursts(300, 200, 800) if quick else callgrind.Bursts()
        self.result = Result(scenario.name, quick, time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC", platform.python_version())
        self._failed: set[str] = set()
        self._warned: set[str] = set()

    def run(self) -> Result:
        """Measure everything; what cannot be measured is a note."""
        busy = os.getloadavg()[0]
        if busy > _BUSY_LOAD and not self.result.quick:
            self.result.note(f"the machine was not quiet: load average {busy:.1f} before this scenario")
        try:
            _MEASURES[self.scenario.how](self)
        except Missing as error:
            self.warn(f"SKIPPED: {error}")
        except BenchmarkError as error:
            self.result.note(str(error))
        return self.result

    # -- what the measurements share

    @contextmanager
    def attempt(self, line: str) -> Iterator[None]:
        """A line that fails is left out from then on, with a note."""
        try:
            yield
        except Missing as error:
            self._failed.add(line)
            self.warn(f"SKIPPED: {error}")
        except BenchmarkError as error:
            self._failed.add(line)
            self.result.cases.pop(line, None)
            self.result.note(f"{line} FAILED: {error}")

    def warn(self, text: str) -> None:
        """A note that is made once."""
        if text not in self._warned:
            self._warned.add(text)
            self.result.note(text)

    def lines(self) -> Iterator[tuple[str, Case, proxies.Kind]]:
        """(line, case, proxy) of everything that has not failed, the lines of one case one after the other: A B A B when repeated."""
        for case in self.scenario.cases:
            for name in self.scenario.proxies:
                line = case.key(name)
                if line not in self._failed:
                    yield line, case, proxies.KINDS[name]

    def backend(self) -> Backend:
        """The service that the scenario's load wants; to be used as a context manager."""
        return Backend(self.folder / "backend", self.scenario.cases[0].load.service)

    def start_all(self, stack: ExitStack, backend_port: int) -> dict[str, Running]:
        """Every line's proxy, running until the stack is left; idle ones cost nothing."""
        started: dict[str, Running] = {}
        for line, case, kind in self.lines():
            with self.attempt(line):
                cpus = [processes.PROXY_CPU] if case.spec.workers == 1 else processes.CPUS
                folder = self.folder / _folder_name(line)
                started[line] = Pair(kind, backend_port, folder) if case.spec.meshed else proxies.start(kind, case.spec, backend_port, folder, cpus=cpus)
                stack.push(started[line])
        return started

    def saturate(self, case: Case, proxy: Running, seconds: float) -> Outcome:
        """As many requests as a proxy of that case takes."""
        return load.saturate(case.load, proxy.port, seconds, self.folder, tls=case.spec.tls)

    def warm(self, case: Case, proxy: Running) -> None:
        """A second of load, and every route used once: what is made at first use is made, and code has run often enough to be specialised."""
        if case.load.limit > 1:
            load.exactly(case.load, proxy.port, case.load.limit, 60)
        self.saturate(case, proxy, 1)


def _folder_name(line: str) -> str:
    return line.replace(", ", "-").replace(" ", "-").replace(",", "")


# -- the measurements


def _http(run: Run) -> None:
    with run.backend() as backend:
        with ExitStack() as stack:
            running = run.start_all(stack, backend.port)
            for line, case, _ in run.lines():
                with run.attempt(line):
                    run.warm(case, running[line])
            for _ in range(run.rounds):
                for line, case, _ in run.lines():
                    with run.attempt(line):
                        _http_round(run, line, case, running[line])
        if run.scenario.instructions and not measure.perf_works():
            _count_instructions(run, backend.port)


def _http_round(run: Run, line: str, case: Case, proxy: Running) -> None:
    pids = proxy.pids()
    with ExitStack() as stack:
        counter = stack.enter_context(measure.Instructions(pids)) if measure.perf_works() else None
        before = measure.cpu_seconds(pids)
        outcome = run.saturate(case, proxy, run.seconds)
        after = measure.cpu_seconds(pids)
    if proxy.pids() != pids:
        raise BenchmarkError("a worker was replaced under load")
    cpu = sum(after) - sum(before)
    throughput = outcome.requests / outcome.seconds
    cpu_us = cpu / outcome.requests * 1e6
    values = {"throughput": throughput, "cpu_us": cpu_us, "per_core": 1e6 / cpu_us, "p50_us": outcome.p50_us, "p99_us": outcome.p99_us}
    if counter is not None:
        user, kernel = counter.counted
        values |= {"user_instructions": user / outcome.requests, "kernel_instructions": kernel / outcome.requests}
    run.result.add(line, **values)


def _count_instructions(run: Run, backend_port: int) -> None:
    run.warn("perf cannot count instructions on this machine; user instructions are callgrind's")
    for line, case, kind in run.lines():
        if kind.name in run.scenario.instructions:
            with run.attempt(f"{line} under callgrind"):
                folder = run.folder / f"callgrind-{_folder_name(line)}"
                count = callgrind.instructions_per_request(kind, case.spec, case.load, backend_port, folder, run.bursts)
                run.result.add(line, user_instructions=count)


def _rate(run: Run) -> None:
    with run.backend() as backend, ExitStack() as stack:
        running = run.start_all(stack, backend.port)
        rates: dict[str, float] = {}
        for case in run.scenario.cases:
            envoy = running.get(case.key(ENVOY))
            if envoy is None:
                raise BenchmarkError("without Envoy there is no rate to take half of")
            run.warm(case, envoy)
            outcome = run.saturate(case, envoy, 1 if run.result.quick else 2)
            rates[case.label] = round(outcome.requests / outcome.seconds / 2, -2)
            run.result.note(f"{case.label}: {rates[case.label]:,.0f} requests a second")
        for line, case, _ in run.lines():
            with run.attempt(line):
                run.warm(case, running[line])
        for _ in range(run.rounds):
            for line, case, _ in run.lines():
                with run.attempt(line):
                    outcome = load.at_rate(case.load, running[line].port, rates[case.label], run.seconds)
                    run.result.add(line, p50_us=outcome.p50_us, p99_us=outcome.p99_us)


def _tcp(run: Run) -> None:
    service_port = processes.free_port()
    kind = "bulk" if run.scenario.how is How.TCP_BULK else "small"
    with ExitStack() as stack:
        running = run.start_all(stack, service_port)
        for number in range(run.rounds + 1):
            for line, _, _ in run.lines():
                with run.attempt(line):
                    values = _tcp_round(kind, running[line], service_port, run.seconds if number else 0.5)
                    if number:  # the first round warms
                        run.result.add(line, **values)


def _tcp_round(kind: str, proxy: Running, service_port: int, seconds: float) -> dict[str, float]:
    pids = proxy.pids()
    before = measure.cpu_seconds(pids)
    command = [sys.executable, "-m", "benchmarks.tcp_load", kind, str(proxy.port), str(service_port), str(seconds)]
    outcome = json.loads(processes.run(command, limit_s=seconds + 30))
    user, kernel = (now - then for now, then in zip(measure.cpu_seconds(pids), before, strict=True))
    if kind == "small":
        cpu_us = (user + kernel) / outcome["requests"] * 1e6
        return {"throughput": outcome["requests"] / outcome["seconds"], "cpu_us": cpu_us, "per_core": 1e6 / cpu_us}
    return _per_gigabyte(outcome["bytes"], outcome["seconds"], user, kernel)


def _http2_bulk(run: Run) -> None:
    if find_nginx() is None:
        raise Missing("nginx is not installed (Debian: apt-get install nginx): nothing else here sends 1 GiB over HTTP/2")
    with run.backend() as backend, ExitStack() as stack:
        running = run.start_all(stack, backend.port)
        for number in range(run.rounds + (not run.result.quick)):
            for line, case, _ in run.lines():
                with run.attempt(line):
                    values = _http2_bulk_round(case, running[line])
                    if number or run.result.quick:  # the first round warms
                        run.result.add(line, **values)


def _http2_bulk_round(case: Case, proxy: Running) -> dict[str, float]:
    pids = proxy.pids()
    before = measure.cpu_seconds(pids)
    outcome = load.exactly(case.load, proxy.port, 1, 120)
    user, kernel = (now - then for now, then in zip(measure.cpu_seconds(pids), before, strict=True))
    if outcome.bytes != BULK_BYTES:
        raise BenchmarkError(f"{outcome.bytes} bytes arrived, not {BULK_BYTES}")
    return _per_gigabyte(outcome.bytes, outcome.seconds, user, kernel)


def _per_gigabyte(count: int, seconds: float, user: float, kernel: float) -> dict[str, float]:
    gigabytes = count / 1e9
    return {
        "gb_per_s": gigabytes / seconds,
        "user_s_per_gb": user / gigabytes,
        "kernel_s_per_gb": kernel / gigabytes,
        "cpu_s_per_gb": (user + kernel) / gigabytes,
    }


def _idle_connections(run: Run) -> None:
    with run.backend() as backend:
        for _ in range(run.rounds):
            for line, case, kind in run.lines():
                with run.attempt(line), Proxy(kind, case.spec, backend.port, run.folder / _folder_name(line)) as proxy:
                    load.exactly(load.REPEATED_H2, proxy.port, 5000, 60)  # what is made at first use is made
                    run.result.add(line, **_growth(case, proxy))


def _growth(case: Case, proxy: Proxy) -> dict[str, float]:
    """Memory with `connections` idle connections that have had their request, and what they added to it."""
    time.sleep(_SETTLE_S)
    before = _memory(proxy)
    sender = h2_sender.Sender(load.http2_job(case.load, proxy.port) | {"requests": case.load.connections})
    try:
        sender.run()
        time.sleep(_SETTLE_S)
        after = _memory(proxy)
    except SenderError as error:
        raise BenchmarkError(str(error)) from error
    finally:
        sender.close()
    return {"alone": before["alone"], "loaded_alone": after["alone"], "grown": after["alone"] - before["alone"]}


def _warn_of_others(run: Run, name: str) -> None:
    others = measure.others(name)
    if others:
        run.warn(f"{len(others)} other processes of {name} were running: they share its pages, so its PSS is too low")


def _start(run: Run) -> None:
    with run.backend() as backend:
        for _ in range(run.rounds):
            for line, case, kind in run.lines():
                _warn_of_others(run, kind.name)
                with run.attempt(line), Proxy(kind, case.spec, backend.port, run.folder / _folder_name(line), cpus=processes.CPUS) as proxy:
                    time.sleep(run.seconds)
                    run.result.add(line, ready_ms=proxy.ready_s * 1000, **_memory(proxy))


def _memory(proxy: Running, prefix: str = "") -> dict[str, float]:
    found = measure.memory(proxy.pids())
    return {f"{prefix}{name}": getattr(found, name) for name in ("pss", "alone", "pss_anon", "anonymous")}


def _idle_and_loaded(run: Run) -> None:
    with run.backend() as backend:
        for _ in range(run.rounds):
            for line, case, kind in run.lines():
                _warn_of_others(run, kind.name)
                with run.attempt(line), Proxy(kind, case.spec, backend.port, run.folder / _folder_name(line)) as proxy:
                    time.sleep(1)
                    run.result.add(line, **_memory(proxy))
                    run.result.add(line, **_memory_under_load(run, case, proxy))


def _memory_under_load(run: Run, case: Case, proxy: Running) -> dict[str, float]:
    sampled: dict[str, float] = {}
    sampler = threading.Timer(run.seconds * 0.7, lambda: sampled.update(_memory(proxy, "loaded_")))
    sampler.start()
    run.saturate(case, proxy, run.seconds)
    sampler.join()
    return sampled


_MEASURES: dict[How, Callable[[Run], Any]] = {
    How.HTTP: _http,
    How.RATE: _rate,
    How.TCP_BULK: _tcp,
    How.TCP_SMALL: _tcp,
    How.HTTP2_BULK: _http2_bulk,
    How.IDLE: _idle_connections,
    How.START: _start,
    How.MEMORY: _idle_and_loaded,
    How.MESH_SCALE: scale,
    How.MESH_UPDATES: updates,
    How.MESH_EDIT: edit,
    How.MESH_ROTATION: faultless.rotation,
    How.MESH_ALONE: faultless.alone,
}
