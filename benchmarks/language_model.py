"""The cost of zeroing weights or removing structure in SmolLM2-135M, one shot.

Quality is perplexity on the raw test text of WikiText-2, on the first 64 of its 595 windows of 512
tokens, which do not overlap and are each read by themselves; lower is better. Calibration is on its
validation text, detokenized, lines with `<unk>` left out: 32 segments of 512 tokens, drawn at
random. All layers are pruned; the embedding, which is also the output head, is not.
$GRAPHPRUNE_DATA names the folder that holds wikitext2/.

Every row runs in a process of its own, so that its peak memory is its own too.

    python -m benchmarks.language_model [--quick] [--json FILE] [--only TEXT] [--segments N]
                                        [--windows N] [--threads N] [--opinions]

--only keeps the rows whose name contains TEXT; --windows 0 reads the whole test text; --opinions
adds zero-shot accuracy on PIQA and LAMBADA.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

import graphprune
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.models import load_model
from graphprune.models.data.calibration import token_batches
from graphprune.models.tasks import evaluate
from graphprune.passes import (
    Magnitude,
    PruneHeads,
    PruneNeurons,
    SparseGPT,
    SparseLLM,
    Wanda,
)
from graphprune.pipeline.base import Pass
from graphprune.pipeline.events import Event, PassProgress

MODEL = "smollm2"


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what is pruned."""

    name: str
    sparsity: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to calibrate and to evaluate on, with how many threads."""

    segments: int = 32
    length: int = 512
    windows: int = 64
    threads: int = 2
    opinions: bool = False
    limit: int = 500


def cases() -> list[Case]:
    """The table, the rows that say most first."""
    found = [Case("dense", "0 %", ())]
    for sparsity in (0.7, 0.5, 0.8, 0.6):
        text = f"{sparsity:.0%}".replace("%", " %")
        found += [
            Case("magnitude", text, (Magnitude(sparsity),)),
            Case("wanda", text, (Wanda(sparsity),)),
            Case("sparsegpt", text, (SparseGPT(sparsity),)),
            Case("sparsellm", text, (SparseLLM(sparsity),)),
        ]
    found += [
        Case("magnitude", "2:4", (Magnitude(pattern="2:4"),)),
        Case("wanda", "2:4", (Wanda(pattern="2:4"),)),
        Case("sparsegpt", "2:4", (SparseGPT(pattern="2:4"),)),
        Case("sparsellm", "2:4", (SparseLLM(pattern="2:4"),)),
        Case("wanda + owl", "70 %", (Wanda(0.7, allocation="owl"),)),
        Case("sparsegpt + owl", "70 %", (SparseGPT(0.7, allocation="owl"),)),
        Case("sparsellm + owl", "70 %", (SparseLLM(0.7, allocation="owl"),)),
        Case("neurons, magnitude", "25 %", (PruneNeurons(0.25),)),
        Case("neurons, obs + least squares", "25 %", (PruneNeurons(0.25, score="obs"),)),
        # Ten of the ninety key/value groups of thirty layers, no more than one of a layer's three.
        *(
            Case(f"KV groups, {label}", "10 of 90", (PruneHeads(
                1 / 9, score=score, allocation="global", floor=2 / 3),))
            for score, label in (("magnitude", "magnitude"), ("obs", "obs + least squares"))
        ),
    ]  # fmt: skip
    return found


QUICK = ("dense", "magnitude", "sparsegpt")


def measure(settings: Settings, amount: Amount, only: str) -> Iterator[Row]:
    """Every row, in a fresh process each."""
    chosen = [c for c in cases() if only in f"{c.name} {c.sparsity}"]
    if settings.quick:
        chosen = [c for c in chosen if c.name in QUICK and c.sparsity in ("0 %", "70 %")]
        amount = Amount(8, 512, 8, amount.threads, amount.opinions, 50)
    context = multiprocessing.get_context("spawn")
    for case in chosen:
        with context.Pool(1) as pool:
            row = pool.apply(_row, (case, amount))
            pool.close()  # a process that is terminated leaves its semaphores
            pool.join()
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row


def _row(case: Case, amount: Amount) -> Row:
    torch.set_num_threads(amount.threads)
    data = data_folder("wikitext2/test.raw.txt", "wikitext2/valid.tokens.txt").parent
    loaded = load_model(MODEL)
    assert loaded.tokenizer_dir is not None
    inputs = loaded.example_inputs
    batches = None
    if any(step.needs_calibration for step in case.passes):
        batches = token_batches(
            data / "wikitext2" / "valid.tokens.txt",
            list(inputs),
            loaded.tokenizer_dir,
            segments=amount.segments,
            length=amount.length,
        )
    start = time.perf_counter()
    compiled = graphprune.compile(
        loaded.module, case.passes, example_inputs=inputs, calibration=batches, observers=[_tell]
    )
    row: Row = {
        "pruned": case.name,
        "sparsity": case.sparsity,
        "calibration tokens": 0 if batches is None else amount.segments * amount.length,
        "perplexity": 0.0,
        "parameters": compiled.program.num_parameters(),
        "compile s": time.perf_counter() - start,
        "passes s": sum(p.seconds for p in compiled.report.passes),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    del batches
    tasks = ("piqa", "lambada") if amount.opinions else ()
    extent = {"perplexity": {"windows": amount.windows}}
    for task in ("perplexity", *tasks):
        result = evaluate(
            task,
            compiled.module,
            tokenizer_dir=loaded.tokenizer_dir,
            data=data / ("wikitext2/test.raw.txt" if task == "perplexity" else task),
            schema=None,
            progress=lambda done, total: None,
            **extent.get(task, {"limit": amount.limit}),
        )
        row[task] = result.value
        row[f"{task} of"] = result.details
    for step in compiled.report.passes:
        if "seconds" in step.details:
            row |= {f"{what} s": s for what, s in step.details["seconds"].items()}
    return row


def _tell(event: Event) -> None:
    if isinstance(event, PassProgress) and sys.stderr.isatty():
        print(f"\r{event.name} {event.done}/{event.total} {event.unit}", end="", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    usual = Amount()
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--segments", type=int, default=usual.segments)
    parser.add_argument("--windows", type=int, default=usual.windows)
    parser.add_argument("--threads", type=int, default=usual.threads)
    parser.add_argument("--opinions", action="store_true")
    options, sys.argv[1:] = parser.parse_known_args()
    amount = Amount(options.segments, 512, options.windows, options.threads, options.opinions)
    main("language_model", partial(measure, amount=amount, only=options.only))
