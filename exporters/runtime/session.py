"""ONNX Runtime sessions, and what they cost: time, load time, memory, size on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.exporters.runtime.kv_cache import Feeds as Feeds
from graphprune.exporters.runtime.kv_cache import filled, shapes_of

Clock = Literal["wall", "cpu"]

# ORT's fused SkipLayerNormalization is a scalar loop: 0.22 ms where Add + LayerNormalization take
# 0.05 (ORT 1.31, 128 x 384, one thread).
DISABLED = ("SkipLayerNormFusion",)

_CLOCKS: dict[str, Callable[[], int]] = {
    "wall": time.perf_counter_ns,
    # Of the calling thread: with one thread ORT computes in it, so other programs do not count.
    "cpu": time.thread_time_ns,
}


def open_session(path: Path, threads: int | None = None, *, profile: bool = False) -> Any:
    """An onnxruntime.InferenceSession on the CPU with pinned thread counts.

    Args:
        path: the ONNX file.
        threads: within operators; None leaves the choice to ORT. Between operators always one.
        profile: write ORT's profile, see `InferenceSession.end_profiling`.

    Raises:
        ArtifactError: ORT refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = profile
    if threads is not None and not 1 <= threads <= 4 * (os.cpu_count() or 1):
        raise GraphPruneError(
            f"threads must be between 1 and {4 * (os.cpu_count() or 1)} on this machine, got "
            f"{threads}"
        )
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(DISABLED),
        )
    except Exception as e:
        raise ArtifactError(f"ONNX Runtime cannot load {str(path)!r}: {e}") from e


def feeds_of(batch: Any, names: Sequence[str]) -> Feeds:
    """A batch as ONNX Runtime takes it: arrays by input name.

    Args:
        batch: a mapping by argument name, a tuple or list in order, or one tensor; tensors or
            arrays, nested arguments nested as the model has them.
        names: the inputs of the ONNX file.

    Raises:
        GraphPruneError: an input is missing.
    """
    if isinstance(batch, Mapping):
        found = dict(_flat("", batch))
    else:
        values = batch if isinstance(batch, tuple | list) else [batch]
        flat = [v for _, v in _flat("", list(values))]
        found = dict(zip(names, flat, strict=False))
    missing = [name for name in names if name not in found]
    if missing:
        raise GraphPruneError(
            f"the batch lacks {missing}; the model takes {list(names)}, the batch has "
            f"{sorted(found)}"
        )
    return {name: _array(found[name]) for name in names}


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, tuple | list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [(prefix, value)]
    return [x for k, v in items for x in _flat(f"{prefix}.{k}" if prefix else k, v)]


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, Tensor):
        half = value.dtype in (torch.bfloat16, torch.float16)
        value = value.detach().cpu()
        value = (value.float() if half else value).numpy()
    array: npt.NDArray[Any] = np.asarray(value)
    return array


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of its external weights."""
    data = path.with_suffix(".onnx.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run: median and quartiles, over rounds, of each round's fastest."""

    ms: float
    low: float
    high: float


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models measured in turns.

    Attributes:
        model: the model in question.
        against: what it is compared with.
        ratio: how many times faster the model is, median over rounds.
        ratio_low: lower quartile of the rounds' ratios; `ratio_high` the upper.
        rounds: how often the turn went round; `runs` is how often a model ran in each round.
        threads: within operators.
        clock: "wall", or "cpu" for the CPU time of one thread.
        shapes: of the inputs.
        others: further opponents of the same rounds, by name.
    """

    model: Timing
    against: Timing
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    runs: int
    threads: int
    clock: str
    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(
    model: Any,
    against: Any,
    feeds: Feeds,
    *,
    threads: int = 1,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock | None = None,
) -> Comparison:
    """Time two sessions in turns, A B A B …, so that what slows the machine slows both.

    Args:
        model: the session in question.
        against: the session to compare with.
        feeds: inputs for both; of a decoder's cache, both have their own.
        threads: how many threads the sessions were opened with; recorded.
        repeats: rounds.
        runs: runs of each session in a round, of which the fastest counts.
        clock: by default `default_clock(threads)`.
    """
    return compare_all(
        model,
        {"against": against},
        feeds,
        threads=threads,
        repeats=repeats,
        runs=runs,
        clock=clock,
    )


def compare_all(
    model: Any,
    against: Mapping[str, Any],
    feeds: Feeds,
    *,
    threads: int = 1,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock | None = None,
) -> Comparison:
    """Like `compare`, with several opponents in the same rounds: the first, the rest as others."""
    clock = clock or default_clock(threads)
    sessions = [model, *against.values()]
    first, *rest = interleaved(sessions, feeds, repeats=repeats, runs=runs, clock=clock)
    found: dict[str, Comparison] = {}
    for name, times in zip(against, rest, strict=True):
        ratios = [b / a for a, b in zip(first, times, strict=True)]
        found[name] = Comparison(
            model=_timing(first),
            against=_timing(times),
            ratio=median(ratios),
            ratio_low=_quantile(ratios, 0.25),
            ratio_high=_quantile(ratios, 0.75),
            rounds=repeats,
            runs=runs,
            threads=threads,
            clock=clock,
            shapes={name: tuple(array.shape) for name, array in feeds.items()},
        )
    main, *others = found
    return replace(found[main], others={name: found[name] for name in others})


def default_clock(threads: int) -> Clock:
    """CPU time of one thread, which other programs do not slow; of more, only the wall clock."""
    return "cpu" if threads == 1 else "wall"


def interleaved(
    sessions: Sequence[Any],
    feeds: Feeds,
    *,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock = "wall",
) -> list[list[float]]:
    """For each session, each round's fastest run in milliseconds."""
    now = _CLOCKS[clock]
    result: list[list[float]] = [[] for _ in sessions]
    own = [filled(shapes_of(session), feeds) for session in sessions]
    for session, fed in zip(sessions, own, strict=True):
        for _ in range(2):
            session.run(None, fed)
    for _ in range(max(1, repeats)):
        for times, session, fed in zip(result, sessions, own, strict=True):
            fastest = min(_once(session, fed, now) for _ in range(max(1, runs)))
            times.append(fastest / 1e6)
    return result


