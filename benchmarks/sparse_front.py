"""Structure alone against structure and sparse blocks, at equal measured int8 time.

Every point is trained once (the program is kept in --folder), then exported, evaluated and timed in
int8 on this CPU, under the label --cpu; a second run does what is missing. With a CPU's features
masked, another label measures the same programs again.

- minilm: all-MiniLM-L6-v2, heads and neurons removed, without or with 32x4 blocks of zeros on top;
  one shot (OBS), or distilled on sentences of the STS Benchmark's training part without their
  scores. Spearman on the test pairs; cosine of embeddings to the dense float model's.
- sst2: the same with a head, fine-tuned on SST-2 first; accuracy on the test sentences and the
  divergence of the outputs from the dense float model's. Each seed has a dense model of its own.
- smollm2: SmolLM2-135M, 32x4 at 50 % by SparseGPT and SparseLLM against 4-bit weights and dense
  int8: tokens per second after a 128-token prompt, perplexity on the first windows of WikiText-2's
  test text. SparseLLM takes half an hour.

Points with blocks export with target "onnxruntime+kernels", which needs graphprune-kernels; all
others with ONNX Runtime alone. Times are CPU time of one thread for one sentence of 128 tokens,
interleaved with dense int8. "structure there" is what structure alone reaches in a point's time,
with as much training, interpolated between its points. $GRAPHPRUNE_DATA names the folder that holds
stsb/, sst2/ and wikitext2/.

    python -m benchmarks.sparse_front [--quick] [--json FILE] [--folder DIR] [--cpu LABEL]
        [--only TEXT] [--seeds N] [--epochs N] [--sentences N] [--windows N] [--train]

--only keeps the points whose name contains TEXT: "minilm", "sst2 half", "32x4". --train trains
without exporting. --sentences are those that are trained on.
"""

from __future__ import annotations

import abc
import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphprune
from benchmarks import decode, front, sparse_training
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.api import Compiled
from graphprune.exporters import export
from graphprune.exporters.artifact.artifact import Artifact
from graphprune.exporters.runtime.session import Feeds, open_session
from graphprune.exporters.runtime.timing import compare_all
from graphprune.ir.program import Program
from graphprune.models import load_model
from graphprune.models.data.calibration import calibration_batches, token_batches
from graphprune.models.tasks import evaluate
from graphprune.models.tasks.base import embed, runner
from graphprune.models.tasks.labeled import evaluate_labeled
from graphprune.models.tasks.sts import read_pairs
from graphprune.passes import (
    Distill,
    GradualMagnitude,
    PruneHeads,
    PruneNeurons,
    Quantize,
    SparseGPT,
    SparseLLM,
)
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import dump

