"""Where the API server is, and who we are there: by the service account of a pod, or by a kubeconfig.

kubernetes_asyncio reads them; plugins we run ourselves (`exec_plugin`), and HTTP is ours: the library's session reads ~/.netrc for each request and fails where
that has something to say, and knows no networks in NO_PROXY, which is how clusters are written there.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import yaml
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.config import ConfigException, load_incluster_config
from kubernetes_asyncio.config.kube_config import FileOrData, KubeConfigLoader, KubeConfigMerger

from control import exec_plugin
from meshproxy.record import Record

MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_WRONG = (ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, exec_plugin.PluginFailed)


class NoAccess(Exception):
    """We do not know where the API server is, or who we are. The text says why."""


class Access(Record, frozen=True):
    """How to find the API server. `kubeconfig` "": by the pod's service account, or else $KUBECONFIG or ~/.kube/config; `context` "": that file's current one.

    `mount`: the folder of the service account.
    """

    kubeconfig: str = ""
    context: str = ""
    mount: str = MOUNT


class Found(NamedTuple):
    """`url`: without a slash at its end; `server_name`: that its certificate must have, None for that of the URL; `proxy`: by HTTP, "" for none.

    `who` gives the value of Authorization, "" for none. It raises ConfigException and OSError when a token's file is no longer good.
    """

    url: str
    tls: ssl.SSLContext
    server_name: str | None
    proxy: str
    who: Callable[[], Awaitable[str]]
    shows_certificate: bool


def kubeconfig(access: Access) -> str:
    """The kubeconfig, or several with `:` between them, that says it; "" for the service account of a pod."""
    if not access.kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
        return ""
    return access.kubeconfig or os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")


def check(access: Access) -> None:
    """Raises NoAccess when there is nothing that could say it."""
    path = kubeconfig(access)
    if path and not any(os.path.isfile(one) for one in path.split(":")):
        raise NoAccess(f"{path}: there is no such kubeconfig")


async def find(access: Access) -> Found:
    """As things are now: all files are read, and plugins run. Raises NoAccess."""
    found = Configuration()
    try:
        path = kubeconfig(access)
        if not path:
            load_incluster_config(found, token_filename=f"{access.mount}/token", cert_filename=f"{access.mount}/ca.crt")
        else:
            check(access)
            await _Kubeconfig(KubeConfigMerger(path).config, access.context or None, config_base_path=None).load_and_set(found)
        url = str(found.host or "").rstrip("/")
        proxy = found.proxy if isinstance(found.proxy, str) and found.proxy else proxy_for(url, os.environ)
        if proxy and urlsplit(proxy).scheme not in ("http", "https"):
            raise NoAccess(f"the proxy {proxy}: only those of http and https are served")
    except _WRONG as error:
        raise NoAccess(f"how to find the API server: {error}") from error
    try:
        tls = _tls(found)
    except (OSError, ValueError) as error:
        raise NoAccess(f"the certificates for the API server: {error}") from error

    async def who() -> str:
        return str(await found.get_api_key_with_prefix("BearerToken") or "").strip()

    return Found(url, tls, found.tls_server_name or None, proxy, who, bool(found.cert_file))


def _tls(found: Configuration) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=found.ssl_ca_cert)
    if found.cert_file:
        made.load_cert_chain(found.cert_file, found.key_file)
    if not found.verify_ssl:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    made.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the authorities of many clusters lack what RFC 5280 asks for, and kubectl does not mind
    return made


class _Kubeconfig(KubeConfigLoader):
    """The library's reader, with our way to run plugins. A plugin is asked whenever the file is read: at first, and when the API server does not know us."""

    async def load_from_exec_plugin(self) -> bool:
        """Who the plugin says we are. Raises PluginFailed."""
        found = await exec_plugin.run(self._user["exec"].value, self._cluster.value, self._get_base_path(self._user.path))
        if found.token:
            self.token = f"Bearer {found.token}"
        if found.certificate:
            pair = {"certificate": found.certificate, "key": found.key}
            self.cert_file, self.key_file = (FileOrData(pair, None, data_key_name=name, base64_file_content=False).as_file() for name in pair)
        return True


def proxy_for(url: str, environment: Mapping[str, str]) -> str:
    """The proxy that the environment has for a URL, "" for none. As Go and so kubectl have it: NO_PROXY has names, with all that is below them, addresses, and
    networks, each maybe with a port; and nothing goes to the machine itself by way of a proxy."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxy = _either(environment, f"{parts.scheme}_proxy")
    address = _address(host)
    if not proxy or host == "localhost" or (address is not None and address.is_loopback):
        return ""
    if any(_spares(one.strip().lower(), host, port) for one in _either(environment, "no_proxy").split(",")):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _either(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name.upper()) or environment.get(name) or ""


def _spares(one: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY is about a host."""
    if one in ("", "*"):
        return one == "*"
    address = _address(host)
    if address is not None and "/" in one:
        try:
            return address in ipaddress.ip_network(one, strict=False)
        except ValueError:
            return False
    name, colon, its_port = one.rpartition(":")
    if colon and its_port.isdigit() and _address(one) is None:
        if int(its_port) != port:
            return False
        one = name.strip("[]")
    if address is not None:
        return _address(one) == address
    one = one.removeprefix("*")
    return host.endswith(one) if one.startswith(".") else host == one or host.endswith(f".{one}")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
