"""What one proxy asks for, by name, when its application calls it (VHDS), and what it has not called for long. Sans-IO."""

from __future__ import annotations

from collections.abc import Mapping

from control.ads.session import Session
from control.translate.resource import VIRTUAL_HOST
from control.translate.translator import Asked

MAX_UNKNOWN = 1000  # names of nothing in the mesh that a proxy is answered for; the oldest go first
_OURS = "meshproxy"  # a node's user agent


class Interest:
    """Of one delta stream of all types. What a proxy asked for is its own as long as its stream lasts, unless it is dropped."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._since: dict[str, float] = {}  # name -> when it was asked for, in that order
        self._dropped: set[str] = set()

    def asked(self, now: float) -> Asked:
        """All of it."""
        session = self._session
        for name in session.asked_anew:
            self._dropped.discard(name)
            self._since.pop(name, None)
            self._since[name] = now
        session.asked_anew.clear()
        hosts = session.subscriptions.get(VIRTUAL_HOST)
        if hosts is None:
            # It has come back, and has yet to say what it asked for: until then, what it has is what it wants.
            return Asked(frozenset(), frozenset(host for name in session.brought if (host := service_of(name))))
        for name in self._since.keys() - hosts.names:
            del self._since[name]
        self._dropped &= hosts.names
        return Asked(frozenset(hosts.names - self._dropped))

    @property
    def asks_again(self) -> bool:
        """Whether the proxy asks once more for what was taken away. Envoy does not: its requests would find nothing for ever."""
        return self._session.node is not None and self._session.node.user_agent_name == _OURS

    def drop_unknown(self, led: Mapping[str, frozenset[str]]) -> bool:
        """Answer no longer for names that lead nowhere, but for the last of them; whether there were too many."""
        unknown = [name for name in self._since if name not in led and name not in self._dropped]
        self._dropped.update(unknown[:-MAX_UNKNOWN])
        return len(unknown) > MAX_UNKNOWN

    def drop_idle(self, led: Mapping[str, frozenset[str]], used: Mapping[str, float], before: float) -> list[str]:
        """Drop what was asked for, and used last, before that time. `led`: names -> services; `used`: services -> when."""
        found = [
            name
            for name, since in self._since.items()
            if name not in self._dropped and max(since, *(used.get(host, since) for host in led.get(name, ()))) < before
        ] if self.asks_again else []  # fmt: skip
        self._dropped.update(found)
        return found


def service_of(cluster: str) -> str:
    """The host of a cluster's service; "" for what is none."""
    parts = cluster.split("|")
    return parts[3] if len(parts) == 4 and parts[0] == "outbound" else ""
