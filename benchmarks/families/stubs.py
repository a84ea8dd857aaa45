"""Packages that model libraries import and that building a model does not use.

timm, diffusers and ultralytics import torchvision and OpenCV when they are imported themselves; a
model of convolutions needs neither. Where they are missing, modules without content stand in.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Iterable
from typing import Any

ABSENT = ("torchvision", "cv2", "matplotlib", "thop", "ultralytics_thop")
_VERSION = "0.20.0"


class _Class(type):
    """A class whose attributes are classes, such as the members of an enumeration."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


class _Module(types.ModuleType):
    __version__ = _VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        # Decorators give back what they decorate.
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else None

        def begin(self: Any, *args: Any, **kwargs: Any) -> None:
            pass

        made = _Class(name, (), {"__init__": begin, "__call__": call})
        setattr(self, name, made)
        return made


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        lines = f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {_VERSION}\n"
        return lines if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


class _Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """The last finder of modules: of packages that no other one found."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = context.name if context else None
        return [_Distribution(name)] if name in ABSENT else []


def imported(name: str) -> Any:
    """Import a module of timm, diffusers or ultralytics, with stubs for what they want beside it.

    Raises:
        ImportError: it is not installed.
    """
    _quiet()
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise ImportError(f"{name.split('.')[0]} is not installed")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        _answered_by_transformers()
        sys.meta_path.append(_Finder())
    return importlib.import_module(name)


def _quiet() -> None:
    """ultralytics writes its settings somewhere; nobody asks a hub for files."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _answered_by_transformers() -> None:
    """Let transformers find out what is installed before stubs are; it keeps its answers."""
    found = importlib.import_module("transformers.utils.import_utils")
    for name in ("torchvision", "torchvision_v2", "cv2", "matplotlib"):
        asked = getattr(found, f"is_{name}_available", None)
        if asked is not None:
            asked()
