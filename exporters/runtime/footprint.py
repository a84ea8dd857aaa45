"""What a model costs a fresh process: load time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime.kv_cache import Feeds
from graphprune.exporters.runtime.session import DISABLED


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
