"""The device kit: a folder that times models on another machine, and its result as a Device.

The folder holds their ONNX files, named by signature, what they are fed, `kit.json`, and
`measure.py`, which needs numpy and onnxruntime only and writes JSON.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

import graphprune
from graphprune.errors import GraphPruneError, first_line
from graphprune.exporters.kernels.library import needs_library
from graphprune.exporters.runtime import measure as script
from graphprune.exporters.runtime import probe
from graphprune.exporters.runtime.costs import check_cost
from graphprune.exporters.runtime.latency import File, check_library, runs_of, write_files
from graphprune.exporters.runtime.session import TUNED
from graphprune.exporters.runtime.signature import signature
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.pipeline.device import Cost, Progress
from graphprune.storage.folders import check_target, whole_folder

_log = logging.getLogger(__name__)

KIT = "kit.json"
BITS = 7  # of sparse codes, exact on every CPU
SCRIPT = Path(str(script.__file__)).name
FORMAT = "graphprune device kit"
VERSION = 1
_TYPES = {
    "cpu": dict, "model": str, "graphprune": str, "onnxruntime": str, "threads": int,
    "version": int, "mark": dict | None, "costs": dict,
}  # fmt: skip
_AGAIN = "make the kit again with `graphprune device-kit`, and measure again"


def write_kit(
    models: Mapping[str, Program],
    folder: Path,
    *,
    inputs: Mapping[str, Sequence[Tensor]] | None = None,
    threads: int = 1,
    progress: Progress = lambda done, total, unit: None,
) -> Path:
    """Write the kit; a kit that was there before is replaced as a whole, or not at all.

    Args:
        models: what to time, each as its mark says; those of one signature are written once.
        folder: where to.
        inputs: flat inputs by name, of those that are not timed on their example inputs.
        threads: that the script takes without --threads.
        progress: called with how many are done, of how many, of what.

    Returns:
        The script.

    Raises:
        ExportError: a program cannot be exported, or the folder is not a kit or cannot be written.
        GraphPruneError: there are zero blocks, and graphprune-kernels is not installed.
    """
    check_target(folder, is_kit)
    check_library(models)
    runs = runs_of(models, inputs)
    keys = {name: signature(*run) for name, run in runs.items()}
    distinct = {keys[name]: run for name, run in runs.items()}
    marks = [program.quantization for program in models.values() if program.quantization]
    with whole_folder(folder) as fresh:
        files = dict(zip(distinct, write_files(distinct, fresh, progress, BITS), strict=True))
        names = {key: [name for name in models if keys[name] == key] for key in files}
        finish_kit(
            fresh,
            files,
            names,
            model=next((p.model for p in models.values()), ""),
            mark=marks[0] if marks else None,
            threads=threads,
            library=any(needs_library(file.path) for file in files.values()),
        )
    return folder / SCRIPT


def finish_kit(
    folder: Path,
    files: Mapping[str, File],
    names: Mapping[str, Sequence[str]],
    *,
    model: str,
    mark: Mark | None,
    threads: int,
    library: bool = False,
) -> None:
    """Write what lies beside a kit's ONNX files: inputs, kit.json and the scripts.

    Args:
        folder: the kit's, with the files.
        files: by the key that their costs will have.
        names: what each is a part of, for people.
        model: the whole model's name.
        mark: how parts are quantized.
        threads: that the script takes without --threads.
        library: whether files need the library of kernels, which is installed there.
    """
    described = {}
    for key, file in files.items():
        # By position: a keyword of savez may be an input's name.
        np.savez(folder / f"{key}.npz", *file.feeds.values())
        described[key] = {
            "names": list(names[key]),
            "file": file.path.name,
            "feeds": f"{key}.npz",
            "inputs": list(file.feeds),
            "bytes": file.bytes,
        }
    kit = {
        "format": FORMAT,
        "version": VERSION,
        "graphprune": graphprune.__version__,
        "onnxruntime": version("onnxruntime"),
        "model": model,
        "mark": None if mark is None else mark.to_json(),
        "threads": threads,
        "session": dict(TUNED),
        "library": library,
        "models": described,
    }
    (folder / KIT).write_text(json.dumps(kit, indent=1) + "\n", encoding="utf-8")
    for module in (script, probe):
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)


def is_kit(folder: Path) -> bool:
    """Whether a folder is a kit that graphprune wrote."""
    try:
        return json.loads((folder / KIT).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


@final
class KitDevice:
    """Another machine, as what a kit's script wrote there describes it.

    Attributes:
        name: that machine's CPU.
        threads: that it was measured with.
        can_measure: False.
        blocks: the pattern of the zero blocks that were timed for a budget, or "".
    """

    can_measure = False

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Read the file.

        Another version of ONNX Runtime there is only a warning: a phone's or a board's is seldom
        the one that is installed here, and the times hold for the one that will run the model.

        Args:
            path: what the script wrote.
            threads: that the model is for; None: as many as were measured with.

        Raises:
            GraphPruneError: the file is not such a one, of another version of graphprune, or of
                other threads than asked for.
        """
        self._path = path
        data = _read(path)
        self._costs: dict[str, Cost] = data["costs"]
        self._model, self._mark = data["model"], data["mark"]
        self.name: str = data["name"]
        self.threads: int = data["threads"]
        self.blocks: str = (data["mark"] or {}).get("blocks", "")
        self._check_same(data, threads)
        if data["onnxruntime"] != version("onnxruntime"):
            _log.warning(
                "%r was measured with onnxruntime %s, and files are written with %s here: times "
                "hold for the former",
                str(path),
                data["onnxruntime"],
                version("onnxruntime"),
            )

    def _check_same(self, data: Mapping[str, Any], threads: int | None) -> None:
        made = data["version"], data["graphprune"]
        if made != (VERSION, graphprune.__version__):
            raise GraphPruneError(
                f"{str(self._path)!r} comes from a kit of graphprune {data['graphprune']}, and "
                f"this is {graphprune.__version__}, which may export otherwise: {_AGAIN}"
            )
        if threads not in (None, self.threads):
            raise GraphPruneError(
                f"{str(self._path)!r} was measured with {self.threads} threads, and {threads} are "
                f"asked for: measure again with --threads {threads}"
            )

    def measure(
        self,
        models: Mapping[str, Program],
        *,
        inputs: Mapping[str, Sequence[Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[str, Cost]:
        """Look the costs of programs up in the file; see `Device`.

        Raises:
            GraphPruneError: the file does not hold one of them.
        """
        keys = {name: signature(*run) for name, run in runs_of(models, inputs).items()}
        if any(key not in self._costs for key in keys.values()):
            self._check_scheme(models)
        return self.lookup(keys)

    def lookup(self, keys: Mapping[str, str]) -> dict[str, Cost]:
        """Costs by the names of keys.

        Raises:
            GraphPruneError: the file does not hold one of them.
        """
        unknown = [name for name, key in keys.items() if key not in self._costs]
        if len(unknown) == len(keys) and unknown:
            raise GraphPruneError(
                f"{str(self._path)!r} knows no part of this model: it was measured for "
                f"{self._model!r}, at other sizes or of another model; {_AGAIN}"
            )
        if unknown:
            raise GraphPruneError(
                f"{str(self._path)!r} does not say what {unknown[0]!r} costs, nor "
                f"{len(unknown) - 1} others of {len(keys)}: {_AGAIN}"
            )
        return {name: self._costs[key] for name, key in keys.items()}

    def _check_scheme(self, models: Mapping[str, Program]) -> None:
        marks = [p.quantization for p in models.values() if p.quantization]
        asked = _form(marks[0].scheme, marks[0].reduce_range) if marks else None
        blocks = marks[0].blocks if marks else ""
        if blocks and blocks != self.blocks:
            raise GraphPruneError(
                f"{str(self._path)!r} was measured without zero blocks of {blocks}: make the kit "
                "with `graphprune device-kit --target onnxruntime+kernels`, and measure again"
            )
        there = None if self._mark is None else _form(**self._mark)
        if there != asked:
            raise GraphPruneError(
                f"{str(self._path)!r} was measured {there or 'in float'}, and exports will be "
                f"{asked or 'in float'}: {_AGAIN}"
            )


def _form(scheme: str, reduce_range: bool = False, **_: object) -> str:
    """The words for a mark's fields."""
    return f"as {scheme}" + (" of seven bits (--reduce-range)" if reduce_range else "")


def _read(path: Path) -> dict[str, Any]:
    """Read what the script wrote, with `Cost`s.

    Raises:
        GraphPruneError: the script did not write it, or it cannot be read.
    """
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise GraphPruneError(
            f"{str(path)!r} cannot be read ({e.strerror or e}): name the JSON that a device kit's "
            "measure.py wrote"
        ) from e
    except (ValueError, TypeError, KeyError) as e:
        raise GraphPruneError(
            f"{str(path)!r} is not what a device kit's measure.py writes ({first_line(e)}): run "
            "`python measure.py > device.json` in the kit's folder, and name that file"
        ) from e


def _parsed(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != script.RESULT:
        raise ValueError(f"its format is not {script.RESULT!r}")
    for key, kind in _TYPES.items():
        if not isinstance(data[key], kind):
            raise TypeError(f"its {key} is {data[key]!r}")
    costs = {str(key): Cost(**cost) for key, cost in data["costs"].items()}
    for cost in costs.values():
        check_cost(cost)
    return {**data, "costs": costs, "name": str(data["cpu"]["name"])}
