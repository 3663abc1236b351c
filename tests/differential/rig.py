"""A proxy with its scripted upstreams, and the running of cases on it and on a pair of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.differential import proxy as proxies
from tests.differential.config import BARRIER, PROBE_HOST, Config, render, tokens
from tests.differential.http2_steps import ask
from tests.differential.outcome import SECTIONS, Normaliser, Outcome, difference, stat_deltas
from tests.differential.wire import Play, Response, Script, Signals, Upstream, Wire, hole_sockets, play, refusing_socket
from tests.polling import until

QUIET_LIMIT_S = 60.0
SCENARIO_LIMIT_S = 180.0
_OWN = re.compile(rf"\.admin\.|{re.escape(BARRIER)}\.")
PROBE = f"GET /probe HTTP/1.1\r\nhost: {PROBE_HOST}\r\n\r\n".encode()


@dataclass(frozen=True)
class Tls:
    """How a client speaks TLS: names of certificates are those of pki.py, `curve` is the only one if given. The proxy's certificate is not verified.

    `ciphers` are OpenSSL's names of those of TLS 1.2.
    """

    sni: str | None = "a.test"
    alpn: tuple[str, ...] = ()
    certificate: str | None = None
    maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    curve: str = ""
    # Not the order of whoever built this Python: which cipher is chosen depends on it.
    ciphers: str = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass
class Case:
    """One exchange, as data.

    `steps` is the client's script (its bytes in one go mean: send, then read one response) or a coroutine function for cases that need more than one
    connection: it gets the rig and returns what is to be compared as "client". `up`: what the upstreams do, for all or by name. `then`: "open" probes
    whether the connection is still usable, "closed" waits for its end, "leave" does neither. `skip`: sections that are not compared, with the reason in
    `note`. `joined`: the response's chunks are compared as one. `strictly`: what our client has to have seen, by decision, where Envoy lets wrong HTTP/2
    pass. `stricter`: the status that we answer, by decision, to what Envoy lets pass: 502 for a response; 400 for a request, and then the connection is
    closed and nothing of the request reaches an upstream, except its valid beginning if `may_begin`.
    """

    name: str
    steps: Script | bytes | Callable[[Rig], Awaitable[Any]]
    up: Play | Script | dict[str, Play | Script] = field(default_factory=Play)
    on: str = "main"
    then: str = "open"
    tls: Tls | None = None
    skip: tuple[str, ...] = ()
    skip_stats: tuple[str, ...] = ()
    method: str | None = None
    stricter: int | None = None
    strictly: str = ""
    may_begin: bool = False
    joined: bool = False
    note: str = ""

    def __str__(self) -> str:
        return self.name

    def script(self) -> Script:
        """The client's script."""
        if isinstance(self.steps, bytes):
            return [self.steps, Response(self.method or self.steps.split(b" ", 1)[0].decode("latin-1"))]
        assert isinstance(self.steps, list)
        return self.steps


# Moved by timers of the clusters (names resolved again every few seconds), not by traffic: either process may do so during any case.
_BY_THE_CLOCK = (".update_attempt", ".update_success", ".update_no_rebuild", ".default.total_match_count")


