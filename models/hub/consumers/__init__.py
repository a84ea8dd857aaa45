"""Which programs load folders with ONNX models, and what each needs.

A record a consumer, in files by kind; `check` holds a folder against them. Nothing is run: files
are parsed as JSON or as ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.models.hub.consumers.base import Consumer
from graphprune.models.hub.consumers.base import Finding as Finding
from graphprune.models.hub.consumers.decoders import GENAI
from graphprune.models.hub.consumers.encoders import (
    CHROMADB,
    FASTEMBED,
    FASTEMBED_RS,
    INFINITY,
    LANGCHAIN4J,
    LIGHT_EMBED,
    OPTIMUM,
    SENTENCE_TRANSFORMERS,
    SPRING_AI,
    TEI,
    VESPA,
)
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.runtimes import (
    EXPORTED_MODEL,
    ONNXRUNTIME,
    OPENVINO,
    TRANSFORMERS_JS,
)
from graphprune.suggest import suggest

_CONSUMERS = (
    TRANSFORMERS_JS, FASTEMBED, FASTEMBED_RS, LIGHT_EMBED, TEI, INFINITY, OPTIMUM,
    SENTENCE_TRANSFORMERS, CHROMADB, LANGCHAIN4J, SPRING_AI, VESPA, GENAI, EXPORTED_MODEL,
    OPENVINO, ONNXRUNTIME,
)  # fmt: skip
CONSUMERS: dict[str, Consumer] = {c.name: c for c in _CONSUMERS}


def consumer_names() -> list[str]:
    """The consumers that `check` knows."""
    return list(CONSUMERS)


def check(folder: str | Path, consumers: Sequence[str] = ()) -> list[Finding]:
    """Say what would keep consumers from loading a folder with an ONNX model.

    Args:
        folder: of graphprune or of anybody.
        consumers: names out of `consumer_names()`; all of them where none is given.

    Returns:
        One finding a consumer, in the order asked for.

    Raises:
        GraphPruneError: there is no such consumer or folder, or it holds no .onnx file.
    """
    for name in consumers:
        if name not in CONSUMERS:
            raise GraphPruneError(f"no consumer {name!r} is known; {suggest(name, CONSUMERS)}")
    files = HubFolder(Path(folder).expanduser())
    return [CONSUMERS[name].check(files) for name in consumers or CONSUMERS]
