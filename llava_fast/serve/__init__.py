"""An OpenAI-compatible HTTP server on the engine: ``python -m llava_fast.serve``, or :func:`create_app` in an app.

Needs the extra: ``pip install 'llava-fast[serve]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_fast.serve.settings import Settings

if TYPE_CHECKING:
    from llava_fast.serve.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:  # on first use: the command line says in one line what is missing
    if name == "create_app":
        from llava_fast.serve.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
