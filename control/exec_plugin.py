"""Plugins of kubeconfigs, which say who we are: programs that are run and print an ExecCredential of client.authentication.k8s.io.

Run by us, not by kubernetes_asyncio. Its plugins are subprocesses of asyncio with pipes: such a one is waited for until its pipes are closed, so for as long as
anything that it left behind holds them; for ever, from Python 3.11.4 on, if the event loop ends while they are being connected; and it has no limit of time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Any, BinaryIO

from meshproxy.record import Record

_LIMIT_S = 60.0
_LONGEST = 1 << 20
_LONGEST_COMPLAINT = 1000
_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class PluginFailed(Exception):
    """It said nothing that is of use. The text says why."""


class Credential(Record, frozen=True):
    """What a plugin says: a token, or a certificate with its key as PEM, or both; "" is what it does not."""

    token: str = ""
    certificate: str = ""
    key: str = ""


async def run(config: Mapping[str, Any], cluster: Mapping[str, Any], folder: str, limit_s: float = _LIMIT_S) -> Credential:
    """What a plugin says. `config`: the kubeconfig's `exec`; `cluster`: that of `provideClusterInfo`; `folder`: of the kubeconfig, where relative paths begin.

    A plugin cannot ask anybody anything. It is killed, with all that it started and that stayed in its session, when it takes longer than `limit_s` seconds,
    and when this is cancelled. Raises PluginFailed.
    """
    version, command = config.get("apiVersion"), config.get("command")
    if version not in _VERSIONS or not isinstance(command, str) or not command:
        raise PluginFailed(f"exec: needs a command, and an apiVersion of {' or '.join(_VERSIONS)}")
    if config.get("interactiveMode") == "Always":
        raise PluginFailed(f"exec: {command}: interactiveMode Always: there is nobody to ask")
    if os.path.dirname(command) and not os.path.isabs(command):
        command = os.path.join(folder, command)
    spec = {"interactive": False, **({"cluster": dict(cluster)} if config.get("provideClusterInfo") else {})}
    environment = {**os.environ, **{str(one["name"]): str(one["value"]) for one in config.get("env") or ()}}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps({"apiVersion": version, "kind": "ExecCredential", "spec": spec})
    # Files in memory, not pipes: they are whole when the plugin ends, whoever else has them.
    with os.fdopen(os.memfd_create("stdout"), "rb") as out, os.fdopen(os.memfd_create("stderr"), "rb") as complaints:
        try:
            process = _start([command, *map(str, config.get("args") or ())], environment, out, complaints)
        except (OSError, ValueError) as error:
            hint = str(config.get("installHint") or "").strip()
            raise PluginFailed(f"exec: {command}: {error}{f'; {hint}' if hint else ''}") from error
        code = await _end(process, limit_s)
        said, complaint = _content(out, _LONGEST + 1), _content(complaints, _LONGEST_COMPLAINT).decode("utf-8", "replace").strip()
    if code != 0:
        what = f"took longer than {limit_s:g} s" if code is None else f"ended with {code}"
        raise PluginFailed(f"exec: {command} {what}{f': {complaint}' if complaint else ''}")
    return _credential(said, str(version), command)


def _start(command: list[str], environment: Mapping[str, str], out: BinaryIO, complaints: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=complaints, start_new_session=True)


async def _end(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The code that it ends with; None if it took too long."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    fd = os.pidfd_open(process.pid)
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(limit_s):
            await ended.wait()
    except TimeoutError:
        return None
    finally:
        loop.remove_reader(fd)
        os.close(fd)
        if not ended.is_set():
            os.killpg(process.pid, signal.SIGKILL)  # nobody has waited for it yet: the group's number is its own
        code = process.wait()
    return code


def _content(file: BinaryIO, most: int) -> bytes:
    """What was written into a file."""
    file.seek(0)
    return file.read(most)


def _credential(said: bytes, version: str, command: str) -> Credential:
    try:
        document = json.loads(said) if len(said) <= _LONGEST else None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("kind") != "ExecCredential":
        raise PluginFailed(f"exec: {command}: what it prints is no ExecCredential")
    if document.get("apiVersion") != version:
        raise PluginFailed(f"exec: {command}: it speaks {document.get('apiVersion')}, and not {version}")
    status = document.get("status")
    found = status if isinstance(status, dict) else {}
    made = Credential(*(str(found.get(name) or "") for name in ("token", "clientCertificateData", "clientKeyData")))
    if not (made.token or made.certificate) or bool(made.certificate) != bool(made.key):
        raise PluginFailed(f"exec: {command}: its status has neither a token nor a certificate with its key")
    return made
