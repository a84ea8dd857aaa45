"""Model families with random weights: captured, cut by half, verified, exported, run.

Every family is a small model of its architecture, all weights random. Half of the heads, half of
the neurons and half of every other axis that no norm and no output holds are removed, removal is
verified against masking, and the ONNX file runs in ONNX Runtime at two shapes against torch. Each
family runs in a process of its own; one that fails is a row that says why. Rows stay in --folder,
so that a second run does what is missing. Families of timm, diffusers and ultralytics need these
packages, and are left out where they are missing.

    python -m benchmarks.families [--quick] [--json FILE] [--folder DIR] [--only TEXT ...]
        [--limit SECONDS] [--again] [--markdown FILE]

--only keeps families whose name or section contains a TEXT; --again repeats those that failed;
--markdown writes the table into a page, between its markers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row, Settings, main
from benchmarks.families import FAMILIES, QUICK
from benchmarks.families.base import Family
from benchmarks.families.measure import measured
from benchmarks.families.table import shown, write

# A fork has these loaded, which takes as long as a family.
_FORK = multiprocessing.get_context("fork")
_LOADED = ("transformers", "onnxruntime", "onnxscript", "onnx.reference", "networkx",
           "torch.onnx", "torch.export", "graphprune.exporters.onnx.convert")  # fmt: skip


def measure(settings: Settings, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A row for each family."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in _LOADED:
        importlib.import_module(module)
    rows = []
    for family in FAMILIES:
        named = f"{family.domain} {family.name}".lower()
        if options.only and not any(text.lower() in named for text in options.only):
            continue
        if settings.quick and not options.only and family.name not in QUICK:
            continue
        rows.append(_row(family, folder, options.limit, options.again))
        print(json.dumps(shown(rows[-1]), ensure_ascii=False), file=sys.stderr, flush=True)
    if options.markdown:
        write(options.markdown, rows)
    yield from rows if options.json else map(shown, rows)


def _row(family: Family, folder: Path, limit: float, again: bool) -> Row:
    """The kept row of a family, or a new one."""
    file = folder / (re.sub(r"\W+", "-", family.name.lower()) + ".json")
    if file.exists():
        row: Row = json.loads(file.read_text(encoding="utf-8"))
        if not (again and ("failed" in row or "missing" in row)):
            return row
    row = {"family": family.name, "domain": family.domain}
    process = _FORK.Process(target=_one, args=(family, file))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return _kept(file, {**row, "failed": f"not done after {limit:g} s"})
    if process.exitcode:
        return _kept(file, {**row, "failed": f"its process ended with code {process.exitcode}"})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _kept(file: Path, row: Row) -> Row:
    file.write_text(json.dumps(row, indent=1), encoding="utf-8")
    return row


def _one(family: Family, file: Path) -> None:
    """What the process of a family does."""
    torch.set_num_threads(1)
    _kept(file, measured(family))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options, sys.argv[1:] = parser.parse_known_args()
    options.json = "--json" in sys.argv
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.folder or Path(temporary)
        main("families", partial(measure, options=options, folder=kept))
