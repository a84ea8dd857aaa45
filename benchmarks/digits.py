"""A small residual network on MNIST: half of its channels, one-shot, trained on, and in int8.

    GRAPHPRUNE_DATA=... python -m benchmarks.digits [--quick] [--json FILE]

Three residual blocks of 32, 64 and 128 channels with batch norms (0.5 M parameters) are trained on
5,000 images for four epochs. Then half of the channels go, inside the blocks and between them.
"accuracy" is in percent of the 10,000 test images. Rows, calibrated on 1,024 training images:

- magnitude and obs, nothing trained: with norms folded first ("folded"), or kept and set to the
  statistics of the calibration images after the cut ("recalibrated");
- distilled for one epoch on the training images, and int8-static on top;
- Budget(speedup=3).

MACs are of one image, "ratio" is dense float / model in ONNX Runtime, CPU time of one thread,
interleaved, one image. --quick trains on 1,000 images for two epochs and tests on 1,000.
$GRAPHPRUNE_DATA names the folder that holds mnist/.
"""

from __future__ import annotations

import gzip
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.api import Compiled
from graphprune.ir.cost import flops
from graphprune.passes import (
    Budget,
    Distill,
    FoldBatchNorm,
    PruneAxis,
    PruneNeurons,
    Quantize,
    RecalibrateBatchNorm,
)
from graphprune.pipeline.base import Pass

CHANNELS = (32, 64, 128)


class Block(nn.Module):
    """x + f(x), where f halves the image's sides from the second block on."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, a block for each width, and the mean over the image; [n, 1, 28, 28] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS[0])
        widths = (CHANNELS[0], *CHANNELS)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(CHANNELS[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(F.max_pool2d(images, 2))))
        result: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return result


class Images:
    """MNIST: pixels from 0 to 1, and labels."""

    def __init__(self, folder: Path, quick: bool) -> None:
        with gzip.open(folder / "train5k.csv.gz", "rt") as file:
            table = torch.tensor([[float(v) for v in line.split(",")] for line in file])
        table = table[torch.randperm(len(table))][: 1000 if quick else None]
        self.train = table[:, :784].view(-1, 1, 28, 28) / 255
        self.labels = table[:, 784].long()
        raw, names = (
            _bytes(folder / name)
            for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
        )
        count = 1000 if quick else 10_000
        self.test = raw[16:].view(-1, 1, 28, 28)[:count].float() / 255
        self.answers = names[8:][:count].long()
        self.calibration = list(self.train[:1024].split(128))

    def batches(self, size: int = 64) -> list[dict[str, Tensor]]:
        """The training images once."""
        parts = zip(self.train.split(size), self.labels.split(size), strict=True)
        return [{"images": x, "labels": y} for x, y in parts]


def _bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)


def train(model: nn.Module, data: Images, epochs: int) -> None:
    """AdamW, one cycle."""
    steps = epochs * -(-len(data.train) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train[chosen]), data.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def half(score: str) -> list[Pass]:
    """Half of the channels: inside the blocks, and those that the blocks add to."""
    return [PruneNeurons(0.5, score=score), PruneAxis(0.5, role="residual", score=score)]


def cases() -> dict[str, list[Pass]]:
    """The passes of each row."""
    int8 = Quantize("int8-static", reduce_range=True)
    norms: list[Pass] = [RecalibrateBatchNorm(), FoldBatchNorm()]
    distill = [*half("obs"), RecalibrateBatchNorm(), Distill(epochs=1, lr=1e-3), FoldBatchNorm()]
    return {
        "dense": [],
        "half, magnitude, folded": [FoldBatchNorm(), *half("magnitude")],
        "half, magnitude, recalibrated": [*half("magnitude"), *norms],
        "half, obs, folded": [FoldBatchNorm(), *half("obs")],
        "half, obs, recalibrated": [*half("obs"), *norms],
        "half, obs, distilled": distill,
        "dense, int8": [FoldBatchNorm(), int8],
        "half, obs, distilled, int8": [*distill, int8],
        "3 times as fast": [FoldBatchNorm(), Budget(speedup=3.0, batch=(1,), evaluations=40)],
    }


def measure(settings: Settings) -> Iterator[Row]:
    """The rows, one after another."""
    data = Images(data_folder("mnist/train5k.csv.gz"), settings.quick)
    model = ResNet()
    train(model, data, 2 if settings.quick else 4)
    dense = graphprune.compile(
        model,
        [],
        example_inputs={"images": data.test[:4]},
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, passes in cases().items():
            start = time.perf_counter()
            compiled = graphprune.compile(
                dense,
                passes,
                calibration=data.calibration,
                training=graphprune.Training(data.batches()),
            )
            seconds = time.perf_counter() - start
            yield {"row": name, **_row(dense, compiled, data, settings, Path(folder))} | {
                "seconds": seconds
            }


def _row(
    dense: Compiled, compiled: Compiled, data: Images, settings: Settings, folder: Path
) -> Row:
    """Accuracy, size and speed of the exported model."""
    artifact = compiled.export(folder / "artifact", calibration=data.calibration[:2])
    session = artifact.session(1)
    logits = [session.run(None, {"images": x.numpy()})[0] for x in data.test.split(500)]
    found = torch.cat([torch.from_numpy(some).argmax(1) for some in logits])
    before, after = (flops(c.program) for c in (dense, compiled))
    timed = artifact.benchmark({"images": data.test[:1]}, repeats=settings.repeats)
    return {
        "accuracy": 100 * float((found == data.answers).double().mean()),
        "MMACs": after / 2e6 / len(dense.program.forward.example[0]),
        "MACs ratio": before / after,
        "ms": timed.model.ms,
        "ratio": timed.ratio,
        "spread": f"{timed.ratio_low:.2f}-{timed.ratio_high:.2f}",
    }


if __name__ == "__main__":
    main("digits", measure)
