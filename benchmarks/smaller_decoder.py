"""SmolLM2-135M with a tenth to three tenths of its blocks' parameters removed, in one shot.

- neurons, KV groups, blocks: one kind of unit alone; neurons and groups by OBS with least squares,
  blocks (attention and feed-forward part of a layer together) by the similarity of what goes in
  and out;
- budget over all: `Budget(size_mb=...)` chooses among all three;
- dense, also in int8 (dynamic, seven bits) and with int4 weights.

Each is exported with its cache, in float32; the dense model in int8 and int4 too. Perplexity is
ONNX Runtime's, on the first windows of 512 tokens of WikiText-2's raw test text. Tokens per second
are those after a 128-token prompt, CPU time of one thread, and "faster" is against dense float32,
interleaved. Calibration is on segments of 512 tokens of the validation text, drawn at random.
$GRAPHPRUNE_DATA names the folder that holds wikitext2/.

    python -m benchmarks.smaller_decoder [--quick] [--json FILE] [--only TEXT] [--segments N]
                                         [--windows N] [--evaluations N] [--threads N]
                                         [--folder DIR]

--evaluations are the models that a budget tries. --only keeps the rows whose name contains TEXT,
--folder the models and what was measured, by row, so that a run can be continued with the same
options. --threads are torch's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphprune
from benchmarks import decode
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.api import Compiled
from graphprune.exporters.runtime.session import open_session
from graphprune.models import load_model
from graphprune.models.data.calibration import token_batches
from graphprune.models.tasks import evaluate
from graphprune.passes import Budget, DropSublayers, PruneHeads, PruneNeurons, Quantize
from graphprune.pipeline.base import Pass

PARTS = (0.1, 0.2, 0.3)
# Of SmolLM2-135M: parameters of a layer's attention and feed-forward part, and its float32 file.
ATTENTION, FEEDFORWARD, LAYERS, MEGABYTES = 884_736, 2_654_208, 30, 538.1
# Seven bits are exact on every CPU; eight overflow on those without VNNI.
INT8, INT4 = Quantize("int8-dynamic", reduce_range=True), Quantize("int4-weights")


@dataclass(frozen=True, slots=True)
class Case:
    """A row.

    Attributes:
        name: what is removed.
        part: how much of the blocks' parameters.
        passes: that remove it.
        forms: the last pass of each file that is written; None for float32.
    """

    name: str
    part: float
    passes: tuple[Pass, ...] = ()
    forms: tuple[Pass | None, ...] = (None,)


def cases(evaluations: int) -> list[Case]:
    """Dense, then by how much is removed; budgets try so many models."""
    cut = (case for part in PARTS for case in _cut(part, evaluations))
    return [Case("dense", 0, forms=(None, INT8, INT4)), *cut]


def _cut(part: float, evaluations: int) -> Iterator[Case]:
    layer = ATTENTION + FEEDFORWARD
    megabytes = MEGABYTES - part * layer * LAYERS * 4 / 1e6
    yield Case("neurons", part, (PruneNeurons(part * layer / FEEDFORWARD, score="obs"),))
    if part * layer / ATTENTION < 2 / 3:  # one of three groups stays
        groups = PruneHeads(part * layer / ATTENTION, score="obs", allocation="global")
        yield Case("KV groups", part, (groups,))
    yield Case("blocks", part, (DropSublayers(count=round(part * LAYERS), kind="block"),))
    budget = Budget(size_mb=megabytes, batch=(1, 128), samples=4, evaluations=evaluations)
    yield Case("budget over all", part, (budget,))


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to calibrate, to search and to evaluate on."""

    segments: int = 32
    windows: int = 64
    evaluations: int = 100


class Bench:
    """The dense model, its data, and how a row is measured."""

    def __init__(self, settings: Settings, amount: Amount, folder: Path) -> None:
        self.settings, self.amount, self.folder = settings, amount, folder
        self.data = data_folder("wikitext2/test.raw.txt", "wikitext2/valid.tokens.txt")
        loaded = load_model(decode.MODEL)
        assert loaded.tokenizer_dir is not None
        self.tokenizer: Path = loaded.tokenizer_dir
        self.inputs = dict(loaded.example_inputs)
        self.dense = graphprune.compile(loaded.module, [], example_inputs=self.inputs, cache=True)
        self.prompt = np.random.default_rng(0).integers(5, 40000, (1, decode.PROMPT))

    @cached_property
    def calibration(self) -> Sequence[Any]:
        return token_batches(
            self.data / "valid.tokens.txt",
            list(self.inputs),
            self.tokenizer,
            segments=self.amount.segments,
        )

    @cached_property
    def dense_session(self) -> Any:
        return self.session(self.dense, self.folder / "dense")

    def session(self, compiled: Compiled, path: Path) -> Any:
        """Written with its cache, and opened with one thread."""
        return open_session(compiled.export(path, baseline=False).model_path, 1)

    def row(self, case: Case) -> Row:
        """Compile, export each form, evaluate and time it; or read what was measured before."""
        kept = self.folder / f"{case.name} {case.part:.0%}.json"
        if kept.exists():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        start = time.perf_counter()
        compiled = self.compiled(case, kept.with_suffix(""))
        row: Row = {
            "removed": case.name,
            "of the blocks": f"{case.part:.0%}".replace("%", " %"),
            "M parameters": compiled.program.num_parameters() / 1e6,
        }
        for last in case.forms:
            name = "float32" if last is None else str(last.scheme)  # type: ignore[attr-defined]
            row |= {f"{name} {k}": v for k, v in self._form(compiled, last).items()}
        row["s"] = time.perf_counter() - start
        kept.write_text(json.dumps(row, indent=1), encoding="utf-8")
        return row

    def compiled(self, case: Case, path: Path) -> Compiled:
        """The model of a case; kept, for a search is long, and what follows it may fail."""
        if not case.passes:
            return self.dense
        if not path.exists():
            given = list(case.passes)
            graphprune.compile(self.dense, given, calibration=self.calibration).save(path)
        return graphprune.load(path)

    def _form(self, compiled: Compiled, last: Pass | None) -> Row:
        if last is not None:
            compiled = graphprune.compile(compiled, [last])
        session = self.session(compiled, self.folder / "form")
        found = evaluate(
            "perplexity",
            session,
            tokenizer_dir=self.tokenizer,
            data=self.data / "test.raw.txt",
            schema=None,
            progress=lambda done, total: None,
            windows=self.amount.windows,
        )
        rates = decode.compared(session, self.dense_session, self.prompt, self.settings)
        return {"perplexity": found.value, **rates}


def measure(settings: Settings, amount: Amount, only: str, folder: Path) -> Iterator[Row]:
    """Every row."""
    chosen = [c for c in cases(amount.evaluations) if only in f"{c.name} {c.part:.0%}"]
    if settings.quick:
        chosen, amount = chosen[:2], Amount(4, 2)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, amount, folder)
    for case in chosen:
        row = bench.row(case)
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    usual = Amount()
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--segments", type=int, default=usual.segments)
    parser.add_argument("--windows", type=int, default=usual.windows)
    parser.add_argument("--evaluations", type=int, default=usual.evaluations)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options, sys.argv[1:] = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        main(
            "smaller_decoder",
            partial(
                measure,
                amount=Amount(options.segments, options.windows, options.evaluations),
                only=options.only,
                folder=options.folder or Path(temporary),
            ),
        )
