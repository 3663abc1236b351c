"""What spans say of the process that they come from: OpenTelemetry's resource, and its detectors.

Sources: envoy.extensions.tracers.opentelemetry.resource_detectors.v3; OpenTelemetry's specification of a resource for OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote

from meshproxy import __version__
from meshproxy.api import errors, registry

_E = "envoy.extensions.tracers.opentelemetry.resource_detectors.v3."
HONOURS = {f"{_E}EnvironmentResourceDetectorConfig": "", f"{_E}StaticConfigResourceDetectorConfig": "attributes"}

_VARIABLE = "OTEL_RESOURCE_ATTRIBUTES"


def detect(service_name: str, detectors: Any) -> dict[str, str]:
    """The attributes of a resource; what a later detector says overrides what an earlier one did. Raises ConfigError relative to the message."""
    attributes = {
        "service.name": service_name or "unknown_service:envoy",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "meshproxy",
        "telemetry.sdk.version": __version__,
    }
    for position, extension in enumerate(detectors):
        with errors.under(f"resource_detectors[{position}].typed_config"):
            registry.module(registry.type_url(extension.typed_config), "OpenTelemetry resource detector")
            config: Any = registry.unpack(extension.typed_config)
            if config.DESCRIPTOR.name == "StaticConfigResourceDetectorConfig":
                attributes.update({name: value for name, value in sorted(config.attributes.items()) if name and value})
            else:
                attributes.update(_from_environment())
    return attributes


def _from_environment() -> dict[str, str]:
    text = os.environ.get(_VARIABLE, "")
    attributes = {}
    for pair in text.split(",") if text else ():
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            errors.fail("", f"The {_VARIABLE} environment variable is malformed: {pair!r} is not of the form key=value")
        attributes[name.strip()] = unquote(value.strip())
    return attributes
