"""Certificates and authorities by discovery: rotated under connections that stay, waited for, missed."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from meshproxy.net.certificate import Certificate
from tests.differential import proxy
from tests.differential.config import Config
from tests.differential.test_xds_streams import ADS, Plane, started
from tests.differential.xds_rig import Client, Site, compare, goes_to, http_listener, play, says, source, static

DYNAMIC = {"dynamic_resources": {"cds_config": source("cds.json"), "lds_config": source("lds.json")}}


class Secrets:
    """The secrets of a site, in files; material from `pki`."""

    def __init__(self, site: Site, pki: Path) -> None:
        self.site = site
        self.pki = pki

    def certificate(self, name: str, version: str, material: str) -> None:
        chain, key = ((self.pki / f"{material}.{kind}").read_text() for kind in ("pem", "key"))
        secret = {"name": name, "tls_certificate": {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}}
        self.site.write(f"sds-{name}.json", version, "secret", secret)

    def authority(self, name: str, version: str, material: str = "ca") -> None:
        secret = {"name": name, "validation_context": {"trusted_ca": {"inline_string": (self.pki / f"{material}.pem").read_text()}}}
        self.site.write(f"sds-{name}.json", version, "secret", secret)


def sds(name: str) -> Config:
    return {"name": name, "sds_config": source(f"sds-{name}.json")}


def secure(name: str, common: Config, **fields: Any) -> Config:
    """A listener with TLS."""
    made = http_listener(name, says("hello"))
    tls = {"@": "downstream_tls", "common_tls_context": common, **fields}
    made["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": tls}
    return made


async def connect(site: Site, listener: str, pki: Path, certificate: str = "") -> tuple[Client, str]:
    """A TLS connection, and the server's name in its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(pki / f"{certificate}.pem", pki / f"{certificate}.key")
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port(listener), ssl=context)
    certificate_seen = Certificate(writer.get_extra_info("ssl_object").getpeercert(True))
    return site.keep(Client(reader, writer)), " ".join(certificate_seen.dns_sans)


async def a_certificate_rotates_under_a_connection(site: Site, pki: Path) -> None:
    files = Secrets(site, pki)
    files.certificate("own", "s1", "server")
    site.write("cds.json", "c1", "cluster")
    site.write("lds.json", "l1", "listener", secure("in", {"tls_certificate_sds_secret_configs": [sds("own")]}))
    await site.start(DYNAMIC)
    old, name = await connect(site, "in", pki)
    site.note(name, await old.get())
    files.certificate("own", "s2", "other")
    await site.until("sds.own.version_text", "s2")
    async with asyncio.timeout(60):
        while (seen := await connect(site, "in", pki))[1] == name:
            seen[0].close()
    site.note(seen[1], await seen[0].get(), await old.get())
    await site.note_stats("sds.", "listener.in.server_ssl_socket_factory.", "listener_manager.")
    await site.note_dump("SecretsConfigDump", "ListenersConfigDump")
    site.write("sds-own.json", "s3", "secret", {"name": "own", "tls_certificate": {"certificate_chain": {"inline_string": "nonsense"}}})
    await site.until("sds.own.update_rejected", 1)
    site.note((await connect(site, "in", pki))[1] == seen[1], await old.get())
    site.write("sds-own.json", "s4", "secret", {"name": "else", "validation_context": {}})
    await site.until("sds.own.update_rejected", 2)
    await site.note_stats("sds.")


