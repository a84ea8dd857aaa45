"""Keeps graphs and recipe for a bug report, in the folder that $GRAPHPRUNE_DUMP names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from graphprune.ir.program import Program
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import dump as recipe
from graphprune.verify.invariants import describe

DUMP = "GRAPHPRUNE_DUMP"
_logger = logging.getLogger(__name__)


def dump_graphs(before: Program, after: Program | None, passes: Sequence[Pass], index: int) -> None:
    """Write both graphs and the recipe with its position to $GRAPHPRUNE_DUMP, when that is set."""
    folder = os.environ.get(DUMP)
    if not folder:
        return
    try:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for which, program in (("before", before), ("after", after)):
            for name, entry in (program.entries if program else {}).items():
                (target / f"{which}-{name}.txt").write_text(_print(entry.graph), encoding="utf-8")
        position = f"# failed at pass {index + 1} of {len(passes)}: {passes[index].name}\n"
        (target / "recipe.yaml").write_text(position + recipe(passes), encoding="utf-8")
    except Exception as e:
        # Whatever it is, the error on its way to the user matters more.
        _logger.warning("cannot write to %s=%s: %s", DUMP, folder, e)


def _print(graph: fx.Graph) -> str:
    lines = [f"{node.format_node()}  {describe(node.meta.get('val'))}" for node in graph.nodes]
    return "\n".join(lines) + "\n"
