"""Half of the channels of a small network on real images, nothing trained afterwards."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.passes import FoldBatchNorm, PruneNeurons


def images(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2,000 images to train on and 2,000 to test, with labels; pixels 0 to 1."""
    with gzip.open(folder / "mnist" / "train5k.csv.gz", "rt") as file:
        table = [[float(v) for v in line.split(",")] for line in file]
    rows = torch.tensor(table)[torch.randperm(len(table))[:2000]]
    raw = gzip.decompress((folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    names = gzip.decompress((folder / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    test = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8)[: 2000 * 784]
    labels = torch.frombuffer(bytearray(names[8:]), dtype=torch.uint8)[:2000]
    return (
        rows[:, :784].view(-1, 1, 28, 28) / 255,
        rows[:, 784].long(),
        test.view(-1, 1, 28, 28).float() / 255,
        labels.long(),
    )


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 36, 10),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.data
def test_obs_keeps_what_magnitude_loses(data_folder: Path) -> None:
    train, labels, test, answers = images(data_folder)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for chosen in torch.randperm(len(train)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[chosen]), labels[chosen]).backward()
            optimizer.step()
    program = capture(model.eval(), (test[:4],))

    def accuracy(other: Program) -> float:
        return float((other.run([test])[0].argmax(1) == answers).double().mean())

    def cut(score: str) -> Program:
        steps = [FoldBatchNorm(), PruneNeurons(0.5, score=score)]
        return gp.compile(program, steps, calibration=list(train.split(500))).program

    dense, obs, magnitude = accuracy(program), accuracy(cut("obs")), accuracy(cut("magnitude"))
    assert dense > 0.9
    assert obs > dense - 0.04
    assert obs > magnitude + 0.01