class Rig:
    """One proxy with its own upstreams and folder; runs cases one after the other."""

    def __init__(self, command: list[str], config: Config, pki: Path, label: str) -> None:
        self.label = label
        self.config = config
        self.pki = pki
        self._folder = tempfile.TemporaryDirectory(prefix=f"differential-{label}-")
        self.folder = Path(self._folder.name)
        self.proxy = proxies.Proxy(command, self.folder)
        self.upstreams: dict[str, Upstream] = {}
        self.signals = Signals()
        self._fillers: list[socket.socket] = []
        self._closed_ports: list[socket.socket] = []
        self._stats: dict[str, int] = {}
        self._log_offset = 0
        self._clients: list[Wire] = []
        self._barrier: Wire | None = None

    async def start(self) -> None:
        ports = {}
        for name in tokens(self.config, "port"):
            ports[name] = await self._upstream(name)
        rendered = render(self.config, lambda kind, name: ports[name] if kind == "port" else self._path(kind, name))
        await self.proxy.start(rendered)
        self.normaliser = Normaliser({port: name for name, port in ports.items()} | {port: f"listener {name}" for name, port in self.proxy.ports.items()})
        self._stats = await self.proxy.stats()

    async def _upstream(self, name: str) -> int:
        if name.startswith("dead"):
            self._closed_ports.append(sock := refusing_socket())
            return int(sock.getsockname()[1])
        if name.startswith("hole"):
            sock, fillers = hole_sockets()
            self._closed_ports.append(sock)
            self._fillers += fillers
            return int(sock.getsockname()[1])
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.upstreams[name] = upstream = Upstream(name, sock, http2=name.startswith(("h2", "tls_h2")))
        context = None
        if name.startswith(("tls", "mtls")):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate = name.partition("tls_with_")[2] or "server"
            context.load_cert_chain(self.pki / f"{certificate}.pem", self.pki / f"{certificate}.key")
            context.set_alpn_protocols(["h2", "http/1.1"] if upstream.http2 else ["http/1.1"])
            context.sni_callback = _remember_sni
            if name.startswith("mtls"):
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.pki / "ca.pem")
        await upstream.start(context)
        return upstream.port

    def _path(self, kind: str, name: str) -> str:
        if kind in {"sha256", "spki"}:
            return _pin(self.pki / f"{name}.pem", kind)
        folder = self.folder if kind == "file" else self.pki
        return str(folder / (name if kind == "file" else f"{name}.{kind}"))

    # ---- connections ---------------------------------------------------------------------------------------------------------------------------------

    async def connect(self, listener: str = "main", tls: Tls | None = None) -> Wire:
        """A client connection; closed at the end of the case."""
        context = self.client_tls(tls) if tls else None
        server_hostname = (tls.sni or "") if tls else None
        _, wire = await asyncio.get_running_loop().create_connection(
            Wire,
            "127.0.0.1",
            self.proxy.ports[listener],
            ssl=context,
            server_hostname=server_hostname,
        )
        self._clients.append(wire)
        return wire

    def client_tls(self, tls: Tls) -> ssl.SSLContext:
        """The client's side of TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = tls.maximum
        context.set_ciphers(tls.ciphers)
        if tls.curve:
            context.set_ecdh_curve(tls.curve)
        if tls.alpn:
            context.set_alpn_protocols(list(tls.alpn))
        if tls.certificate:
            context.load_cert_chain(self.pki / f"{tls.certificate}.pem", self.pki / f"{tls.certificate}.key")
        return context

    async def exchange(self, wire: Wire, request: bytes) -> str:
        """Send a request on a connection and read its response, normalised."""
        start = len(wire.received)
        trouble = await play([request, Response(request.split(b" ", 1)[0].decode("latin-1"))], wire, self.signals)
        return trouble or self.normaliser.bytes(bytes(wire.received[start:]))

    async def get(self, request: bytes, listener: str = "main") -> str:
        """One exchange on a connection of its own."""
        wire = await self.connect(listener)
        response = await self.exchange(wire, request)
        wire.close()
        return response

    async def settled(self) -> None:
        """Return when the proxy's worker has seen everything that was sent to it before, and this process what the worker then sent.

        Three exchanges: a connection that waited before the first is accepted at the latest together with it, and read from together with the second, so that
        its end, or the first answer on it, is there before the third.
        """
        for _ in range(3):
            if self._barrier is None or self._barrier.end or self._barrier.transport.is_closing():
                _, self._barrier = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", self.proxy.ports[BARRIER])
            self._barrier.take(len(self._barrier.buffer))
            await play([PROBE, Response()], self._barrier, self.signals)

    async def counted(self, name: str) -> int:
        """By how much the stats whose names end so have grown since the case began."""
        stats = await self.proxy.stats()
        return sum(value - self._stats.get(each, 0) for each, value in stats.items() if each.endswith(name) and not _OWN.search(each))

    async def until_counted(self, name: str, count: int = 1) -> None:
        """Wait until the proxy has counted so much more, for scenarios that go on after something that they cannot see."""

        async def enough() -> bool:
            return await self.counted(name) >= count

        await until(enough)

    async def wait_lines(self, file: str, count: int) -> str:
        """The text of a log file in the proxy's folder once it has so many lines."""
        path = self.folder / file
        await until(lambda: path.exists() and path.read_text().count("\n") >= count)
        return path.read_text()

    # ---- cases ---------------------------------------------------------------------------------------------------------------------------------------

    async def run(self, case: Case) -> Outcome:
        """Run one case from a quiet proxy to a quiet proxy."""
        outcome = Outcome()
        self.signals = Signals(self.counted)
        for name, upstream in self.upstreams.items():
            upstream.begin(_play_of(case, name), self.signals)
        try:
            if callable(case.steps):
                async with asyncio.timeout(SCENARIO_LIMIT_S):
                    outcome.client = await case.steps(self)
            else:
                await self._run_script(case, outcome)
        except (OSError, AssertionError, TimeoutError, proxies.ProxyError) as error:
            outcome.trouble.append(f"{type(error).__name__}: {error}")
        for wire in self._clients:
            wire.close()
        self._clients.clear()
        await self._finish(outcome, case)
        return outcome

    async def _run_script(self, case: Case, outcome: Outcome) -> None:
        try:
            wire = await self.connect(case.on, case.tls)
        except (ssl.SSLError, ConnectionError) as error:
            outcome.fate = f"no connection: {type(error).__name__}"
            return
        if trouble := await play(case.script(), wire, self.signals):
            outcome.trouble.append(f"client: {trouble}")
        consumed = len(wire.received) - len(wire.buffer)
        outcome.fate = await self._fate(case, wire)
        if wire.http2 is not None:
            outcome.client = self.normaliser.bytes(wire.http2.text())
            return
        outcome.client = self.normaliser.bytes(_joined(bytes(wire.received[:consumed])) if case.joined else bytes(wire.received[:consumed]))
        if wire.buffer and case.then != "open":
            outcome.client = self.normaliser.bytes(bytes(wire.received))

    async def _fate(self, case: Case, wire: Wire) -> str:
        if wire.ended_by_us:
            return "closed by the client"
        if case.then == "leave":
            return "left"
        if case.then == "open" and wire.end is None and wire.http2 is not None:
            return await self._http2_fate(wire)
        if case.then == "open" and wire.end is None:
            before = len(wire.received)
            trouble = await play([PROBE, Response()], wire, self.signals)
            answer = bytes(wire.received[before:])
            if answer:
                return "open" if answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"alive") else f"open, then {self.normaliser.bytes(answer)!r}"
            return "closed" if trouble is None else f"unclear: probe {trouble}"
        trouble = await play([_END], wire, self.signals)
        return "closed" if trouble is None else f"unclear: {trouble}"

    async def _http2_fate(self, wire: Wire) -> str:
        assert wire.http2 is not None
        probe = wire.http2.next_id
        wire.http2.hidden.add(probe)
        trouble = await play(ask("GET", "/probe", authority=PROBE_HOST), wire, self.signals)
        seen = wire.http2.streams[probe]
        if not seen.events:
            return "closed" if trouble is None else f"unclear: probe {trouble}"
        return "open" if seen.data == b"alive" else f"open, then {self.normaliser.bytes(seen.text())!r}"

    async def _finish(self, outcome: Outcome, case: Case) -> None:
        """Wait until the proxy is quiet, then take down what it did."""
        await self._quiet(outcome, "downstream_cx_active", "downstream_rq_active", "upstream_rq_active")
        outcome.upstream = {
            name: [{**seen, "got": self.normaliser.bytes(seen["got"].encode("latin-1"))} for seen in upstream.seen()]
            for name, upstream in self.upstreams.items()
            if upstream.connections
        }
        for upstream in self.upstreams.values():
            outcome.trouble += upstream.notes
            upstream.end_case()
        stats = await self._quiet(outcome, "downstream_cx_active", "upstream_cx_active", "upstream_rq_active", "write_total_buffered")
        skipped = (*case.skip_stats, *_BY_THE_CLOCK)
        outcome.stats = {name: delta for name, delta in stat_deltas(self._stats, stats).items() if not any(part in name for part in skipped)}
        self._stats = stats
        self.read_log(outcome)

    async def _quiet(self, outcome: Outcome, *gauges: str) -> dict[str, int]:
        """The stats, once all gauges of these names (the admin's own apart) are zero and nothing changes any more."""
        pause, waited = 0.001, 0.0
        while True:
            await self.settled()
            stats = await self.proxy.stats()
            busy = [f"{name}={value}" for name, value in stats.items() if value and name.endswith(gauges) and not _OWN.search(name)]
            if not busy and not stat_deltas(stats, again := await self.proxy.stats()):  # a snapshot can fall between two counts of the same event
                return again
            if waited > QUIET_LIMIT_S:
                outcome.trouble.append(f"not quiet: {busy}")
                return stats
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, 0.05)

    def read_log(self, outcome: Outcome) -> None:
        """Append the new lines of the access log, the probe's apart."""
        path = self.folder / "access.log"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._log_offset)
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._log_offset += len(data)
            outcome.log += [self.normaliser.line(line) for line in data.decode("utf-8", "backslashreplace").split("\n") if line and PROBE_HOST not in line]

    async def stop(self) -> None:
        if self._barrier is not None:
            self._barrier.transport.abort()
        for upstream in self.upstreams.values():
            await upstream.stop()
        for sock in self._fillers + self._closed_ports:
            sock.close()
        self.proxy.stop()
        await asyncio.sleep(0)
        self._folder.cleanup()


