"""Accuracy against sparsity, size and time: MiniLM-L6 on SST-2, sparse by training or pruning.

Every row begins with the same dense model: all-MiniLM-L6-v2 with a fresh head, fine-tuned for two
epochs on the 6,920 training sentences. Accuracy is on the 1,821 test sentences, one standard error
of a single run 0.75 points; with several seeds, mean and range over them. $GRAPHPRUNE_DATA names
the folder that holds sst2/.

    python -m benchmarks.sparse_training [--quick] [--json FILE] [--only TEXT] [--seeds N]
                                         [--threads N] [--folder DIR] [--faster TIMES]

- zeros: a fraction of all weights of the encoder's linear layers, the smallest over all of them,
  set to zero after three epochs of training with a penalty (NeuroPrune, L1) or without; then one
  epoch more, the zeros held. Gradual magnitude zeroes on the way. Four epochs each. "FLOPs shrunk"
  is how many times fewer are left when Shrink has turned zeros into structure.
- removed: a fraction of the encoder's weights removed with heads and neurons, by Taylor scores
  while training for four epochs with distillation.
- structure: heads and neurons removed until the encoder has a half or a quarter of its FLOPs at 128
  tokens, then four epochs of distillation. Both with the time of ONNX Runtime for one sentence of
  128 tokens, one thread, against the dense model in the same run.
- budget: int8, and trained for four epochs with distillation until it is so many times as fast as
  the dense float model in ONNX Runtime, for one sentence of 128 tokens, by a table of measured
  times; heads, neurons and whole sublayers go. Accuracy is that of ONNX Runtime; dense int8 beside.
  --faster names the speed-ups, with commas: 6.5 and 13 are for a CPU with AMX, where dense int8
  alone is three times as fast as float. "with spans": five epochs at 2e-4 in batches of 64, and
  with each sentence four random spans of it, which the dense model labels.
- heads: how many NeuroPrune merges at some theta, and what that costs.
- epoch: the time of NeuroPrune against plain fine-tuning, interleaved, epochs of 64 batches.

--folder keeps what was trained, by seed and passes, so that a run can be continued. With
ACCELERATE_MIXED_PRECISION=bf16 products are computed in bfloat16 while training, which takes half
the time where the processor has instructions for it; accuracy and timings are always float32's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import graphprune
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.api import Compiled
from graphprune.axes import axis_groups
from graphprune.axes.sites import is_output_head, linear_sites
from graphprune.exporters import export
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.models import load_model
from graphprune.models.data.batches import SIZE, Batches, table_batches
from graphprune.models.data.spans import Spans
from graphprune.models.data.tables import Schema
from graphprune.models.tasks.labeled import evaluate_labeled
from graphprune.models.zoo.heads import with_head
from graphprune.passes import (
    L1,
    Budget,
    Distill,
    Finetune,
    GradualMagnitude,
    GradualStructure,
    Magnitude,
    NeuroPrune,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Shrink,
)
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import dump

TOKENS = 128
INT8 = Quantize("int8-dynamic")
LR = 2e-4  # of all sparse training; the penalties need steps as long as the weights are large
# Chosen on the development sentences, by accuracy at 90 % zeros, each alpha among 1e-4, 3e-4, 1e-3.
ALPHA, BETA, L1_ALPHA = 3e-4, 3e-3, 3e-4
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
SPANS = 4  # of each sentence, in batches twice as large: they are half as long
PRECISION = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate reads it


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what is done in stages; equal beginnings are trained once."""

    kind: str
    name: str
    amount: str
    stages: tuple[tuple[Pass, ...], ...]
    spans: int = 0  # of each sentence, that are trained on too


