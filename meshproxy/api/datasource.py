"""DataSource: bytes from a file, from the configuration itself, or from the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from meshproxy.api import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from envoy.config.core.v3.base_pb2 import DataSource

HONOURS = {"envoy.config.core.v3.DataSource": "filename inline_bytes inline_string environment_variable"}


def read(source: DataSource, *, allow_empty: bool = False, max_size: int = 0, environment: Mapping[str, str] = os.environ) -> bytes:
    """The bytes that `source` names, read now. `max_size` in bytes, 0 for no limit.

    Raises ConfigError relative to `source`: no such file or variable, unreadable, empty (unless `allow_empty`), too large, or nothing set.
    """
    kind = source.WhichOneof("specifier")
    if kind is None:
        if allow_empty:
            return b""
        errors.fail("", "filename or inline_bytes or inline_string or environment_variable must be set")
    value = getattr(source, kind)
    if kind == "filename":
        data = _read_file(value)
    elif kind == "environment_variable":
        if value not in environment:
            errors.fail(kind, f"the environment variable {value} is not set")
        data = environment[value].encode("utf-8", "surrogateescape")
    else:
        data = value if isinstance(value, bytes) else value.encode()
    if not data and not allow_empty:
        errors.fail(kind, f"{value} is empty" if kind in ("filename", "environment_variable") else "must not be empty")
    if max_size and len(data) > max_size:
        errors.fail(kind, f"has {len(data)} bytes; at most {max_size} are allowed")
    return data


def read_text(source: DataSource, *, allow_empty: bool = False, max_size: int = 0, environment: Mapping[str, str] = os.environ) -> str:
    """Like `read`, decoded as UTF-8."""
    data = read(source, allow_empty=allow_empty, max_size=max_size, environment=environment)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        errors.fail(source.WhichOneof("specifier") or "", f"not UTF-8: {error.reason} at byte {error.start}")


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        errors.fail("filename", f"cannot read {path}: {error.strerror}")
    except ValueError:  # a NUL in the name
        errors.fail("filename", f"{path!r} is not a file name")
