"""Models and tasks for the command line, the demo and the tests."""

if __name__ != "graphprune.models":
    raise ImportError(f"{__name__!r} is part of graphprune: import graphprune.models")

from graphprune.models.loading.loaded import LoadedModel as LoadedModel
from graphprune.models.loading.loading import builtin_names as builtin_names
from graphprune.models.loading.loading import load_model as load_model

__all__ = ["LoadedModel", "builtin_names", "load_model"]
