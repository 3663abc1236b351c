"""An API server in memory: what clients of a real one see of lists, watches, versions and errors, for a few kinds.

It runs in a thread of its own, so that whoever tests may block. What it does is what kube-apiserver does; `tests/unit/test_control_kubernetes.py` asks both.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

CORE_KINDS = """
v1 services Service, v1 pods Pod, v1 secrets Secret, v1 configmaps ConfigMap, v1 nodes Node -, v1 namespaces Namespace -, v1 events Event,
discovery.k8s.io/v1 endpointslices EndpointSlice, coordination.k8s.io/v1 leases Lease, events.k8s.io/v1 events Event
"""
_WITH_STATUS = ("Pod", "Service", "Node", "Namespace", "Gateway", "GatewayClass", "HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "BackendTLSPolicy")


class Resource(NamedTuple):
    group: str
    versions: tuple[str, ...]
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def status(self) -> bool:
        return self.kind in _WITH_STATUS


class _Event(NamedTuple):
    revision: int
    resource: tuple[str, str]
    kind: str
    value: dict[str, Any]
    before: dict[str, Any] | None


class Failure(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code = code
        self.body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code}


class MemoryApiServer:
    """`tokens`: whom it knows; `reviews`: token -> (user, audiences) for TokenReviews; `forbidden`: plurals that nobody may touch; `failing`: a status for
    every call. `tls`: of the server, from its next start; whose certificate it takes is who its common name says. `authority`: for clients, a file."""

    def __init__(self, tls: ssl.SSLContext | None = None, authority: Path | None = None) -> None:
        self.tls = tls
        self.authority = authority
        self.tokens = {"admin-token": "admin"}
        self.reviews: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.forbidden: set[str] = set()
        self.failing = 0
        self.requests: list[tuple[str, str]] = []
        self.bookmark_every_s = 0.0
        self._resources: dict[tuple[str, str], Resource] = {}
        self._objects: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
        self._revision = 100
        self._compacted = 0
        self._log: list[_Event] = []
        self._pages: dict[str, tuple[int, list[dict[str, Any]]]] = {}
        self._watchers: set[asyncio.Event] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner | None = None
        self.port = 0
        for words in CORE_KINDS.replace("\n", " ").split(","):
            api, plural, kind, *rest = words.split()
            group, _, version = api.rpartition("/")
            self._add(Resource(group, (version,), plural, kind, not rest))
        self.start()

    # --- for tests

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, on the same port as before."""
        self._run(self._start())

    def stop(self) -> None:
        """End, with every connection."""
        self._run(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def compact(self) -> None:
        """Forget what happened so far: watches from then, and lists that are under way, are too old."""
        self._run(self._compact())

    def install(self, crds: list[dict[str, Any]]) -> None:
        """CustomResourceDefinitions."""
        for one in crds:
            spec = one["spec"]
            versions = tuple(version["name"] for version in spec["versions"] if version.get("served"))
            self._add(Resource(spec["group"], versions, spec["names"]["plural"], spec["names"]["kind"], spec["scope"] == "Namespaced"))

    def uninstall(self, group: str, plural: str) -> None:
        self._run(self._uninstall(group, plural))

    def drop_watches(self) -> None:
        """End every watch, as a load balancer in between may."""
        self._run(self._drop())

    # --- what it does

    def _run(self, doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(30)

    def _add(self, one: Resource) -> None:
        self._resources[one.group, one.plural] = one
        self._objects.setdefault((one.group, one.plural), {})

    async def _start(self) -> None:
        application = web.Application(middlewares=[self._guard])
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)  # 0 would be no limit
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._generation = object()
        self._serving = True

    async def _stop(self) -> None:
        if self._runner is not None:
            self._serving = False  # also for watches that are about to begin
            await self._drop()
            await self._runner.cleanup()
            self._runner = None

    async def _drop(self) -> None:
        self._generation = object()
        for one in self._watchers:
            one.set()

    async def _compact(self) -> None:
        self._compacted = self._revision
        self._pages.clear()
        self._log.clear()

    async def _uninstall(self, group: str, plural: str) -> None:
        for key in list(self._objects[group, plural]):
            await self._delete(self._resources[group, plural], key)
        del self._resources[group, plural], self._objects[group, plural]
        await self._drop()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        try:
            if self.failing:
                raise Failure(self.failing, "InternalError", "as the test wants it")
            self._user(request)
            return await handler(request)
        except Failure as failure:
            return web.json_response(failure.body, status=failure.code)

    def _user(self, request: web.Request) -> str:
        word, _, token = request.headers.get("authorization", "").partition(" ")
        if word == "Bearer" and token in self.tokens:
            return self.tokens[token]
        subject = (request.get_extra_info("peercert") or {}).get("subject", ())
        if not word and subject:
            return next(value for part in subject for name, value in part if name == "commonName")
        raise Failure(401, "Unauthorized", "Unauthorized")

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if parts == ["apis"]:
            groups: dict[str, set[str]] = {}
            for one in self._resources.values():
                if one.group:
                    groups.setdefault(one.group, set()).update(one.versions)
            found = [
                {"name": group, "versions": [{"groupVersion": f"{group}/{one}", "version": one} for one in sorted(some)]} for group, some in groups.items()
            ]
            return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": found})
        if parts[:1] == ["api"]:
            group, (version, *rest) = "", parts[1:]
        elif len(parts) >= 3 and parts[0] == "apis":
            group, version, *rest = parts[1:]
        else:
            raise Failure(404, "NotFound", "the server could not find the requested resource")
        if group == "authentication.k8s.io" and rest == ["selfsubjectreviews"]:
            return web.json_response({"kind": "SelfSubjectReview", "status": {"userInfo": {"username": self._user(request)}}}, status=201)
        if group == "authentication.k8s.io" and rest == ["tokenreviews"]:
            return web.json_response(self._review(await request.json()), status=201)
        known = [one for one in self._resources.values() if one.group == group and version in one.versions]
        if not rest:
            if not known:
                raise Failure(404, "NotFound", "the server could not find the requested resource")
            resources = [{"name": one.plural, "kind": one.kind, "namespaced": one.namespaced} for one in known]
            return web.json_response({"kind": "APIResourceList", "groupVersion": f"{group}/{version}".lstrip("/"), "resources": resources})
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        resource = next((one for one in known if one.plural == rest[0]), None)
        if resource is None:
            raise Failure(404, "NotFound", "the server could not find the requested resource")
        if resource.plural in self.forbidden:
            raise Failure(403, "Forbidden", f'{resource.plural} is forbidden: User "x" cannot list resource')
        api = f"{group}/{version}".lstrip("/")
        if len(rest) == 1:
            if request.method == "POST":
                return web.json_response(await self._create(resource, api, namespace, await request.json()), status=201)
            if request.method == "GET":
                return await (self._watch if request.query.get("watch") in ("1", "true") else self._list)(request, resource, api, namespace)
        elif len(rest) == 2 or rest[2:] == ["status"]:
            return web.json_response(await self._one(request, resource, api, (namespace, rest[1]), status=len(rest) == 3))
        raise Failure(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _review(self, asked: dict[str, Any]) -> dict[str, Any]:
        user, audiences = self.reviews.get(asked["spec"]["token"], ("", ()))
        common = [one for one in audiences if one in asked["spec"]["audiences"]]
        return {**asked, "status": {"authenticated": True, "user": {"username": user}, "audiences": common} if common else {"authenticated": False}}

    async def _list(self, request: web.Request, resource: Resource, api: str, namespace: str) -> web.Response:
        limit, token = int(request.query.get("limit", 0)), request.query.get("continue", "")
        if token:
            if token not in self._pages:
                raise Failure(410, "Expired", "The provided continue parameter is too old to display a consistent list result.")
            revision, items = self._pages[token]
        else:
            revision = self._revision
            items = [one for one in self._sorted(resource) if _selected(one, request, namespace)]
        meta: dict[str, Any] = {"resourceVersion": str(revision)}
        if limit and len(items) > limit:
            meta |= {"continue": uuid.uuid4().hex, "remainingItemCount": len(items) - limit}
            self._pages[meta["continue"]] = revision, items[limit:]
            items = items[:limit]
        partial = "PartialObjectMetadata" in request.headers.get("accept", "")
        shown = [_shown(one, api, resource, partial) for one in items]
        if not resource.versions[0].startswith("v1") or resource.group not in ("", "discovery.k8s.io", "coordination.k8s.io") or partial:
            listed = shown
        else:  # items of kinds of its own do not say what they are
            listed = [{key: value for key, value in one.items() if key not in ("apiVersion", "kind")} for one in shown]
        return web.json_response({"kind": f"{resource.kind}List", "apiVersion": api, "metadata": meta, "items": listed})

    def _sorted(self, resource: Resource) -> list[dict[str, Any]]:
        found = self._objects[resource.group, resource.plural]
        return [found[key] for key in sorted(found)]

    async def _watch(self, request: web.Request, resource: Resource, api: str, namespace: str) -> web.StreamResponse:
        at = int(request.query.get("resourceVersion") or 0)
        if at > self._revision:
            raise Failure(504, "Timeout", f"Too large resource version: {at}, current: {self._revision}")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        if at < self._compacted:
            old = Failure(410, "Expired", f"too old resource version: {at} ({self._compacted})").body
            await response.write(json.dumps({"type": "ERROR", "object": old}).encode() + b"\n")
            return response
        woken = asyncio.Event()
        self._watchers.add(woken)
        try:
            await self._tell(request, response, woken, (resource, api, namespace), at)
        finally:
            self._watchers.discard(woken)
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse, woken: asyncio.Event, about: tuple[Resource, str, str], at: int) -> None:
        resource, api, namespace = about
        partial = "PartialObjectMetadata" in request.headers.get("accept", "")
        generation, ends = self._generation, self._loop.time() + float(request.query.get("timeoutSeconds", 1800))
        while self._serving and generation is self._generation and self._loop.time() < ends:
            woken.clear()
            if at < self._compacted:  # it had not been told all when that was forgotten
                break
            news = [one for one in self._log if one.revision > at and one.resource == (resource.group, resource.plural)]
            for one in news:
                at = one.revision
                was, now = (value is not None and _selected(value, request, namespace) for value in (one.before, one.value))
                kind = one.kind if was == now or one.kind == "DELETED" else "ADDED" if now else "DELETED"
                if was or now:
                    line = {"type": kind, "object": _shown(one.value, api, resource, partial)}
                    await response.write(json.dumps(line).encode() + b"\n")
            if self.bookmark_every_s and request.query.get("allowWatchBookmarks") == "true":
                at = self._revision
                mark = {"kind": resource.kind, "apiVersion": api, "metadata": {"resourceVersion": str(at)}}
                await response.write(json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(ends - self._loop.time(), self.bookmark_every_s or 3600)):
                    await woken.wait()

    async def _one(self, request: web.Request, resource: Resource, api: str, key: tuple[str, str], *, status: bool) -> dict[str, Any]:
        known = self._objects[resource.group, resource.plural].get(key)
        if known is None:
            raise Failure(404, "NotFound", f'{resource.plural} "{key[1]}" not found')
        if request.method == "GET":
            return _shown(known, api, resource, partial=False)
        if request.method == "DELETE":
            await self._delete(resource, key)
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        given = await request.json()
        if request.method == "PATCH":
            given = _merged(known, given)
        elif given["metadata"].get("resourceVersion", known["metadata"]["resourceVersion"]) != known["metadata"]["resourceVersion"]:
            given["metadata"]["resourceVersion"] = ""
        if given["metadata"].get("resourceVersion") not in (None, known["metadata"]["resourceVersion"]):
            raise Failure(409, "Conflict", f'Operation cannot be fulfilled on {resource.plural} "{key[1]}": the object has been modified')
        if status:
            made = {**known, **({"status": given["status"]} if "status" in given else {})}
        else:
            made = {**given, **({"status": known["status"]} if resource.status and "status" in known else {})}
            if resource.status and "status" not in known:
                made.pop("status", None)
        made["metadata"] = {**(known if status else given)["metadata"], **{one: known["metadata"][one] for one in ("uid", "generation", "namespace", "name")}}
        if {**made, "metadata": 0, "status": 0} != {**known, "metadata": 0, "status": 0}:
            made["metadata"]["generation"] += 1
        made["metadata"]["resourceVersion"] = known["metadata"]["resourceVersion"]
        if made != known:
            await self._put(resource, key, "MODIFIED", made)
        return _shown(self._objects[resource.group, resource.plural][key], api, resource, partial=False)

    async def _create(self, resource: Resource, api: str, namespace: str, given: dict[str, Any]) -> dict[str, Any]:
        meta = dict(given["metadata"])
        name = meta.get("name") or meta.get("generateName", "") + uuid.uuid4().hex[:5]
        key = (namespace if resource.namespaced else "", name)
        if key in self._objects[resource.group, resource.plural]:
            raise Failure(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        meta |= {"name": name, "uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z", "namespace": key[0]}
        made = {**given, "metadata": meta}
        if resource.status:
            made.pop("status", None)
        await self._put(resource, key, "ADDED", made)
        return _shown(self._objects[resource.group, resource.plural][key], api, resource, partial=False)

    async def _put(self, resource: Resource, key: tuple[str, str], kind: str, value: dict[str, Any]) -> None:
        objects = self._objects[resource.group, resource.plural]
        before = objects.get(key)
        self._revision += 1
        value = copy.deepcopy(value)
        value["metadata"]["resourceVersion"] = str(self._revision)
        objects[key] = value
        await self._note(resource, kind, value, before)

    async def _delete(self, resource: Resource, key: tuple[str, str]) -> None:
        before = self._objects[resource.group, resource.plural].pop(key)
        self._revision += 1
        value = {**before, "metadata": {**before["metadata"], "resourceVersion": str(self._revision)}}
        await self._note(resource, "DELETED", value, before)

    async def _note(self, resource: Resource, kind: str, value: dict[str, Any], before: dict[str, Any] | None) -> None:
        self._log.append(_Event(self._revision, (resource.group, resource.plural), kind, value, before))
        for one in self._watchers:
            one.set()


def _shown(value: dict[str, Any], api: str, resource: Resource, partial: bool) -> dict[str, Any]:
    if partial:
        return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": value["metadata"]}
    return {**value, "kind": resource.kind, "apiVersion": api}


def _selected(value: dict[str, Any], request: web.Request, namespace: str) -> bool:
    meta = value["metadata"]
    if namespace and meta.get("namespace") != namespace:
        return False
    for key, wanted, equal in _terms(request.query.get("labelSelector", "")):
        if (key not in (meta.get("labels") or {})) if not wanted else ((meta.get("labels") or {}).get(key) == wanted) != equal:
            return False
    for key, wanted, equal in _terms(request.query.get("fieldSelector", "")):
        has: Any = value
        for part in key.split("."):
            has = (has or {}).get(part, "")
        if (has == wanted) != equal:
            return False
    return True


def _terms(text: str) -> Iterator[tuple[str, str, bool]]:
    for term in filter(None, text.split(",")):
        key, sign, value = term.partition("!=")
        if not sign:
            key, _, value = term.partition("=")
        yield key, value, not sign


def _merged(value: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    made = dict(value) if isinstance(value, dict) else {}
    for key, one in patch.items():
        if one is None:
            made.pop(key, None)
        else:
            made[key] = _merged(made.get(key), one)
    return made
