"""Output of `meshctl`: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml


def show(value: Any, form: str) -> str:
    """A plain value as JSON or YAML."""
    return json.dumps(value, indent=2) if form == "json" else yaml.safe_dump(value, sort_keys=False).rstrip("\n")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns one under another."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
