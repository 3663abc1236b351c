"""The `meshctl` command.

What a subcommand needs is imported when it runs: `validate` works without gRPC.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from control import serve
from control.ca import commands as commands_of_authority
from control.flags import DEFAULT_ADDRESS, Unusable, host_and_port
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.names import is_local
from control.output import plain, show, table
from control.plan import commands as commands_of_plan
from control.up import commands as commands_of_up
from meshproxy.version import version_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for what is wrong with documents (of `diff`: for what they change), 2 for what is wrong with the call."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except Unusable as error:
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
    serve.add(commands)
    _add_queries(commands)
    _add_bootstrap(commands)
    commands_of_plan.add(commands, _add_server, _server)
    commands_of_up.add(commands)
    commands_of_authority.add(commands)
    return parser


def _add_queries(commands: Any) -> None:
    validate = commands.add_parser("validate", help="say what is wrong with a folder, or with one file")
    validate.add_argument("folder", metavar="FOLDER|FILE")
    validate.add_argument("--trust-domain", default=DEFAULT_TRUST_DOMAIN, metavar="NAME", help="as the control plane has it (default %(default)s)")
    _add_output(validate)
    validate.set_defaults(run=_validate)

    status = commands.add_parser("proxy-status", help="which proxies are connected, and whether they have what they should")
    _add_server(status)
    _add_output(status)
    status.set_defaults(run=_proxy_status)

    config = commands.add_parser("proxy-config", help="what one proxy has")
    config.add_argument("kind", choices=("clusters", "endpoints", "listeners", "routes", "secrets", "loads"))
    config.add_argument("proxy", help="name.namespace, as proxy-status shows it; name is name.default")
    config.add_argument("--name", default="", help="only the resource of this name")
    config.add_argument("--admin", default="", metavar="ADDRESS", help="of secrets: ask the proxy itself, there (of what is up here, it is asked anyhow)")
    _add_server(config)
    _add_output(config)
    config.set_defaults(run=_proxy_config)

    observed = commands.add_parser("observed", help="what proxies have been seen to call; with -o yaml, as Sidecars that let them see just that")
    _add_server(observed)
    _add_output(observed)
    observed.set_defaults(run=_observed)


def _add_bootstrap(commands: Any) -> None:
    bootstrap = commands.add_parser("bootstrap", help="print the bootstrap of a sidecar, or of a gRPC client")
    bootstrap.add_argument("proxy", help="name of the workload, or name.namespace")
    bootstrap.add_argument("--for", dest="target", default="envoy", choices=("envoy", "grpc"))
    bootstrap.add_argument("--sotw", action="store_true", help="the state of the world instead of delta")
    bootstrap.add_argument("--admin-port", type=int, default=0)
    bootstrap.add_argument("--sds", default="", metavar="PATH", help="the Unix socket of the agent that has its certificates")
    bootstrap.add_argument(
        "--authority", action="append", default=[], metavar="ADDRESS", help="a sidecar of ours gets certificates itself, from unix:PATH or host:port; repeat it"
    )
    bootstrap.add_argument("--workload-api", default="", metavar="unix:PATH", help="or from a SPIRE agent's socket")
    bootstrap.add_argument("--roots", default="", metavar="FILE", help="whom to trust at host:port (`meshctl certs --bundle`)")
    bootstrap.add_argument("--join-token-file", default="", metavar="FILE", help="what it shows the authority the first time")
    bootstrap.add_argument(
        "--token-file", default="", metavar="FILE", help="a service account token instead; without --sds and --authority, what it shows for xDS"
    )
    bootstrap.add_argument("--group", default="", metavar="NAME", help="it registers itself as a workload of this WorkloadGroup of its namespace")
    bootstrap.add_argument("--address", default="", metavar="IP", help="with --group: where others reach it")
    bootstrap.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="with --group: beside the group's labels; repeat it")
    bootstrap.add_argument("--locality", default="", metavar="REGION/ZONE", help="where it is: what zone-aware balancing needs to know")
    bootstrap.add_argument("--readiness", action="store_true", help="it asks the application beside it, by the workload's readinessProbe, and reports")
    bootstrap.add_argument("--tls", action="store_true", help="TLS also to a control plane of this machine; to others it is the rule")
    bootstrap.add_argument("--allow-plaintext", action="store_true", help="no TLS to control planes of other machines")
    bootstrap.add_argument("--documents", default="", metavar="FOLDER", help="put into it what EnvoyFilters in this folder say of bootstraps")
    bootstrap.add_argument("--certificates", default="", metavar="FOLDER", help="for gRPC: where `meshctl agent --files` writes them")
    _add_server(bootstrap, several=True)
    bootstrap.add_argument("-o", "--output", default="yaml", choices=("json", "yaml"))
    bootstrap.set_defaults(run=_bootstrap)


def _add_server(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    where = f"where the control plane serves (default: that of --folder, of what is up here, or {DEFAULT_ADDRESS})"
    if several:
        parser.add_argument("--server", action="append", metavar="ADDRESS", help=f"{where}; repeat it for replicas")
    else:
        parser.add_argument("--server", metavar="ADDRESS", help=where)
    parser.add_argument("--folder", default="", help="that `meshctl up` runs, or its state folder: its control plane is asked")


def _server(options: argparse.Namespace) -> str:
    """The address of the control plane that is meant. Raises Unusable."""
    from control.up.state import running

    if options.server:
        return str(options.server)
    if options.folder:
        found = running(options.folder)
        if not found:
            raise Unusable(f"{options.folder} is not up")
        return found
    here = {found for path in (".", *sorted(pathlib.Path().glob("*.state"))) if (found := running(str(path)))}
    if len(here) > 1:
        raise Unusable("several meshes are up here: say which with --folder or --server")
    return here.pop() if here else DEFAULT_ADDRESS


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="table", choices=("table", "json", "yaml"))


def _validate(options: argparse.Namespace) -> int:
    import time

    from control.kinds.store import Store
    from control.plan import files
    from control.progress import each
    from control.sources.folder import Folder

    try:
        if os.path.isfile(options.folder):
            store = files.store_of(files.read(options.folder), options.trust_domain)
        else:
            store = Store(options.trust_domain)
            Folder(options.folder, store, lambda names: each(names, "reading files")).scan(time.time_ns())
            store.settle()
    except files.Unreadable as error:
        raise Unusable(str(error)) from error
    except OSError as error:
        raise Unusable(f"{options.folder}: {error.strerror}") from error
    notes = [] if os.path.isfile(options.folder) else _notes(store, options.trust_domain)  # one file is seldom all of a mesh
    if options.output == "table":
        for trouble in store.troubles:
            print(trouble)
        for file, document, identity, what in notes:
            print(f"{file}: document {document} ({identity}): note: {what}")
        print(f"{store.right} documents are right, {len(store.troubles)} complaints")
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
        told = [{"file": file, "document": document, "object": identity, "what": what} for file, document, identity, what in notes]
        print(show({"right": store.right, "complaints": complaints, "notes": told}, options.output))
    return 1 if store.troubles else 0


def _notes(store: Any, trust_domain: str) -> list[tuple[str, int, str, str]]:
    """(file, document, object, what of it leads nowhere), in the order of files."""
    from control.model.snapshot import build
    from control.plan.loose import loose_ends

    places = store.places
    config = build(store.objects, None, trust_domain).config
    found = ((places[identity], identity, what) for identity, what in loose_ends(store.objects, config) if identity in places)
    return [(file, index + 1, str(identity), what) for (file, index), identity, what in sorted(found)]


def _proxy_status(options: argparse.Namespace) -> int:
    from control import query

    try:
        server = _server(options)
        proxies = query.proxy_status(query.ask(server, contents=False))
    except query.QueryError as error:
        raise Unusable(str(error)) from error
    if options.output != "table":
        print(show(proxies, options.output))
        return 0
    print(query.status_table(proxies))
    if complaints := _said(options, server).get("complaints", ()):
        print("\n".join(["", "documents that are wrong:", *complaints]))
    return 0


def _said(options: argparse.Namespace, server: str) -> dict[str, Any]:
    """What is known of the mesh with this control plane, if `meshctl up` runs it here."""
    from control.up.state import said_by

    folders = [options.folder] if options.folder else [".", *map(str, sorted(pathlib.Path().glob("*.state")))]
    return next(filter(None, (said_by(folder, server) for folder in folders)), {})


def _proxy_config(options: argparse.Namespace) -> int:
    import datetime as dt

    from control import query
    from control.held import secret_table

    if options.admin and options.kind != "secrets":
        raise Unusable("--admin is for secrets")
    try:
        found = _held(options) if options.kind == "secrets" else _sent(options)
    except query.QueryError as error:
        raise Unusable(str(error)) from error
    if options.name:
        found = [one for one in found if options.name == (one.cluster_name if options.kind in ("endpoints", "loads") else one.name)]
    if options.output != "table":
        print(show([plain(one) for one in found], options.output))
    elif options.kind == "secrets":
        print(secret_table(found, dt.datetime.now(dt.UTC)))
        if not found:
            print("meshctl: the control plane has sent it none; which certificates it has itself, its admin address would tell: --admin", file=sys.stderr)
    else:
        print(query.resource_table(options.kind, found))
    return 0


def _sent(options: argparse.Namespace) -> list[Any]:
    """What a proxy was sent of one type. Raises Unusable and QueryError."""
    from control import query

    server = _server(options)
    proxy = query.node_id(query.ask(server, contents=False), options.proxy)
    response = query.ask(server, proxy=proxy, contents=True)
    return query.resources(response, query.TYPES[options.kind], options.proxy)


def _held(options: argparse.Namespace) -> list[Any]:
    """The Secrets of a proxy: those that it has, where it can be asked, or else those that it was sent. Raises Unusable and QueryError."""
    from control import held

    admin = options.admin
    if not admin:
        proxy = options.proxy if "." in options.proxy else f"{options.proxy}.default"
        workloads = _said(options, _server(options)).get("workloads", ())
        admin = next((one["admin"] for one in workloads if f"{one['name']}.{one['namespace']}" == proxy), "")
    return held.of_admin(*host_and_port(admin, "--admin")) if admin else _sent(options)


def _observed(options: argparse.Namespace) -> int:
    from control import observed, query

    try:
        found = observed.observed(query.ask(_server(options), contents=True))
    except query.QueryError as error:
        raise Unusable(str(error)) from error
    if options.output == "table":
        rows = [(f"{one.name}.{one.namespace}", host, str(one.requests.get(host, "-"))) for one in found for host in sorted(one.hosts)]
        print(table([("PROXY", "CALLS", "REQUESTS"), *rows]))
        return 0
    made = list(observed.sidecars(found))
    print("\n---\n".join(show(one, options.output) for one in made) if options.output == "yaml" else show(made, options.output))
    return 0


def _bootstrap(options: argparse.Namespace) -> int:
    from control import bootstrap
    from control.kinds.common import locality_of

    name, _, namespace = options.proxy.partition(".")
    servers = [host_and_port(one) for one in options.server or [_server(options)]]
    beyond = next((host for host, _ in servers if not is_local(host)), "") if not options.allow_plaintext else ""
    if options.target == "grpc":
        tls = bool(options.tls or beyond)
        if tls and not options.certificates:
            why = f"{beyond} is another machine, where" if beyond else "by TLS"
            raise Unusable(f"{why} a gRPC client must say who it is: by the certificate in --certificates; --allow-plaintext goes without")
        made = bootstrap.grpc(name, namespace or "default", servers, certificates=options.certificates, tls=tls)
    else:
        secure = _secure(options, beyond) if options.tls or beyond else None
        made = bootstrap.envoy(
            name,
            namespace or "default",
            servers,
            delta=not options.sotw,
            admin_port=options.admin_port,
            sds=options.sds,
            secure=secure,
            readiness=options.readiness,
            locality=locality_of(options.locality),
            group=_group(options),
        )
        if options.authority:
            if not options.roots and not all(one.startswith("unix:") for one in options.authority):
                raise Unusable("--roots is needed with host:port: whoever answers there will be trusted with a token")
            try:
                identity = bootstrap.Identity(options.authority, options.roots, options.token_file, options.join_token_file)
                made = bootstrap.with_identity(made, identity)
            except ValueError as error:
                raise Unusable(str(error)) from error
        if options.workload_api:
            if options.authority or options.sds or not options.workload_api.startswith("unix:/"):
                raise Unusable("--workload-api is unix:/PATH, and instead of --authority and --sds")
            made = bootstrap.with_workload_api(made, options.workload_api.removeprefix("unix:"))
        if options.documents:
            made = _with_patches(made, options.documents, name, namespace or "default")
    print(show(made, options.output))
    return 0


def _group(options: argparse.Namespace) -> Any:
    """The WorkloadGroup that a proxy registers itself in, or None. Raises Unusable."""
    from control.bootstrap import Group
    from control.names import is_ip

    if not options.group:
        if options.address or options.label:
            raise Unusable("--address and --label are for proxies that register themselves, with --group")
        return None
    if not is_ip(options.address):
        raise Unusable(f"--address {options.address}: an IP address is needed, at which others reach what registers itself")
    labels = dict(one.partition("=")[::2] for one in options.label)
    for one in options.label:
        if not one.partition("=")[1] or one.startswith("="):
            raise Unusable(f"--label {one}: KEY=VALUE is needed")
    return Group(options.group, options.address, labels)


def _with_patches(made: dict[str, Any], folder: str, name: str, namespace: str) -> dict[str, Any]:
    """A bootstrap with what the EnvoyFilters of a folder say of it. Raises Unusable."""
    from control import bootstrap
    from control.app import Mesh

    mesh = Mesh(folder, "")  # bootstraps do not depend on the trust domain
    try:
        mesh.look()
    except OSError as error:
        raise Unusable(f"{folder}: {error.strerror}") from error
    mesh.settle()
    for trouble in mesh.troubles:
        print(f"meshctl: {trouble}", file=sys.stderr)
    try:
        return bootstrap.with_patches(made, bootstrap.patches_for(mesh.snapshot, name, namespace))
    except ValueError as error:
        raise Unusable(str(error)) from error


def _secure(options: argparse.Namespace, beyond: str) -> Any:
    """How a proxy shows who it is: by its certificate, or by a token. Raises Unusable."""
    from control.bootstrap import Secure

    if options.sds or options.authority or options.workload_api:
        return Secure()
    if not options.token_file or not options.roots:
        why = f"{beyond} is another machine, where" if beyond else "by TLS"
        raise Unusable(
            f"{why} a proxy must say who it is: by the certificate of --sds, --authority or --workload-api, or by --token-file with --roots; "
            "--allow-plaintext goes without"
        )
    try:
        return Secure(pathlib.Path(options.token_file).read_text(encoding="ascii").strip(), options.roots)
    except (OSError, ValueError) as error:
        raise Unusable(f"{options.token_file}: {error}") from error