STOCK, KERNELS = "onnxruntime", "onnxruntime+kernels"
BLOCKS = "32x4"
INT8 = Quantize("int8-dynamic")
# Eight bits overflow on CPUs without VNNI, which costs an encoder little and a decoder everything.
SEVEN = Quantize("int8-dynamic", reduce_range=True)
LR = 2e-4
# (name, fraction of the FFN neurons removed, fraction of the 12 heads removed)
CUTS = (
    ("half", 1 / 2, 4 / 12),
    ("small", 3 / 4, 6 / 12),
    ("smaller", 7 / 8, 8 / 12),
    ("smallest", 15 / 16, 9 / 12),
)
BLOCKS_ON = ("half", "small")
SPARSITIES = (0.5, 0.8)
PRECISE = ("quality", "cosine", "divergence")
COMPARED = 512  # sentences whose embeddings are compared with the dense model's


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to train and to evaluate."""

    epochs: int = 4
    sentences: int = 2048
    windows: int = 16


@dataclass(frozen=True, slots=True)
class Point:
    """A model: how it is made, and how it is run.

    Attributes:
        part: which comparison it belongs to.
        cut: the structure that is left.
        blocks: the fraction of zero blocks; 0 for none.
        way: "one shot", or how it is trained.
        passes: from the dense model, in float.
        low_bit: the last pass.
        seed: of the training.
    """

    part: str
    cut: str
    blocks: float
    way: str
    passes: tuple[Pass, ...]
    low_bit: Pass = INT8
    seed: int = 0

    @property
    def name(self) -> str:
        zeros = f"{BLOCKS} {100 * self.blocks:.0f} %" if self.blocks else "structure"
        return f"{self.part} {self.cut} {zeros} {self.way} seed {self.seed}"

    @property
    def target(self) -> str:
        """The export target that runs it."""
        return KERNELS if self.blocks else STOCK

    def key(self, amount: Amount, quick: bool) -> str:
        """A name for files, which differs where the program does."""
        given = f"{self.part} {self.seed} {dump(list(self.passes))}"
        if self.way != "one shot":
            given += f" {amount.sentences} {quick}"
        words = self.name.replace(" %", "").replace(" ", "-")
        return f"{words}-{hashlib.blake2b(given.encode(), digest_size=4).hexdigest()}"


def encoder_points(part: str, amount: Amount, seed: int, quick: bool) -> Iterator[Point]:
    """Structure alone, then structure with blocks."""
    point = partial(Point, part, seed=seed)
    yield point("dense", 0.0, "one shot", ())
    epochs = amount.epochs
    distill = Distill(epochs=epochs, lr=LR)
    for cut, neurons, heads in CUTS[:2] if quick else CUTS:
        score: Any = {"score": "obs"}
        passes = (PruneHeads(heads, **score), PruneNeurons(neurons, round_to=32, **score))
        yield point(cut, 0.0, "one shot", passes)
        yield point(cut, 0.0, "distilled", (*passes, distill))
        for zeros in SPARSITIES[:1] if quick else SPARSITIES:
            if cut not in (BLOCKS_ON[:1] if quick else BLOCKS_ON):
                continue
            once = SparseGPT(zeros, pattern=BLOCKS)
            grown = GradualMagnitude(
                zeros, pattern=BLOCKS, distill=True, end=0.6, epochs=epochs, lr=LR
            )
            yield point(cut, zeros, "one shot", (*passes, once))
            yield point(cut, zeros, "distilled", (*passes, once, distill))
            yield point(cut, zeros, "gradual", (*passes, grown))


def decoder_points() -> Iterator[Point]:
    """Dense in low bits, then blocks."""
    for low in (SEVEN, Quantize("int4-weights")):
        yield Point("smollm2", f"dense {low.scheme}", 0.0, "one shot", (), low)
    for step in (SparseGPT(0.5, pattern=BLOCKS), SparseLLM(0.5, pattern=BLOCKS)):
        yield Point("smollm2", f"dense {step.name}", 0.5, "one shot", (step,), SEVEN)


class Part(abc.ABC):
    """A model and its data: where programs begin, and how they are evaluated and timed."""

    def __init__(self, amount: Amount, settings: Settings, folder: Path) -> None:
        self.amount, self.settings, self.folder = amount, settings, folder

    @abc.abstractmethod
    def made(self, point: Point) -> Program:
        """The program of a point, in float."""

    @abc.abstractmethod
    def quality(self, point: Point, session: Any) -> Row:
        """What is left of the model, `quality` first."""

    @abc.abstractmethod
    def time(self, point: Point, artifact: Artifact) -> Row:
        """`ms`, and `faster`: how many times as fast as dense int8."""


class Encoder(Part):
    """Timed on one sentence of 128 tokens."""

    def __init__(self, amount: Amount, settings: Settings, folder: Path) -> None:
        super().__init__(amount, settings, folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begun: dict[str, Compiled] = {}

    @property
    @abc.abstractmethod
    def dense(self) -> Program:
        """The dense model."""

    @cached_property
    def dense_int8(self) -> Any:
        """A session of the dense model in int8."""
        return opened(exported(self.dense, INT8, self.folder / "dense-int8", STOCK))

    def time(self, point: Point, artifact: Artifact) -> Row:
        ids = torch.randint(
            1000, 30000, (1, front.TOKENS), generator=torch.Generator().manual_seed(0)
        )
        mask = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        feeds = artifact.feeds({"input_ids": ids, **mask})
        return timed(opened(artifact), self.dense_int8, feeds, self.settings)

    def compiled(self, point: Point, data: Sequence[Any], calibration: Sequence[Any]) -> Program:
        """The dense model after a point's passes; what several points begin with is made once."""
        # Without a report it counts as dense, and is what distillation learns from.
        current, done = graphprune.compile(replace(self.dense, report=None), []), ""
        for step in point.passes:
            done += dump([step])
            if done in self.begun:
                current = self.begun[done]
                continue
            current = graphprune.compile(  # of a Compiled: the teacher is the dense model
                current,
                [step],
                training=graphprune.Training(data),
                calibration=calibration,
                seed=point.seed,
            )
            if not step.needs_training:
                self.begun[done] = current
        return current.program


