"""From a Program to an ONNX file that ONNX Runtime runs fast, measured and proven equal."""

if __name__ != "graphprune.exporters":
    raise ImportError(f"{__name__!r} is part of graphprune: import graphprune.exporters")

from graphprune.exporters.artifact import Artifact as Artifact
from graphprune.exporters.artifact import is_artifact as is_artifact
from graphprune.exporters.artifact import open_artifact as open_artifact
from graphprune.exporters.convert import to_onnx as to_onnx
from graphprune.exporters.ort import Comparison as Comparison
from graphprune.exporters.ort import Footprint as Footprint
from graphprune.exporters.ort import Timing as Timing
from graphprune.exporters.parity import Agreement as Agreement
from graphprune.exporters.write import export as export
from graphprune.exporters.write import measure as measure

__all__ = [
    "Agreement",
    "Artifact",
    "Comparison",
    "Footprint",
    "Timing",
    "export",
    "is_artifact",
    "measure",
    "open_artifact",
    "to_onnx",
]
