"""The model card: README.md of a hub folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graphprune.report.report import Report, change_text


def model_card(
    source: Mapping[str, Any], files: Collection[str], manifest: Mapping[str, Any], report: Report
) -> str:
    """Write what the model is made from and by which passes, what it costs, and how to run it.

    Args:
        source: "name" and "license" of the model that it was made from, as far as known.
        files: names of what travels with it.
        manifest: the artifact's.
        report: what the passes did.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphprune.models.hub", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    outputs = [output["name"] for output in manifest["outputs"]]
    deployed = manifest["files"]["model"]
    return environment.get_template("card.md.j2").render(
        name=source.get("name") or report.model,
        license=source.get("license") or "",
        task=_task(outputs, manifest),
        outputs=outputs,
        model=deployed,
        float_model=manifest["files"].get("float"),
        scheme=manifest["precision"]["onnx"],
        opset=manifest["opset"],
        runtime="1.21" if manifest["opset"] == 20 else "1.23",
        passes=[(done.name, done.removed) for done in report.passes],
        rows=_rows(manifest, report),
        verification=report.verification(),
        versions=manifest["versions"],
        inputs=[i["name"] for i in manifest["inputs"] if not i.get("optional")],
        has_tokenizer="tokenizer.json" in files,
    )


def _task(outputs: list[str], manifest: Mapping[str, Any]) -> str:
    """The hub's name of what the model is for; empty where the outputs do not say it."""
    if "sentence_embedding" in outputs:
        return "sentence-similarity"
    if manifest["entry"] != "forward":
        return "text-generation"
    logits = next((o for o in manifest["outputs"] if o["name"] == "logits"), None)
    if logits is not None and len(logits["shape"]) == 2:
        return "text-classification"
    return "feature-extraction" if outputs[0] == "last_hidden_state" else ""


def _rows(manifest: Mapping[str, Any], report: Report) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change): sizes, and what was measured of time and quality."""
    rows = [row for row in report.size_rows() if row[0] != "MB"]
    sizes = manifest["sizes"]
    size = sizes[Path(manifest["files"]["model"]).name]
    dense = sizes.get("baseline.onnx")
    if dense is not None:
        rows.append(
            ("MB of ONNX", f"{dense / 1e6:.1f}", f"{size / 1e6:.1f}", change_text(dense, size))
        )
    else:
        rows.append(("MB of ONNX", "", f"{size / 1e6:.1f}", ""))
    results = manifest.get("results") or {}
    if timing := results.get("timing"):
        what = f"ms, batch {timing['batch']}, {timing['threads']} thread(s)"
        rows.append(
            (what, f"{timing['dense_ms']:.2f}", f"{timing['pruned_ms']:.2f}",
             f"{timing['speedup']:.2f}x faster")
        )  # fmt: skip
    quality = results.get("quality") or {}
    if pruned := quality.get("pruned"):
        before = quality.get("dense")
        rows.append(
            (f"{pruned['task']}: {pruned['metric']}",
             f"{before['value']:.4f}" if before else "", f"{pruned['value']:.4f}",
             f"{pruned['value'] - before['value']:+.4f}" if before else "")
        )  # fmt: skip
    return rows
