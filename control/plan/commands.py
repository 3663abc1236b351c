"""`meshctl diff` and `meshctl apply`. `add` puts them into a parser; imports are left to when they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from control.flags import Unusable, mesh_config
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.progress import each

SAME, DIFFERENT = 0, 1  # exit statuses of `diff`
_COMPARING = "comparing what proxies have"


def add(commands: Any, add_server: Callable[[argparse.ArgumentParser], None], server: Callable[[argparse.Namespace], str]) -> None:
    """Add the subcommands. `commands`: what `add_subparsers` returned; `server`: which control plane is meant. Their functions raise Unusable."""
    diff = commands.add_parser("diff", help="what documents would change for proxies; exits with 1 if anything", description=_diff.__doc__)
    diff.add_argument("folder", metavar="FOLDER")
    diff.add_argument("--against", default="", metavar="FOLDER", help="what is served now, instead of what the control plane's proxies have")
    diff.add_argument("--proxy", action="append", default=[], metavar="NAME.NAMESPACE", help="only this one; repeat it")
    add_server(diff)
    _add_common(diff)
    diff.set_defaults(run=lambda options: _diff(options, server))

    apply = commands.add_parser("apply", help="check documents, say what they change, and put them into a folder, all at once", description=_apply.__doc__)
    apply.add_argument("source", metavar="FOLDER|FILE")
    apply.add_argument("--to", required=True, metavar="FOLDER", help="that a control plane serves; made if need be")
    apply.add_argument("--prune", action="store_true", help="take files away that FOLDER does not have")
    apply.add_argument("--dry-run", action="store_true", help="only say what would happen")
    _add_common(apply)
    apply.set_defaults(run=_apply)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-domain", default=DEFAULT_TRUST_DOMAIN, metavar="NAME", help="of the mesh (default %(default)s)")
    parser.add_argument("--otlp", default="", metavar="HOST:PORT", help="as the control plane has it")
    parser.add_argument("-o", "--output", default="table", choices=("table", "json", "yaml"))


def _diff(options: argparse.Namespace, server: Callable[[argparse.Namespace], str]) -> int:
    """What FOLDER would change, by proxy and resource. Exit status: 0 nothing, 1 something, 2 it cannot be said."""
    from control.plan import compare, files

    try:
        wanted = files.store_of(files.read(options.folder), options.trust_domain)
        if wanted.troubles:
            raise Unusable("\n".join([f"{options.folder} is not right:", *map(str, wanted.troubles)]))
        snapshots = compare.Snapshots(options.trust_domain, mesh_config(options.otlp))
        if options.against:
            after = snapshots.of(wanted.objects)
            store = files.store_of(files.read(options.against), options.trust_domain)
            for trouble in store.troubles:
                print(f"{options.against}: {trouble}", file=sys.stderr)
            before = snapshots.of(store.objects)
            proxies = [one for one in compare.proxies_of(before, after) if not options.proxy or str(one) in options.proxy]
            _check_asked(options.proxy, [str(one) for one in proxies])
            changes = compare.compare(before, after, each(proxies, _COMPARING))
        else:
            changes = _against_server(options, server(options), snapshots, wanted.objects)
    except files.Unreadable as error:
        raise Unusable(str(error)) from error
    _print(options, changes)
    return DIFFERENT if changes else SAME


def _against_server(options: argparse.Namespace, address: str, snapshots: Any, objects: Any) -> dict[str, Any]:
    """What connected proxies have, compared to what they would get."""
    try:
        from control import query
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise Unusable("gRPC is needed to ask a control plane: pip install 'meshproxy[control]', or compare with --against") from error
    from control.ads.registrations import registration_of
    from control.model.service import Workload
    from control.model.snapshot import with_unready
    from control.plan import compare
    from control.translate.proxy import GRPC, of_node
    from control.translate.translator import Translator

    chosen = [one for one in objects.values() if isinstance(one, Workload) and one.run is not None]
    if chosen:
        raise Unusable(f"{chosen[0].name} is run by `meshctl up`, which chooses ports when it runs: use --against with another folder")
    try:
        response = query.ask(address, contents=True)
    except query.QueryError as error:
        raise Unusable(str(error)) from error
    unready = query.unready(response)
    said = [registration_of(config.node, of_node(config.node)) for config in response.config]
    registered = [one for one in said if one is not None]
    after = snapshots.of(objects, registered)
    if keys := _keys(after.config):
        after = snapshots.of(objects, registered, keys)
    after = with_unready(after, unready, unready)
    differ, translator, changes = compare.Differ(), Translator(), {}
    seen = []
    for config in each(response.config, _COMPARING):
        key = of_node(config.node)
        if options.proxy and str(key) not in options.proxy:
            continue
        seen.append(str(key))
        view = translator.view(key, after, compare.asked_of_status(config))
        found = differ.changes(compare.has_of_status(config), compare.has_of(view), by_name=key.kind == GRPC)
        if found:
            changes[str(key)] = found
    _check_asked(options.proxy, seen)
    return changes


def _keys(config: Any) -> dict[Any, str]:
    """What issuers say that the control plane asks, too: their keys are part of what proxies have."""
    from control.translate import tokens

    wanted = tokens.wanted(config.security.request_authentication, config.services)
    if not wanted:
        return {}
    import asyncio

    from control.sources import issuers

    async def ask() -> dict[Any, str]:
        asked = issuers.over_http()
        try:
            asked.want(wanted)
            await asked.wait_tried(max(wanted.values()) * 2)
            for one in asked.statistics():
                if not one.known and not one.why:  # the others are told of
                    print(f"meshctl: issuer {one.issuer} has not answered", file=sys.stderr)
            return asked.known
        finally:
            await asked.close()

    return asyncio.run(ask())


def _check_asked(asked: list[str], there: list[str]) -> None:
    for one in asked:
        if one not in there:
            raise Unusable(f"there is no proxy {one!r}")


def _apply(options: argparse.Namespace) -> int:
    """Put documents into a folder, where all of them come to be at one moment, or none. Exit status: 0 done, 1 they are not right, 2 nor is the call."""
    import os

    from control.plan import compare, files, show

    try:
        source = files.read(options.source)
        there = files.read(options.to) if os.path.isdir(options.to) else {}
    except files.Unreadable as error:
        raise Unusable(str(error)) from error
    gone = frozenset(there.keys() - source.keys()) if options.prune else frozenset()
    if options.prune and not os.path.isdir(options.source):
        raise Unusable("--prune is for folders")
    result = {name: content for name, content in {**there, **source}.items() if name not in gone}
    before, after = files.store_of(there, options.trust_domain), files.store_of(result, options.trust_domain)
    troubles = files.new_troubles(before, after, source)
    if troubles:
        for trouble in troubles:
            print(trouble, file=sys.stderr)
        print(f"meshctl: nothing was applied to {options.to}", file=sys.stderr)
        return 1
    snapshots = compare.Snapshots(options.trust_domain, mesh_config(options.otlp))
    old, new = snapshots.of(before.objects), snapshots.of(after.objects)
    changes = compare.compare(old, new, each(compare.proxies_of(old, new), _COMPARING))
    documents = show.documents(before.texts, after.texts)
    if not options.dry_run:
        changed = {name: content for name, content in source.items() if there.get(name) != content}
        try:
            if changed or gone:
                files.write(options.to, changed, gone)
        except OSError as error:
            raise Unusable(f"{error.filename or options.to}: {error.strerror or error}") from error
    _print(options, changes, documents)
    return 0


def _print(options: argparse.Namespace, changes: dict[str, Any], documents: list[tuple[str, str]] | None = None) -> None:
    from control.output import show as form
    from control.plan import show

    if options.output == "table":
        for name, word in documents or ():
            print(f"{name} {word}{' (dry run)' if options.dry_run else ''}")
        print(show.as_table(changes))
        return
    told = show.plain(changes)
    print(form(told if documents is None else {"documents": [{"object": name, "change": word} for name, word in documents], "proxies": told}, options.output))
