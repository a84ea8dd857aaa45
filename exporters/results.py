"""report.html in an artifact, and what was measured of the artifact afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.exporters.artifact import Artifact, open_artifact
from graphprune.files import sha256
from graphprune.html import report_page
from graphprune.report import Report
from graphprune.serialize import MANIFEST

PAGE = "report.html"


def write_page(report: Report, manifest: dict[str, Any], folder: Path) -> None:
    """Write report.html for a manifest, and its hash into that manifest."""
    _replace(folder / PAGE, report_page(report, manifest))
    manifest["sha256"][PAGE] = sha256(folder / PAGE)


def add_results(artifact: Artifact, report: Report, results: Mapping[str, Any]) -> Artifact:
    """Note measurements in the manifest, under "results", and draw report.html anew.

    Args:
        artifact: what was measured.
        report: of the program in it.
        results: those that there are of "timing", a benchmark as one flat row, "quality", task
            results of "pruned" and "dense", and "dense_training", what the training of the dense
            model reports; they replace earlier ones of the same name.

    Returns:
        The artifact with the new manifest.
    """
    manifest = dict(artifact.manifest)
    manifest["results"] = {**(manifest.get("results") or {}), **results}
    manifest["sha256"] = dict(manifest["sha256"])
    write_page(report, manifest, artifact.path)
    _replace(artifact.path / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
    return open_artifact(artifact.path)


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
