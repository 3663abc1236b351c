"""Runtime values: a few numbers and switches that can change while the proxy runs, by layers of which a later one overrides an earlier one.

Static layers come from the bootstrap, disk layers from a tree of small files, RTDS layers by discovery, and the admin layer, of which there is at most one,
from `/runtime_modify`. Without one of the last two nothing can change, and whatever is compiled from a runtime key becomes a constant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, messages
from meshproxy.api.errors import UNSUPPORTED, Collector, ConfigError
from meshproxy.record import Record, field

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from envoy.config.bootstrap.v3.bootstrap_pb2 import LayeredRuntime, RuntimeLayer
    from envoy.config.core.v3.base_pb2 import RuntimeFeatureFlag, RuntimeFractionalPercent
    from envoy.type.v3.percent_pb2 import FractionalPercent

HONOURS = {
    "envoy.config.bootstrap.v3.LayeredRuntime": "layers",
    "envoy.config.bootstrap.v3.RuntimeLayer": "name static_layer disk_layer admin_layer rtds_layer",
    "envoy.config.bootstrap.v3.RuntimeLayer.RtdsLayer": "name rtds_config",
    "envoy.service.runtime.v3.Runtime": "name layer",
    "envoy.config.bootstrap.v3.RuntimeLayer.DiskLayer": "symlink_root append_service_cluster subdirectory",
    "envoy.config.bootstrap.v3.RuntimeLayer.AdminLayer": "",
    "envoy.config.core.v3.RuntimeFractionalPercent": "default_value runtime_key",
    "envoy.config.core.v3.RuntimeFeatureFlag": "default_value runtime_key",
    "envoy.type.v3.FractionalPercent": "numerator denominator",
}

MAX_DISK_DEPTH = 16  # directories below a disk layer's root

_DENOMINATOR_NAMES: dict[str | int, int] = {"HUNDRED": 100, "TEN_THOUSAND": 10_000, "MILLION": 1_000_000}
# By the numbers of envoy.type.v3.FractionalPercent.DenominatorType.
DENOMINATORS = {number: _DENOMINATOR_NAMES[name] for name, number in messages.known("envoy.type.v3.FractionalPercent").DenominatorType.items()}
_DECIMAL = r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*"


class Entry(Record, frozen=True):
    """One value as each kind of reader sees it; None where it is not of that kind. `raw` is what `/runtime` shows."""

    raw: str
    number: float | None = None
    boolean: bool | None = None
    fraction: tuple[int, int] | None = None  # numerator, denominator

    @property
    def integer(self) -> int | None:
        """The number rounded down; negative numbers are no integers here."""
        return int(self.number) if self.number is not None and 0 <= self.number <= 1 << 64 else None


class Layer(Record):
    """The values of one layer. `admin` marks the one that can be modified, `discovered` those that come by discovery."""

    name: str
    values: dict[str, Entry] = field(default_factory=dict)
    admin: bool = False
    discovered: bool = False


class Runtime:
    """The values of all layers, the last layer first. Readers get the default they pass when a key is not there or not of their kind."""

    def __init__(self, layers: list[Layer] | None = None) -> None:
        self.layers = layers or []
        self.load_errors = 0  # disk layers that could not be read
        self.mutable = any(layer.admin or layer.discovered for layer in self.layers)
        self._values: dict[str, Entry] = {}
        self._rebuild()

    @classmethod
    def from_proto(cls, proto: LayeredRuntime, service_cluster: str = "") -> Runtime:
        """Read the layers, files included. Raises ConfigError relative to `proto`; a disk layer that cannot be read is empty, as in Envoy."""
        problems = Collector()
        layers: list[Layer] = []
        failed = 0
        names: set[str] = set()
        for i, one in enumerate(proto.layers):
            with problems.under(f"layers[{i}]"):
                if one.name in names:
                    errors.fail("name", f"another layer is called {one.name!r} too")
                names.add(one.name)
                if one.HasField("admin_layer") and any(layer.admin for layer in layers):
                    errors.fail("admin_layer", "there can be only one admin layer")
                layer, readable = _layer(one, service_cluster)
                layers.append(layer)
                failed += not readable
        problems.raise_any()
        runtime = cls(layers)
        runtime.load_errors = failed
        return runtime

    def integer(self, key: str, default: int) -> int:
        entry = self._values.get(key)
        value = entry.integer if entry is not None else None
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        entry = self._values.get(key)
        return default if entry is None or entry.number is None else entry.number

    def boolean(self, key: str, default: bool) -> bool:
        entry = self._values.get(key)
        return default if entry is None or entry.boolean is None else entry.boolean

    def fraction(self, key: str, default: tuple[int, int]) -> tuple[int, int]:
        """Numerator and denominator; a plain number is a percentage, and whatever is over 100 is always."""
        entry = self._values.get(key)
        if entry is None:
            return default
        if entry.fraction is not None:
            return entry.fraction
        percent = entry.integer
        return default if percent is None else (min(percent, 100), 100)

    def modify(self, changes: Mapping[str, str]) -> None:
        """Override keys in the admin layer; an empty value removes the override. Raises ConfigError when there is no admin layer."""
        layer = next((layer for layer in self.layers if layer.admin), None)
        if layer is None:
            raise ConfigError("No admin layer specified")
        parsed = {key: parse_entry(text) for key, text in changes.items() if text}
        for key in changes:
            layer.values.pop(key, None)
        layer.values.update(parsed)
        self._rebuild()

    def replace_layer(self, name: str, struct: bytes) -> None:
        """The values of a layer by discovery: a serialised google.protobuf.Struct. Raises ConfigError and changes nothing when they are wrong."""
        values = parse_struct(messages.known("google.protobuf.Struct").FromString(struct))
        for layer in self.layers:
            if layer.discovered and layer.name == name:
                layer.values = values
        self._rebuild()

    @property
    def overrides(self) -> dict[str, str]:
        """What the admin layer holds: `modify` with it brings another Runtime of the same configuration to the same state."""
        return {key: entry.raw for layer in self.layers if layer.admin for key, entry in layer.values.items()}

    def dump(self) -> dict[str, Any]:
        """What `/runtime` shows: `layers` and, per key, `final_value` and `layer_values`."""
        return {
            "layers": [layer.name for layer in self.layers],
            "entries": {
                key: {"layer_values": [layer.values[key].raw if key in layer.values else "" for layer in self.layers], "final_value": entry.raw}
                for key, entry in sorted(self._values.items())
            },
        }

    @property
    def size(self) -> int:
        """How many keys have values. (Not `__len__`: an empty runtime may fill, and must not pass for none.)"""
        return len(self._values)

    def _rebuild(self) -> None:
        values: dict[str, Entry] = {}
        for layer in self.layers:
            values.update(layer.values)
        self._values = values


# -- compiled readers


def compile_chance(proto: RuntimeFractionalPercent | FractionalPercent | None, runtime: Runtime, *, default: bool = True) -> bool | Callable[[int], bool]:
    """Whether something applies, given a random integer of at least 64 bits: for what must be decided the same way twice for one stream.

    A constant where it is one. `default` is the answer for an unset field (None); a set RuntimeFractionalPercent without default_value means never.
    """
    if proto is None:
        return default
    key, start = _key_and_default(proto)
    if not key or not runtime.mutable:
        numerator, denominator = runtime.fraction(key, start)
        if numerator <= 0 or numerator >= denominator:
            return numerator > 0
        return lambda value: value % denominator < numerator

    def chance(value: int) -> bool:
        numerator, denominator = runtime.fraction(key, start)
        return value % denominator < numerator

    return chance


def compile_fraction(
    proto: RuntimeFractionalPercent | FractionalPercent | None, runtime: Runtime, random: random.Random, *, default: bool = True
) -> bool | Callable[[], bool]:
    """Whether something applies, decided anew by `random` at each call; see compile_chance."""
    chance = compile_chance(proto, runtime, default=default)
    if isinstance(chance, bool):
        return chance
    bits = random.getrandbits
    return lambda: chance(bits(64))


def compile_flag(proto: RuntimeFeatureFlag | None, runtime: Runtime, *, default: bool = True) -> bool | Callable[[], bool]:
    """The switch of a RuntimeFeatureFlag; `default` is for an unset field (None) and for a flag without default_value."""
    if proto is None:
        return default
    start = proto.default_value.value if proto.HasField("default_value") else default
    key = proto.runtime_key
    if not key or not runtime.mutable:
        return runtime.boolean(key, start)
    return lambda: runtime.boolean(key, start)


def fraction_of(proto: FractionalPercent) -> tuple[int, int]:
    """Numerator and denominator of a FractionalPercent."""
    return proto.numerator, DENOMINATORS.get(proto.denominator, 100)


def _key_and_default(proto: RuntimeFractionalPercent | FractionalPercent) -> tuple[str, tuple[int, int]]:
    if proto.DESCRIPTOR.full_name == "envoy.type.v3.FractionalPercent":
        return "", fraction_of(proto)
    return proto.runtime_key, fraction_of(proto.default_value)


# -- layers and values


def _layer(proto: RuntimeLayer, service_cluster: str) -> tuple[Layer, bool]:
    kind = proto.WhichOneof("layer_specifier")
    if kind == "static_layer":
        with errors.under("static_layer"):
            return Layer(proto.name, parse_struct(proto.static_layer)), True
    if kind == "rtds_layer":
        return Layer(proto.name, discovered=True), True
    if kind == "disk_layer":
        disk = proto.disk_layer
        root = "/".join(part for part in (disk.symlink_root, disk.subdirectory, service_cluster if disk.append_service_cluster else "") if part)
        if not root:
            errors.fail("disk_layer.symlink_root", "must not be empty")
        from pathlib import Path

        if disk.symlink_root and not Path(disk.symlink_root).parent.is_dir():
            # The link may come later; where it will be must exist, for Envoy watches it.
            errors.fail("disk_layer.symlink_root", f"the directory {Path(disk.symlink_root).parent} does not exist")
        values: dict[str, Entry] = {}
        try:
            _walk_disk(Path(root), "", 1, values)
        except (OSError, ConfigError, ValueError):
            # Envoy starts without the values of a directory that is not there (yet), and counts runtime.load_error.
            return Layer(proto.name), False
        return Layer(proto.name, values), True
    if kind == "admin_layer":
        return Layer(proto.name, admin=True), True
    raise ConfigError.at(kind or "", "is not supported" if kind else "static_layer, disk_layer, admin_layer or rtds_layer must be set", UNSUPPORTED)


def parse_struct(struct: Any) -> dict[str, Entry]:
    """The values of a google.protobuf.Struct. Raises ConfigError."""
    from meshproxy.api import convert  # only where there is a layer: it is much code for every worker to hold

    values: dict[str, Entry] = {}
    for key, value in convert.from_struct(struct).items():
        _flatten(key, value, values)
    return values


def _flatten(key: str, value: Any, values: dict[str, Entry]) -> None:
    if value is None or isinstance(value, list):
        errors.fail(key, "a runtime value must be a number, a string, true, false or a mapping")
    if isinstance(value, dict) and value and not {"numerator", "denominator"} & value.keys():
        for name, item in value.items():
            _flatten(f"{key}.{name}", item, values)
    else:
        values[key] = _entry(value, "")


def _walk_disk(folder: Path, prefix: str, depth: int, values: dict[str, Entry]) -> None:
    if depth > MAX_DISK_DEPTH:
        errors.fail(str(folder), f"deeper than {MAX_DISK_DEPTH} directories")
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _walk_disk(path, f"{prefix}{path.name}.", depth + 1, values)
        elif path.is_file():
            lines = [line for line in path.read_text("utf-8").split("\n") if line and not line.startswith("#")]
            values[prefix + path.name] = parse_entry("\n".join(lines).rstrip())


def parse_entry(text: str) -> Entry:
    """The value that a file or `/runtime_modify` gives as text. Raises ConfigError when it is not YAML."""
    from meshproxy.api import document

    return _entry(document.parse(text), text)


def _entry(value: Any, raw: str) -> Entry:
    if isinstance(value, bool):
        return Entry(raw or str(value).lower(), boolean=value)
    if isinstance(value, int | float):
        return _number(float(value), raw or f"{value:g}")
    if isinstance(value, dict):
        import json

        return Entry(raw or json.dumps(value), fraction=_fraction(value))
    if isinstance(value, str) and re.fullmatch(_DECIMAL, value):
        return _number(float(value), raw or value)
    return Entry(raw or str(value or ""))


def _number(number: float, raw: str) -> Entry:
    whole = number.is_integer() and abs(number) < 1 << 31
    return Entry(raw, number=number, boolean=number != 0 if whole else None)


def _fraction(value: dict[str, Any]) -> tuple[int, int] | None:
    numerator = value.get("numerator", 0)
    name = value.get("denominator", "HUNDRED")
    denominator = _DENOMINATOR_NAMES.get(name) if isinstance(name, str | int) else None
    if value.keys() - {"numerator", "denominator"} or denominator is None or not isinstance(numerator, int | float) or not math.isfinite(numerator):
        return None
    return int(numerator), denominator
