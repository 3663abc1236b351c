"""RTDS: layers of runtime values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail
from meshproxy.api.runtime import parse_struct
from meshproxy.xds.resources import RUNTIME

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources


class RuntimeLayer:
    """The watcher of one layer. `tell(layer, Struct)` is how this process and the workers hear of it; `on_first` is called once."""

    def __init__(self, layer: Any, sources: Sources, context: Context, tell: Callable[[str, bytes], None], on_first: Callable[[], None]) -> None:
        """`layer`: envoy.config.bootstrap.v3.RuntimeLayer with an rtds_layer. Raises ConfigError."""
        self._layer: str = layer.name
        self._name: str = layer.rtds_layer.name
        self._tell = tell
        self._on_first = on_first
        self.subscription = sources.subscribe(layer.rtds_layer.rtds_config, RUNTIME, self._name, self, context.stats.scope("runtime."))

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources and update.removed:
            self._tell(self._layer, b"")
        elif len(update.resources) != 1:
            fail("", f"Unexpected RTDS resource length: {len(update.resources)}")
        elif (proto := update.resources[0].message) is not None:
            if proto.name != self._name:
                fail("", f"Unexpected RTDS runtime (expecting {self._name}): {proto.name}")
            parse_struct(proto.layer)
            self._tell(self._layer, proto.layer.SerializeToString(deterministic=True))
        self._on_first()

    def failed(self) -> None:
        """Nothing (good) came: the start goes on."""
        self._on_first()
