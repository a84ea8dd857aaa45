"""Artifact: the folder that `export` writes, opened."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from graphprune import notebook
from graphprune.errors import ArtifactError, ExportError, GraphPruneError
from graphprune.exporters.onnx.files import file_bytes
from graphprune.exporters.quantize.quantize import quantize
from graphprune.exporters.runtime.footprint import Footprint, footprint
from graphprune.exporters.runtime.kv_cache import Shapes, filled, shapes_of
from graphprune.exporters.runtime.profile import operator_times
from graphprune.exporters.runtime.session import Feeds, feeds_of, open_session
from graphprune.exporters.runtime.timing import Clock, Comparison, compare_files
from graphprune.ir.decoding import PAST, is_past
from graphprune.ir.quantization import SCHEMES, Mark
from graphprune.ir.sizes import check_sizes, limits_from_json
from graphprune.report.measured import megabytes_text, plural
from graphprune.storage.folders import restore
from graphprune.storage.layout import FLAT, LAYOUTS, MANIFEST, Layout, layout_of
from graphprune.storage.program import check_hashes, digest, read_json
from graphprune.suggest import suggest

if TYPE_CHECKING:
    from graphprune.models.tasks import TaskResult

FORMAT = "graphprune-artifact"
VERSION = 1
MODEL = "model.onnx"
BASELINE = "baseline.onnx"
DENSE = "dense"  # how `benchmark` calls the dense model


def low_bit_baseline(scheme: str) -> str:
    """The file of the dense model quantized by a scheme: baseline-int8.onnx, baseline-int4.onnx."""
    return f"baseline-{scheme.partition('-')[0]}.onnx"


def quantized_name(scheme: str) -> str:
    """The quantized file beside the float one, as web runtimes call it."""
    return "model_q4.onnx" if scheme.startswith("int4") else "model_quantized.onnx"


@final
class Artifact:
    """A compiled model on disk: ONNX, its baseline, the program, manifest and report.

    Attributes:
        path: the folder.
        manifest: the content of manifest.json.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def digest(self) -> str:
        """The hash that `graphprune.load(..., expect=)` takes: "sha256:…", over all files."""
        return digest(self.path)

    @property
    def has_cache(self) -> bool:
        """Whether model.onnx reads and extends a key/value cache."""
        return any(is_past(i["name"]) for i in self.manifest["inputs"])

    @property
    def layout(self) -> Layout:
        """Where its files lie."""
        return LAYOUTS[self.manifest.get("layout", FLAT.name)]

    @property
    def model_path(self) -> Path:
        """The ONNX file that `session` opens: the quantized one where there are two."""
        return self._file("model", MODEL)

    @property
    def baseline_path(self) -> Path:
        """The ONNX file of the baseline, which may be missing."""
        return self._file("baseline", BASELINE)

    @property
    def upload_bytes(self) -> int:
        """Bytes of all files but the baselines, which can be left out of an upload."""
        removable = set(self.manifest.get("removable", ()))
        named = [n for n in self.manifest["sha256"] if n not in removable]
        return sum(
            (self.path / name).stat().st_size for name in named if (self.path / name).is_file()
        )

    def _file(self, part: str, default: str) -> Path:
        return self.path / self.manifest.get("files", {}).get(part, default)

    @property
    def has_baseline(self) -> bool:
        """Whether the baseline was written too, and came along."""
        path = self.baseline_path
        return path.relative_to(self.path).as_posix() in self.manifest["sha256"] and path.is_file()

    def session(self, threads: int | None = None) -> Any:
        """An onnxruntime.InferenceSession over `model_path`; None leaves the threads to ORT.

        Its `run` refuses sizes that the model was not captured for, with a GraphPruneError; the
        file alone computes something there.
        """
        return self._checked(open_session(self.model_path, threads))

    def baseline_session(self, threads: int | None = None) -> Any:
        """The same over the dense baseline.

        Raises:
            GraphPruneError: the artifact was exported without one.
        """
        self._check_baseline()
        return self._checked(open_session(self.baseline_path, threads))

    def _check_baseline(self) -> None:
        if not self.has_baseline:
            raise GraphPruneError(
                f"{str(self.path)!r} has no dense baseline: export with baseline=True, or name "
                "another artifact to measure against"
            )

    def check_sizes(self, feeds: Mapping[str, Any]) -> None:
        """Refuse arrays of sizes that the model was not captured for.

        Raises:
            GraphPruneError: the input, its dimension, what it may be and the way out.
        """
        self._check(feeds, self._shapes())

    def _check(self, feeds: Mapping[str, Any], shapes: Shapes) -> None:
        limits = limits_from_json(self.manifest)
        known = {name: shape for name, shape in shapes.items() if name in feeds}
        # An input that is missing is for ONNX Runtime to name.
        limits["relations"] = [
            r for r in limits["relations"] if all(n in known for n, _ in r.sizes.values())
        ]
        check_sizes(known, {name: _shape(feeds[name]) for name in known}, **limits)

    def _shapes(self) -> dict[str, Any]:
        return {i["name"]: i["shape"] for i in self.manifest["inputs"]}

    def _checked(self, session: Any) -> Any:
        """The session, with sizes checked before each run."""
        shapes = shapes_of(session)

        def checked(run: Callable[..., Any]) -> Callable[..., Any]:
            def checked_run(names: Any, feeds: Mapping[str, Any], options: Any = None) -> Any:
                self._check(feeds, shapes)
                return run(names, feeds, options)

            return checked_run

        session.run = checked(session.run)
        session.run_with_ort_values = checked(session.run_with_ort_values)
        return session

    def feeds(self, batch: Any) -> Feeds:
        """A batch, as the model takes it, as arrays by input name.

        What is optional may be left out. Of a decoder with a cache, token ids and mask are enough:
        the past is as long as the mask is longer than the ids, and zero where it is not given.

        Raises:
            GraphPruneError: an input is missing, or of a size that the model was not captured for.
        """
        shapes = self._shapes()
        optional = {i["name"] for i in self.manifest["inputs"] if i.get("optional")}
        if isinstance(batch, Mapping):
            optional -= batch.keys()
        elif isinstance(batch, tuple | list) and len(batch) >= len(shapes):
            optional = set()
        shapes = {name: shape for name, shape in shapes.items() if name not in optional}
        names = [name for name in shapes if not is_past(name)]
        whole = (
            any(key == PAST or is_past(str(key)) for key in batch)
            if isinstance(batch, Mapping)
            else isinstance(batch, tuple | list) and len(batch) > len(names)
        )
        feeds = filled(shapes, feeds_of(batch, list(shapes) if whole else names), strict=True)
        self.check_sizes(feeds)
        return feeds

    def benchmark(
        self,
        batch: Any,
        against: str | Path | Artifact = DENSE,
        *,
        threads: int = 1,
        repeats: int = 20,
        clock: Clock | None = None,
    ) -> Comparison:
        """Time the model and its baseline interleaved, in processes of their own.

        The result is with the session options that docs/deploy.md names, its `default` with ONNX
        Runtime's own. `session` has the first but for the flag for denormals, which would be this
        process's; it makes a difference where inputs are padded.

        Args:
            batch: inputs as the model takes them; not part of the artifact, because speed-ups
                depend on batch and length.
            against: "dense"; "int8" or a scheme, for the dense model quantized; another artifact or
                its folder; or several names with commas, "dense,int8": the first is what the result
                compares with, the others are in its `others`.
            threads: ORT's threads within operators.
            repeats: rounds; each takes the fastest of three runs of both.
            clock: "cpu", CPU time of the calling thread, the default for one thread and for one
                only; or "wall".

        Raises:
            GraphPruneError: no dense baseline, or a batch that does not fit.
        """
        if clock == "cpu" and threads != 1:
            raise GraphPruneError("clock='cpu' measures one thread; use clock='wall' for more")
        feeds = self.feeds(batch)
        if isinstance(against, str):
            self.check_opponents(against)
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            return compare_files(
                self.model_path,
                self._opponents(against, feeds, Path(folder)),
                feeds,
                threads=threads,
                repeats=repeats,
                clock=clock,
            )

    def operators(self, batch: Any, *, threads: int = 1) -> dict[str, dict[str, float]]:
        """Milliseconds of a run by operator type, of "dense", where it is there, and "pruned".

        Args:
            batch: inputs as the model takes them.
            threads: ORT's threads within operators.

        Raises:
            GraphPruneError: a batch that does not fit.
        """
        dense = {DENSE: self.baseline_path} if self.has_baseline else {}
        files = {**dense, "pruned": self.model_path}
        return operator_times(files, self.feeds(batch), threads=threads)

    def check_opponents(self, against: str) -> None:
        """Refuse, before anything is loaded, names that this artifact cannot be measured against.

        Raises:
            GraphPruneError: there is nothing of a name, or no baseline where one is needed.
        """
        check_names(against)
        for name in _names(against):
            if name == DENSE or _scheme(name, ""):
                self._check_baseline()

    def _opponents(
        self, against: str | Path | Artifact, feeds: Feeds, folder: Path
    ) -> dict[str, Path]:
        if isinstance(against, Artifact):
            return {str(against.path): against._timed(feeds)}
        if isinstance(against, Path):
            return {str(against): open_artifact(against)._timed(feeds)}
        return {name: self._opponent(name, feeds, folder) for name in _names(against)}

    def _opponent(self, name: str, feeds: Feeds, folder: Path) -> Path:
        if name == DENSE:
            return self.baseline_path
        notes = self.manifest.get("quantization", {})
        own = notes.get(self.model_path.name, {}).get("scheme", "")
        scheme = _scheme(name, own)
        if scheme:
            return self._low_bit(scheme, own, feeds, folder)
        return open_artifact(Path(name).expanduser())._timed(feeds)

    def _timed(self, feeds: Feeds) -> Path:
        """The file that is timed on another's feeds, whose sizes this artifact must take too."""
        self.check_sizes({name: feed for name, feed in feeds.items() if not is_past(name)})
        return self.model_path

    def _low_bit(self, scheme: str, own: str, feeds: Feeds, folder: Path) -> Path:
        """The dense model quantized: as it was written, or made now where it was not."""
        file = low_bit_baseline(scheme)
        if scheme == own and (written := self.baseline_path.with_name(file)).is_file():
            return written
        mark = Mark(scheme)
        if mark.needs_calibration:
            raise GraphPruneError(
                f"the dense model quantized by {scheme!r} needs calibration batches, which an "
                f"artifact does not hold; compile with quantize {scheme!r} to have it written"
            )
        quantize(self.baseline_path, folder / file, mark, [feeds])
        return folder / file

    def evaluate(
        self, task: str, *, data: str | Path | None = None, dense: bool = False, **options: Any
    ) -> TaskResult:
        """Evaluate the model by a task: graphprune.models.tasks.TASKS, or `graphprune eval --help`.

        Args:
            task: its name, such as "sts".
            data: the task's file or folder; also found through $GRAPHPRUNE_DATA.
            dense: evaluate the baseline instead.
            options: the task's own.

        Raises:
            GraphPruneError: there is no such task, or it needs what the artifact or its data lack.
        """
        from graphprune.models.tasks.artifacts import evaluate_artifact

        path = None if data is None else Path(data).expanduser()
        return evaluate_artifact(self, task, data=path, dense=dense, **options)

    def footprint(self, batch: Any, *, dense: bool = False, threads: int = 1) -> Footprint:
        """Load time and memory of the model, or of its baseline, in a process of its own."""
        if dense:
            self._check_baseline()
        path = self.baseline_path if dense else self.model_path
        return footprint(path, self.feeds(batch), threads)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, {', '.join(self._sizes())})"

    def _repr_html_(self) -> str:
        inputs = [
            (i["name"], i.get("dtype", ""), " x ".join(map(str, i["shape"])))
            for i in self.manifest["inputs"]
        ]
        return notebook.block(
            str(self.path),
            notebook.paragraph(", ".join(self._sizes())),
            notebook.table(("input", "type", "shape"), inputs),
            notebook.paragraph("; ".join(self._measured())),
        )

    def _sizes(self) -> list[str]:
        """Names and megabytes of the models."""
        paths = [self.model_path, *([self.baseline_path] if self.has_baseline else [])]
        return [f"{path.name} {megabytes_text(file_bytes(path))} MB" for path in paths]

    def _measured(self) -> list[str]:
        """What was measured of it, in words."""
        results = self.manifest.get("results") or {}
        timing, quality = results.get("timing"), results.get("quality") or {}
        said = []
        if timing:
            where = f"batch {timing['batch']}, {plural(timing['threads'], 'thread')}"
            times = f"{timing['speedup']:.2f}x as fast as {timing['against']}"
            said.append(f"{timing['pruned_ms']:.2f} ms, {where}: {times}")
        return said + [
            f"{found['metric']} of {which}: {found['value']:.4f}"
            for which, found in quality.items()
        ]


