"""Artifact: the folder that `export` writes, opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from graphprune.errors import ArtifactError, ExportError, GraphPruneError
from graphprune.exporters.ort import (
    Clock,
    Comparison,
    Feeds,
    Footprint,
    compare,
    feeds_of,
    footprint,
    open_session,
)
from graphprune.serialize import MANIFEST, check_hashes, read_json

FORMAT = "graphprune-artifact"
VERSION = 1
MODEL = "model.onnx"
BASELINE = "baseline.onnx"


@final
class Artifact:
    """A compiled model on disk: model.onnx, its dense twin, the program, manifest and report.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def has_baseline(self) -> bool:
        """Whether the dense twin was written too."""
        return BASELINE in self.manifest["sha256"]

    def session(self, threads: int | None = None) -> Any:
        """An onnxruntime.InferenceSession over model.onnx; None leaves the threads to ORT."""
        return open_session(self.path / MODEL, threads)

    def baseline_session(self, threads: int | None = None) -> Any:
        """The same over the dense twin.

        Raises:
            GraphPruneError: the artifact was exported without one.
        """
        if not self.has_baseline:
            raise GraphPruneError(
                f"{str(self.path)!r} has no dense twin: export with baseline=True, or name "
                "another artifact to measure against"
            )
        return open_session(self.path / BASELINE, threads)

    def feeds(self, batch: Any) -> Feeds:
        """A batch, as the model takes it, as arrays by input name."""
        return feeds_of(batch, [i["name"] for i in self.manifest["inputs"]])

    def benchmark(
        self,
        batch: Any,
        against: str | Path | Artifact = "dense",
        *,
        threads: int = 1,
        repeats: int = 20,
        clock: Clock = "wall",
    ) -> Comparison:
        """Time the model and its dense twin in turns.

        Args:
            batch: inputs as the model takes them; not part of the artifact, because speed-ups
                depend on batch and length.
            against: "dense", or another artifact or its folder.
            threads: ORT's threads within operators.
            repeats: rounds; each takes the fastest of three runs of both.
            clock: "wall", or "cpu": CPU time of the calling thread, for one thread only.

        Raises:
            GraphPruneError: no dense twin, or a batch that does not fit.
        """
        if clock == "cpu" and threads != 1:
            raise GraphPruneError("clock='cpu' measures one thread; use clock='wall' for more")
        if against == "dense":
            other = self.baseline_session(threads)
        else:
            opened = against if isinstance(against, Artifact) else open_artifact(Path(against))
            other = opened.session(threads)
        feeds = self.feeds(batch)
        strange = sorted({i.name for i in other.get_inputs()} - feeds.keys())
        if strange:
            raise GraphPruneError(
                f"{str(against)!r} takes inputs {strange} that {str(self.path)!r} does not: only "
                "forms of one model can be measured against each other"
            )
        return compare(
            self.session(threads), other, feeds, threads=threads, repeats=repeats, clock=clock
        )

    def footprint(self, batch: Any, *, dense: bool = False, threads: int = 1) -> Footprint:
        """Load time and peak memory of the model, or of its dense twin, in a process of its own."""
        return footprint(self.path / (BASELINE if dense else MODEL), self.feeds(batch), threads)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"


def is_artifact(path: Path) -> bool:
    """Whether a folder is one that `export` wrote; its files are not checked.

    Raises:
        ExportError: it is, but somebody put files of their own into it.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except ArtifactError:
        return False
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return False
    known = {MANIFEST, *manifest.get("sha256", ())}
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
    manifest = check_hashes(path)
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{str(path / MANIFEST)!r} has version {manifest.get('version')!r}, this graphprune "
            f"reads {VERSION}; install the graphprune that wrote it"
        )
    if MODEL not in manifest["sha256"] or not manifest.get("inputs"):
        raise ArtifactError(f"{str(path / MANIFEST)!r} names no {MODEL!r}; export it again")
    return Artifact(path, manifest)
