"""Programs that say who we are: what they are told, what they may say, and that none of them can keep us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import pytest

from control import exec_plugin
from control.exec_plugin import Credential, PluginFailed

V1 = "client.authentication.k8s.io/v1"


def plugin(tmp_path, code, **more):
    """The `exec` of a kubeconfig; `status(...)` prints a credential, `info` is what it was told."""
    path = tmp_path / "plugin.py"
    path.write_text(
        f"""
import json, os, pathlib, subprocess, sys, time
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
here = pathlib.Path({str(tmp_path)!r})
def status(**status):
    print(json.dumps({{"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": status}}))
{code}
"""
    )
    return {"apiVersion": V1, "command": sys.executable, "args": [str(path)], "interactiveMode": "Never", **more}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("status(token='t', expirationTimestamp='2030-01-01T00:00:00Z')", Credential(token="t")),
        ("status(clientCertificateData='c', clientKeyData='k')", Credential(certificate="c", key="k")),
        ("status(token='t', clientCertificateData='c', clientKeyData='k')", Credential("t", "c", "k")),
        ("status(token=json.dumps([info['spec'], os.environ['MORE'], sys.stdin.read()]))", Credential(token='[{"interactive": false}, "1", ""]')),
        ("print('beside the point', file=sys.stderr); status(token='t')", Credential(token="t")),
    ],
)
async def test_what_it_says(tmp_path, code, expected):
    assert await exec_plugin.run(plugin(tmp_path, code, env=[{"name": "MORE", "value": "1"}]), {}, "") == expected


async def test_it_may_be_told_the_cluster(tmp_path):
    config = plugin(tmp_path, "status(token=info['spec']['cluster']['server'])", provideClusterInfo=True)
    assert await exec_plugin.run(config, {"server": "https://here"}, "") == Credential(token="https://here")


async def test_a_command_beside_the_kubeconfig(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/who").symlink_to(sys.executable)
    assert await exec_plugin.run(plugin(tmp_path, "status(token='t')") | {"command": "bin/who"}, {}, str(tmp_path)) == Credential(token="t")


@pytest.mark.parametrize(
    ("code", "more", "expected"),
    [
        ("sys.exit('no such user')", {}, "ended with 1: no such user"),
        ("os.kill(os.getpid(), 9)", {}, "ended with -9"),
        ("print('hello')", {}, "no ExecCredential"),
        ("print('[]')", {}, "no ExecCredential"),
        ("print('x' * (1 << 20))", {}, "no ExecCredential"),
        ("status()", {}, "neither a token nor a certificate"),
        ("status(clientCertificateData='c')", {}, "neither a token nor a certificate with its key"),
        ("info['apiVersion'] = 'v0'; status(token='t')", {}, "it speaks v0, and not client.authentication.k8s.io/v1"),
        ("", {"apiVersion": "client.authentication.k8s.io/v1alpha1"}, "needs a command, and an apiVersion"),
        ("", {"command": ""}, "needs a command"),
        ("", {"command": "/nowhere/who", "installHint": "brew install who"}, "/nowhere/who.*; brew install who"),
        ("", {"interactiveMode": "Always"}, "there is nobody to ask"),
    ],
)
async def test_what_is_of_no_use(tmp_path, code, more, expected):
    with pytest.raises(PluginFailed, match=expected):
        await exec_plugin.run(plugin(tmp_path, code, **more), {}, "")


async def test_what_it_leaves_behind_is_not_waited_for(tmp_path):
    """A grandchild has its output still open."""
    code = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n(here / 'child').write_text(str(child.pid))\nstatus(token='t')"
    assert await exec_plugin.run(plugin(tmp_path, code), {}, "") == Credential(token="t")
    os.kill(int((tmp_path / "child").read_text()), 9)


LASTING = """
alive = open(here / "alive", "wb")  # for as long as it or its child is there
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], pass_fds=[alive.fileno()])
print("still at it", file=sys.stderr, flush=True)
alive.write(b"begun")
alive.flush()
time.sleep(3600)
"""


async def test_who_is_tired_of_it_ends_it_and_its_children(tmp_path):
    os.mkfifo(tmp_path / "alive")
    running = asyncio.create_task(exec_plugin.run(plugin(tmp_path, LASTING), {}, ""))
    with await asyncio.to_thread(open, tmp_path / "alive", "rb") as alive:
        assert await asyncio.to_thread(alive.read, 5) == b"begun"
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert await asyncio.to_thread(alive.read) == b""


async def test_it_has_a_limit(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "alive")
    begun = asyncio.Event()
    timeout = asyncio.timeout

    @contextlib.asynccontextmanager
    async def once_begun(_):
        """The clock, as it were."""
        await begun.wait()
        async with timeout(0):
            yield

    running = asyncio.create_task(exec_plugin.run(plugin(tmp_path, LASTING), {}, "", limit_s=7))
    monkeypatch.setattr(exec_plugin.asyncio, "timeout", once_begun)
    with await asyncio.to_thread(open, tmp_path / "alive", "rb") as alive:
        assert await asyncio.to_thread(alive.read, 5) == b"begun"
        begun.set()
        with pytest.raises(PluginFailed, match="took longer than 7 s: still at it"):
            await running
        assert await asyncio.to_thread(alive.read) == b""


@pytest.mark.parametrize("turns", range(8))
def test_an_event_loop_that_ends_while_one_starts(tmp_path, turns):
    """With asyncio's own subprocesses it would wait for ever, at most of these moments."""
    config = plugin(tmp_path, "time.sleep(3600)")

    async def main():
        running = asyncio.create_task(exec_plugin.run(config, {}, ""))
        for _ in range(turns):
            await asyncio.sleep(0)
        return running

    assert asyncio.run(main()).cancelled()


async def test_memory_of_the_output_is_given_back(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    config = plugin(tmp_path, "status(token='t')")
    for _ in range(3):
        assert await exec_plugin.run(config, {}, "") == Credential(token="t")
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # that of the listing itself
