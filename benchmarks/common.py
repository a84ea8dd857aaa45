"""Shared by all benchmarks: command line, table, JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphprune.errors import GraphPruneError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to measure.

    Attributes:
        quick: a short run, for a first look and for tests.
        repeats: rounds of each comparison; a round takes the fastest of three runs.
    """

    quick: bool

    @property
    def repeats(self) -> int:
        return 6 if self.quick else 30


def main(name: str, measure: Callable[[Settings], Iterable[Row]]) -> None:
    """Parse the command line, measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = list(measure(Settings(options.quick)))
    show(name, rows)
    if options.json is not None:
        data = {"benchmark": name, "machine": machine(), "rows": rows}
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")


def data_folder(*files: str) -> Path:
    """The folder of the first of these files, which lie below what $GRAPHPRUNE_DATA names.

    Raises:
        GraphPruneError: one of them is missing.
    """
    root = Path(os.environ.get("GRAPHPRUNE_DATA", ""))
    if missing := [file for file in files if not (root / file).is_file()]:
        raise GraphPruneError(
            f"this benchmark reads {missing[0]}: set GRAPHPRUNE_DATA to the folder that holds it"
        )
    return (root / files[0]).parent


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table, columns in order of appearance; `dense X` stands beside `X`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [c for c in columns if c.removeprefix("dense ") not in columns or c[:6] != "dense "]
    table = Table(title=title, title_justify="left")
    for column in columns:
        number = any(isinstance(row.get(column), int | float) for row in rows)
        heading = f"{column} / dense" if any(f"dense {column}" in row for row in rows) else column
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(row, column) for column in columns))
    # A pipe has no width; eighty columns would cut the numbers.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(row: Row, column: str) -> str:
    dense = row.get(f"dense {column}")
    return _text(row.get(column)) + (f" / {_text(dense)}" if dense is not None else "")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """The environment that the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnxruntime", "onnx", "transformers")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
