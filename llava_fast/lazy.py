"""Names that a package has from its modules, each imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def exporter(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package (PEP 562). What needs no model then starts without torch, which takes seconds.

    Args:
        package: its ``__name__``.
        homes: the module of each name. Modules of the package itself are found as well.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is not None:
            return getattr(import_module(home), name)
        if name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
