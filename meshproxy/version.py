"""What this program calls itself."""

from __future__ import annotations

from meshproxy import __version__

ENVOY_VERSION = "1.40.0"  # the Envoy whose behaviour is ours
HOT_RESTART_VERSION = "disabled"


def version(tls_library: str = "OpenSSL") -> str:
    """`<revision>/<version>/<status>/<build type>/<TLS library>` as in /server_info; the revision names the Envoy whose behaviour is ours."""
    return f"envoy-{ENVOY_VERSION}/{__version__}/Clean/RELEASE/{tls_library}"


def version_line() -> str:
    """What --version prints, like Envoy's line."""
    return f"meshproxy  version: {version()}"
