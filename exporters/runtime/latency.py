"""The device that is this machine: programs timed in ONNX Runtime as they will be exported."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

import graphprune
from graphprune.exporters.kernels.every import every_sparse
from graphprune.exporters.kernels.library import find_library, installed_library
from graphprune.exporters.onnx.convert import to_onnx_together
from graphprune.exporters.onnx.files import file_bytes, save_onnx
from graphprune.exporters.onnx.names import input_names
from graphprune.exporters.quantize.quantize import NothingToQuantizeError, quantize
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.costs import Costs, machine
from graphprune.exporters.runtime.measure import RUNS
from graphprune.exporters.runtime.probe import until_stable
from graphprune.exporters.runtime.session import TUNED, Feeds, check_threads, feeds_of
from graphprune.exporters.runtime.signature import signature
from graphprune.exporters.runtime.timing import default_clock
from graphprune.ir.batches import resized
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.pipeline.device import Cost, Device, Progress
from graphprune.storage.folders import cache_dir

Run = tuple[Program, tuple[Tensor, ...]]
_AGAIN = 3  # known programs that are timed again beside new ones: a median of three is robust


@final
class OnnxRuntimeDevice:
    """This machine's CPU, asked how long programs take there as they will be exported.

    Programs with one signature are timed once. What was measured is kept for 30 days, for this CPU,
    number of threads and versions.

    Attributes:
        name: the CPU's name.
        threads: within operators.
        can_measure: True.
    """

    can_measure = True

    def __init__(
        self,
        threads: int = 1,
        cache: Path | None = None,
        progress: Progress = lambda done, total, unit: None,
    ) -> None:
        """Measure nothing yet.

        Args:
            threads: within operators.
            cache: folder of what was measured; by default "latency" in the user's cache folder.
            progress: called with how many are done, of how many, of what.

        Raises:
            GraphPruneError: this machine does not have so many threads.
        """
        check_threads(threads)
        self.threads, self._progress = threads, progress
        self._cpu = machine()
        self._library = installed_library()
        self.name: str = self._cpu["name"]
        self._costs = Costs(cache or cache_dir() / "latency", self.environment())

    def environment(self) -> dict[str, Any]:
        """Everything that a time depends on beside the program: machine, options, versions."""
        packages = ("onnxruntime", "torch", "onnxscript")
        return {
            "cpu": self._cpu,
            "threads": self.threads,
            "session": dict(TUNED),
            "graphprune": graphprune.__version__,
            "kernels": None if self._library is None else self._library.to_json(),
            **{name: version(name) for name in packages},
        }

    def measure(
        self,
        models: Mapping[str, Program],
        *,
        inputs: Mapping[str, Sequence[Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[str, Cost]:
        """Measure programs here, by the names given; see `Device`.

        Raises:
            ExportError: a program cannot be written as ONNX.
            GraphPruneError: ONNX Runtime cannot run it, or it has zero blocks and
                graphprune-kernels is not there.
        """
        check_library(models)
        runs = runs_of(models, inputs)
        keys = {name: signature(*run) for name, run in runs.items()}
        known = {} if fresh else self._costs.read(set(keys.values()))
        every = {keys[name]: run for name, run in runs.items()}
        new = {key: run for key, run in every.items() if key not in known}
        measured = self._beside(new, every, known) if new else {}
        self._costs.write(measured)
        return {name: {**known, **measured}[key] for name, key in keys.items()}

    def _beside(
        self, new: Mapping[str, Run], every: Mapping[str, Run], known: Mapping[str, Cost]
    ) -> dict[str, Cost]:
        """New programs' costs, in milliseconds of the run that measured the known ones.

        A busy machine is slower than a quiet one, so the longest known ones are measured again
        beside the new ones, and the ratio of both runs scales what is new.
        """
        again = sorted(known, key=lambda key: known[key].ms)[-_AGAIN:]
        measured = self._measured({**{key: every[key] for key in again}, **new})
        scale = np.median([known[key].ms / measured[key].ms for key in again]) if again else 1.0
        return {key: scaled(measured[key], float(scale)) for key in new}

    def _measured(self, models: Mapping[str, Run]) -> dict[str, Cost]:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            files = write_files(models, Path(folder), self._progress)
            with child([file.path for file in files], self.threads, TUNED) as process:
                process.warm_up([file.feeds for file in files])
                clock = default_clock(self.threads)
                times = until_stable(
                    lambda: process.round(RUNS, clock),
                    lambda done, most: self._progress(done, most, "rounds"),
                )
        return {
            key: cost(own, file.bytes) for key, own, file in zip(models, times, files, strict=True)
        }


def open_device(
    file: str, threads: int, progress: Progress = lambda done, total, unit: None
) -> Device:
    """This machine, or the one that the JSON file of a device kit describes.

    Raises:
        GraphPruneError: no kit wrote the file, or this machine does not have so many threads.
    """
    if file:
        from graphprune.exporters.runtime.device_kit import KitDevice

        return KitDevice(Path(file).expanduser(), threads)
    return OnnxRuntimeDevice(threads, progress=progress)


def runs_of(
    models: Mapping[str, Program], inputs: Mapping[str, Sequence[Tensor]] | None
) -> dict[str, Run]:
    """Programs with the flat inputs that they are timed on, by name."""
    given = inputs or {}
    return {
        name: (program, tuple(given.get(name, program.entries[program.deployed].example)))
        for name, program in models.items()
    }


def scaled(cost: Cost, factor: float) -> Cost:
    """The cost with all times multiplied."""
    return replace(cost, ms=cost.ms * factor, low=cost.low * factor, high=cost.high * factor)


def cost(times: Iterable[float], size: int) -> Cost:
    """Median and quartiles of rounds, beside a file's bytes."""
    low, middle, high = np.quantile(np.asarray([*times]), [0.25, 0.5, 0.75])
    return Cost(float(middle), size, float(low), float(high))