async def both_sides_of_mutual_tls(site: Site, pki: Path) -> None:
    """One listener trusts by discovery, and a cluster shows a certificate by discovery to it."""
    files = Secrets(site, pki)
    files.certificate("own", "s1", "server")
    files.certificate("client", "s1", "client")
    files.authority("roots", "s1")
    common = {"tls_certificate_sds_secret_configs": [sds("own")], "validation_context_sds_secret_config": sds("roots")}
    upstream = static("inner")
    upstream["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": "${listen:inner}"}}}}
    ]
    upstream_tls = {
        "tls_certificate_sds_secret_configs": [sds("client")],
        "combined_validation_context": {"default_validation_context": {}, "validation_context_sds_secret_config": sds("roots")},
    }
    upstream["transport_socket"] = {"name": "tls", "typed_config": {"@": "upstream_tls", "common_tls_context": upstream_tls}}
    site.write("cds.json", "c1", "cluster", upstream)
    inner = secure("inner", common, require_client_certificate=True)
    site.write("lds.json", "l1", "listener", inner, http_listener("outer", goes_to("inner")))
    await site.start(DYNAMIC)
    client = await site.connect("outer")
    site.note(await client.get())
    files.authority("roots", "s2", "other_ca" if (pki / "other_ca.pem").exists() else "other")
    await site.until("sds.roots.version_text", "s2")
    site.note(await client.get())  # over the connection that there is
    await site.note_dump("SecretsConfigDump", "ClustersConfigDump")
    await site.note_stats("sds.", "cluster.inner.client_ssl_socket_factory.", "listener.inner.server_ssl_socket_factory.")


async def secrets_that_never_come(site: Site, pki: Path) -> None:
    files = Secrets(site, pki)
    site.replace("sds-own.json", "nonsense: [")
    site.replace("sds-client.json", "nonsense: [")
    upstream = static("inner")
    upstream["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": "${listen:plain}"}}}}
    ]
    context = {"tls_certificate_sds_secret_configs": [sds("client")]}
    upstream["transport_socket"] = {"name": "tls", "typed_config": {"@": "upstream_tls", "common_tls_context": context}}
    site.write("cds.json", "c1", "cluster", upstream)
    own = secure("in", {"tls_certificate_sds_secret_configs": [sds("own")]})
    site.write("lds.json", "l1", "listener", own, http_listener("outer", goes_to("inner")), http_listener("plain", says("plain")))
    await site.start(DYNAMIC)
    site.note(await site.get("in"))
    site.note((await site.get("outer")).split()[0])
    await site.note_stats("sds.", "listener.in.server_ssl_socket_factory.", "cluster.inner.client_ssl_socket_factory.", "listener.in.downstream_cx_total")
    files.certificate("own", "s1", "server")
    await site.until("sds.own.update_success", 1)
    async with asyncio.timeout(60):
        while True:
            try:
                client, name = await connect(site, "in", pki)
                break
            except (ssl.SSLError, ConnectionError):
                continue
    site.note(name, await client.get())
    await site.note_dump("SecretsConfigDump")


async def until_shown(site: Site, listener: str, pki: Path, old: str) -> tuple[Client, str]:
    """Connect until the certificate is another one."""
    async with asyncio.timeout(60):
        while (seen := await connect(site, listener, pki))[1] == old:
            seen[0].close()
    return seen


async def note_certs(site: Site) -> None:
    """Note /certs, in an order, and the gauges that say when what expires."""
    _, text = await site.proxy.admin("GET", "/certs")
    site.note(sorted(json.loads(text)["certificates"], key=json.dumps))
    _, text = await site.proxy.admin("GET", "/stats")
    site.note([line for line in text.splitlines() if "expiration_unix_time_seconds" in line or "days_until_first_cert" in line])


def copy(pki: Path, material: str, folder: Path) -> None:
    """Put a certificate and its key into a folder, and let others take the place of the files at once."""
    folder.mkdir(exist_ok=True)
    for kind in ("key", "pem"):
        (folder / f"new.{kind}").write_bytes((pki / f"{material}.{kind}").read_bytes())
        (folder / f"new.{kind}").rename(folder / f"own.{kind}")


def in_files(site: Site, name: str, **fields: Any) -> Config:
    chain, key = ({"filename": str(site.folder / "tls" / f"own.{kind}")} for kind in ("pem", "key"))
    return {"name": name, "tls_certificate": {"certificate_chain": chain, "private_key": key, **fields}}


