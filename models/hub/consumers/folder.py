"""A model's folder, read when it is asked about."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.models.hub.consumers.graph import Graph, read_graph

OURS = "graphprune/"


class HubFolder:
    """The files of a model: JSON and ONNX, parsed once each and never run.

    Raises:
        GraphPruneError: it is no folder, or holds no .onnx file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise GraphPruneError(f"{str(path)!r} is no folder; give the folder of an ONNX model")
        self.path = path
        self._json: dict[str, Any] = {}
        self._graphs: dict[str, Graph | None] = {}
        if not self.onnx_files:
            raise GraphPruneError(
                f"{str(path)!r} holds no .onnx file; `graphprune compile` or "
                "`compiled.export` writes a folder that does"
            )

    @cached_property
    def onnx_files(self) -> tuple[str, ...]:
        """All .onnx files at any depth, those at the root first."""
        found = [p.relative_to(self.path) for p in self.path.rglob("*.onnx") if p.is_file()]
        return tuple(p.as_posix() for p in sorted(found, key=lambda p: (len(p.parts), p)))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The .onnx files without those that graphprune keeps for itself."""
        return tuple(name for name in self.onnx_files if not name.startswith(OURS))

    def has(self, name: str) -> bool:
        return os.path.isfile(self.path / name)  # also for names that no file can have

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where there is none."""
        return (self.path / name).stat().st_size if self.has(name) else -1

    def unreadable(self, name: str) -> str:
        """Why a file is no JSON object; empty where it is one."""
        if not self.has(name):
            return f"{name} is missing"
        found = self._parsed(name)
        if isinstance(found, Exception):
            return f"{name} is no JSON ({found})"
        return "" if isinstance(found, dict | list) else f"{name} holds a bare value"

    def json(self, name: str, *keys: str) -> dict[str, Any]:
        """The object in a JSON file, or the one inside it under these keys; empty without one."""
        found = self._at(name, keys)
        return found if isinstance(found, dict) else {}

    def entries(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """The objects in a list, found as `json` finds."""
        found = self._at(name, keys)
        return [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []

    def _at(self, name: str, keys: tuple[str, ...]) -> Any:
        found = self._parsed(name) if self.has(name) else None
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def _parsed(self, name: str) -> Any:
        if name not in self._json:
            try:
                self._json[name] = json.loads((self.path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:  # the latter for what is no UTF-8, too
                self._json[name] = e
        return self._json[name]

    def graph(self, name: str) -> Graph | None:
        """An ONNX file of the folder; None where it cannot be read."""
        if name not in self._graphs:
            self._graphs[name] = read_graph(self.path / name, name)
        return self._graphs[name]
