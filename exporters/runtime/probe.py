"""The other end of `child.py`: a process that opens ONNX files and runs them in turns.

Run as a script, it imports neither torch nor graphprune, so that it starts fast. Each line of stdin
is a request, and each line of stdout the answer, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np

CLOCKS: dict[str, Callable[[], int]] = {
    "wall": time.perf_counter_ns,
    # Of the calling thread: with one thread ORT computes in it, so other programs do not count.
    "cpu": time.thread_time_ns,
}


def new_session(
    path: str, threads: int | None, config: Mapping[str, str], *, profile: bool = False
) -> Any:
    """Open an onnxruntime.InferenceSession on the CPU, with configuration entries by key."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = profile
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def warm_up(session: Any, feeds: Mapping[str, Any]) -> None:
    """Run a session twice."""
    for _ in range(2):
        session.run(None, feeds)


def one_round(
    sessions: Sequence[Any],
    feeds: Sequence[Mapping[str, Any]],
    runs: int,
    now: Callable[[], int],
) -> list[float]:
    """Run the sessions one after the other; the fastest run of each in milliseconds."""
    return [
        min(_once(session, fed, now) for _ in range(max(1, runs))) / 1e6
        for session, fed in zip(sessions, feeds, strict=True)
    ]


def _once(session: Any, feeds: Mapping[str, Any], now: Callable[[], int]) -> int:
    start = now()
    session.run(None, feeds)
    return now() - start


@final
class Probe:
    """What the process answers, a method a request.

    Attributes:
        at: the file that is worked on.
    """

    def __init__(self) -> None:
        self.at = ""
        self._paths: Sequence[str] = ()
        self._sessions: list[Any] = []
        self._feeds: list[dict[str, Any]] = []

    def open(self, paths: Sequence[str], threads: int, config: Mapping[str, str]) -> dict[str, Any]:
        """Open files; peak memory before, the milliseconds it took, and what each takes."""
        self._paths = paths
        peak, start = _peak(), time.perf_counter()
        for path in paths:
            self.at = path
            self._sessions.append(new_session(path, threads, config))
        return {
            "load_ms": 1e3 * (time.perf_counter() - start),
            "peak": peak,
            "inputs": [{i.name: i.shape for i in s.get_inputs()} for s in self._sessions],
            "optional": [
                [i.name for i in s.get_overridable_initializers()] for s in self._sessions
            ],
        }

    def warm_up(self, arrays: str, names: Sequence[Sequence[str]]) -> dict[str, int | None]:
        """Read what each file is fed from one .npz, run them, and say what memory they hold."""
        with np.load(arrays) as data:
            values = iter([data[key] for key in data.files])
        self._feeds = [{name: next(values) for name in wanted} for wanted in names]
        for path, session, fed in zip(self._paths, self._sessions, self._feeds, strict=True):
            self.at = path
            warm_up(session, fed)
        return {"peak": _peak(), "private": _status("RssAnon:")}

    def round(self, runs: int, clock: str) -> list[float]:
        """Milliseconds of each file in one round."""
        return one_round(self._sessions, self._feeds, runs, CLOCKS[clock])


def _peak() -> int | None:
    """Highest resident memory in bytes; None where the system does not say."""
    # ru_maxrss survives exec and would be the parent's; the mark in /proc does not.
    marked = _status("VmHWM:")
    if marked is not None:
        return marked
    try:
        import resource
    except ImportError:
        return None
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is none."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(
                (int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None
            )
    except OSError:
        return None


def main() -> None:
    """Answer requests until there are no more."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import onnxruntime  # noqa: F401  # before time and memory are looked at

    probe = Probe()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(probe, request.pop("do"))(**request)}
        except Exception as e:
            reason = str(e).strip() or type(e).__name__
            answer = {"error": reason.splitlines()[0], "at": probe.at}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