async def files_of_a_secret_are_watched(site: Site, pki: Path) -> None:
    tls = site.folder / "tls"
    copy(pki, "server", tls)
    site.write("sds-own.json", "s1", "secret", in_files(site, "own"))
    site.write("cds.json", "c1", "cluster")
    site.write("lds.json", "l1", "listener", secure("in", {"tls_certificate_sds_secret_configs": [sds("own")]}))
    await site.start(DYNAMIC)
    old, name = await connect(site, "in", pki)
    site.note(name, await old.get())
    await note_certs(site)
    # The certificate comes before its key: for a moment the two do not belong together.
    (tls / "new").write_bytes((pki / "other.pem").read_bytes())
    (tls / "new").rename(tls / "own.pem")
    await site.until("sds.own.key_rotation_failed", 2)  # one for each file
    site.note((await connect(site, "in", pki))[1] == name)
    (tls / "new").write_bytes((pki / "other.key").read_bytes())
    (tls / "new").rename(tls / "own.key")
    seen = await until_shown(site, "in", pki, name)
    site.note(seen[1], await seen[0].get(), await old.get())
    (tls / "new").write_text("something else")
    (tls / "new").rename(tls / "nobody's")
    await site.note_stats("sds.", "listener.in.server_ssl_socket_factory.")
    await note_certs(site)
    await site.note_dump("SecretsConfigDump")
    (tls / "own.key").unlink()
    site.write("sds-own.json", "s2", "secret", in_files(site, "own", password={"inline_string": ""}))
    await site.until("sds.own.update_rejected", 1)
    site.note((await connect(site, "in", pki))[1] == seen[1])


async def a_folder_is_watched_instead(site: Site, pki: Path) -> None:
    """As a Secret is mounted by Kubernetes: files in a folder behind a symbolic link, which is replaced."""
    mount = site.folder / "tls"
    mount.mkdir()

    def mounted(material: str) -> None:
        folder = mount / f"..{material}"
        folder.mkdir()
        for kind in ("pem", "key"):
            (folder / f"own.{kind}").write_bytes((pki / f"{material}.{kind}").read_bytes())
        (mount / "..tmp").symlink_to(folder.name)
        (mount / "..tmp").rename(mount / "..data")

    mounted("server")
    folder = {"watched_directory": {"path": "${file:tls}"}}
    certificate = {kind: {"filename": str(mount / "..data" / f"own.{end}")} for kind, end in (("certificate_chain", "pem"), ("private_key", "key"))}
    site.write("sds-own.json", "s1", "secret", {"name": "own", "tls_certificate": certificate | folder})
    trusted = {"trusted_ca": {"filename": str(pki / "ca.pem")}, **folder}
    site.write("sds-roots.json", "s1", "secret", {"name": "roots", "validation_context": trusted})
    site.write("cds.json", "c1", "cluster")
    common = {"tls_certificate_sds_secret_configs": [sds("own")], "validation_context_sds_secret_config": sds("roots")}
    site.write("lds.json", "l1", "listener", secure("in", common))
    await site.start(DYNAMIC)
    old, name = await connect(site, "in", pki, "client")
    mounted("other")
    seen = await until_shown(site, "in", pki, name)
    site.note(name, seen[1], await seen[0].get(), await old.get())
    await site.note_stats("sds.", "listener.in.server_ssl_socket_factory.")
    await note_certs(site)


