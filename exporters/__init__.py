"""From a Program to an ONNX file that ONNX Runtime runs fast, measured and verified."""

if __name__ != "graphprune.exporters":
    raise ImportError(f"{__name__!r} is part of graphprune: import graphprune.exporters")

from graphprune.exporters.artifact.artifact import Artifact as Artifact
from graphprune.exporters.artifact.artifact import is_artifact as is_artifact
from graphprune.exporters.artifact.artifact import open_artifact as open_artifact
from graphprune.exporters.artifact.export import export as export
from graphprune.exporters.artifact.export import measure as measure
from graphprune.exporters.onnx.convert import to_onnx as to_onnx
from graphprune.exporters.runtime.footprint import Footprint as Footprint
from graphprune.exporters.runtime.latency import open_device as open_device
from graphprune.exporters.runtime.parity import Agreement as Agreement
from graphprune.exporters.runtime.timing import Comparison as Comparison
from graphprune.exporters.runtime.timing import Timing as Timing

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
    "open_device",
    "to_onnx",
]