class Sentences(Encoder):
    """MiniLM's embeddings, distilled on sentences without scores."""

    def __init__(self, amount: Amount, settings: Settings, folder: Path) -> None:
        super().__init__(amount, settings, folder / "minilm")
        self.data = data_folder("stsb/train.tsv", "stsb/test.tsv")
        self.bench = front.Bench(settings, self.folder)

    @property
    def dense(self) -> Program:
        return self.bench.dense.program

    def made(self, point: Point) -> Program:
        names, file = list(self.bench.inputs), self.data / "train.tsv"
        found = calibration_batches(file, names, self.bench.tokenizer, self.amount.sentences)
        # They come sorted by length.
        drawn = torch.Generator().manual_seed(point.seed)
        data = [found[i] for i in torch.randperm(len(found), generator=drawn).tolist()]
        return self.compiled(point, data, self.bench.batches)

    @cached_property
    def compared(self) -> tuple[list[str], Tensor]:
        first, _, _ = read_pairs(self.data / "test.tsv")
        some = list(dict.fromkeys(first))[:COMPARED]
        return some, embed(self.bench.session, self.bench.tokenizer, some)

    def quality(self, point: Point, session: Any) -> Row:
        tokenizer = self.bench.tokenizer
        result = evaluate("sts", session, tokenizer_dir=tokenizer, data=self.data)
        some, expected = self.compared
        cosine = (embed(session, tokenizer, some) * expected).sum(1)
        return {"quality": result.value, "metric": "Spearman", "cosine": float(cosine.mean())}


class Labels(Encoder):
    """MiniLM with a head on SST-2; one seed."""

    def __init__(self, amount: Amount, settings: Settings, folder: Path, seed: int) -> None:
        super().__init__(amount, settings, folder / f"sst2-{seed}")
        self.bench = sparse_training.Bench(seed, self.folder, settings.quick)

    @property
    def dense(self) -> Program:
        return self.bench.dense

    def made(self, point: Point) -> Program:
        batches = list(self.bench.training.data)[: -(-self.amount.sentences // 32)]
        return self.compiled(point, batches, self.bench.calibration)

    @property
    def evaluated(self) -> str:
        return "dev" if self.settings.quick else "test"

    @cached_property
    def expected(self) -> list[Tensor]:
        """The dense float model's log-probabilities, batch by batch."""
        return self._log_probabilities(self.dense)

    def _log_probabilities(self, model: Any) -> list[Tensor]:
        run, batches = runner(model), self.bench.batches(self.evaluated)
        return [run(batch).float().log_softmax(-1) for batch in batches]

    def quality(self, point: Point, session: Any) -> Row:
        file = self.bench.data / f"{self.evaluated}.tsv"
        found = evaluate_labeled(session, self.bench.tokenizer, file, self.bench.schema)
        both = zip(self.expected, self._log_probabilities(session), strict=True)
        each = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in both])
        return {
            "quality": 100 * found.value,
            "metric": "accuracy",
            "divergence": float(each.mean()),
        }