def _remember_sni(connection: Any, server_name: str | None, _context: ssl.SSLContext) -> None:
    connection.server_name_seen = server_name


def _pin(path: Path, kind: str) -> str:
    """What `verify_certificate_hash` and `verify_certificate_spki` say of a certificate."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    if kind == "sha256":
        return certificate.fingerprint(hashes.SHA256()).hex()
    info = certificate.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(info).digest()).decode()


def _joined(response: bytes) -> bytes:
    """A response with its chunks put together."""
    head, empty, body = response.partition(b"\r\n\r\n")
    return head + empty + proxies.dechunk(body)


class _End:
    """Read to the end of the connection."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await wire.until(lambda: False)

    def __repr__(self) -> str:
        return "end of connection"


_END = _End()


def _play_of(case: Case, upstream: str) -> Play:
    up = case.up.get(upstream, Play()) if isinstance(case.up, dict) else case.up
    return Play([up]) if isinstance(up, list) else up


class Pair:
    """The oracle (real Envoy) and the subject, with the same configuration."""

    def __init__(self, config: Config, pki: Path, subject_command: list[str], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.show = False
        self.self_check = subject_command == proxies.envoy_command()
        self._make = lambda: (Rig(proxies.envoy_command(), config, pki, "envoy"), Rig(subject_command, config, pki, "ours"))
        self.oracle, self.subject = self._make()

    def start(self) -> None:
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        results = await asyncio.gather(self.oracle.start(), self.subject.start(), return_exceptions=True)
        for rig, result in zip((self.oracle, self.subject), results, strict=True):
            if isinstance(result, BaseException):
                await self._stop()
                raise AssertionError(f"{rig.label} did not start: {result}")

    def stop(self) -> None:
        self.loop.run_until_complete(self._stop())

    async def _stop(self) -> None:
        for rig in (self.oracle, self.subject):
            await rig.stop()

    def renew(self) -> None:
        """Start both anew, with nothing left of what was."""
        self.stop()
        for task in asyncio.all_tasks(self.loop):  # of a case that was broken off
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.oracle, self.subject = self._make()
        self.start()

    def check(self, case: Case) -> str:
        """Run the case on both; raise AssertionError with a diff where they differ. Returns "equal" or "stricter"."""
        oracle, subject = self.loop.run_until_complete(self._run(case))
        if self.show:
            print(f"\n==== {case.name}", *oracle.text(SECTIONS), sep="\n")
        if not self.oracle.proxy.alive() or not self.subject.proxy.alive():
            dead = self.oracle if not self.oracle.proxy.alive() else self.subject
            message = f"{dead.label} died: {dead.proxy.stderr()}"
            self.renew()
            raise AssertionError(message)
        if oracle.fate.startswith("unclear"):
            oracle.trouble.append(oracle.fate)
        assert case.stricter or not oracle.trouble, f"the case is not conclusive on Envoy: {oracle.trouble}\n" + "\n".join(oracle.text(SECTIONS))
        if case.stricter:
            assert not str(oracle.client).startswith(f"HTTP/1.1 {case.stricter} "), "Envoy is as strict: make it a plain case"
        if case.stricter and not self.self_check:
            _check_stricter(case, subject)
            return "stricter"
        if case.strictly:
            assert case.strictly not in str(oracle.client), "Envoy is as strict: make it a plain case"
            if not self.self_check:
                assert case.strictly in str(subject.client), f"expected {case.strictly}: {subject.client!r}"
                return "stricter"
        _tell_goodbye(oracle, subject)
        if lines := difference(oracle, subject, [section for section in SECTIONS if section not in case.skip]):
            raise AssertionError("\n".join(["differs from Envoy:", *lines, *self._stderr_tail()]))
        return "equal"

    def _stderr_tail(self) -> list[str]:
        text = self.subject.proxy.stderr()
        return ["stderr of ours:", text[-1500:]] if text else []

    async def _run(self, case: Case) -> tuple[Outcome, Outcome]:
        for_oracle = for_subject = case
        if case.stricter:
            for_oracle = replace(case, then="leave")
            for_subject = for_oracle if self.self_check or case.stricter >= 500 else replace(case, then="closed")
        oracle, subject = await asyncio.gather(self.oracle.run(for_oracle), self.subject.run(for_subject))
        return oracle, subject


def _tell_goodbye(oracle: Outcome, subject: Outcome) -> None:
    """Of most errors of a connection Envoy's peer hears nothing but its end. We always say why, and that is no difference; but no GOAWAY is one."""
    if oracle.fate == subject.fate == "closed" and "\ngoaway" not in f"\n{oracle.client}":
        subject.client = _ERROR_GOAWAY.sub("", str(subject.client))
    for name, connections in subject.upstream.items():
        for theirs, ours in zip(oracle.upstream.get(name, []), connections, strict=False):
            if theirs["end"] != "kept" and "\ngoaway" not in theirs["got"]:
                ours["got"] = _ERROR_GOAWAY.sub("", ours["got"])


_ERROR_GOAWAY = re.compile(r"(?m)^goaway last=\d+ (?!NO_ERROR)\w+\r\n\Z")


def _check_stricter(case: Case, subject: Outcome) -> None:
    wanted = f"HTTP/1.1 {case.stricter} "
    assert str(subject.client).startswith(wanted), f"expected {wanted}: {subject.client!r}"
    if case.stricter >= 500:
        return
    assert subject.fate == "closed", f"the connection must be closed: {subject.fate}"
    seen = [seen["got"] for connections in subject.upstream.values() for seen in connections if seen["got"]]
    assert case.may_begin or not seen, f"the upstream saw {seen}"
