"""Changes of several files of a folder that happen at once.

New contents are written beside the files, under hidden names. Then the journal, itself a hidden file, says which of them take the place of which file, and
which files go: that it is there is the moment at which all of it has happened, for whoever reads the folder through `Journal.path`. The files are put in place
after that, and the journal is taken away. Who is interrupted leaves a journal, which the next one finishes.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

NAME = ".meshctl-apply.json"


class Journal(NamedTuple):
    """`put`: name of a file -> the one with its new contents; `gone`: names of files that are no more. All within the folder."""

    put: dict[str, str]
    gone: frozenset[str]

    def path(self, root: str, name: str) -> str:
        """Where the contents of a file are now."""
        other = os.path.join(root, self.put[name]) if name in self.put else ""
        return other if other and os.path.exists(other) else os.path.join(root, name)


NOTHING = Journal({}, frozenset())


def read(root: str) -> Journal:
    """The journal of a folder; NOTHING without one. Raises OSError for one that cannot be read."""
    try:
        with open(os.path.join(root, NAME), encoding="utf-8") as file:
            found: Any = json.load(file)
        return Journal({_inside(name): _inside(scratch) for name, scratch in found["put"].items()}, frozenset(map(_inside, found["gone"])))
    except FileNotFoundError:
        return NOTHING
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(0, f"{NAME} is damaged: {error!r}") from error


def _inside(name: Any) -> str:
    if not isinstance(name, str) or os.path.isabs(name) or ".." in name.split(os.sep):
        raise ValueError(f"{name!r} is no file of the folder")
    return name