def _once(session: Any, feeds: Feeds, now: Callable[[], int]) -> int:
    start = now()
    session.run(None, feeds)
    return now() - start


def _timing(times: Sequence[float]) -> Timing:
    return Timing(median(times), _quantile(times, 0.25), _quantile(times, 0.75))


def _quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(values), q))


@final
@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model costs a fresh process.

    Attributes:
        load_ms: making the session, file cache warm.
        peak_bytes: highest resident memory, Python and ORT included.
        model_bytes: how much of it came with the session and its first run.
    """

    load_ms: float
    peak_bytes: int
    model_bytes: int


_PROBE = """
import json, resource, sys, time
import numpy as np, onnxruntime

def peak():
    # ru_maxrss survives exec and would be the parent's; the mark in /proc does not.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

path, data, threads, disabled = sys.argv[1:]
feeds = dict(np.load(data))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.log_severity_level = 3
before, start = peak(), time.perf_counter()
session = onnxruntime.InferenceSession(
    path, options, providers=["CPUExecutionProvider"], disabled_optimizers=json.loads(disabled))
load = time.perf_counter() - start
session.run(None, feeds)
print(json.dumps([load, before, peak()]))
"""


def footprint(path: Path, feeds: Feeds, threads: int = 1) -> Footprint:
    """Load and run an ONNX file once in a process of its own, and ask what it took."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "feeds.npz"
        np.savez(data, **feeds)  # type: ignore[arg-type]  # numpy: keywords are arrays by name
        command = [sys.executable, "-c", _PROBE, str(path.absolute()), str(data)]
        command += [str(threads), json.dumps(list(DISABLED))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr[-500:]
        raise GraphPruneError(f"{str(path)!r} does not run in a fresh process: {reason}")
    load, before, peak = json.loads(done.stdout)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return Footprint(load * 1e3, peak * unit, (peak - before) * unit)
