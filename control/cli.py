"""The `meshctl` command.

What a subcommand needs is imported when it runs: `validate` works without gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from control.ca import commands as commands_of_authority
from control.model.telemetry import NO_MESH_CONFIG, to_collector
from control.names import is_local
from control.output import plain, show, table
from control.plan import commands as commands_of_plan
from control.up import commands as commands_of_up
from meshproxy.version import version_line

DEFAULT_ADDRESS = "127.0.0.1:15010"  # the port on which Istio's control plane serves xDS in the clear


class UsageError(Exception):
    """Something that the user can mend; the text says what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for what is wrong with documents (of `diff`: for what they change), 2 for what is wrong with the call."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (UsageError, commands_of_authority.Unusable) as error:
        print(f"meshctl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="meshctl", description="The control plane of a mesh, from a folder of YAML.")
    parser.add_argument("--version", action="version", version=version_line())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve xDS from a folder, a Kubernetes cluster, or both, which are watched")
    serve.add_argument("folder", nargs="?", default="")
    serve.add_argument("--listen", default=DEFAULT_ADDRESS, metavar="ADDRESS", help=f"where proxies connect (default {DEFAULT_ADDRESS}); port 0 takes any")
    serve.add_argument("--allow-plaintext", action="store_true", help="--listen may be an address that other machines reach: whoever does reads the whole mesh")
    serve.add_argument("--address-path", metavar="FILE", help="write the address into this file when it is served")
    serve.add_argument("--ca-dir", metavar="FOLDER", help="be the mesh's authority, too, with keys in this folder (made on first run)")
    serve.add_argument("--trust-domain", default=commands_of_authority.DEFAULT_TRUST_DOMAIN, metavar="NAME", help="of a new authority (default %(default)s)")
    serve.add_argument("--ca-socket", default="", metavar="PATH", help="a Unix socket whose callers are known by their user")
    serve.add_argument("--ca-user", action="append", default=[], metavar="UID=NAMESPACE/SERVICEACCOUNT", help="who a user is on that socket; repeat it")
    serve.add_argument("--certificate-life", type=commands_of_authority.duration, default=86400.0, metavar="TIME", help="of workloads (default 24h)")
    serve.add_argument(
        "--tls-listen",
        default="",
        metavar="ADDRESS",
        help="TLS with a certificate of the authority: certificates, and xDS for callers with a token (Istio: 15012)",
    )
    serve.add_argument("--mtls-listen", default="", metavar="ADDRESS", help="the same for callers with a certificate of the mesh: xDS, and renewal")
    serve.add_argument("--tls-name", action="append", default=[], metavar="NAME", help="a DNS name or IP address of that certificate; repeat it")
    serve.add_argument("--otlp", default="", metavar="HOST:PORT", help="have every request traced, to a collector there that takes OTLP over gRPC")
    commands_of_up.add_scope(serve)
    serve.add_argument("--kubernetes", action="store_true", help="the objects of a cluster: in a pod, its own; elsewhere, that of the kubeconfig")
    serve.add_argument("--kubeconfig", default="", metavar="FILE", help="instead of the pod's service account, $KUBECONFIG or ~/.kube/config")
    serve.add_argument("--context", default="", metavar="NAME", help="of the kubeconfig, instead of its current one")
    serve.add_argument("--namespace", action="append", default=[], metavar="NAME", help="only this namespace of the cluster; repeat it")
    serve.add_argument(
        "--write-status",
        default="",
        metavar="NAMESPACE",
        help="write conditions of the Gateway API, and Events, if we hold the Lease `meshctl` there",
    )
    serve.add_argument("--token-reviews", action="store_true", help="the cluster says whose service account tokens are, also with a folder alone")
    serve.add_argument("--status-listen", default="", metavar="ADDRESS", help="HTTP in the clear: /healthz, /readyz, and /status about the sources")
    serve.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    serve.set_defaults(run=_serve)

    validate = commands.add_parser("validate", help="say what is wrong with a folder")
    validate.add_argument("folder")
    _add_output(validate)
    validate.set_defaults(run=_validate)

    status = commands.add_parser("proxy-status", help="which proxies are connected, and whether they have what they should")
    _add_server(status)
    _add_output(status)
    status.set_defaults(run=_proxy_status)

    config = commands.add_parser("proxy-config", help="what one proxy has")
    config.add_argument("kind", choices=("clusters", "endpoints", "listeners", "routes", "loads"))
    config.add_argument("proxy", help="name.namespace, as proxy-status shows it")
    config.add_argument("--name", default="", help="only the resource of this name")
    _add_server(config)
    _add_output(config)
    config.set_defaults(run=_proxy_config)

    observed = commands.add_parser("observed", help="what proxies have been seen to call; with -o yaml, as Sidecars that let them see just that")
    _add_server(observed)
    _add_output(observed)
    observed.set_defaults(run=_observed)

    bootstrap = commands.add_parser("bootstrap", help="print the bootstrap of a sidecar, or of a gRPC client")
    bootstrap.add_argument("proxy", help="name of the workload, or name.namespace")
    bootstrap.add_argument("--for", dest="target", default="envoy", choices=("envoy", "grpc"))
    bootstrap.add_argument("--sotw", action="store_true", help="the state of the world instead of delta")
    bootstrap.add_argument("--admin-port", type=int, default=0)
    bootstrap.add_argument("--sds", default="", metavar="PATH", help="the Unix socket of the agent that has its certificates")
    bootstrap.add_argument(
        "--authority", action="append", default=[], metavar="ADDRESS", help="a sidecar of ours gets certificates itself, from unix:PATH or host:port; repeat it"
    )
    bootstrap.add_argument("--roots", default="", metavar="FILE", help="whom to trust at host:port (`meshctl certs --bundle`)")
    bootstrap.add_argument("--join-token-file", default="", metavar="FILE", help="what it shows the authority the first time")
    bootstrap.add_argument(
        "--token-file", default="", metavar="FILE", help="a service account token instead; without --sds and --authority, what it shows for xDS"
    )
    bootstrap.add_argument("--tls", action="store_true", help="TLS also to a control plane of this machine; to others it is the rule")
    bootstrap.add_argument("--allow-plaintext", action="store_true", help="no TLS to control planes of other machines")
    bootstrap.add_argument("--certificates", default="", metavar="FOLDER", help="for gRPC: where `meshctl agent --files` writes them")
    _add_server(bootstrap, several=True)
    bootstrap.add_argument("-o", "--output", default="yaml", choices=("json", "yaml"))
    bootstrap.set_defaults(run=_bootstrap)

    commands_of_plan.add(commands, _add_server, _server)
    commands_of_up.add(commands)
    commands_of_authority.add(commands)
    return parser


def _add_server(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    where = f"where the control plane serves (default: that of --folder, of what is up here, or {DEFAULT_ADDRESS})"
    if several:
        parser.add_argument("--server", action="append", metavar="ADDRESS", help=f"{where}; repeat it for replicas")
    else:
        parser.add_argument("--server", metavar="ADDRESS", help=where)
    parser.add_argument("--folder", default="", help="that `meshctl up` runs, or its state folder: its control plane is asked")


def _server(options: argparse.Namespace) -> str:
    """The address of the control plane that is meant. Raises UsageError."""
    from control.up.state import running

    if options.server:
        return str(options.server)
    if options.folder:
        found = running(options.folder)
        if not found:
            raise UsageError(f"{options.folder} is not up")
        return found
    here = {found for path in (".", *sorted(pathlib.Path().glob("*.state"))) if (found := running(str(path)))}
    if len(here) > 1:
        raise UsageError("several meshes are up here: say which with --folder or --server")
    return here.pop() if here else DEFAULT_ADDRESS


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="table", choices=("table", "json", "yaml"))


# --- serve


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return asyncio.run(_serving(options))


async def _serving(options: argparse.Namespace) -> int:
    app_module = _needs_grpc()
    _check_plaintext(options)
    _check_sources(options)
    try:
        defaults = to_collector(options.otlp) if options.otlp else NO_MESH_CONFIG
    except ValueError as error:
        raise UsageError(f"--otlp {error}") from error
    async with contextlib.AsyncExitStack() as ending:
        server = await _api_server(options, ending)
        authority = _authority(options, server)
        of_authority: dict[str, Any] = {"identify": authority.admission, "handlers": authority.handlers()} if authority is not None else {}
        scope, cluster = commands_of_up.scope_of(options), _cluster(options, server)
        app = app_module.App(options.folder, trust_domain=options.trust_domain, defaults=defaults, cluster=cluster, scope=scope, **of_authority)
        serving = asyncio.create_task(_until_ended(options, app, authority, server, ending), name="serve")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    return 0


async def _until_ended(options: argparse.Namespace, app: Any, authority: Any, server: Any, ending: contextlib.AsyncExitStack) -> None:
    """Serve until cancelled. What is to be ended then is put into `ending`. Raises UsageError."""
    status = await _status_page(options, app, ending)
    watching = None
    if app.mesh.cluster is not None:
        watching = asyncio.create_task(app.mesh.cluster.run(), name="watch the cluster")
        ending.callback(watching.cancel)
        await _beside(watching, app.mesh.cluster.wait_settled())
    try:
        app.load()
    except OSError as error:
        raise UsageError(f"{options.folder}: {error.strerror}") from error
    address = await _listen(options, app, authority, ending)
    if options.address_path:
        pathlib.Path(options.address_path).write_text(address, encoding="utf-8")
    sources = " and ".join(filter(None, (options.folder, "the cluster" if options.kubernetes else "")))
    log = logging.getLogger("meshctl")
    log.info("serving %s on %s: %d documents, %d complaints", sources, address, len(app.mesh.store.objects), len(app.mesh.troubles))
    if status is not None:
        status.ready = True
    writer = _status_writer(options, server, app, ending)
    await _beside(watching, app.run(writer.wake if writer is not None else None))


async def _beside(task: asyncio.Task[None] | None, doing: Coroutine[Any, Any, None]) -> None:
    """Do something for as long as a task does not fail: then it fails, too."""
    if task is None:
        await doing
        return
    other = asyncio.ensure_future(doing)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        (other if other.done() else task).result()
    finally:
        other.cancel()


async def _listen(options: argparse.Namespace, app: Any, authority: Any, ending: contextlib.AsyncExitStack) -> str:
    """Open all ports; returns the address of the first. Raises UsageError."""
    log = logging.getLogger("meshctl")
    where = options.listen
    try:
        port = app.server.listen(where)
        if authority is not None:
            for inner in authority.inner:
                app.server.listen(inner)
            for address, mutual in ((options.tls_listen, False), (options.mtls_listen, True)):
                if address:
                    where = address
                    bound = app.server.listen(where, authority.credentials(mutual=mutual))
                    log.info("%s on %s:%d", "mutual TLS" if mutual else "TLS", where.rpartition(":")[0], bound)
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {where}: {error}") from error
    await app.server.start()
    if authority is not None:
        try:
            await authority.start()
        except OSError as error:
            await app.server.stop()
            raise UsageError(f"{options.ca_socket}: {error.strerror}") from error
        ending.push_async_callback(authority.stop)
    ending.push_async_callback(app.server.stop)
    return f"{options.listen.rpartition(':')[0]}:{port}"


def _check_sources(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    if not options.folder and not options.kubernetes:
        raise UsageError("a folder, or --kubernetes, is needed")
    if not options.kubernetes and not options.token_reviews and (options.kubeconfig or options.context):
        raise UsageError("--kubeconfig and --context need --kubernetes or --token-reviews")
    if (options.namespace or options.write_status) and not options.kubernetes:
        raise UsageError("--namespace and --write-status need --kubernetes")


async def _api_server(options: argparse.Namespace, ending: contextlib.AsyncExitStack) -> Any:
    """The ApiServer that is asked, or None."""
    if not options.kubernetes and not options.token_reviews:
        return None
    try:
        from control.api_server import Access, ApiServer
    except ModuleNotFoundError as error:
        if error.name not in ("kubernetes_asyncio", "aiohttp"):
            raise
        raise UsageError("kubernetes_asyncio is needed: pip install 'meshproxy[control]'") from error
    made = ApiServer(Access(options.kubeconfig, options.context))
    ending.push_async_callback(made.close)
    return made


def _cluster(options: argparse.Namespace, server: Any) -> Any:
    """What makes the source of a cluster's objects, or None."""
    if not options.kubernetes:
        return None
    from control.model.gateway import GATEWAY_API
    from control.sources.kubernetes import Kubernetes

    whole = frozenset({GATEWAY_API}) if options.write_status else frozenset()
    return lambda store: Kubernetes(server, store, tuple(options.namespace), whole=whole)


def _status_writer(options: argparse.Namespace, server: Any, app: Any, ending: contextlib.AsyncExitStack) -> Any:
    """The Writer that is asked for, at work, or None."""
    if not options.write_status:
        return None
    import secrets
    import socket

    from control.status.lease import Leadership
    from control.status.writer import Writer

    writer = Writer(server, app.mesh)
    leadership = Leadership(server, options.write_status, "meshctl", f"{socket.gethostname()}-{secrets.token_hex(4)}", writer.wake)
    for doing, name in ((leadership.run(), "the Lease"), (writer.run(leadership), "write status")):
        task = asyncio.create_task(doing, name=name)
        ending.push_async_callback(_cancelled, task)
    return writer


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _status_page(options: argparse.Namespace, app: Any, ending: contextlib.AsyncExitStack) -> Any:
    """The StatusPage that is asked for, or None. Raises UsageError."""
    if not options.status_listen:
        return None
    from control.status_page import StatusPage

    page = StatusPage(app.mesh)
    try:
        await page.start(*_host_and_port(options.status_listen, "--status-listen"))
    except OSError as error:
        raise UsageError(f"cannot listen on {options.status_listen}: {error.strerror}") from error
    ending.push_async_callback(page.stop)
    return page


def _check_plaintext(options: argparse.Namespace) -> None:
    """xDS in the clear, to whoever asks, is for one machine. Raises UsageError."""
    if not is_local(options.listen.rpartition(":")[0] if not options.listen.startswith("unix") else options.listen) and not options.allow_plaintext:
        raise UsageError(
            f"--listen {options.listen}: other machines would get the mesh's configuration in the clear, without saying who they are; "
            "use --mtls-listen for them, or --allow-plaintext if that is meant"
        )


def _authority(options: argparse.Namespace, server: Any) -> Any:
    """The RunningAuthority that is asked for, or None."""
    if not options.ca_dir:
        if options.tls_listen or options.mtls_listen or options.ca_socket:
            raise UsageError("--tls-listen, --mtls-listen and --ca-socket need --ca-dir")
        return None
    from control.ca.certificates import BadCertificate
    from control.ca.keystore import StoreError
    from control.ca.rotation import Settings
    from control.ca.running import NAMES, Options, RunningAuthority
    from meshproxy.api import spiffe

    settings = Settings(life_s=options.certificate_life, max_life_s=options.certificate_life)
    try:
        names = (*NAMES, *options.tls_name)
        reviews = _reviews(server)
        running = RunningAuthority(Options(options.ca_dir, options.trust_domain, settings, options.ca_socket, names, reviews))
        for one in options.ca_user:
            uid, _, who = one.partition("=")
            namespace, _, account = who.partition("/")
            running.peers.register(spiffe.workload(options.trust_domain, namespace, account), uid=int(uid))
    except (StoreError, BadCertificate, ValueError) as error:
        raise UsageError(str(error)) from error
    return running


def _reviews(server: Any) -> Any:
    """Who knows service account tokens, or None."""
    if server is None:
        return None
    from control.ca.token_review import TokenReviews

    return TokenReviews(server)


def _needs_grpc() -> Any:
    try:
        import control.app
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise UsageError("gRPC is needed: pip install 'meshproxy[control]'") from error
    return control.app


# --- the others


def _validate(options: argparse.Namespace) -> int:
    import time

    from control.kinds.store import Store
    from control.sources.folder import Folder

    store = Store()
    try:
        Folder(options.folder, store).scan(time.time_ns())
    except OSError as error:
        raise UsageError(f"{options.folder}: {error.strerror}") from error
    store.settle()
    if options.output == "table":
        for trouble in store.troubles:
            print(trouble)
        print(f"{len(store.objects)} documents are right, {len(store.troubles)} complaints")
    else:
        complaints = [
            {
                "file": trouble.file,
                "document": trouble.place + 1,
                "object": str(trouble.identity or ""),
                "path": trouble.problem.path,
                "why": trouble.problem.why,
                "kind": trouble.problem.kind,
            }
            for trouble in store.troubles
        ]
        print(show({"right": len(store.objects), "complaints": complaints}, options.output))
    return 1 if store.troubles else 0


def _proxy_status(options: argparse.Namespace) -> int:
    from control import query

    try:
        proxies = query.proxy_status(query.ask(_server(options), contents=False))
    except query.QueryError as error:
        raise UsageError(str(error)) from error
    print(query.status_table(proxies) if options.output == "table" else show(proxies, options.output))
    return 0


def _proxy_config(options: argparse.Namespace) -> int:
    from control import query

    try:
        response = query.ask(_server(options), proxy=options.proxy, contents=True)
        found = query.resources(response, query.TYPES[options.kind], options.proxy)
    except query.QueryError as error:
        raise UsageError(str(error)) from error
    if options.name:
        found = [one for one in found if options.name == (one.cluster_name if options.kind in ("endpoints", "loads") else one.name)]
    print(query.resource_table(options.kind, found) if options.output == "table" else show([plain(one) for one in found], options.output))
    return 0


def _observed(options: argparse.Namespace) -> int:
    from control import observed, query

    try:
        found = observed.observed(query.ask(_server(options), contents=True))
    except query.QueryError as error:
        raise UsageError(str(error)) from error
    if options.output == "table":
        rows = [(f"{one.name}.{one.namespace}", host, str(one.requests.get(host, "-"))) for one in found for host in sorted(one.hosts)]
        print(table([("PROXY", "CALLS", "REQUESTS"), *rows]))
        return 0
    made = list(observed.sidecars(found))
    print("\n---\n".join(show(one, options.output) for one in made) if options.output == "yaml" else show(made, options.output))
    return 0


def _bootstrap(options: argparse.Namespace) -> int:
    from control import bootstrap

    name, _, namespace = options.proxy.partition(".")
    servers = [_host_and_port(one) for one in options.server or [_server(options)]]
    beyond = next((host for host, _ in servers if not is_local(host)), "") if not options.allow_plaintext else ""
    if options.target == "grpc":
        tls = bool(options.tls or beyond)
        if tls and not options.certificates:
            why = f"{beyond} is another machine, where" if beyond else "by TLS"
            raise UsageError(f"{why} a gRPC client must say who it is: by the certificate in --certificates; --allow-plaintext goes without")
        made = bootstrap.grpc(name, namespace or "default", servers, certificates=options.certificates, tls=tls)
    else:
        secure = _secure(options, beyond) if options.tls or beyond else None
        made = bootstrap.envoy(name, namespace or "default", servers, delta=not options.sotw, admin_port=options.admin_port, sds=options.sds, secure=secure)
        if options.authority:
            if not options.roots and not all(one.startswith("unix:") for one in options.authority):
                raise UsageError("--roots is needed with host:port: whoever answers there will be trusted with a token")
            try:
                identity = bootstrap.Identity(options.authority, options.roots, options.token_file, options.join_token_file)
                made = bootstrap.with_identity(made, identity)
            except ValueError as error:
                raise UsageError(str(error)) from error
    print(show(made, options.output))
    return 0


def _secure(options: argparse.Namespace, beyond: str) -> Any:
    """How a proxy shows who it is: by its certificate, or by a token. Raises UsageError."""
    from control.bootstrap import Secure

    if options.sds or options.authority:
        return Secure()
    if not options.token_file or not options.roots:
        why = f"{beyond} is another machine, where" if beyond else "by TLS"
        raise UsageError(
            f"{why} a proxy must say who it is: by the certificate of --sds or --authority, or by --token-file with --roots; --allow-plaintext goes without"
        )
    try:
        return Secure(pathlib.Path(options.token_file).read_text(encoding="ascii").strip(), options.roots)
    except (OSError, ValueError) as error:
        raise UsageError(f"{options.token_file}: {error}") from error


def _host_and_port(address: str, option: str = "--server") -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{option} {address}: host:port is needed")
    return host.strip("[]"), int(port)
