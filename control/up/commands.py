"""`meshctl up` and `meshctl down`. `add` puts them into a parser; imports are left to when they run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from control.flags import Unusable, duration, host_and_port, mesh_config
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.model.service import ALL, OBSERVED
from control.names import is_local
from control.up.state import State, birth, default_folder, end, gone, is_alive, pause

if TYPE_CHECKING:
    from control.ads.hub import Scope

_OWN = "meshproxy"
_SHORTEST_S = 20.0
_PATIENCE_S = 15.0  # more than a process of the mesh is given to end


def add(commands: Any) -> None:
    """Add the subcommands. `commands`: what `add_subparsers` returned. Their functions raise Unusable."""
    up = commands.add_parser("up", help="run a mesh on this machine: control plane, authority, the processes of Workloads, and their sidecars")
    _add_folder(up)
    up.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS", help="of the control plane (default: any free port)")
    up.add_argument("--allow-plaintext", action="store_true", help="--listen may be an address that other machines reach: whoever does reads the whole mesh")
    up.add_argument("--proxy", default=_OWN, metavar="ENVOY", help="an Envoy for the sidecars (default: our own)")
    up.add_argument("--trust-domain", default=DEFAULT_TRUST_DOMAIN, metavar="NAME", help="of a new authority (default %(default)s)")
    up.add_argument("--otlp", default="", metavar="HOST:PORT", help="trace every request, to a collector there that takes OTLP over gRPC (usually port 4317)")
    add_scope(up)
    up.add_argument("--detach", action="store_true", help="return when it is up, and leave it running")
    up.add_argument("--sidecar-log-level", default="warning", metavar="LEVEL", help="(default %(default)s)")
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="end what `up` has started")
    _add_folder(down)
    down.set_defaults(run=_down)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")
    parser.add_argument("--state", default="", metavar="FOLDER", help="where logs, keys and what runs are kept (default: FOLDER.state)")


def add_scope(parser: argparse.ArgumentParser) -> None:
    """The flags of a `Scope`."""
    parser.add_argument(
        "--scope", default=ALL, choices=(ALL, OBSERVED), help="what sidecars are sent: what they may call, or what they have called (default %(default)s)"
    )
    parser.add_argument(
        "--forget-after",
        type=_forget_after,
        default=3600.0,
        metavar="TIME",
        help="of what was called: it is sent no more when it was not for so long (default 1h)",
    )


def _forget_after(text: str) -> float:
    """Seconds. Raises ArgumentTypeError for less than a few load reports."""
    seconds = duration(text)
    if 0 < seconds < _SHORTEST_S:
        raise argparse.ArgumentTypeError(f"at least {_SHORTEST_S:.0f}s, as proxies say every ten seconds what they called, or 0s: never")
    return seconds


def scope_of(options: argparse.Namespace) -> Scope:
    """What they say."""
    from control.ads.hub import Scope

    return Scope(options.scope == OBSERVED, options.forget_after)


def _state(options: argparse.Namespace) -> State:
    return State(options.state or default_folder(options.folder))


def _up(options: argparse.Namespace) -> int:
    if options.detach:
        return _detached(options)
    try:
        from control.up import mesh
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise Unusable("gRPC is needed: pip install 'meshproxy[control]'") from error
    from control.ca.certificates import BadCertificate
    from control.ca.keystore import StoreError

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if not os.path.isdir(options.folder):
        raise Unusable(f"{options.folder}: no such folder")
    host, _ = host_and_port(options.listen, "--listen")  # gRPC would take the port 99999 for another one
    if not is_local(host) and not options.allow_plaintext:
        raise Unusable(f"--listen {options.listen}: other machines would read the mesh's configuration; use --allow-plaintext if that is meant")
    proxy = _OWN if options.proxy == _OWN else shutil.which(options.proxy)
    if proxy is None:
        raise Unusable(f"{options.proxy}: no such program")
    state = _state(options)
    ours = False
    try:
        ours = state.lock()
        if not ours:
            raise Unusable(f"{options.folder} is up already, by process {state.read().get('pid')}")
        end(state.read().get("processes", ()), _PATIENCE_S)  # of an `up` that was killed
        state.clear()
        state.write({"pid": os.getpid(), "born": birth(os.getpid())})  # `down` ends it from now on
        chosen = mesh.Options(
            options.folder, options.trust_domain, options.listen, proxy, options.sidecar_log_level, defaults=mesh_config(options.otlp), scope=scope_of(options)
        )
        asyncio.run(_run(chosen, state))
    except OSError as error:
        raise Unusable(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except (RuntimeError, StoreError, BadCertificate, ValueError) as error:
        raise Unusable(str(error)) from error
    finally:
        if ours:
            state.clear()
        state.unlock()
    return 0


async def _run(options: Any, state: State) -> None:
    from control.up.mesh import LaptopMesh

    async def run() -> None:  # nothing of it is there before somebody can be told to end it
        await LaptopMesh(options, state).run(lambda text: print(text, flush=True))

    running = asyncio.create_task(run(), name="mesh")
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not running.cancelling():  # who asks twice does not leave anything behind either
            running.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await running


def _detached(options: argparse.Namespace) -> int:
    state = _state(options)
    if not os.path.isdir(options.folder):
        raise Unusable(f"{options.folder}: no such folder")
    said = state.read()
    if is_alive(said):  # its log is not ours to begin anew
        raise Unusable(f"{options.folder} is up already, by process {said['pid']}")
    path = state.logs / "meshctl.log"
    command = [sys.executable, "-m", "control", "up", options.folder, "--state", str(state.path), "--listen", options.listen]
    command += ["--proxy", options.proxy, "--trust-domain", options.trust_domain, "--sidecar-log-level", options.sidecar_log_level]
    command += ["--otlp", options.otlp] if options.otlp else []
    command += ["--scope", options.scope, "--forget-after", f"{int(options.forget_after)}s"]
    command += ["--allow-plaintext"] if options.allow_plaintext else []
    try:
        state.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as error:
        raise Unusable(f"{error.filename}: {error.strerror}") from error
    with path.open(encoding="utf-8", errors="replace") as log:  # what is going on, and at last what is up
        ready = False
        while process.poll() is None and not ready:
            said = state.read()
            ready = said.get("pid") == process.pid and bool(said.get("ready"))  # it says so when it has written all
            print(log.read(), end="", flush=True)
            pause()
        print(log.read(), end="", flush=True)
    if not ready:
        raise Unusable(f"it did not come up, see above, or {path}")
    unready = said.get("unready", ())
    if unready:
        print(f"meshctl: it is up, but not ready are {', '.join(unready)}: see {state.logs}", file=sys.stderr)
    return 1 if unready else 0


def _down(options: argparse.Namespace) -> int:
    state = _state(options)
    said = state.read()
    main = {"pid": said.get("pid", 0), "born": said.get("born", 0)}
    processes = list(said.get("processes", ()))
    if not is_alive(main) and not any(is_alive(one) for one in processes):
        raise Unusable(f"{options.folder} is not up")
    print(f"ending {len(processes)} processes", file=sys.stderr, flush=True)
    if is_alive(main):
        with contextlib.suppress(ProcessLookupError):
            os.kill(main["pid"], signal.SIGTERM)
        if not gone([main], _PATIENCE_S):
            end([main], 0.0, groups=False)
        processes += state.read().get("processes", ())  # of one that had to be killed
    end(processes, _PATIENCE_S)
    state.clear()
    print(f"{options.folder} is down")
    return 0
