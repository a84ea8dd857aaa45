"""Time the ONNX files beside this script, and write what they took to stdout as JSON.

    python measure.py --threads 1 > device.json

It needs numpy and onnxruntime, and graphprune-kernels where the kit is of sparse products.
`graphprune device-kit` made this folder, and
`graphprune compile ... --device device.json` reads the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULT = "graphprune device costs"  # format of what is written
RUNS = 3  # of a model in a round; the fastest counts


def beside(name: str) -> Any:
    """A module in this script's folder, which is not on Python's path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> None:
    """Measure all models of the kit, interleaved."""
    kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Time the models of this kit.")
    parser.add_argument("--threads", type=int, default=kit["threads"], help="of ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, about")
    options = parser.parse_args(arguments)
    costs = measured(kit, options.threads, options.seconds)
    import onnxruntime

    result = {
        "format": RESULT,
        **{key: kit[key] for key in ("version", "graphprune", "model", "mark")},
        "cpu": beside("probe").cpu(),
        "threads": options.threads,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "costs": costs,
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def measured(kit: dict[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """Median, quartiles and bytes of every model of a kit, by signature."""
    probe = beside("probe")
    config = {**kit["session"], **(library() if kit.get("library") else {})}
    sessions, feeds = [], []
    for number, model in enumerate(kit["models"].values(), 1):
        said(f"loading {number} of {len(kit['models'])}")
        session = probe.new_session(str(HERE / model["file"]), threads, config)
        with np.load(HERE / model["feeds"]) as data:
            feeds.append({n: data[key] for n, key in zip(model["inputs"], data.files, strict=True)})
        sessions.append(session)
        probe.warm_up(session, feeds[-1])
    # As graphprune itself: CPU time of one thread, which other programs do not slow.
    now = probe.CLOCKS["cpu" if threads == 1 else "wall"]
    rounds = probe.until_stable(
        lambda: probe.one_round(sessions, feeds, RUNS, now),
        lambda done, most: said(f"round {done}, of at most {most}"),
        seconds=seconds,
    )
    sys.stderr.write("\n")
    result = {}
    for (name, model), times in zip(kit["models"].items(), rounds, strict=True):
        low, middle, high = (float(x) for x in np.quantile(times, [0.25, 0.5, 0.75]))
        result[name] = {"ms": middle, "bytes": model["bytes"], "low": low, "high": high}
    return result


def library() -> dict[str, str]:
    """The entry of a session's configuration that names the library of kernels."""
    try:
        import graphprune_kernels
    except ImportError:
        sys.exit("this kit needs graphprune-kernels: install its wheel here, and measure again")
    return {"custom_ops_library": str(graphprune_kernels.library_path())}


def said(what: str) -> None:
    """Show progress on stderr, in one line."""
    sys.stderr.write(f"\r\x1b[K{what}")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
