"""`meshctl certs`, `meshctl token` and `meshctl agent`. Nothing here needs a running control plane but the agent: folders are shared under a lock.

`add` puts the subcommands into a parser; imports are left to when they run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from control.flags import UNITS, Unusable, duration
from control.output import show, table

if TYPE_CHECKING:
    from control.ca.authority import Authority


def add(commands: Any) -> None:
    """Add the subcommands. `commands`: what `add_subparsers` returned. Their functions raise Unusable."""
    certs = commands.add_parser("certs", help="the authority's roots and intermediates: show them, replace them, bring others")
    _add_folder(certs)
    certs.add_argument("-o", "--output", default="table", choices=("table", "json", "yaml"))
    what = certs.add_mutually_exclusive_group()
    what.add_argument("--rotate-intermediate", action="store_true", help="sign with a new intermediate from now on")
    what.add_argument("--rotate-root", action="store_true", help="make a new root: trusted at once, and signing when every workload knows it")
    what.add_argument("--bring-root", nargs=2, metavar=("CERTIFICATE", "KEY"), help="the same with a root of yours (PEM files)")
    what.add_argument(
        "--bring-intermediate", nargs=3, metavar=("CHAIN", "KEY", "ROOT"), help="sign with an intermediate of yours; its root's key stays with you"
    )
    what.add_argument("--bundle", action="store_true", help="print the roots to be trusted, as PEM")
    certs.set_defaults(run=_certs)

    token = commands.add_parser("token", help="join tokens, for workloads that have no other proof of who they are").add_subparsers(
        required=True, metavar="ACTION"
    )
    create = token.add_parser("create", help="print a new token; it is good once, for one identity")
    create.add_argument("identity", metavar="NAMESPACE/SERVICEACCOUNT", help="or a whole SPIFFE ID")
    create.add_argument("--life", type=duration, default=3600.0, metavar="TIME", help="how long it can be used, as 30s, 10m, 1h (default) or 2d")
    _add_folder(create)
    create.add_argument("-o", "--output", default="text", choices=("text", "json", "yaml"))
    create.set_defaults(run=_token_create)
    listing = token.add_parser("list", help="tokens that have not expired")
    _add_folder(listing)
    listing.add_argument("-o", "--output", default="table", choices=("table", "json", "yaml"))
    listing.set_defaults(run=_token_list)
    revoke = token.add_parser("revoke", help="make a token useless")
    revoke.add_argument("id", help="as `token list` shows it")
    _add_folder(revoke)
    revoke.set_defaults(run=_token_revoke)

    agent = commands.add_parser("agent", help="hold an identity for an Envoy: certificates from the authority, served by SDS on a Unix socket")
    agent.add_argument("--socket", required=True, help="where the proxy finds its secrets `default` and `ROOTCA`")
    source = agent.add_mutually_exclusive_group(required=True)
    source.add_argument("--authority", metavar="ADDRESS", help="host:port of the authority (TLS), or unix:PATH")
    source.add_argument("--workload-api", metavar="unix:PATH", help="a SPIRE agent's socket instead of an authority")
    agent.add_argument("--roots", metavar="FILE", help="whom to trust when connecting to host:port (`meshctl certs --bundle`)")
    agent.add_argument("--identity", help="SPIFFE ID to ask for (default: the only one that we may have)")
    agent.add_argument("--life", type=duration, default=0.0, metavar="TIME", help="of certificates (default: the authority's)")
    proof = agent.add_mutually_exclusive_group()
    proof.add_argument("--token-file", default="", help="a service account token, read anew each time")
    proof.add_argument("--join-token-file", default="", help="a join token (- for the environment's MESHCTL_TOKEN)")
    agent.add_argument("--mode", type=lambda text: int(text, 8), default=0o600, help="of the socket (default 600); private keys go through it")
    agent.add_argument("--files", default="", metavar="FOLDER", help="write them there, too: cert-chain.pem, key.pem, root-cert.pem (for gRPC's file_watcher)")
    agent.set_defaults(run=_agent)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ca-dir", default=default_folder(), metavar="FOLDER", help="of the authority's keys (default: $MESHCTL_CA, or %(default)s)")


def default_folder() -> str:
    """Where the authority's keys are when nobody says otherwise."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.environ.get("MESHCTL_CA") or os.path.join(state, "meshctl", "ca")


# --- certs


def open_authority(folder: str) -> Authority:
    """The authority that a folder holds. Raises Unusable when there is none."""
    from control.ca.authority import Authority, trust_domain_of
    from control.ca.certificates import BadCertificate
    from control.ca.keystore import StoreError

    if not os.path.isdir(folder):
        raise Unusable(f"{folder}: there is no authority yet; `meshctl serve --ca-dir` makes one")
    try:
        return Authority(folder, trust_domain_of(folder))
    except (StoreError, BadCertificate) as error:
        raise Unusable(str(error)) from error


def _certs(options: argparse.Namespace) -> int:
    from control.ca import certificates
    from control.ca.certificates import BadCertificate
    from control.ca.keystore import StoreError

    authority = open_authority(options.ca_dir)
    try:
        if options.rotate_intermediate:
            authority.rotate_intermediate()
        elif options.rotate_root:
            authority.rotate_root()
        elif options.bring_root:
            certificate, key = _texts(options.bring_root)
            authority.bring_root(certificate, key)
        elif options.bring_intermediate:
            chain, key, root = _texts(options.bring_intermediate)
            authority.bring_intermediate(chain, key, root)
    except (StoreError, BadCertificate) as error:
        raise Unusable(str(error)) from error
    if options.bundle:
        print(certificates.pem(*authority.bundle()), end="")
        return 0
    found = authority.statistics()
    print(certs_table(found) if options.output == "table" else show(found, options.output))
    return 0


