"""Who has come and says that it is a workload of a WorkloadGroup (Istio's auto-registration). Sans-IO.

Nothing of it is kept anywhere: a control plane that begins is told again by those who come. With several, each knows those that have come to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from control.model.registration import Registration
from control.model.snapshot import Key
from control.names import is_ip
from control.translate.proxy import ProxyKey
from meshproxy.api import convert

GRACE_S = 10.0  # that somebody who has left is remembered for, as in Istio: proxies come back
GROUP, ADDRESSES = "AUTO_REGISTER_GROUP", "INSTANCE_IPS"  # metadata of nodes, as Istio's agents write it


def registration_of(node: Any, key: ProxyKey) -> Registration | None:
    """What an envoy.config.core.v3.Node says of itself; None: it does not belong to a group. The address is the first of its metadata, or that in its id."""
    metadata = convert.from_struct(node.metadata)
    group, said = metadata.get(GROUP), metadata.get(ADDRESSES)
    if not isinstance(group, str) or not group:
        return None
    parts = node.id.split("~")
    texts = said if isinstance(said, list) else str(said or "").split(",")
    addresses = [str(text).strip() for text in (*texts, parts[1] if len(parts) == 4 else "")]
    return Registration(key.name, key.namespace, group, next(filter(is_ip, addresses), ""), key.labels, key.locality)


class Registrations:
    """By stream. `changed` is called when `known` is something else. `clock`: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, changed: Callable[[], None] = lambda: None) -> None:
        self.changed = changed
        self.known: Mapping[Key, Registration] = {}
        self._clock = clock
        self._streams: dict[int, Registration] = {}  # in the order in which they came
        self._left: dict[Key, tuple[float, Registration]] = {}

    def came(self, stream: int, one: Registration, account: str | None) -> None:
        """A stream of a proxy has begun. Of two that are called the same, the one that came last counts."""
        self._streams[stream] = replace(one, account=account)
        self._left.pop((one.namespace, one.name), None)
        self._settle()

    def left(self, stream: int) -> None:
        """A stream has ended."""
        one = self._streams.pop(stream, None)
        if one is not None:
            if all(str(other) != str(one) for other in self._streams.values()):
                self._left[one.namespace, one.name] = self._clock(), one
            self._settle()

    def tidy(self) -> None:
        """To be called now and then: forget who has been away for long."""
        before = self._clock() - GRACE_S
        self._left = {key: pair for key, pair in self._left.items() if pair[0] > before}
        self._settle()

    def _settle(self) -> None:
        known = {key: one for key, (_, one) in self._left.items()}
        known.update(((one.namespace, one.name), one) for one in self._streams.values())
        if known != self.known:
            self.known = known
            self.changed()
