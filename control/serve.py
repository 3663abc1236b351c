"""`meshctl serve`: the control plane as a process, and all that may go with it. `add` puts it into a parser; imports are left to when it runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import pathlib
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from control.flags import DEFAULT_ADDRESS, Unusable, duration, host_and_port, mesh_config
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.names import is_local
from control.up import commands as commands_of_up
from meshproxy.api import spiffe

if TYPE_CHECKING:
    from control.sources.reports import SharedReports

_MAX_AGE_S = 1800.0  # as Istio has it


def add(commands: Any) -> None:
    """Add the subcommand. `commands`: what `add_subparsers` returned. Its function raises Unusable."""
    serve = commands.add_parser("serve", help="serve xDS from a folder, a Kubernetes cluster, or both, which are watched")
    serve.add_argument("folder", nargs="?", default="")
    serve.add_argument("--listen", default=DEFAULT_ADDRESS, metavar="ADDRESS", help=f"where proxies connect (default {DEFAULT_ADDRESS}); port 0 takes any")
    serve.add_argument("--allow-plaintext", action="store_true", help="--listen may be an address that other machines reach: whoever does reads the whole mesh")
    serve.add_argument("--address-path", metavar="FILE", help="write the address into this file when it is served")
    serve.add_argument("--ca-dir", metavar="FOLDER", help="be the mesh's authority, too, with keys in this folder (made on first run)")
    serve.add_argument("--trust-domain", default=DEFAULT_TRUST_DOMAIN, metavar="NAME", help="of a new authority (default %(default)s)")
    serve.add_argument("--ca-socket", default="", metavar="PATH", help="a Unix socket whose callers are known by their user")
    serve.add_argument("--ca-user", action="append", default=[], metavar="UID=NAMESPACE/SERVICEACCOUNT", help="who a user is on that socket; repeat it")
    serve.add_argument("--certificate-life", type=duration, default=86400.0, metavar="TIME", help="of workloads (default 24h)")
    serve.add_argument(
        "--tls-listen",
        default="",
        metavar="ADDRESS",
        help="TLS with a certificate of the authority: certificates, and xDS for callers with a token (Istio: 15012)",
    )
    serve.add_argument("--mtls-listen", default="", metavar="ADDRESS", help="the same for callers with a certificate of the mesh: xDS, and renewal")
    serve.add_argument("--tls-name", action="append", default=[], metavar="NAME", help="a DNS name or IP address of that certificate; repeat it")
    serve.add_argument(
        "--max-connection-age",
        type=duration,
        default=None,
        metavar="TIME",
        help="proxies connect anew after it, and prove anew who they are (default: with TLS 30m, or a third of --certificate-life if that is less)",
    )
    serve.add_argument("--otlp", default="", metavar="HOST:PORT", help="have every request traced, to a collector there that takes OTLP over gRPC")
    commands_of_up.add_scope(serve)
    serve.add_argument(
        "--no-fetch-keys", action="store_true", help="ask no issuer of tokens for its keys: none of those that no proxy can fetch are known then"
    )
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
    serve.add_argument(
        "--share-readiness",
        default="",
        metavar="FOLDER",
        help="what sidecars report of their applications' readiness, other replicas that are given this folder know, too (made if it is not there)",
    )
    serve.add_argument("--token-reviews", action="store_true", help="the cluster says whose service account tokens are, also with a folder alone")
    serve.add_argument("--status-listen", default="", metavar="ADDRESS", help="HTTP in the clear: /healthz, /readyz, and /status about the sources")
    serve.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return asyncio.run(_serving(options))


async def _serving(options: argparse.Namespace) -> int:
    app_module = _needs_grpc()
    _check_addresses(options)
    _check_plaintext(options)
    _check_sources(options)
    max_age_s = _max_age(options)
    defaults = mesh_config(options.otlp)
    try:
        spiffe.check_trust_domain(options.trust_domain)
    except ValueError as error:
        raise Unusable(f"--trust-domain: {error}") from error
    async with contextlib.AsyncExitStack() as ending:
        server = await _api_server(options, ending)
        authority = _authority(options, server)
        of_authority: dict[str, Any] = {"identify": authority.admission, "handlers": authority.handlers()} if authority is not None else {}
        scope, cluster = commands_of_up.scope_of(options), _cluster(options, server)
        app = app_module.App(
            options.folder,
            trust_domain=options.trust_domain,
            defaults=defaults,
            cluster=cluster,
            scope=scope,
            max_age_s=max_age_s,
            issuers=_issuers(ending) if not options.no_fetch_keys else None,
            reports=_shared(options.share_readiness),
            **of_authority,
        )
        serving = asyncio.create_task(_until_ended(options, app, authority, server, ending), name="serve")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    return 0


def _issuers(ending: contextlib.AsyncExitStack) -> Any:
    """Who asks issuers of tokens for their keys."""
    from control.sources.issuers import over_http

    made = over_http()
    ending.push_async_callback(made.close)
    return made


def _shared(folder: str) -> SharedReports | None:
    """What replicas share. Raises Unusable."""
    if not folder:
        return None
    from control.sources.reports import SharedReports

    try:
        pathlib.Path(folder).mkdir(0o700, parents=True, exist_ok=True)
        made = SharedReports(pathlib.Path(folder))
        made.read()
        made.write({})
    except OSError as error:
        raise Unusable(f"--share-readiness {folder}: {error.strerror}") from error
    return made


def _needs_grpc() -> Any:
    try:
        import control.app
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise Unusable("gRPC is needed: pip install 'meshproxy[control]'") from error
    return control.app


def _check_addresses(options: argparse.Namespace) -> None:
    """gRPC would take the port 99999 for 34463. Raises Unusable."""
    for option, address in (("--listen", options.listen), ("--tls-listen", options.tls_listen), ("--mtls-listen", options.mtls_listen)):
        if address and not address.startswith("unix"):
            host_and_port(address, option)


def _check_plaintext(options: argparse.Namespace) -> None:
    """xDS in the clear, to whoever asks, is for one machine. Raises Unusable."""
    if not is_local(options.listen.rpartition(":")[0] if not options.listen.startswith("unix") else options.listen) and not options.allow_plaintext:
        raise Unusable(
            f"--listen {options.listen}: other machines would get the mesh's configuration in the clear, without saying who they are; "
            "use --mtls-listen for them, or --allow-plaintext if that is meant"
        )


def _check_sources(options: argparse.Namespace) -> None:
    """Raises Unusable."""
    if not options.folder and not options.kubernetes:
        raise Unusable("a folder, or --kubernetes, is needed")
    if not options.kubernetes and not options.token_reviews and (options.kubeconfig or options.context):
        raise Unusable("--kubeconfig and --context need --kubernetes or --token-reviews")
    if (options.namespace or options.write_status) and not options.kubernetes:
        raise Unusable("--namespace and --write-status need --kubernetes")


def _max_age(options: argparse.Namespace) -> float:
    """Seconds after which a connection ends, 0.0 for never.

    Certificates are renewed at half of their life: with a third of it, who has connected just before that comes again before its certificate has ended. Raises
    Unusable.
    """
    age, most = options.max_connection_age, options.certificate_life / 3
    if not options.tls_listen and not options.mtls_listen:
        return age or 0.0
    if age is not None and not 0 < age <= most:
        raise Unusable("--max-connection-age must be at most a third of --certificate-life: connections would be longer than who is at their end is known")
    return float(age or min(_MAX_AGE_S, most))


async def _api_server(options: argparse.Namespace, ending: contextlib.AsyncExitStack) -> Any:
    """The ApiServer that is asked, or None."""
    if not options.kubernetes and not options.token_reviews:
        return None
    try:
        from control.access import NoAccess, check
        from control.api_server import Access, ApiServer
    except ModuleNotFoundError as error:
        if error.name not in ("kubernetes_asyncio", "aiohttp"):
            raise
        raise Unusable("kubernetes_asyncio is needed: pip install 'meshproxy[control]'") from error
    access = Access(options.kubeconfig, options.context)
    try:
        check(access)
    except NoAccess as error:
        raise Unusable(f"{error}; --kubeconfig says where one is") from error
    made = ApiServer(access)
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


def _authority(options: argparse.Namespace, server: Any) -> Any:
    """The RunningAuthority that is asked for, or None."""
    if not options.ca_dir:
        if options.tls_listen or options.mtls_listen or options.ca_socket:
            raise Unusable("--tls-listen, --mtls-listen and --ca-socket need --ca-dir")
        return None
    from control.ca.certificates import BadCertificate
    from control.ca.keystore import StoreError
    from control.ca.rotation import Settings
    from control.ca.running import NAMES, Options, RunningAuthority

    settings = Settings(life_s=options.certificate_life, max_life_s=options.certificate_life)
    users = [_user(one, options.trust_domain) for one in options.ca_user]
    try:
        names = (*NAMES, *options.tls_name)
        reviews = _reviews(server)
        running = RunningAuthority(Options(options.ca_dir, options.trust_domain, settings, options.ca_socket, names, reviews))
        for uid, identity in users:
            running.peers.register(identity, uid=uid)
    except (StoreError, BadCertificate, ValueError) as error:
        raise Unusable(str(error)) from error
    return running


def _user(text: str, trust_domain: str) -> tuple[int, Any]:
    """A `--ca-user`: the user, and who that is. Raises Unusable."""
    uid, _, who = text.partition("=")
    namespace, slash, account = who.partition("/")
    if not (uid.isascii() and uid.isdigit() and namespace and slash and account):
        raise Unusable(f"--ca-user {text}: UID=NAMESPACE/SERVICEACCOUNT is needed")
    try:
        return int(uid), spiffe.workload(trust_domain, namespace, account)
    except ValueError as error:
        raise Unusable(f"--ca-user {text}: {error}") from error


def _reviews(server: Any) -> Any:
    """Who knows service account tokens, or None."""
    if server is None:
        return None
    from control.ca.token_review import TokenReviews

    return TokenReviews(server)


async def _until_ended(options: argparse.Namespace, app: Any, authority: Any, server: Any, ending: contextlib.AsyncExitStack) -> None:
    """Serve until cancelled. What is to be ended then is put into `ending`. Raises Unusable."""
    status = await _status_page(options, app, ending)
    watching = None
    if app.mesh.cluster is not None:
        watching = asyncio.create_task(app.mesh.cluster.run(), name="watch the cluster")
        ending.callback(watching.cancel)
        await _beside(watching, app.mesh.cluster.wait_settled())
    try:
        app.load()
        await app.wait_keys()
    except OSError as error:
        raise Unusable(f"{options.folder}: {error.strerror}") from error
    address = await _listen(options, app, authority, ending)
    if options.address_path:
        try:
            pathlib.Path(options.address_path).write_text(address, encoding="utf-8")
        except OSError as error:
            raise Unusable(f"{options.address_path}: {error.strerror}") from error
    sources = " and ".join(filter(None, (options.folder, "the cluster" if options.kubernetes else "")))
    log = logging.getLogger("meshctl")
    log.info("serving %s on %s: %d documents, %d complaints", sources, address, app.mesh.store.right, len(app.mesh.troubles))
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
    """Open all ports; returns the address of the first. Raises Unusable."""
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
        raise Unusable(f"cannot listen on {where}: {_why_not(where) or error}") from error
    await app.server.start()
    if authority is not None:
        try:
            await authority.start()
        except OSError as error:
            await app.server.stop()
            raise Unusable(f"{options.ca_socket}: {error.strerror}") from error
        ending.push_async_callback(authority.stop)
    ending.push_async_callback(app.server.stop)
    return f"{options.listen.rpartition(':')[0]}:{port}"


def _why_not(address: str) -> str:
    """What is in the way of listening there, which gRPC does not say."""
    from control.listening import why_not

    return "" if address.startswith("unix") else why_not(*host_and_port(address, ""))


async def _status_page(options: argparse.Namespace, app: Any, ending: contextlib.AsyncExitStack) -> Any:
    """The StatusPage that is asked for, or None. Raises Unusable."""
    if not options.status_listen:
        return None
    from control.status_page import StatusPage

    page = StatusPage(app.mesh, app.issuers)
    try:
        await page.start(*host_and_port(options.status_listen, "--status-listen"))
    except OSError as error:
        raise Unusable(f"cannot listen on {options.status_listen}: {error.strerror}") from error
    ending.push_async_callback(page.stop)
    return page


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
