"""Text to plain values: JSON here, YAML in `yaml_text`.

Beyond Envoy: a duplicate key is an error instead of the last one winning.

Only what is light is imported here: reading is the first thing that a start does, while the rest of the proxy is still being imported (`launch`).
"""

from __future__ import annotations

from typing import Any, NoReturn

from meshproxy.api.errors import ConfigError

MAX_DEPTH = 200  # nested objects and lists; far beyond any real configuration


# A configuration that was read, as plain data: its form, which is "value" (of YAML or JSON), "pb" (a binary message) or "pb_text" (protobuf's text format),
# and what was there.
Source = tuple[str, Any]


def read(path: str | None = None, config_yaml: str = "") -> list[Source]:
    """What is in the file at `path`, and in `config_yaml` (`--config-path` and `--config-yaml`).

    By the file's suffix: `.pb` is a binary message, `.pb_text` its text format, `.json` JSON; everything else is YAML or JSON. Raises ConfigError.
    """
    if not path and not config_yaml:
        raise ConfigError("no configuration: give a file (-c) or text (--config-yaml)")
    sources: list[Source] = []
    if path:
        data = _bytes(path)
        lower = path.lower()
        form = "pb" if lower.endswith(".pb") else "pb_text" if lower.endswith(".pb_text") else "value"
        sources.append((form, parse(data, json_only=lower.endswith(".json")) if form == "value" else data))
    if config_yaml:
        sources.append(("value", parse(config_yaml)))
    return sources


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path!r} is not a file name") from error


def parse(text: str | bytes, *, json_only: bool = False) -> Any:
    """The value of a YAML or JSON text, made of dict, list, str, int, float, bool and None. Raises ConfigError with line and column.

    A text that starts like JSON is tried as JSON first, which is ten times faster; numbers become what the YAML rules make of them unless `json_only`.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"not UTF-8: byte {error.start} is 0x{text[error.start]:02x}") from error
    if json_only:
        return _parse_json(text, {})
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _parse_json(text, {"parse_float": str, "parse_int": _integer})
        except _NotJson:
            pass  # YAML's flow style looks alike
    from meshproxy.api import yaml_text

    return yaml_text.parse(text)


class _NotJson(ConfigError):
    """Not JSON syntax, as opposed to JSON that we reject."""


def _parse_json(text: str, hooks: dict[str, Any]) -> Any:
    import json

    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, **hooks)
    except json.JSONDecodeError as error:
        raise _NotJson(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(str(error)) from error
    if "\\u" in text:
        _reject_surrogates(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ConfigError(f"{name} is not a JSON value")


def _integer(text: str) -> int | str:
    # Envoy hands integers beyond 32 bits on as text, so that a double cannot round them.
    value = int(text)
    return value if -(1 << 31) <= value < 1 << 31 else text


def _reject_surrogates(value: Any, depth: int = 0) -> None:
    # "\ud800" is a legal JSON string that no UTF-8 text can hold.
    if depth > MAX_DEPTH:
        raise ConfigError("nested too deeply")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"the string {value!r} holds half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _reject_surrogates(key)
            _reject_surrogates(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _reject_surrogates(item, depth + 1)