def certs_table(found: dict[str, Any], now: float | None = None) -> str:
    """`Authority.statistics` for people."""
    now = time.time() if now is None else now
    rows = [("KIND", "ID", "STATUS", "UNTIL", "LEFT", "NOTE")]
    for kind in ("roots", "intermediates"):
        for one in found[kind]:
            note = "" if kind == "intermediates" else "" if one["key"] else "its key is elsewhere"
            if one.get("signs_at", 0) > now:
                note = f"signs from {_time(one['signs_at'])} on"
            if kind == "intermediates":
                note = f"of root {one['root']}"
            rows.append((kind[:-1], one["id"], one["status"], _time(one["not_after"]), _left(one["not_after"] - now), note))
    return f"trust domain {found['trust_domain']}\n\n{table(rows)}"


def _texts(paths: list[str]) -> list[str]:
    found = []
    for path in paths:
        try:
            found.append(Path(path).read_text(encoding="ascii"))
        except OSError as error:
            raise Unusable(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise Unusable(f"{path}: it is no PEM: {error}") from error
    return found


def _time(seconds: float) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M:%SZ}"


def _left(seconds: float) -> str:
    if seconds <= 0:
        return "none"
    for unit in ("d", "h", "m"):
        if seconds >= 2 * UNITS[unit]:
            return f"{int(seconds // UNITS[unit])}{unit}"
    return f"{int(seconds)}s"


# --- token


def _token_create(options: argparse.Namespace) -> int:
    from control.ca.keystore import StoreError
    from control.ca.running import tokens_of
    from meshproxy.api import spiffe

    authority = open_authority(options.ca_dir)
    try:
        identity = spiffe.parse(options.identity) if "://" in options.identity else spiffe.workload(authority.trust_domain, *_pair(options.identity))
        if identity.trust_domain != authority.trust_domain or not identity.path:
            raise Unusable(f"{identity} is no workload of {authority.trust_domain}")
        token = tokens_of(options.ca_dir).create(identity, options.life)
    except (ValueError, StoreError) as error:
        raise Unusable(str(error)) from error
    if options.output == "text":
        print(token)
    else:
        print(show({"token": token, "identity": str(identity), "expires": time.time() + options.life}, options.output))
    return 0


def _pair(text: str) -> list[str]:
    found = text.split("/")
    if len(found) != 2:
        raise Unusable(f"{text!r}: NAMESPACE/SERVICEACCOUNT or a SPIFFE ID is needed")
    return found


def _token_list(options: argparse.Namespace) -> int:
    from control.ca.keystore import StoreError
    from control.ca.running import tokens_of

    try:
        tokens = tokens_of(options.ca_dir)
        tokens.sweep()
        found = tokens.statistics()
    except StoreError as error:
        raise Unusable(str(error)) from error
    if options.output == "table":
        rows = [(one["id"], one["identity"], "used" if one["used"] else "unused", _time(one["expires"])) for one in found]
        print(table([("ID", "IDENTITY", "STATUS", "EXPIRES"), *rows]))
    else:
        print(show(found, options.output))
    return 0


def _token_revoke(options: argparse.Namespace) -> int:
    from control.ca.keystore import StoreError
    from control.ca.running import tokens_of

    try:
        if not tokens_of(options.ca_dir).revoke(options.id):
            raise Unusable(f"there is no token {options.id}")
    except StoreError as error:
        raise Unusable(str(error)) from error
    return 0


# --- agent


def _agent(options: argparse.Namespace) -> int:
    import asyncio
    import logging

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return asyncio.run(_run_agent(options))


async def _run_agent(options: argparse.Namespace) -> int:
    import asyncio
    import signal

    try:
        import grpc
    except ModuleNotFoundError as error:
        raise Unusable("gRPC is needed: pip install 'meshproxy[control]'") from error
    from control.ca.agent import Agent
    from control.ca.calls import GrpcCalls
    from meshproxy.api import spiffe
    from meshproxy.identity.spire import SpireSource
    from meshproxy.identity.workload import Wish, WorkloadSource

    target = options.authority or options.workload_api
    try:
        identity = spiffe.parse(options.identity) if options.identity else None
    except ValueError as error:
        raise Unusable(str(error)) from error
    if target.startswith("unix:"):
        channel = grpc.aio.insecure_channel(target)
    elif options.roots:
        channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(_texts([options.roots])[0].encode()))
    else:
        raise Unusable("--roots is needed to connect to host:port: whoever answers there will be trusted with a token")
    async with channel:
        calls = GrpcCalls(channel)
        if options.workload_api:
            source: Any = SpireSource(calls, identity)
        else:
            source = WorkloadSource(calls, Wish(identity, options.life, options.token_file, _join_token(options.join_token_file)))
        agent = Agent(source, options.socket, mode=options.mode, files=options.files)
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        try:
            await agent.start()
        except OSError as error:
            raise Unusable(f"{options.socket}: {error.strerror}") from error
        try:
            await ended.wait()
        finally:
            await agent.stop()
    return 0


def _join_token(path: str) -> str:
    if path == "-":
        return os.environ.get("MESHCTL_TOKEN", "")
    return _texts([path])[0].strip() if path else ""