class Language(Part):
    """SmolLM2, token by token."""

    def __init__(self, amount: Amount, settings: Settings, folder: Path) -> None:
        super().__init__(amount, settings, folder)
        self.loaded = load_model(decode.MODEL)
        assert self.loaded.tokenizer_dir is not None
        self.tokenizer: Path = self.loaded.tokenizer_dir
        self.data = data_folder("wikitext2/test.raw.txt", "wikitext2/valid.tokens.txt")
        self.prompt = np.random.default_rng(0).integers(5, 40000, (1, decode.PROMPT))

    @cached_property
    def captured(self) -> Compiled:
        return graphprune.compile(
            self.loaded.module, [], example_inputs=dict(self.loaded.example_inputs), cache=True
        )

    def made(self, point: Point) -> Program:
        if not point.passes:
            return self.captured.program
        names, segments = list(self.loaded.example_inputs), 4 if self.settings.quick else 32
        file = self.data / "valid.tokens.txt"
        batches = token_batches(file, names, self.tokenizer, segments=segments)
        return graphprune.compile(self.captured, list(point.passes), calibration=batches).program

    @cached_property
    def dense_int8(self) -> Any:
        path = self.folder / "smollm2-dense-int8"
        return opened(exported(self.captured.program, SEVEN, path, STOCK))

    def quality(self, point: Point, session: Any) -> Row:
        found = evaluate(
            "perplexity",
            session,
            tokenizer_dir=self.tokenizer,
            data=self.data / "test.raw.txt",
            windows=2 if self.settings.quick else self.amount.windows,
        )
        return {"quality": found.value, "metric": "perplexity"}

    def time(self, point: Point, artifact: Artifact) -> Row:
        row = decode.compared(opened(artifact), self.dense_int8, self.prompt, self.settings)
        return {"ms": 1000 / row["tokens/s"], **row}


def opened(artifact: Artifact) -> Any:
    """A session of one thread: of ONNX Runtime alone, or with the kernels where the file has them.

    Both have the same options.
    """
    if artifact.manifest["target"] != KERNELS:
        return open_session(artifact.model_path, 1)
    import graphprune_kernels

    return graphprune_kernels.session(artifact.model_path, threads=1)


def timed(session: Any, dense_int8: Any, feeds: Feeds, settings: Settings) -> Row:
    """Time a session of one thread against that of dense int8, interleaved."""
    found = compare_all(
        session, {"dense int8": dense_int8}, feeds, repeats=settings.repeats, clock="cpu"
    )
    return {
        "ms": found.model.ms,
        "faster": found.ratio,
        "spread": f"{found.ratio_low:.2f}-{found.ratio_high:.2f}",
    }


def exported(program: Program, low_bit: Pass, path: Path, target: str) -> Artifact:
    """A program in few bits, as a folder."""
    low = graphprune.compile(program, [low_bit]).program
    return export(low, path, target=target)


def measure(
    settings: Settings, amount: Amount, folder: Path, *, cpu: str, only: str, seeds: int,
    train: bool,
) -> Iterator[Row]:  # fmt: skip
    """Every point, from its file where it has one; then what structure alone reaches there."""
    (folder / "results" / cpu).mkdir(parents=True, exist_ok=True)
    rows = []
    for make, points in _parts(settings, amount, folder, seeds):
        chosen = [point for point in points if only in point.name]
        holder: list[Part] = []  # made once something is missing: it loads and captures a model

        def part(make: Callable[[], Part] = make, holder: list[Part] = holder) -> Part:
            if not holder:
                holder.append(make())
            return holder[0]

        for point in chosen:
            row = _row(point, part, settings, amount, folder, cpu, train)
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    yield from (compared(row, rows) for row in rows)


