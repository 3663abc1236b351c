"""`meshctl certs` and `meshctl token`, and where the control plane takes a request for a certificate."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from control import cli
from control.ca import certificates
from control.ca.authority import Authority
from control.ca.commands import certs_table, duration
from control.ca.csr import parse_csr
from control.ca.running import tokens_of
from control.peers import is_private
from tests.polling import PATIENCE
from tests.unit.ca_help import WEB, csr, key_pem


@pytest.fixture
def folder(tmp_path):
    Authority(str(tmp_path / "ca"), "mesh.test")
    return str(tmp_path / "ca")


def run(*arguments: str) -> int:
    return cli.main(arguments)


def certs(folder: str, capsys, *arguments: str) -> dict:
    assert run("certs", "--ca-dir", folder, "-o", "json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_certs(folder, capsys):
    assert run("certs", "--ca-dir", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trust domain mesh.test"
    assert [line.split()[0] for line in lines[2:]] == ["KIND", "root", "intermediate"]
    first = certs(folder, capsys)
    second = certs(folder, capsys, "--rotate-intermediate")
    assert [one["status"] for one in second["intermediates"]] == ["spare", "signing"]
    third = certs(folder, capsys, "--rotate-root")
    assert third["roots"][0]["id"] == first["roots"][0]["id"]
    assert [one["status"] for one in third["roots"]] == ["signing", "trusted"]
    assert run("certs", "--ca-dir", folder, "--bundle") == 0
    assert capsys.readouterr().out.count("BEGIN CERTIFICATE") == 2
    assert "signs from" in certs_table(third)


def test_bringing(folder, tmp_path, capsys):
    key = certificates.new_key()
    import time

    root = certificates.make_root(key, "corp.test", time.time(), 86400 * 365)
    (tmp_path / "root.pem").write_text(certificates.pem(root))
    (tmp_path / "root.key").write_text(key_pem(key))
    found = certs(folder, capsys, "--bring-root", str(tmp_path / "root.pem"), str(tmp_path / "root.key"))
    assert found["roots"][1]["key"] is True
    below = certificates.new_key()
    (tmp_path / "i.pem").write_text(certificates.pem(certificates.make_intermediate(below, root, key, "mesh.test", time.time(), 86400 * 90)))
    (tmp_path / "i.key").write_text(key_pem(below))
    found = certs(folder, capsys, "--bring-intermediate", str(tmp_path / "i.pem"), str(tmp_path / "i.key"), str(tmp_path / "root.pem"))
    assert len(found["intermediates"]) == 3
    assert run("certs", "--ca-dir", folder, "--bring-root", str(tmp_path / "i.pem"), str(tmp_path / "i.key")) == 2
    assert run("certs", "--ca-dir", folder, "--bring-root", str(tmp_path / "none"), str(tmp_path / "i.key")) == 2
    assert "path length is 0" in capsys.readouterr().err


def test_tokens(folder, capsys):
    assert run("token", "create", "default/web", "--ca-dir", folder, "--life", "10m") == 0
    token = capsys.readouterr().out.strip()
    assert tokens_of(folder).redeem(token, parse_csr(csr())) == WEB
    assert run("token", "create", str(WEB), "--ca-dir", folder, "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["identity"] == str(WEB)
    assert run("token", "list", "--ca-dir", folder, "-o", "json") == 0
    found = {one["used"]: one["id"] for one in json.loads(capsys.readouterr().out)}
    assert set(found) == {True, False}
    assert run("token", "list", "--ca-dir", folder) == 0
    assert capsys.readouterr().out.split()[:3] == ["ID", "IDENTITY", "STATUS"]
    assert run("token", "revoke", found[False], "--ca-dir", folder) == 0
    assert run("token", "revoke", found[False], "--ca-dir", folder) == 2
    for wrong in ("web", "a/b/c", "spiffe://other.test/ns/a/sa/b", "spiffe://mesh.test", "../x"):
        assert run("token", "create", wrong, "--ca-dir", folder) == 2, wrong


def test_folders_that_hold_none(tmp_path, capsys):
    assert run("certs", "--ca-dir", str(tmp_path / "none")) == 2
    assert "there is no authority yet" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir(0o700)
    assert run("token", "create", "a/b", "--ca-dir", str(tmp_path / "empty")) == 2
    assert "holds no authority" in capsys.readouterr().err
    (tmp_path / "open").mkdir(0o755)
    assert run("certs", "--ca-dir", str(tmp_path / "open")) == 2
    assert "is open to others" in capsys.readouterr().err


def test_files_and_sockets_that_are_not_there(folder, tmp_path, capsys):
    assert run("certs", "--ca-dir", folder, "--bring-root", "none.pem", "none.key") == 2
    assert capsys.readouterr().err == "meshctl: none.pem: No such file or directory\n"
    command = [sys.executable, "-m", "control", "agent", "--socket", str(tmp_path / "none/s"), "--authority", "unix:/none"]
    agent = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (agent.returncode, agent.stderr) == (2, f"meshctl: {tmp_path}/none/s: No such file or directory\n")


def test_a_time_that_is_none(folder, capsys):
    with pytest.raises(SystemExit):
        run("token", "create", "shop/web", "--ca-dir", folder, "--life", "5")
    assert "argument --life: '5' is no time: 30s, 10m, 24h, 7d" in capsys.readouterr().err


def test_times():
    assert [duration(text) for text in ("30s", "10m", "24h", "7d")] == [30, 600, 86400, 604800]
    for text in ("", "5", "h", "1.5h", "-1h", "1 h", "9999999999s"):
        with pytest.raises(argparse.ArgumentTypeError):
            duration(text)


@pytest.mark.parametrize(
    ("peer", "security", "private"),
    [
        ("ipv4:10.0.0.1:5000", b"ssl", True),
        ("ipv4:10.0.0.1:5000", b"insecure", False),
        ("ipv6:%5B2001:db8::1%5D:5000", b"insecure", False),
        ("ipv4:127.0.0.1:5000", b"insecure", True),
        ("ipv6:%5B::1%5D:5000", b"insecure", True),
        ("unix:", b"insecure", True),
        ("", b"", False),
    ],
)
def test_tokens_are_not_taken_in_the_clear(peer, security, private):
    assert is_private(peer, {"transport_security_type": [security]}) is private


def test_the_default_folder(monkeypatch, capsys):
    monkeypatch.setenv("MESHCTL_CA", "/nonexistent/ca")
    assert run("certs") == 2
    assert "/nonexistent/ca" in capsys.readouterr().err
    assert not os.path.exists("/nonexistent")


@pytest.mark.parametrize(
    ("authority", "type", "san"),
    [("control.example:15012", "STRICT_DNS", ("DNS", "control.example")), ("10.0.0.1:15012", "STATIC", ("IP_ADDRESS", "10.0.0.1"))],
)
def test_bootstraps_of_sidecars_that_get_their_identity_themselves(tmp_path, capsys, authority, type, san):
    Authority(str(tmp_path / "ca"), "mesh.test")
    assert run("certs", "--ca-dir", str(tmp_path / "ca"), "--bundle") == 0
    (tmp_path / "roots.pem").write_text(capsys.readouterr().out)
    flags = ["bootstrap", "web.shop", "--authority", authority, "--join-token-file", "/etc/token", "-o", "json"]
    assert run(*flags) == 2  # a token is shown to nobody who was not verified
    assert "--roots is needed" in capsys.readouterr().err
    assert run(*flags, "--roots", str(tmp_path / "roots.pem")) == 0
    text = capsys.readouterr().out
    found = json.loads(text)["static_resources"]["clusters"][-1]
    context = found["transport_socket"]["typed_config"]["common_tls_context"]
    match = context["validation_context"]["match_typed_subject_alt_names"][0]
    assert (found["type"], match["san_type"], match["matcher"]["exact"]) == (type, *san)
    (tmp_path / "bootstrap.yaml").write_text(text)
    checked = [sys.executable, "-m", "meshproxy", "-c", str(tmp_path / "bootstrap.yaml"), "--mode", "validate"]
    assert subprocess.run(checked, check=False, timeout=PATIENCE).returncode == 0


def test_a_bootstrap_for_the_identity_of_a_spire_agent(tmp_path, capsys):
    assert run("bootstrap", "web.shop", "--server", "control.example:15011", "--workload-api", "unix:/run/spire/agent.sock", "-o", "json") == 0
    text = capsys.readouterr().out
    (tmp_path / "bootstrap.yaml").write_text(text)
    checked = [sys.executable, "-m", "meshproxy", "-c", str(tmp_path / "bootstrap.yaml"), "--mode", "validate"]
    assert subprocess.run(checked, check=False, timeout=PATIENCE).returncode == 0
    made = json.loads(text)
    cluster = made["static_resources"]["clusters"][-1]
    assert made["bootstrap_extensions"][0]["typed_config"]["workload_api"] == cluster["name"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"] == {"pipe": {"path": "/run/spire/agent.sock"}}
    for wrong in (["--workload-api", "127.0.0.1:1"], ["--workload-api", "unix:/a", "--sds", "/b"], ["--workload-api", "unix:/a", "--authority", "unix:/b"]):
        assert run("bootstrap", "web", *wrong) == 2
        assert "--workload-api is unix:/PATH" in capsys.readouterr().err


def test_authorities_that_are_no_address(capsys):
    for wrong in ("control.example", ":15012", "control.example:port"):
        assert run("bootstrap", "web", "--authority", wrong, "--roots", "roots.pem") == 2
        assert "unix:PATH or host:port is needed" in capsys.readouterr().err
