"""The record of a consumer, and what is found when a folder is held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.graph import Graph

# Both return one problem in a sentence, with the way out; or nothing.
FileRule = Callable[[HubFolder], str]
GraphRule = Callable[[HubFolder, Graph], str]


# Where a configuration has the number of layers.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")


@dataclass(frozen=True, slots=True)
class Finding:
    """The obstacles to one consumer's loading a folder, and notes where there is none.

    Attributes:
        opens: the .onnx files that it opens.
        problems: each keeps it from loading the folder, or from running what it loaded.
        notes: how to call it, and what differs by its version or by where it runs.
    """

    consumer: str
    what: str
    opens: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON."""
        return {
            "consumer": self.consumer,
            "what": self.what,
            "loads": self.loads,
            "opens": list(self.opens),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program or library that loads folders with ONNX models.

    Attributes:
        what: its package and version, as read or run.
        opens: the .onnx files that it would open, of those in a folder; empty where none fits.
        looks_for: what it opens, in words; empty where a rule about files covers it.
        files: rules about the files of the folder.
        graph: rules about each .onnx file that it opens.
        notes: what to know about each file that it opens; same form as a rule.
    """

    name: str
    what: str
    opens: Callable[[HubFolder], tuple[str, ...]]
    looks_for: str
    files: tuple[FileRule, ...] = ()
    graph: tuple[GraphRule, ...] = ()
    notes: tuple[GraphRule, ...] = ()

    def check(self, folder: HubFolder) -> Finding:
        """Hold a folder against every rule."""
        problems = [rule(folder) for rule in self.files]
        notes: list[str] = []
        opened = self.opens(folder)
        if self.looks_for and not opened:
            problems.append(
                f"there is no {self.looks_for}, which it opens (only {_some(folder.onnx_files)}): "
                "rename the file or move it there"
            )
        for name in opened:
            graph = folder.graph(name)
            if graph is None:
                problems.append(f"{name} is no ONNX model that can be read: write it again")
                continue
            problems += [rule(folder, graph) for rule in self.graph]
            notes += [note(folder, graph) for note in self.notes]
        return Finding(self.name, self.what, opened, _said(problems), _said(notes))


def _said(sentences: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for s in sentences if s))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