def _parts(
    settings: Settings, amount: Amount, folder: Path, seeds: int
) -> Iterator[tuple[Callable[[], Part], list[Point]]]:
    points = partial(encoder_points, amount=amount, quick=settings.quick)
    given = (amount, settings, folder)
    yield lambda: Sentences(*given), list(points("minilm", seed=0))
    for seed in range(seeds):
        yield lambda seed=seed: Labels(*given, seed), list(points("sst2", seed=seed))  # type: ignore[misc]
    yield lambda: Language(*given), list(decoder_points())


def _row(
    point: Point, part: Callable[[], Part], settings: Settings, amount: Amount, folder: Path,
    cpu: str, train: bool,
) -> Row:  # fmt: skip
    key = point.key(amount, settings.quick)
    program, result = folder / "programs" / key, folder / "results" / cpu / f"{key}.json"
    row: Row = {
        "part": point.part,
        "left": point.cut,
        "blocks": f"{BLOCKS} {100 * point.blocks:.0f} %" if point.blocks else "",
        "way": point.way,
        "seed": point.seed,
    }
    if result.exists():
        return row | dict(json.loads(result.read_text(encoding="utf-8")))
    if not program.exists():
        start = time.process_time()
        found = part().made(point)
        program.parent.mkdir(exist_ok=True)
        graphprune.compile(found, []).save(program)
        row["made in CPU s"] = time.process_time() - start
    if train:
        return row
    artifact = exported(
        graphprune.load(program).program, point.low_bit, folder / "artifact", point.target
    )
    measured = {
        **part().quality(point, opened(artifact)),
        **part().time(point, artifact),
        "file MB": artifact.manifest["sizes"][artifact.model_path.name] / 1e6,
    }
    whole = result.with_suffix(".part")
    whole.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    whole.replace(result)
    return row | measured


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """A point, and what structure alone has at its time; trained points with trained ones."""
    # As text: a table shows two digits of a number, too few for a correlation.
    shown = {k: f"{v:.4f}" if k in PRECISE else v for k, v in row.items()}
    if not row.get("blocks") or "ms" not in row or row["part"] == "smollm2":
        return shown
    trained = row["way"] != "one shot"
    alone = [
        other
        for other in rows
        if (other["part"], other["seed"]) == (row["part"], row["seed"])
        and "ms" in other
        and not other["blocks"]
        and (other["left"] == "dense" or (other["way"] != "one shot") == trained)
    ]
    # By the ratio to dense int8 of the same rounds: milliseconds of other hours do not compare.
    there = interpolated({r["faster"]: r["quality"] for r in alone}, row["faster"])
    if there is None:
        return shown
    return {**shown, "structure there": f"{there:.4f}", "gain": f"{row['quality'] - there:+.4f}"}


def interpolated(points: Mapping[float, float], speed: float) -> float | None:
    """The quality at a speed, linear in its logarithm between neighbors; None outside of them."""
    known = sorted(points.items())
    if not known or not known[0][0] <= speed <= known[-1][0]:
        return None
    speeds, values = zip(*known, strict=True)
    return float(np.interp(math.log(speed), [math.log(s) for s in speeds], values))


def _isa() -> str:
    """What the kernels run on here; "stock" without them."""
    try:
        import graphprune_kernels
    except ImportError:
        return "stock"
    return str(graphprune_kernels.isa())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    usual = Amount()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cpu", default="", metavar="LABEL")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--sentences", type=int, default=usual.sentences)
    parser.add_argument("--windows", type=int, default=usual.windows)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", action="store_true")
    options, sys.argv[1:] = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    amount = Amount(options.epochs, options.sentences, options.windows)
    if "--quick" in sys.argv:
        amount = replace(amount, epochs=1, sentences=min(amount.sentences, 64))
    with tempfile.TemporaryDirectory() as temporary:
        main(
            "sparse_front",
            partial(
                measure,
                amount=amount,
                folder=options.folder or Path(temporary),
                cpu=options.cpu or _isa(),
                only=options.only,
                seeds=options.seeds,
                train=options.train,
            ),
        )
