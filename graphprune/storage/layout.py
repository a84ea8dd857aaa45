"""Where the files of an artifact lie in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

MANIFEST = "manifest.json"
CARD = "README.md"  # the model card, which its owner may edit
# Of the files that travel with a program, those that graphprune alone reads.
OWN_FILES = ("task.json", "labels.json")


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """One of two ways to lay out an artifact.

    1. `FLAT`: everything side by side, model.onnx among it.
    2. `HUB`: as the hub has models. What runs the model reads the root and onnx/; what graphprune
       keeps beside it is in graphprune/, and can be left out of an upload.

    Attributes:
        name: "flat" or "hub".
        own: folder of what graphprune keeps, with its slash; "" is the root.
        onnx: folder of the deployed model.
    """

    name: str
    own: str
    onnx: str

    @property
    def manifest(self) -> str:
        """The file that names and hashes all others."""
        return self.own + MANIFEST

    @property
    def program(self) -> str:
        """The folder of the program."""
        return f"{self.own}program"

    def place(self, name: str) -> str:
        """Where a file goes that travels with the program."""
        return self.own + name if name in OWN_FILES else name


FLAT = Layout("flat", "", "")
HUB = Layout("hub", "graphprune/", "onnx/")
LAYOUTS = {layout.name: layout for layout in (FLAT, HUB)}


def layout_of(folder: Path) -> Layout | None:
    """How the artifact in a folder is laid out; None where there is no manifest."""
    return next((layout for layout in (HUB, FLAT) if (folder / layout.manifest).is_file()), None)