def check_names(against: str) -> None:
    """Refuse names of nothing that a model can be measured against.

    Args:
        against: as `Artifact.benchmark` takes it.

    Raises:
        GraphPruneError: the name is no scheme, and no folder of an artifact; near names are named.
    """
    for name in _names(against):
        folder = Path(name).expanduser()
        if name == DENSE or _scheme(name, "") or layout_of(folder) is not None:
            continue
        if folder.exists():
            raise GraphPruneError(
                f"{name!r} is no artifact to measure against: it has no {MANIFEST}; compile that "
                "model first"
            )
        known = [DENSE, "int8", "int4", *SCHEMES]
        raise GraphPruneError(
            f"there is nothing called {name!r} to measure against, and no such folder; "
            f"{suggest(name, known)}"
        )


def _names(against: str) -> list[str]:
    return [name.strip() for name in against.split(",")]


def _shape(value: Any) -> Sequence[int]:
    """The shape of an array, of what becomes one, or of a value that ONNX Runtime holds."""
    return value.shape() if callable(getattr(value, "shape", None)) else np.shape(value)


def _scheme(name: str, own: str) -> str:
    """The scheme that "int8", "int4" or a scheme's own name stands for; "" for none."""
    if name in SCHEMES:
        return name
    defaults = {"int8": "int8-dynamic", "int4": "int4-weights"}
    return own if own.partition("-")[0] == name else defaults.get(name, "")


