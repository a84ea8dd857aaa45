"""The front of quality against milliseconds: MiniLM-L6, one shot, nothing trained.

Quality is Spearman's rank correlation on the STS Benchmark's test pairs, calibrated on 1,024
sentences of its training part; $GRAPHPRUNE_DATA names the folder that holds stsb/. Without it:
agreement of ten nearest neighbors with the dense model on sentences of Python's own help topics,
calibrated on others of them. Milliseconds are CPU time of one thread for one sentence of 128
tokens, dense float and the model interleaved; "faster" is the median ratio to dense float.

A point is on the front when no other is both faster and better. --plot draws it. Float points of
equal widths are one graph to ONNX Runtime and share one measurement.

    python -m benchmarks.front [--quick] [--json FILE] [--plot FILE.html]
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphprune
from benchmarks.common import Row, Settings, main
from graphprune.api import Compiled
from graphprune.exporters import Artifact
from graphprune.models import load_model
from graphprune.models.data.calibration import LINES, calibration_batches, text_batches
from graphprune.models.tasks import evaluate
from graphprune.models.tasks.neighbors import SENTENCES, python_sentences
from graphprune.passes import PruneHeads, PruneNeurons, Quantize
from graphprune.pipeline.base import Pass
from graphprune.report.page import points_page

TOKENS = 128
# (name, fraction of the FFN neurons removed, fraction of the 12 heads removed)
CUTS = (
    ("FFN 50 %", 0.5, 0.0),
    ("FFN 75 %", 0.75, 0.0),
    ("FFN 50 %, 4 heads", 0.5, 4 / 12),
    ("FFN 50 %, 6 heads", 0.5, 6 / 12),
    ("FFN 75 %, 6 heads", 0.75, 6 / 12),
)
QUICK_CUTS = (CUTS[0], CUTS[4])
# (score, compensation, allocation)
METHODS = (
    ("magnitude", "none", "uniform"),
    ("magnitude", "least-squares", "uniform"),
    ("fluctuation", "none", "uniform"),
    ("fluctuation", "bias", "uniform"),
    ("obs", "least-squares", "uniform"),
    ("obs", "least-squares", "global"),
)
QUICK_METHODS = (METHODS[0], METHODS[4])
INT8 = Quantize("int8-dynamic")


class Bench:
    """The dense model, its calibration batches, and how every point is evaluated."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        loaded = load_model("minilm")
        assert loaded.tokenizer_dir is not None
        self.repeats = settings.repeats
        self.folder = folder
        self.tokenizer: Path = loaded.tokenizer_dir
        self.inputs = dict(loaded.example_inputs)
        self.dense = graphprune.compile(loaded.module, [], example_inputs=self.inputs)
        self.data = _sts()
        self.task = "neighbors" if self.data is None else "sts"
        lines = LINES // 4 if settings.quick else LINES
        self.batches: list[Any] = list(self._calibration(lines))
        self.session = self.dense.export(self.folder / "dense").session(1)
        self.timed: dict[Any, Row] = {}

    def _calibration(self, lines: int) -> Sequence[dict[str, Tensor]]:
        names = list(self.inputs)
        if self.data is not None:
            return calibration_batches(self.data / "train.tsv", names, self.tokenizer, lines)
        evaluated = set(python_sentences(SENTENCES))
        found = [s for s in python_sentences(SENTENCES + 2 * lines) if s not in evaluated]
        return text_batches(found[:lines], names, self.tokenizer)

    def compiled(self, passes: Sequence[Pass]) -> Compiled:
        """The dense model after these passes."""
        return graphprune.compile(self.dense, passes, calibration=self.batches)

    def row(self, name: str, compiled: Compiled, **more: Any) -> Row:
        """One point: how fast, how good, how large; its artifact takes the last one's place."""
        widths = tuple((n, tuple(t.shape)) for n, t in compiled.program.tensors.items())
        model: Any = compiled.module
        if more["precision"] != "fp32" or widths not in self.timed:
            artifact = compiled.export(self.folder / "point")
            model = artifact.session(1)
            self.timed[widths] = self._timing(artifact)
        result = evaluate(
            self.task, model, tokenizer_dir=self.tokenizer, dense=self.session, data=self.data
        )
        return {
            "removed": name,
            **more,
            "metric": result.metric,
            # As text: a table shows two digits of a number, too few for a correlation.
            "quality": f"{result.value:.4f}",
            **(self.timed[widths] if more["precision"] == "fp32" else self.timed.pop(widths)),
            "compile s": compiled.report.seconds,
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        }

    def _timing(self, artifact: Artifact) -> Row:
        ids = torch.randint(1000, 30000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = artifact.benchmark(batch, threads=1, repeats=self.repeats, clock="cpu")
        return {
            "ms": found.model.ms,
            "faster": found.ratio,
            "spread": f"{found.ratio_low:.2f}-{found.ratio_high:.2f}",
            "file MB": artifact.manifest["sizes"][artifact.model_path.name] / 1e6,
        }


def measure(settings: Settings) -> Iterator[Row]:
    """Every point, with a star where it is on the front."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_points(Bench(settings, Path(folder)), settings))
    starred = {id(row) for row in front(rows)}
    for row in rows:
        yield {**row, "front": "*" if id(row) in starred else ""}


def _points(bench: Bench, settings: Settings) -> Iterator[Row]:
    cuts = QUICK_CUTS if settings.quick else CUTS
    methods = QUICK_METHODS if settings.quick else METHODS
    none = {"score": "", "compensate": "", "allocation": ""}
    yield _printed(bench.row("nothing", bench.compiled([]), **none, precision="fp32"))
    yield _printed(bench.row("nothing", bench.compiled([INT8]), **none, precision="int8"))
    for score, compensate, allocation in methods:
        for name, neurons, heads in cuts:
            common: Row = {"score": score, "compensate": compensate, "allocation": allocation}
            passes: list[Pass] = [PruneHeads(heads, **common)] if heads else []
            passes.append(PruneNeurons(neurons, **common))
            cut = bench.compiled(passes)
            yield _printed(bench.row(name, cut, **common, precision="fp32"))
            if score == "obs" and allocation == "uniform":
                low = graphprune.compile(cut, [INT8])
                yield _printed(bench.row(name, low, **common, precision="int8"))


def _printed(row: Row) -> Row:
    """The row, with a line on stderr: the whole run takes its time."""
    what = " ".join(str(row[key]) for key in ("removed", "score", "allocation", "precision"))
    print(f"{what}: {row['ms']:.2f} ms, {row['quality']}", file=sys.stderr, flush=True)
    return row


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in both speed and quality."""
    points = [(float(row["faster"]), float(row["quality"])) for row in rows]
    return [
        row
        for row, (fast, good) in zip(rows, points, strict=True)
        if not any(f >= fast and g >= good and (f, g) != (fast, good) for f, g in points)
    ]


def drawn(rows: Iterable[Row], file: Path) -> Iterator[Row]:
    """The rows as they are; once all are there, a page with quality over milliseconds."""
    seen: list[Row] = []
    for row in rows:
        seen.append(row)
        yield row
    series: dict[str, list[tuple[float, float]]] = {}
    for row in seen:
        way = [row[key] for key in ("score", "compensate", "allocation") if row[key]]
        name = ", ".join([*(way or ["dense"]), row["precision"]])
        series.setdefault(name, []).append((row["ms"], float(row["quality"])))
    series["the front"] = [
        (row["ms"], float(row["quality"])) for row in sorted(front(seen), key=lambda r: r["ms"])
    ]
    caption = f"{seen[0]['metric']} (up) over milliseconds of one thread (right)"
    page = points_page("Quality against time", caption, series, line="the front")
    file.write_text(page, encoding="utf-8")


def _drawn_after(file: Path, settings: Settings) -> Iterator[Row]:
    return drawn(measure(settings), file)


def _sts() -> Path | None:
    root = os.environ.get("GRAPHPRUNE_DATA")
    folder = Path(root) / "stsb" if root else None
    return folder if folder is not None and (folder / "test.tsv").is_file() else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path, metavar="FILE.html")
    options, sys.argv[1:] = parser.parse_known_args()
    file: Path | None = options.plot
    main("front", measure if file is None else partial(_drawn_after, file))
