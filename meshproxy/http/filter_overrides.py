"""`typed_per_filter_config`: what a route configuration, virtual host, route or weighted cluster says about HTTP filters, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.any_pb2 import Any as AnyProto

_FILTER_CONFIG = "envoy.config.route.v3.FilterConfig"
_KIND = "per-route filter configuration"

HONOURS = {_FILTER_CONFIG: "config is_optional disabled"}


class FilterOverride:
    """One filter's entry at one level: `disabled`, and the decoded `config`, None when the entry only switches the filter on or off."""

    __slots__ = ("config", "disabled")

    def __init__(self, config: Any, disabled: bool = False) -> None:
        self.config = config
        self.disabled = disabled

    def __repr__(self) -> str:
        return f"FilterOverride(disabled={self.disabled}, {type(self.config).__name__})"


def compile_overrides(configs: Mapping[str, AnyProto]) -> dict[str, FilterOverride]:
    """The map of one level, by filter name. Raises ConfigError with paths that start at the key."""
    overrides: dict[str, FilterOverride] = {}
    for name in configs:
        with under(f"typed_per_filter_config[{name}]"):
            override = _compile(name, configs[name])
        if override is not None:
            overrides[name] = override
    return overrides


def _compile(name: str, packed: AnyProto) -> FilterOverride | None:
    if registry.type_url(packed) != registry.TYPE_PREFIX + _FILTER_CONFIG:
        return FilterOverride(_decode(packed))
    wrapper: Any = registry.unpack(packed)
    if wrapper.disabled:
        return FilterOverride(None, disabled=True)
    if not wrapper.HasField("config"):
        fail("config", f"Empty route/virtual host per filter configuration for {name} filter")
    if not wrapper.config.type_url:
        return FilterOverride(None)
    if wrapper.is_optional and not registry.is_known(wrapper.config):
        return None
    try:
        with under("config"):
            return FilterOverride(_decode(wrapper.config))
    except ConfigError as error:
        if wrapper.is_optional and all(problem.kind == UNSUPPORTED for problem in error.problems):
            return None
        raise


def _decode(packed: AnyProto) -> Any:
    registry.module(registry.type_url(packed), _KIND)  # the type must be one that some filter takes here
    return registry.unpack(packed)
