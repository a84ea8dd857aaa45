"""An LSTM that classifies questions: half of its hidden units, measured in ONNX Runtime.

    GRAPHPRUNE_DATA=... python -m benchmarks.recurrent [--quick]

A bidirectional LSTM is trained on TREC's six classes (5,452 questions), loses half of its hidden
units by first-order scores on training questions, trains for two epochs more, and is compared with
itself before on the 500 test questions: accuracy, operations, and milliseconds of thread CPU time.
`int8` is `Quantize("int8-dynamic")`, of the LSTM, the table of words and the head.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.quantize.quantize import quantize
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.exporters.runtime.timing import compare
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.passes import Distill, PruneNeurons

CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
LENGTH = 24  # of the timed batch; accuracy is at each question's own length
UNITS = 256


class Classifier(nn.Module):
    """Words, a bidirectional LSTM, the largest value of each unit over time, six logits."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 128)
        self.lstm = nn.LSTM(128, UNITS, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * UNITS, len(CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(ids))
        result: Tensor = self.out(h.amax(1))
        return result


class Questions:
    """TREC as batches of questions of one length, so that none is padded."""

    def __init__(self, folder: Path) -> None:
        self.rows = {part: _rows(folder / f"{part}.tsv") for part in ("train", "test")}
        counts = Counter(word for _, words in self.rows["train"] for word in words)
        known = sorted(word for word, count in counts.items() if count > 1)
        self.words = {word: i + 1 for i, word in enumerate(known)}

    def batches(self, part: str, size: int = 32) -> list[dict[str, Tensor]]:
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for label, words in self.rows[part]:
            ids = [self.words.get(word, 0) for word in words]
            by_length.setdefault(len(ids), []).append((label, ids))
        found = []
        for some in by_length.values():
            for start in range(0, len(some), size):
                labels, texts = zip(*some[start : start + size], strict=True)
                found.append({"ids": torch.tensor(texts), "labels": torch.tensor(labels)})
        return found


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    cells = [line.split("\t") for line in lines]
    return [(CLASSES.index(c[0]), c[2].lower().split()) for c in cells]


def _train(model: nn.Module, batches: list[dict[str, Tensor]], epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for number in torch.randperm(len(batches)).tolist():
            batch = batches[number]
            optimizer.zero_grad()
            F.cross_entropy(model(batch["ids"]), batch["labels"]).backward()
            optimizer.step()
    model.eval()


def _accuracy(program: Program, batches: list[dict[str, Tensor]]) -> float:
    right = total = 0
    for batch in batches:
        logits = program.run([batch["ids"]])[0]
        right += int((logits.argmax(1) == batch["labels"]).sum())
        total += len(batch["labels"])
    return 100 * right / total


def _quantized(path: Path, feeds: dict[str, Any]) -> Path:
    """The file as `Quantize("int8-dynamic")` exports it: the LSTM, the table and the head."""
    target = path.with_name(f"int8-{path.name}")
    notes = quantize(path, target, Mark("int8-dynamic"), [feeds])
    assert (notes["recurrent"], notes["products"], notes["tables"]) == (1, 1, 1)
    return target


def _right(session: Any, batches: list[dict[str, Tensor]]) -> float:
    name = session.get_inputs()[0].name
    right = total = 0
    for batch in batches:
        (logits,) = session.run(None, {name: batch["ids"].numpy()})
        right += int((logits.argmax(1) == batch["labels"].numpy()).sum())
        total += len(batch["labels"])
    return 100 * right / total


def measure(settings: Settings) -> Iterator[Row]:
    """The dense model, without half of its units, after recovery, and in int8."""
    torch.set_num_threads(1)
    data = Questions(data_folder("trec/train.tsv"))
    train, test = data.batches("train"), data.batches("test")
    if settings.quick:
        train = train[::8]
    model = Classifier(len(data.words) + 1)
    _train(model, train, 1 if settings.quick else 4)
    example = {"ids": torch.zeros(2, LENGTH, dtype=torch.int64)}
    dense = gp.compile(model, [], example_inputs=example).program
    cut = PruneNeurons(0.5, score="taylor", compensate="none")
    training = gp.Training(train)
    seen = [{"ids": batch["ids"]} for batch in train[:32]]
    alone = gp.compile(dense, [cut], calibration=seen).program
    passes = [cut, Distill(2, lr=1e-3, hidden=False)]
    recovered = gp.compile(dense, passes, calibration=seen, training=training).program
    ratio = flops(dense) / flops(recovered)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        programs = {"dense": dense, "pruned": alone, "recovered": recovered}
        for name, program in programs.items():
            paths[name] = Path(folder) / f"{name}.onnx"
            save_onnx(to_onnx(program), paths[name])
            check_parity(program, open_session(paths[name], 1))
        base = open_session(paths["dense"], 1)
        feeds = {base.get_inputs()[0].name: torch.randint(1, 900, (1, LENGTH)).numpy()}
        for name in programs:
            for form, path in (("float32", paths[name]), ("int8", _quantized(paths[name], feeds))):
                session = open_session(path, 1)
                found = compare(session, base, feeds, repeats=settings.repeats)
                wanted = 1.0 if name == "dense" else ratio
                yield {
                    "model": name,
                    "form": form,
                    "accuracy %": _right(session, test),
                    "MB": path.stat().st_size / 1e6,
                    "ms": found.model.ms,
                    "x dense": found.ratio,
                    "x FLOP": wanted,
                    "of FLOP ratio %": 100 * found.ratio / wanted,
                }


if __name__ == "__main__":
    main("recurrent", measure)
