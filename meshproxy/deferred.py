"""Modules that are imported when somebody first looks into them: what others import at their top, and few need."""

from __future__ import annotations

import sys
from importlib import util


def defer(name: str) -> None:
    """Let `import name`, and `from` its package, give a module that is loaded by the first use of anything in it. Nothing happens when it is there already."""
    if name in sys.modules:
        return
    spec = util.find_spec(name)
    if spec is None or spec.loader is None:
        return  # another version of the library: who imports it will say so
    spec.loader = util.LazyLoader(spec.loader)
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    package, _, attribute = name.rpartition(".")
    setattr(sys.modules[package], attribute, module)
