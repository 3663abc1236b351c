"""OpenTelemetry's samplers: whether a trace is sampled that the connection manager would trace.

Sources: envoy.extensions.tracers.opentelemetry.samplers.v3; Envoy's, of which `TraceIdRatioBased` reads ids as numbers in its own manner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, registry, runtime

if TYPE_CHECKING:
    from meshproxy.tracing.context import SpanContext

_E = "envoy.extensions.tracers.opentelemetry.samplers.v3."
HONOURS = {
    f"{_E}AlwaysOnSamplerConfig": "",
    f"{_E}TraceIdRatioBasedSamplerConfig": "sampling_percentage",
    f"{_E}ParentBasedSamplerConfig": "wrapped_sampler",
}

Sampler = Callable[["SpanContext | None", bytes], bool]  # of the parent, and the trace id


def compile_sampler(extension: Any) -> Sampler:
    """The sampler of a TypedExtensionConfig. Raises ConfigError relative to it."""
    with errors.under("typed_config"):
        registry.module(registry.type_url(extension.typed_config), "OpenTelemetry sampler")
        config: Any = registry.unpack(extension.typed_config)
        name = config.DESCRIPTOR.name
        if name == "AlwaysOnSamplerConfig":
            return _always
        if name == "TraceIdRatioBasedSamplerConfig":
            return _ratio(config)
        with errors.under("wrapped_sampler"):
            return _by_parent(compile_sampler(config.wrapped_sampler))


def _always(parent: SpanContext | None, trace_id: bytes) -> bool:
    return True


def _ratio(config: Any) -> Sampler:
    numerator, denominator = runtime.fraction_of(config.sampling_percentage)
    return lambda parent, trace_id: int.from_bytes(bytes.fromhex(trace_id[:16].decode()), "little") % denominator < numerator


def _by_parent(otherwise: Sampler) -> Sampler:
    return lambda parent, trace_id: otherwise(parent, trace_id) if parent is None else parent.sampled