def cases(speedups: Sequence[float]) -> list[Case]:
    """All rows, without the timing of an epoch."""
    penalized: dict[str, tuple[Pass, ...]] = {
        "NeuroPrune": (
            NeuroPrune(ALPHA, BETA, None, zero_below=0, epochs=3, lr=LR, schedule="constant"),
        ),
        "L1": (L1(L1_ALPHA, zero_below=0, epochs=3, lr=LR, schedule="constant"),),
        "fine-tuning": (Finetune(3, lr=LR, schedule="constant"),),
    }
    found = [Case("", "dense", "", ())]
    for sparsity in SPARSITIES:
        amount = f"{100 * sparsity:.0f} %"
        zero = Magnitude(sparsity, allocation="global")
        found += [
            Case("zeros", f"{name}, then magnitude", amount, (first, (zero, Finetune(1, lr=LR))))
            for name, first in penalized.items()
        ]
        gradual = GradualMagnitude(sparsity, allocation="global", end=0.75, epochs=4, lr=LR)
        found.append(Case("zeros", "gradual magnitude", amount, ((gradual,),)))
        structure = GradualStructure(1 - sparsity, roles=("head", "neuron"), score="taylor",
                                     epochs=4, lr=1e-4)  # fmt: skip
        found.append(Case("removed", "taylor + distillation", amount, ((structure,),)))
    for amount, part in (("1/2 of the FLOPs", 0.5), ("1/4 of the FLOPs", 0.75)):
        cut = (PruneNeurons(part, score="obs"), PruneHeads(part, score="obs"))
        found.append(
            Case("structure", "obs + distillation", amount, ((*cut, Distill(epochs=4, lr=1e-4)),))
        )
    found.append(Case("budget", "dense", "int8", ((INT8,),)))
    for speedup in speedups:
        budget = Budget(speedup=speedup, batch=(1, TOKENS))
        timed = GradualStructure(budget=budget, roles=("head", "neuron"), score="taylor",
                                 epochs=4, lr=1e-4)  # fmt: skip
        amount = f"{speedup:g}x int8"
        found.append(Case("budget", "taylor + distillation", amount, ((timed, INT8),)))
        longer = replace(timed, epochs=5, lr=LR)
        found.append(Case("budget", "with spans", amount, ((longer, INT8),), SPANS))
    for theta in (0.15, 0.2, 0.25):
        step = NeuroPrune(ALPHA, BETA, theta, zero_below=0, epochs=3, lr=LR, schedule="constant")
        found.append(
            Case("heads", "NeuroPrune", f"theta {theta}", ((step,), (Finetune(1, lr=LR),)))
        )
    return found


