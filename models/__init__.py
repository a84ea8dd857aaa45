"""Models and tasks for the command line, the demo and the tests."""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "graphprune.models":
    raise ImportError(f"{__name__!r} is part of graphprune: import graphprune.models")

if TYPE_CHECKING:
    from graphprune.models.loading.loaded import LoadedModel as LoadedModel
    from graphprune.models.loading.loading import load_model as load_model
    from graphprune.models.loading.names import builtin_names as builtin_names

__all__ = ["LoadedModel", "builtin_names", "load_model"]

_HOMES = {
    "LoadedModel": "graphprune.models.loading.loaded",
    "builtin_names": "graphprune.models.loading.names",
    "load_model": "graphprune.models.loading.loading",
}


def __getattr__(name: str) -> Any:
    # `graphprune check` reads folders through models.hub and does without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