async def by_stream(site: Site, pki: Path, kind: str) -> None:
    """A certificate by ADS that is in files: the files are replaced, the control plane says the same again, something else, and files again."""
    plane = Plane(site)
    try:
        tls = site.folder / "tls"
        copy(pki, "server", tls)
        ads = [{"name": name, "sds_config": ADS} for name in ("files", "own")]
        chain, key = ((pki / f"server.{end}").read_text() for end in ("pem", "key"))
        own = {"tls_certificate": {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}}
        plane.put("cluster", "c1")
        plane.put("secret", "s1", in_files(site, "files"), own | {"name": "own"})
        plane.put("listener", "l1", *(secure(name, {"tls_certificate_sds_secret_configs": [one]}) for name, one in zip(("in", "out"), ads, strict=True)))
        await started(site, plane, kind=kind)
        old, first = await connect(site, "in", pki)
        site.note(first, await old.get())
        copy(pki, "other", tls)
        second = (await until_shown(site, "in", pki, first))[1]
        site.note(second)
        await plane.set("secret", "s2", in_files(site, "files"), own | {"name": "own"})
        await plane.set("secret", "s3", own | {"name": "files"}, own | {"name": "own"})
        site.note((await until_shown(site, "in", pki, second))[1])
        copy(pki, "other", tls)  # of no interest now
        await plane.set("secret", "s4", in_files(site, "files"), own | {"name": "own"})
        client, name = await until_shown(site, "in", pki, first)
        site.note(name, await client.get(), await old.get())
        wrong = {"tls_certificate": {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": (pki / "other.key").read_text()}}}
        await plane.set("secret", "s5", wrong | {"name": "files"}, {"name": "own", "validation_context": {}})
        await plane.until_asked("secret", "nack")
        site.note([(await connect(site, listener, pki))[1] for listener in ("in", "out")])
        site.note(await old.get(), await client.get())
        if site.label == "ours":
            assert [complaint.count(f"{name}: ") for complaint in plane.complaints["secret"] for name in ("files", "own")] == [1, 1]
    finally:
        await plane.stop()


async def by_a_stream(site: Site, pki: Path) -> None:
    await by_stream(site, pki, "GRPC")


async def by_a_delta_stream(site: Site, pki: Path) -> None:
    await by_stream(site, pki, "DELTA_GRPC")


SCENARIOS = [
    by_a_stream,
    by_a_delta_stream,
    files_of_a_secret_are_watched,
    a_folder_is_watched_instead,
    a_certificate_rotates_under_a_connection,
    both_sides_of_mutual_tls,
    secrets_that_never_come,
]


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_secrets(scenario, pki_folder):
    compare(lambda site: scenario(site, pki_folder))


def resumed(port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
    """One exchange; the session, and whether it is the one of before."""
    context = resumed.context  # type: ignore[attr-defined]  # a session is of the context that began it
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain, context.wrap_socket(plain, session=session) as tls:
        tls.sendall(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
        assert tls.recv(15) == b"HTTP/1.1 200 OK"
        while tls.recv(4096):
            pass
        return tls.session, bool(tls.session_reused)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_any_worker_resumes_a_session(version, pki_folder):
    """Of a listener and of a certificate that came when the workers were there already."""

    async def scenario(site: Site) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        resumed.context = context  # type: ignore[attr-defined]
        files = Secrets(site, pki_folder)
        files.certificate("own", "s1", "server")
        site.write("cds.json", "c1", "cluster")
        site.write("lds.json", "l1", "listener")
        await site.start(DYNAMIC)
        site.write("lds.json", "l2", "listener", secure("in", {"tls_certificate_sds_secret_configs": [sds("own")]}))
        await site.until("listener_manager.listener_create_success", 3)
        port = site.port("in")
        session, _ = await asyncio.to_thread(resumed, port, None)
        results = [await asyncio.to_thread(resumed, port, session) for _ in range(24)]
        assert all(reused for _, reused in results)
        _, text = await site.proxy.admin("GET", "/stats?filter=worker_.*downstream_cx_total")
        assert sum(not line.endswith(": 0") for line in text.splitlines()) > 1, text

    command = proxy.our_command()
    command[command.index("--concurrency") + 1] = "3"
    asyncio.run(play(scenario, command, "ours"))