class Bench:
    """One seed: data, the untrained model, and what has been trained from it."""

    def __init__(self, seed: int, folder: Path, quick: bool) -> None:
        self.seed, self.folder, self.quick = seed, folder, quick
        self.data = data_folder("sst2/train.tsv", "sst2/test.tsv")
        loaded = load_model("minilm")
        assert loaded.tokenizer_dir is not None
        self.tokenizer: Path = loaded.tokenizer_dir
        table = Schema("classification").read(self.data / "train.tsv")
        self.schema = Schema("classification", table.text, table.label, table.classes())
        self.model = with_head(loaded, self.schema, seed=seed)
        ids = torch.randint(1000, 30000, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batches(self, name: str, shuffle: bool = False) -> Batches:
        """A file's sentences with their labels."""
        table = self.schema.read(self.data / f"{name}.tsv")
        names = list(self.inputs)
        return table_batches(table, self.schema, names, self.tokenizer, shuffle=shuffle)

    @cached_property
    def training(self) -> graphprune.Training:
        return self._training(self.batches("train", shuffle=True))

    def with_spans(self, count: int) -> graphprune.Training:
        """The sentences and so many spans of each."""
        table = self.schema.read(self.data / "train.tsv")
        names = list(self.inputs)
        return self._training(Spans(table, self.schema, names, self.tokenizer, count, 2 * SIZE))

    def _training(self, data: Any) -> graphprune.Training:
        return graphprune.Training(list(data)[:8] if self.quick else data)

    @cached_property
    def short(self) -> graphprune.Training:
        data: Any = self.training.data
        return graphprune.Training(list(data)[:64])

    @cached_property
    def calibration(self) -> list[Any]:
        return self.batches("train").unlabeled(256)

    @cached_property
    def dense(self) -> Program:
        return self.after(self._captured(), "", [(Finetune(2),)])

    def reach(self, stages: Sequence[Sequence[Pass]], spans: int = 0) -> Program:
        """The dense model after these stages, trained on so many spans of each sentence too."""
        if not spans:
            return self.after(self.dense, "dense", stages)
        return self.after(self.dense, f"dense {spans}", stages, self.with_spans(spans))

    def after(
        self,
        program: Program,
        key: str,
        stages: Sequence[Sequence[Pass]],
        training: graphprune.Training | None = None,
    ) -> Program:
        for stage in stages:
            key += dump(list(stage))
            given = f"{self.seed} {self.quick} {PRECISION} {key}"
            name = hashlib.blake2b(given.encode(), digest_size=8)
            path = self.folder / name.hexdigest()
            if not path.exists():
                self._compiled(program, stage, training).save(path)
            program = graphprune.load(path).program
        return program

    def accuracy(self, program: Program) -> float:
        """On the test sentences; of a quantized program in ONNX Runtime."""
        file = self.data / ("dev.tsv" if self.quick else "test.tsv")
        if program.quantization is None:
            return evaluate_labeled(program, self.tokenizer, file, self.schema).value
        with tempfile.TemporaryDirectory() as folder:
            session = export(program, Path(folder) / "artifact").session()
            return evaluate_labeled(session, self.tokenizer, file, self.schema).value

    def _captured(self) -> Program:
        return graphprune.compile(self.model.module, [], example_inputs=self.inputs).program

    def _compiled(
        self, program: Program, stage: Sequence[Pass], training: graphprune.Training | None = None
    ) -> Compiled:
        return graphprune.compile(
            program,
            list(stage),
            training=training or self.training,
            calibration=self.calibration,
            seed=self.seed,
        )

    def epochs(self) -> Iterator[tuple[float, float]]:
        """Seconds of an epoch of plain fine-tuning, and of NeuroPrune, interleaved."""
        while True:
            times = []
            for step in (Finetune(1), NeuroPrune(ALPHA, BETA, epochs=1, lr=5e-5)):
                compiled = self._compiled(self.dense, [step], self.short)
                times.append(compiled.report.passes[-1].details["epochs"][0]["seconds"])
            yield times[0], times[1]


def measure(
    settings: Settings, only: str, seeds: int, folder: Path, speedups: Sequence[float]
) -> Iterator[Row]:
    """Every row, over all seeds."""
    benches = [Bench(seed, folder, settings.quick) for seed in range(seeds)]
    chosen = [c for c in cases(speedups) if only in f"{c.kind} {c.name} {c.amount}"]
    for case in chosen:
        start = time.perf_counter()
        programs = [bench.reach(case.stages, case.spans) for bench in benches]
        found = [100 * b.accuracy(p) for b, p in zip(benches, programs, strict=True)]
        row: Row = {
            "what": case.kind,
            "how": case.name,
            "amount": case.amount,
            "accuracy": mean(found),
            "range": f"{min(found):.2f}-{max(found):.2f}",
            "dense": mean(100 * b.accuracy(b.dense) for b in benches),
            "zeros": f"{_zeros(programs[0]):.1%}",
            "heads": sum(g.size for g in axis_groups(programs[0]).with_role("head")),
            "neurons": sum(g.size for g in axis_groups(programs[0]).with_role("neuron")),
            "FLOPs": flops(benches[0].dense) / flops(programs[0]),
        }
        if case.kind == "zeros":
            shrunk = graphprune.compile(programs[0], [Shrink()]).program
            row["FLOPs shrunk"] = flops(benches[0].dense) / flops(shrunk)
        if case.kind in ("removed", "structure", "budget"):
            row |= _timed(benches[0].dense, programs[0], settings)
        row["seconds"] = time.perf_counter() - start
        print(row, file=sys.stderr, flush=True)
        yield row
    if only in "epoch":
        yield _epoch_times(benches[0], 1 if settings.quick else 3)


def _epoch_times(bench: Bench, rounds: int) -> Row:
    times = [pair for pair, _ in zip(bench.epochs(), range(rounds), strict=False)]
    ratios = [sparse / plain for plain, sparse in times]
    row: Row = {
        "what": "epoch",
        "how": "NeuroPrune / fine-tuning",
        "amount": f"{len(times)} of each",
        "ratio": median(ratios),
        "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
        "seconds": median(sparse for _, sparse in times),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def _zeros(program: Program) -> float:
    """The fraction of the encoder's linear weights that is zero."""
    sites = {s.tensor: s for s in linear_sites(axis_groups(program))}
    weights = [s.matrix(program) for s in sites.values() if not is_output_head(s, program)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _timed(dense: Program, program: Program, settings: Settings) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(program, Path(folder) / "artifact", baseline=dense)
        batch = {n: t[:1] for n, t in zip(dense.forward.input_names, dense.forward.example,
                                          strict=True)}  # fmt: skip
        found = artifact.benchmark(batch, threads=1, repeats=settings.repeats, clock="cpu")
    return {
        "ratio": found.ratio,
        "spread": f"{found.ratio_low:.2f}-{found.ratio_high:.2f}",
        "ms": found.model.ms,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--faster", default="6.5,13", metavar="TIMES")
    options, sys.argv[1:] = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        main(
            "sparse_training",
            partial(
                measure,
                only=options.only,
                seeds=options.seeds,
                folder=options.folder or Path(temporary),
                speedups=[float(text) for text in options.faster.split(",")],
            ),
        )
