"""report.html in an artifact, and what was measured of the artifact afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import ArtifactError
from graphprune.exporters.artifact.artifact import Artifact, open_artifact
from graphprune.report.page import report_page
from graphprune.report.report import Report
from graphprune.storage.layout import FLAT, Layout

PAGE = "report.html"
# From a manifest to files that show what it says, such as a model card.
Finish = Callable[[Mapping[str, Any]], Mapping[str, bytes]]


def write_page(
    report: Report, manifest: dict[str, Any], folder: Path, layout: Layout = FLAT
) -> None:
    """Write report.html for a manifest into an artifact's folder, its hash into that manifest."""
    _replace(folder / layout.own / PAGE, _noted_page(report, manifest, layout))


def add_results(
    artifact: Artifact,
    report: Report,
    results: Mapping[str, Any],
    finish: Finish = lambda manifest: {},
) -> Artifact:
    """Note measurements in the manifest, under "results", and draw report.html again.

    Args:
        artifact: what was measured.
        report: of the program in it.
        results: those that there are of "timing", a benchmark as one flat row, "quality", task
            results of "pruned" and "dense", and "dense_training", what the training of the dense
            model reports; they replace earlier ones of the same name.
        finish: as for `export`: given the new manifest, returns files that show these results.

    Returns:
        The artifact with the new manifest.

    Raises:
        ArtifactError: a result is NaN or infinite, or nothing that JSON knows; nothing is written.
    """
    manifest = dict(artifact.manifest)
    manifest["results"] = {**(manifest.get("results") or {}), **results}
    manifest["sha256"] = dict(manifest["sha256"])
    # All of it before anything is written: a page whose hash is not noted is a corrupt artifact.
    page = _noted_page(report, manifest, artifact.layout)
    files = finish(manifest)
    for name, content in files.items():
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ArtifactError(
            f"the results cannot be noted in {str(artifact.path)!r}: {e}; give finite numbers and "
            "text, the artifact is as it was"
        ) from e
    _replace(artifact.path / artifact.layout.own / PAGE, page)
    for name, content in files.items():
        _replace(artifact.path / name, content)
    _replace(artifact.path / artifact.layout.manifest, text.encode())
    return open_artifact(artifact.path)


def _noted_page(report: Report, manifest: dict[str, Any], layout: Layout) -> bytes:
    """report.html for a manifest, its hash noted in that manifest."""
    page = report_page(report, manifest).encode()
    manifest["sha256"][layout.own + PAGE] = hashlib.sha256(page).hexdigest()
    return page


def _replace(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_bytes(content)
    os.replace(fresh, file)
