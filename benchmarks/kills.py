"""Kill writers at random moments, and look whether anything is lost.

Half of the writers export over an artifact, half train with checkpoints and go on after each kill.
Every third one dies between the two renames by which a folder is replaced where a file system
cannot exchange folders in one step; the others die at a moment drawn at random.

    python -m benchmarks.kills [--kills 150] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

import graphprune
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import Finetune
from graphprune.storage import folders as files
from graphprune.storage.program import load

WINDOW = 3  # every such kill comes between two renames


def main() -> None:
    """Kill, look, and exit with 1 when something was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=150, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        exports = _Exports(Path(folder) / "exports")
        trainings = _Trainings(Path(folder) / "trainings")
        counts: Counter[str] = Counter()
        for i in track(range(options.kills), "kills"):
            subject = (exports, trainings)[i % 2]
            counts[subject.kill(drawn, in_window=i % WINDOW == 0)] += 1
        counts[trainings.finish()] += 1
    for outcome, count in sorted(counts.items()):
        print(f"{count:5}  {outcome}")
    sys.exit(any(outcome.startswith("LOST") for outcome in counts))


class _Exports:
    """One artifact, exported over again with other weights each time."""

    def __init__(self, folder: Path) -> None:
        model, inputs = tiny("tiny-mlp")[:2]
        self.compiled = graphprune.compile(model, [], example_inputs=inputs)
        self.name = next(iter(dict(self.compiled.module.named_parameters())))
        self.path, self.version = folder / "out", 0
        self._write(0)
        start = time.monotonic()
        _wait(_forked(lambda: self._write(0)))
        self.seconds = time.monotonic() - start

    def _write(self, version: int) -> None:
        with torch.no_grad():
            next(self.compiled.module.parameters()).fill_(version)
        self.compiled.export(self.path)

    def kill(self, drawn: random.Random, *, in_window: bool) -> str:
        """Kill one export, and read what is there."""
        new = self.version + 1
        writer = _forked(lambda: self._write(new), in_window=in_window)
        died = _killed(writer, None if in_window else drawn.uniform(0, 1.1 * self.seconds))
        try:
            found = graphprune.load(self.path).program
        except graphprune.GraphPruneError as e:
            return f"LOST: export, {e}"
        weights = found.tensors[self.name]
        read = int(weights.flatten()[0])
        if read not in (self.version, new) or not (weights == read).all():
            return f"LOST: export, version {read} in place of {self.version} or {new}"
        kept = "old" if read == self.version and read != new else "new"
        self.version = read
        return f"export {died}, the {kept} artifact is there and whole"


class _Trainings:
    """A training that is killed and resumed, against an undisturbed one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        model, inputs = tiny("tiny-mlp")[:2]
        self.compiled = graphprune.compile(model, [], example_inputs=inputs)
        self.expected = self._expected()
        self.kills = 0

    def _expected(self) -> dict[str, Tensor]:
        start = time.monotonic()
        _wait(_forked(lambda: self._train(self.folder / "whole")))
        self.seconds = time.monotonic() - start
        return self._result(self.folder / "whole")

    def _train(self, folder: Path) -> None:
        drawn = torch.Generator().manual_seed(0)
        batches = [
            {"x": torch.randn(4, 12, generator=drawn), "labels": torch.arange(4)} for _ in range(6)
        ]
        training = graphprune.Training(
            batches, checkpoints=folder, every=1, resume=True, device="cpu"
        )
        graphprune.compile(self.compiled.program, [Finetune(epochs=3, lr=1e-2)], training=training)

    def _result(self, folder: Path) -> dict[str, Tensor]:
        return dict(load(next(folder.iterdir())).tensors)

    def kill(self, drawn: random.Random, *, in_window: bool) -> str:
        """Kill one training; when it ended by itself, compare and begin another."""
        folder = self.folder / str(self.number)
        writer = _forked(lambda: self._train(folder), in_window=in_window)
        died = _killed(writer, None if in_window else drawn.uniform(0, self.seconds))
        if died != "ended before":
            self.kills += 1
            return f"training {died}"
        return self._compared(folder)

    def _compared(self, folder: Path) -> str:
        self.number += 1
        got = self._result(folder)
        if got.keys() == self.expected.keys() and all(
            torch.equal(got[name], tensor) for name, tensor in self.expected.items()
        ):
            return "training resumed to its end, with the weights of one undisturbed"
        return "LOST: training, other weights than one undisturbed"

    def finish(self) -> str:
        """Let the last one end."""
        folder = self.folder / str(self.number)
        _wait(_forked(lambda: self._train(folder)))
        return self._compared(folder)


def _forked(work: Callable[[], None], *, in_window: bool = False) -> int:
    """Do the work in a process of its own; its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        if in_window:
            _die_between_renames()
        work()
        code = 0
    finally:
        os._exit(code)


def _die_between_renames() -> None:
    """As on a file system without an exchange of folders, and killed where that shows."""
    seen: list[Path] = []
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if seen:
            os.kill(os.getpid(), signal.SIGKILL)
        if "-old-" in str(target):
            seen.append(target)
        return rename(self, target)

    files._exchange = lambda a, b: False
    Path.rename = renamed  # type: ignore[method-assign, assignment]


def _killed(writer: int, after: float | None) -> str:
    """How a writer died."""
    if after is not None:
        time.sleep(after)
        os.kill(writer, signal.SIGKILL)
    status = _wait(writer)
    if os.WIFSIGNALED(status):
        return "killed between two renames" if after is None else "killed at random"
    if os.WEXITSTATUS(status):
        return "FAILED"
    return "ended before"


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    main()
