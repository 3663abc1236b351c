"""The running mesh: what documents say is to run is what runs, and ends with this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from control import bootstrap
from control.ads.hub import Scope
from control.app import App
from control.ca.agent import Agent
from control.ca.calls import GrpcCalls
from control.ca.rotation import Settings
from control.ca.running import Options as AuthorityOptions
from control.ca.running import RunningAuthority
from control.listening import why_not
from control.model.security import Mtls, mtls_mode
from control.model.service import Workload
from control.model.telemetry import NO_MESH_CONFIG, MeshConfig
from control.output import table
from control.sources.issuers import over_http
from control.up import reach
from control.up.arrange import ADMIN, Arrangement, environment
from control.up.ports import Ports, Use
from control.up.process import Process
from control.up.state import SOCKETS, State, birth, default_folder
from meshproxy.api import spiffe
from meshproxy.identity.workload import Wish, WorkloadSource

_log = logging.getLogger("meshctl.up")
_LOOK_EVERY_S = 0.03  # whether a process answers yet
_TELL_EVERY_S = 3.0  # for whom everybody waits
_LOOPBACK = "127.0.0.1"
# As Istio has it. Gradually, who keeps a connection would for ten minutes be let in by rules that are no more.
_DRAINING = ("--drain-strategy", "immediate", "--drain-time-s", "45")
OWN = "meshproxy"  # what our own proxy is called where another could be chosen


class Options(NamedTuple):
    """`proxy`: OWN, or the path of an Envoy; `listen`: of the control plane; `patience_s`: until what is not ready is told as not being so.
    `defaults`: what holds where the documents say nothing."""

    folder: str
    trust_domain: str
    listen: str = f"{_LOOPBACK}:0"
    proxy: str = OWN
    log_level: str = "warning"
    patience_s: float = 20.0
    defaults: MeshConfig = NO_MESH_CONFIG
    scope: Scope = Scope()


class _Unit:
    """One workload: its process, if it has any, and its sidecar. `why`: all that they were started with, to know when it is another."""

    def __init__(self, workload: Workload, why: tuple[Any, ...]) -> None:
        self.workload = workload
        self.why = why
        self.processes: dict[str, Process] = {}
        self.agent: Agent | None = None
        self.tasks: list[asyncio.Task[None]] = []

    def keep(self, process: Process) -> None:
        self.processes[process.name] = process
        self.tasks.append(asyncio.create_task(process.run(), name=process.name))

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.agent is not None:
            await self.agent.stop()


class LaptopMesh:
    """`run` until it is cancelled. Raises StoreError, BadCertificate, ValueError, OSError and RuntimeError for what cannot be used."""

    def __init__(self, options: Options, state: State) -> None:
        self._options = options
        self._state = state
        self._ports = Ports()
        self._arrangement = Arrangement(self._ports)
        self._sockets = tempfile.mkdtemp(prefix=SOCKETS)  # paths of Unix sockets are short, and that of the state folder may not be
        self._socket = os.path.join(self._sockets, "authority")
        try:
            self._authority = RunningAuthority(AuthorityOptions(str(state.authority), options.trust_domain, Settings(), self._socket))
        except BaseException:
            shutil.rmtree(self._sockets, ignore_errors=True)
            raise
        self._app = App(options.folder, self._authority.handlers(), options.trust_domain, self._arrangement, defaults=options.defaults, scope=options.scope,
            issuers=over_http(),
        )  # fmt: skip
        self._units: dict[tuple[str, str], _Unit] = {}
        self._changed = asyncio.Event()
        self._followed = asyncio.Event()  # the first look is done
        self._address = ""
        self._ready = False
        self._unready: list[tuple[str, str]] = []  # when all were to be ready
        self._channel: grpc.aio.Channel | None = None

    async def run(self, say: Callable[[str], None]) -> None:
        """Everything; `say` gets what a person is told once the mesh is there."""
        try:
            await self._serve()
            watching = [
                asyncio.create_task(self._app.run(self._changed.set), name="watch the folder"),
                asyncio.create_task(self._follow(), name="follow the folder"),
                asyncio.create_task(self._announce(say), name="tell"),
            ]
            try:
                await asyncio.gather(*watching)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
        finally:
            await self._end()

    async def _serve(self) -> None:
        self._app.load()
        await self._app.wait_keys()
        host, _, port = self._options.listen.rpartition(":")
        try:
            self._address = f"{host}:{self._app.server.listen(self._options.listen)}"
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._options.listen}: {why_not(host.strip('[]'), int(port)) or error}") from error
        for inner in self._authority.inner:
            self._app.server.listen(inner)
        await self._app.server.start()
        await self._authority.start()
        self._changed.set()

    async def _end(self) -> None:
        await asyncio.gather(*(unit.stop() for unit in self._units.values()))
        self._units.clear()
        if self._channel is not None:
            await self._channel.close()
        await self._app.server.stop()
        if self._app.issuers is not None:
            await self._app.issuers.close()
        await self._authority.stop()
        self._ports.close()
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._state.clear()

    # --- what runs

    async def _follow(self) -> None:
        """Start what documents newly describe, end what they no longer do."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = {(one.namespace, one.name): one for one in self._arrangement.running()}
            old = [key for key, unit in self._units.items() if key not in wanted or _why(wanted[key]) != unit.why]
            await asyncio.gather(*(self._units.pop(key).stop() for key in old))
            for key in old:
                if key not in wanted:
                    _log.info("%s.%s is no longer run", key[1], key[0])
                    self._ports.forget(*key)
            for key, workload in wanted.items():
                unit = self._units.get(key)
                if unit is None:
                    unit = self._units[key] = _Unit(workload, _why(workload))
                    _log.info("running %s.%s", workload.name, workload.namespace)
                    try:
                        await self._start(unit)
                    except (OSError, ValueError) as error:
                        _log.error("%s.%s cannot be run: %s", workload.name, workload.namespace, error)
                unit.workload = workload
            self._record()
            self._followed.set()

    async def _start(self, unit: _Unit) -> None:
        one = unit.workload
        assert one.run is not None
        name = f"{one.name}.{one.namespace}"
        folder = os.path.join(os.path.abspath(self._options.folder), one.run.folder)
        if one.run.command:
            inherited = dict(os.environ)
            inherited["PATH"] = os.pathsep.join((inherited.get("PATH", os.defpath), os.path.dirname(sys.executable)))  # there is a `python`, last of all
            unit.keep(
                Process(
                    name,
                    one.run.command,
                    inherited | environment(one),
                    folder,
                    str(self._state.logs / f"{name}.log"),
                    starts=lambda: self._let_go(one, [f"port {port}" for port in one.ports]),
                    started=lambda pid: self._record(),
                )
            )
        identity = spiffe.workload(self._options.trust_domain, one.namespace, one.service_account)
        own = self._options.proxy == OWN
        assert one.sidecar is not None
        sds = os.path.join(self._sockets, name) if not own and one.sidecar.identity else ""
        if sds:
            unit.agent = await self._agent(identity, sds)
        host, _, port = self._address.rpartition(":")
        admin = self._ports.take(_admin(one), _LOOPBACK)
        made = bootstrap.envoy(
            one.name, one.namespace, [(host.strip("[]"), int(port))], admin_port=admin, sds=sds, locality=one.locality, readiness=one.readiness is not None
        )
        if own and one.sidecar.identity:
            made = bootstrap.with_identity(made, bootstrap.Identity([f"unix:{self._socket}"]))
        try:
            made = bootstrap.with_patches(made, bootstrap.patches_for(self._app.mesh.snapshot, one.name, one.namespace))
        except ValueError as error:
            _log.warning("%s; it is left out", error)
        path = self._state.sidecars / f"{name}.json"
        path.write_text(json.dumps(made, indent=2), encoding="utf-8")
        command = [sys.executable, "-m", "meshproxy"] if own else [self._options.proxy, "--disable-hot-restart"]

        def started(pid: int) -> None:
            if own:
                self._authority.peers.register(identity, uid=os.getuid(), pid=pid)
            self._record()

        unit.keep(
            Process(
                f"{name} sidecar",
                [*command, "-c", str(path), "--concurrency", "1", "-l", self._options.log_level, *_DRAINING],
                dict(os.environ),
                os.getcwd(),
                str(self._state.logs / f"{name}.sidecar.log"),
                starts=lambda: self._let_go(one, [ADMIN]),
                started=started,
                ended=self._authority.peers.unregister if own else lambda pid: None,
                stop=signal.SIGINT if own else signal.SIGTERM,  # at once: whoever could be told to go elsewhere ends as well
            )
        )

    async def _agent(self, identity: spiffe.SpiffeId, path: str) -> Agent:
        """What holds a certificate for an Envoy. It asks for it as this process, which may be anybody whose workload it runs."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(f"unix:{self._socket}")
        self._authority.peers.register(identity, uid=os.getuid(), pid=os.getpid())
        agent = Agent(WorkloadSource(GrpcCalls(self._channel), Wish(identity)), path)
        await agent.start()
        return agent

    def _let_go(self, workload: Workload, what: list[str]) -> None:
        for one in what:
            self._ports.let_go(Use(workload.namespace, workload.name, one))

    # --- what is told

    def _record(self) -> None:
        """Bring the state folder's file up to date; whoever waits for a mesh waits for it."""
        try:
            self._state.write(self._said())
        except OSError as error:
            _log.error("%s: %s", self._state.path, error.strerror)

    def _said(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "born": birth(os.getpid()),
            "ready": self._ready,
            "unready": [f"{name}.{namespace}" for namespace, name in self._unready],
            "control": self._address,
            "sockets": self._sockets,
            "first": self._first(),
            "complaints": [str(one) for one in self._app.mesh.troubles],
            "workloads": [self._told(unit) for unit in self._units.values()],
            "processes": [
                {"name": process.name, "pid": process.pid, "born": birth(process.pid), "restarts": process.restarts}
                for unit in self._units.values()
                for process in unit.processes.values()
                if process.pid
            ],
        }

    def _told(self, unit: _Unit) -> dict[str, Any]:
        one = unit.workload
        assert one.sidecar is not None
        return {
            "name": one.name,
            "namespace": one.namespace,
            "identity": f"spiffe://{self._options.trust_domain}/ns/{one.namespace}/sa/{one.service_account}" if one.sidecar.identity else "",
            "ports": dict(one.ports),
            "inbound": {name: f"{one.address}:{one.reached_at(number)}" for name, number in one.ports.items()},
            "mtls": {name: self._mode(one, number).value for name, number in one.ports.items()},
            "gateway": reach.places(self._app.mesh.snapshot.config, one),
            "proxy": f"http://{_LOOPBACK}:{one.sidecar.http_proxy}",
            "admin": f"{_LOOPBACK}:{self._ports.take(_admin(one), _LOOPBACK)}",
        }

    def _mode(self, one: Workload, number: int) -> Mtls:
        if one.sidecar is None or not one.sidecar.identity:
            return Mtls.DISABLE
        security = self._app.mesh.snapshot.config.security
        return mtls_mode(security.peer_authentication, one.namespace, one.labels, number, security.root)

    def _first(self) -> str:
        """A command that sends a first request: to a port that takes plain ones, or else as one of the workloads."""
        proxied = ""
        for unit in self._units.values():
            one = unit.workload
            assert one.sidecar is not None
            for number in one.ports.values():
                if self._mode(one, number) is not Mtls.STRICT:
                    return f"curl -i http://{one.address}:{one.reached_at(number)}/"
        for unit in self._units.values():
            one = unit.workload
            assert one.sidecar is not None
            if found := reach.first(self._app.mesh.snapshot.config, one):
                return found
            proxied = proxied or f"curl -i -x http://{_LOOPBACK}:{one.sidecar.http_proxy}"
        services = self._app.mesh.snapshot.config.services.values()
        there = [(service, port) for service in services for port in service.ports if service.selector and port.protocol.is_http]
        if not proxied or not there:
            return ""
        service, port = there[0]
        return f"{proxied} http://{service.host}:{port.number}/"

    async def _announce(self, say: Callable[[str], None]) -> None:
        """Wait until everything answers, and tell where it is."""
        began = time.monotonic()
        await self._followed.wait()
        states: dict[tuple[str, str], bool] = {}
        told = began
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.patience_s):
                while waiting := [key for key in self._units if not states.get(key)]:
                    if time.monotonic() - told >= _TELL_EVERY_S:
                        told = time.monotonic()
                        _log.info("waiting for %s", ", ".join(f"{name}.{namespace}" for namespace, name in waiting))
                    await asyncio.sleep(_LOOK_EVERY_S)
                    for key, unit in list(self._units.items()):
                        if not states.get(key) and await self._is_ready(unit):
                            states[key] = True
                            _log.info("%s.%s is ready (%d of %d)", key[1], key[0], sum(map(bool, map(states.get, self._units))), len(self._units))
        # Of one that has ended meanwhile, somebody else may have answered in its place: its port was taken.
        self._unready = [key for key, unit in self._units.items() if not states.get(key) or not all(one.pid for one in unit.processes.values())]
        say(self._summary(time.monotonic() - began))
        self._ready = True  # whoever waits for this reads what has been said
        self._record()

    async def _is_ready(self, unit: _Unit) -> bool:
        one = unit.workload
        if one.run is not None and one.run.command and not all([await _answers(one.address, port) for port in one.ports.values()]):
            return False
        if one.readiness is not None and not self._app.hub.health.is_ready((one.namespace, one.name)):
            return False
        return (
            await _answers(_LOOPBACK, self._ports.take(_admin(one), _LOOPBACK), "GET /ready HTTP/1.1\r\nhost: ready\r\nconnection: close\r\n\r\n")
        ).startswith(b"HTTP/1.1 200 ")

    def _summary(self, seconds: float) -> str:
        rows = [("WORKLOAD", "STATUS", "REACHED AT", "MUTUAL TLS", "ITS WAY OUT", "TO SCRAPE")]
        for key, unit in self._units.items():
            told = self._told(unit)
            status = "not ready" if key in self._unready else "ready"
            at, modes = ", ".join((*told["inbound"].values(), *told["gateway"])) or "-", ", ".join(sorted(set(told["mtls"].values()))) or "-"
            rows.append((f"{told['name']}.{told['namespace']}", status, at, modes, told["proxy"], f"http://{told['admin']}/stats/prometheus"))
        count = sum(len(unit.processes) for unit in self._units.values())
        lines = [table(rows), "", f"{count} processes, {seconds:.1f} s; {len(self._app.mesh.troubles)} complaints about documents", ""]
        first = self._first()
        if first:
            lines.append(f"first request    {first}")
        folder = self._options.folder
        own = str(self._state.path) == default_folder(folder)
        lines.append(f"control plane    meshctl proxy-status --folder {folder if own else self._state.path}")
        lines.append(f"logs             {self._state.logs}")
        lines.append(f"the end          meshctl down {folder}{'' if own else f' --state {self._state.path}'}, or Ctrl-C")
        return "\n".join(lines)


def _admin(one: Workload) -> Use:
    return Use(one.namespace, one.name, ADMIN)


def _why(one: Workload) -> tuple[Any, ...]:
    """All that its processes are started with. What its sidecar gets by xDS is not among it."""
    assert one.sidecar is not None
    sidecar = one.sidecar.identity, one.sidecar.http_proxy, one.sidecar.outbound, one.readiness is not None
    return one.run, one.address, tuple(one.ports.items()), one.service_account, *sidecar


async def _answers(host: str, port: int, request: str = "") -> bytes:
    """The beginning of an answer; for no request, some bytes if anybody listens. Empty if not."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return b""
    try:
        if not request:
            return b"listens"
        writer.write(request.encode())
        return await reader.read(100)
    except OSError:
        return b""
    finally:
        writer.close()
