"""The other end of `child.py`: a process that opens ONNX files and runs them interleaved.

Run as a script, it imports neither torch nor graphprune, so that it starts fast. Each line of stdin
is a request, and each line of stdout the answer, in JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
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
    path: str, threads: int | None, config: Mapping[str, str], *, profile: str = ""
) -> Any:
    """Open an onnxruntime.InferenceSession on the CPU, with configuration entries by key.

    The key "custom_ops_library" is no entry: it names a library of operators. With `profile`, which
    its file's name begins with, the session writes ONNX Runtime's profile.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        if key == "custom_ops_library":
            options.register_custom_ops_library(value)
        else:
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def warm_up(session: Any, feeds: Mapping[str, Any]) -> None:
    """Run a session twice."""
    for _ in range(WARM_UPS):
        session.run(None, feeds)


WARM_UPS = 2


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


def until_stable(
    one: Callable[[], Sequence[float]],
    progress: Callable[[int, int], None] = lambda done, most: None,
    *,
    seconds: float = 120.0,
) -> list[list[float]]:
    """Repeat rounds until every model's median is known within 1 %, at most `MOST` times.

    Args:
        one: runs all models once and gives the milliseconds of each.
        progress: called after each round with how many there were, and the most that there can be.
        seconds: after which no round begins, once there were `LEAST`.

    Returns:
        For each model, its time in every round.
    """
    rounds: list[Sequence[float]] = []
    start = time.monotonic()
    while len(rounds) < MOST:
        rounds.append(one())
        progress(len(rounds), MOST)
        if len(rounds) >= LEAST and (
            time.monotonic() - start > seconds or (not len(rounds) % 5 and _is_stable(rounds))
        ):
            break
    return [list(times) for times in zip(*rounds, strict=True)]


LEAST, MOST = 15, 200  # rounds
_WITHIN = 0.01


def _is_stable(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether two standard errors of each median are below 1 % of it.

    Of a normal distribution the median's error is 1.25 sigma / sqrt(n), and sigma is the distance
    of the quartiles / 1.35.
    """
    low, middle, high = np.quantile(np.asarray(rounds), [0.25, 0.5, 0.75], axis=0)
    errors = 1.25 * (high - low) / 1.35 / len(rounds) ** 0.5
    return bool((2 * errors <= _WITHIN * middle).all())


def cpu() -> dict[str, Any]:
    """This machine's CPU: its "name", "model", and which "instructions" it has for products.

    Virtual machines often hide the name: "AMD EPYC" is several CPUs. The model is the numbers that
    tell them apart (family, model, stepping; on Arm implementer, part, variant, revision), and what
    runs fast follows from the instructions.
    """
    fields = _cpu_fields()
    names = ("model name", "Model", "Hardware", "Processor")
    name = next((fields[key] for key in names if key in fields), "") or _cpu_name()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "name": name,
        "model": " ".join(fields[key] for key in _MODEL if key in fields),
        "instructions": sorted(set(flags) & _PRODUCTS),
    }


_MODEL = (
    *("cpu family", "model", "stepping"),
    *("CPU implementer", "CPU part", "CPU variant", "CPU revision"),
)

_PRODUCTS = {
    "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "sve", "bf16",
}  # fmt: skip


def _cpu_fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            pairs = [line.split(":", 1) for line in lines if ":" in line]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


@final
class Probe:
    """Answers requests, one method for each.

    Attributes:
        at: the file that is worked on.
    """

    def __init__(self) -> None:
        self.at = ""
        self._paths: Sequence[str] = ()
        self._sessions: list[Any] = []
        self._feeds: list[dict[str, Any]] = []

    def open(
        self, paths: Sequence[str], threads: int, config: Mapping[str, str], profile: str = ""
    ) -> dict[str, Any]:
        """Open files; peak memory before, the milliseconds it took, and what each takes.

        With `profile`, a folder, the sessions write what `operators` reads.
        """
        self._paths = paths
        peak, start = _peak(), time.perf_counter()
        for number, path in enumerate(paths):
            self.at = path
            prefix = os.path.join(profile, str(number)) if profile else ""
            self._sessions.append(new_session(path, threads, config, profile=prefix))
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

    def operators(self) -> list[dict[str, float]]:
        """Milliseconds of a run by operator type, of each file; the profiles end with it.

        The runs of `warm_up` do not count.
        """
        found = []
        for path, session in zip(self._paths, self._sessions, strict=True):
            self.at = path
            with open(session.end_profiling(), encoding="utf-8") as profile:
                found.append(by_operator(json.load(profile), WARM_UPS))
        return found


def by_operator(events: Sequence[Mapping[str, Any]], skipped: int = 0) -> dict[str, float]:
    """Milliseconds of a run by operator type, the longest first: the median over runs.

    Args:
        events: of ONNX Runtime's profile; times in microseconds.
        skipped: runs from the start that do not count.
    """
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")[
        skipped:
    ]
    # An If or Loop lasts as long as what is inside it, whose nodes are events themselves.
    nodes = [
        e
        for e in events
        if e.get("cat") == "Node"
        and e["name"].endswith("_kernel_time")
        and e["args"]["op_name"] not in _CONTAINERS
    ]
    kinds = dict.fromkeys(e["args"]["op_name"] for e in nodes)
    sums = {kind: [0] * len(runs) for kind in kinds}
    for event in nodes:
        for number, (start, end) in enumerate(runs):
            if start <= event["ts"] < end:
                sums[event["args"]["op_name"]][number] += event["dur"]
    medians = {kind: float(np.median(us)) / 1e3 if us else 0.0 for kind, us in sums.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


_CONTAINERS = {"If", "Loop", "Scan"}


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