@final
@dataclass(frozen=True, slots=True)
class File:
    """A program written as it will be exported.

    Attributes:
        path: of the ONNX file.
        feeds: its example inputs.
        bytes: of the file, and of its weights beside it.
    """

    path: Path
    feeds: Feeds
    bytes: int


def check_library(models: Mapping[str, Program]) -> None:
    """Refuse, before anything is written, zero blocks that nothing here skips.

    Raises:
        GraphPruneError: a mark names blocks, and graphprune-kernels is not installed.
    """
    if any(p.quantization is not None and p.quantization.blocks for p in models.values()):
        find_library()


def write_files(
    models: Mapping[str, Run], folder: Path, progress: Progress, bits: int | None = None
) -> list[File]:
    """Write the deployed entry of each program as NAME.onnx, quantized as its mark says.

    What has nothing to quantize stays float; a limit of the error counts for whole models and is
    left out. Where the mark names blocks, products that have zero ones are written sparse.

    Args:
        models: the programs and their inputs.
        folder: where to.
        progress: called with how many are done, of how many, of what.
        bits: of sparse codes; by default those that are exact on this machine.

    Raises:
        ExportError: one cannot be written, or ONNX Runtime does not run it quantized.
        GraphPruneError: a product is sparse, and graphprune-kernels is not there.
    """
    files = []
    progress(0, len(models), "models")
    exported = to_onnx_together([_of_export(program) for program, _ in models.values()])
    runs = zip(models.items(), exported, strict=True)
    for number, ((name, (program, inputs)), model) in enumerate(runs, 1):
        path = folder / f"{name}.onnx"
        feeds = feeds_of(inputs, input_names(program.entries[program.deployed]))
        save_onnx(model, path)
        mark = program.quantization
        if mark is not None:
            _quantize(path, mark, feeds, bits)
        files.append(File(path, feeds, file_bytes(path)))
        progress(number, len(models), "models")
    return files


def _of_export(program: Program) -> Program:
    """The program with examples of two or more where a size is dynamic: 1 would be a constant."""
    name = program.deployed
    entry = program.entries[name]
    single = {
        symbol: 2
        for place, tensor in zip(entry.input_names, entry.example, strict=True)
        for dim, symbol in entry.dynamic.get(place, {}).items()
        if tensor.shape[dim] == 1
    }
    if not single:
        return program
    larger = replace(entry, example=tuple(resized(entry, single)))
    return replace(program, entries={**program.entries, name: larger})


def _quantize(path: Path, mark: Mark, feeds: Feeds, bits: int | None) -> None:
    choose = None
    if mark.blocks:
        exact = 7 if mark.reduce_range else bits
        choose = partial(every_sparse, pattern=mark.blocks, bits=exact)
    with contextlib.suppress(NothingToQuantizeError):
        quantize(path, path, replace(mark, keep_error=None), [feeds], [feeds], choose=choose)
