"""Modules that are imported when somebody first looks into them: what others import at their top, and few need."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module, and becomes it. Unlike importlib's LazyLoader, whose modules are loaded by the next `import` of them."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        self.__class__ = ModuleType  # type: ignore[assignment]  # which is allowed for modules
        sys.modules[self.__name__] = sys.modules.pop(self.__name__)  # in the order of loading, as `import` has it
        spec.loader.exec_module(self)  # type: ignore[union-attr]  # it has one: see below
        return getattr(self, name)


def defer(*names: str) -> None:
    """Let `import`, and `from` the package, give modules of these names that are loaded by the first use of anything in them, unless they are there already."""
    for name in names:
        if name in sys.modules:
            continue
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            continue  # another version of the library: who imports it will say so
        module = module_from_spec(spec)
        module.__class__ = _Deferred
        sys.modules[name] = module
        package, _, attribute = name.rpartition(".")
        if package:
            setattr(sys.modules[package], attribute, module)