def is_artifact(path: Path) -> bool:
    """Whether a folder is one that `export` wrote; its files are not checked.

    Raises:
        ExportError: it is, and holds files that graphprune did not write.
    """
    layout = layout_of(path)
    try:
        manifest = None if layout is None else read_json(path / layout.manifest)
    except ArtifactError:
        return False
    if layout is None or not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return False
    known = {layout.manifest, *manifest.get("sha256", ())}
    files = (f.relative_to(path).as_posix() for f in path.rglob("*") if not f.is_dir())
    foreign = sorted(set(files) - known)
    if foreign:
        raise ExportError(
            f"{str(path)!r} holds {foreign[0]!r}, which graphprune did not write and would remove; "
            "move it away, or choose another folder"
        )
    return True


def open_artifact(path: Path) -> Artifact:
    """Open a folder that `export` wrote, comparing every file with its hash.

    Raises:
        ArtifactError: missing, corrupt or tampered with; the file is named.
    """
    restore(path)
    manifest = check_hashes(path)
    artifact = Artifact(path, manifest)
    source = path / (layout_of(path) or FLAT).manifest
    if manifest.get("version") != VERSION or manifest.get("layout", FLAT.name) not in LAYOUTS:
        raise ArtifactError(
            f"{str(source)!r} has version {manifest.get('version')!r} and layout "
            f"{manifest.get('layout', FLAT.name)!r}, this graphprune reads {VERSION} and "
            f"{list(LAYOUTS)}; install the graphprune that wrote it"
        )
    for named in manifest.get("files", {"model": MODEL}).values():
        if named not in manifest["sha256"]:
            raise ArtifactError(f"{str(source)!r} has no hash of {named!r}; export it again")
    if not manifest.get("inputs"):
        raise ArtifactError(f"{str(source)!r} names no inputs; export it again")
    return artifact
