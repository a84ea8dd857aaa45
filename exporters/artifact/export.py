"""export: write a Program as an artifact, verified and measured."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from torch import Tensor

from graphprune.calibration.stream import flat_batch
from graphprune.errors import ExportError
from graphprune.exporters.artifact.artifact import (
    BASELINE,
    FORMAT,
    MODEL,
    VERSION,
    Artifact,
    is_artifact,
    low_bit_baseline,
    open_artifact,
    quantized_name,
)
from graphprune.exporters.artifact.results import MARKDOWN, PAGE, Finish, write_reports
from graphprune.exporters.artifact.weights import bytes_by_role, tensor_roles
from graphprune.exporters.kernels.choose import Chooser, timed_feeds
from graphprune.exporters.kernels.library import find_library
from graphprune.exporters.onnx.convert import check_opset, to_onnx
from graphprune.exporters.onnx.files import (
    WEIGHTS,
    copy_onnx,
    data_file,
    file_bytes,
    save_onnx,
    weights_of,
)
from graphprune.exporters.onnx.grouped import check_cache
from graphprune.exporters.onnx.names import input_names, limits_by_input
from graphprune.exporters.quantize.quantize import Choose, quantize, warn_of_overflow
from graphprune.exporters.runtime.device_kit import KitDevice
from graphprune.exporters.runtime.kv_cache import filled, shapes_of
from graphprune.exporters.runtime.parity import check_parity, grouped_inputs
from graphprune.exporters.runtime.probe import cpu
from graphprune.exporters.runtime.session import Feeds, feeds_of, open_session
from graphprune.exporters.runtime.timing import compare, default_clock, interleaved
from graphprune.ir.batches import second_inputs
from graphprune.ir.decoding import IDS, MASK, empty_cache
from graphprune.ir.history import kept_indices
from graphprune.ir.program import Program
from graphprune.ir.quantization import SCHEMES, Mark
from graphprune.report.report import Report
from graphprune.storage.folders import check_target, sha256, whole_folder
from graphprune.storage.layout import CARD, FLAT, HUB, LAYOUTS, MANIFEST, Layout
from graphprune.storage.program import save_files

if TYPE_CHECKING:
    import onnx_ir as ir

# What runs an artifact, and the quantization schemes that it has operators for.
KERNELS = "onnxruntime+kernels"
TARGETS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": tuple(SCHEMES),
    "genai": tuple(SCHEMES),
    KERNELS: ("int8-dynamic",),
}
GROUPED = ("genai",)  # targets whose past and present share a buffer (`onnx.grouped`)

_Notes = dict[str, Any]


def export(
    program: Program,
    path: Path,
    *,
    target: str = "onnxruntime",
    device: Path | None = None,
    batch: Sequence[int] = (),
    threads: int = 1,
    baseline: Program | Path | None = None,
    extra: Mapping[str, Path | bytes] | None = None,
    calibration: Iterable[Any] | None = None,
    opset: int | None = None,
    layout: Layout = FLAT,
    weights: str = "auto",
    optional: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
    finish: Finish = lambda manifest: {},
) -> Artifact:
    """Write an artifact; one that was there before is replaced as a whole, or not at all.

    Args:
        program: what to export.
        path: the artifact's folder.
        target: what will run it: "onnxruntime", or "genai" for onnxruntime-genai with a cache that
            past and present share. That file runs in ONNX Runtime too, but reads several tokens on
            top of a past for one sample at a time. "onnxruntime+kernels" is ONNX Runtime with the
            library of graphprune-kernels: products with enough zero blocks become sparse there,
            each where that takes the least time on this machine, or on `device`.
        device: what a kit of sparse products wrote on another machine (`kernels.kit`).
        batch: sizes at which those products are timed: samples, and tokens of each (after a cache:
            tokens of past); the example inputs' where it is empty.
        threads: of ONNX Runtime, with which they are timed.
        baseline: the dense program, written as baseline.onnx by the same exporter; or the
            baseline.onnx of an artifact that this program comes from, which is copied.
        extra: more files by name (tokenizer, labels), as paths to copy or bytes.
        calibration: batches like the example inputs; quantization "int8-static" needs them, and
            measures its drift on the first of them.
        opset: 23, for ONNX Runtime from 1.23 on; 20, from 1.21 on, for models without a cache whose
            attention has as many key heads as query heads; by default 20 for those, 23 for others.
        layout: where the files lie.
        weights: in model.onnx_data "beside" the graph, "inside" it, or "auto": beside above 20 MB.
        optional: inputs that need not be fed; they are zero then.
        metadata: more lines for the ONNX file's metadata.
        finish: given the manifest when all that it describes is written; returns more files by
            name, such as a model card.

    A program that is marked for quantization is written in float, verified, and then quantized; so
    is its baseline, as another file, while baseline.onnx stays float. The layout "hub" has both
    forms of the model: model.onnx in float, and model_quantized.onnx (model_q4.onnx where weights
    have four bits), which is what the artifact then opens.

    Raises:
        ExportError: graphprune did not write the folder, or it cannot be written; the graph has no
            ONNX form; ONNX Runtime disagrees with the program; or the target cannot run the
            quantized operators.
    """
    check_opset(opset, cached=program.deployed != "forward")
    mark = program.quantization
    check_forms(layout.name, weights, target)
    check_runs(target, program, mark)
    if target != KERNELS and (device is not None or batch):
        raise ExportError(
            f"device and batch are for the choice of sparse products: give target={KERNELS!r} with "
            "them, or leave them out"
        )
    check_target(path, is_artifact)
    for name, value in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ExportError(
                f"metadata {name!r} is a {type(value).__name__}, and ONNX holds text: give "
                "str(...) or json.dumps(...) of it"
            )
    _check_extra(extra or {}, layout)
    notes: _Notes = {"parity": {}, "sizes": {}, "parameters": {}, "quantization": {}}
    batches = _calibration(program, calibration, mark)
    chooser = None
    if target == KERNELS:
        chooser = Chooser(
            find_library(),
            timed_feeds(program, batch),
            threads=threads,
            device=None if device is None else KitDevice(device, threads),
        )
    options = _Options(
        opset, weights, tuple(optional), dict(metadata or {}), target in GROUPED, chooser
    )
    with whole_folder(path) as folder:
        (folder / layout.onnx).mkdir(exist_ok=True)
        (folder / layout.own).mkdir(exist_ok=True)
        files = {"model": layout.onnx + MODEL, "baseline": layout.own + BASELINE}
        model = _write_model(program, folder / files["model"], notes, options)
        if baseline is program:
            copy_onnx(folder / files["model"], folder / files["baseline"])
        elif isinstance(baseline, Path):
            copy_onnx(baseline, folder / files["baseline"])
            notes["sizes"][BASELINE] = file_bytes(folder / files["baseline"])
        elif baseline is not None:
            _write_model(baseline, folder / files["baseline"], notes, options)
        else:
            del files["baseline"]
        if mark is not None:
            files |= _write_quantized(program, mark, batches, folder, layout, files, notes, options)
        notes["measurements"] = _measurements(program, folder, files, options.grouped)
        (folder / layout.program).mkdir()
        # What is quantized in place is no file of the program's weights any more.
        kept = mark is None or "float" in files
        shared = weights_of(folder, files.get("float", files["model"])) if kept else None
        save_files(program, folder / layout.program, shared)
        notes["weights"] = _weights(program, baseline, folder, files)
        _copy_extra(extra or {}, folder, layout)
        manifest = _manifest(program, target, model, notes, layout, files)
        if chooser is not None:
            manifest["kernels"] = chooser.to_json()
        manifest["metadata"] = dict(options.metadata)
        manifest["beside"] = [n for n in files.values() if data_file(folder / n).is_file()]
        _copy_extra(finish(manifest), folder, layout)
        if program.report is None:
            text = f"# {program.model or 'model'}\n\n{program.num_parameters():,} parameters.\n"
            (folder / layout.own / MARKDOWN).write_text(text, encoding="utf-8")
        manifest["sha256"] = _hashes(folder)
        if program.report is not None:
            write_reports(Report.from_json(program.report), manifest, folder, layout)
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (folder / layout.manifest).write_text(text, encoding="utf-8")
    return open_artifact(path)


@final
@dataclass(frozen=True, slots=True)
class _Options:
    """How ONNX files are written."""

    opset: int | None
    weights: str
    optional: tuple[str, ...]
    metadata: Mapping[str, str]
    grouped: bool
    choose: Choose | None


def measure(program: Program, *, threads: int = 1, repeats: int = 10) -> float:
    """Milliseconds that ONNX Runtime takes for the program's example inputs, without a cache.

    A program marked for quantization is measured quantized, all layers of it; in float where the
    scheme needs calibration.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        save_onnx(to_onnx(program), path)
        mark = program.quantization
        if mark is not None and not mark.needs_calibration:
            feeds = _examples(program, "forward")
            quantize(path, path, replace(mark, keep_error=None), feeds[:1])
        session = open_session(path, threads)
        (times,) = interleaved(
            [session],
            _examples(program, "forward")[0],
            repeats=repeats,
            clock=default_clock(threads),
        )
    return float(np.median(times))


def _write_model(program: Program, path: Path, notes: _Notes, options: _Options) -> ir.Model:
    model = to_onnx(
        program,
        program.deployed,
        opset=options.opset,
        optional=options.optional,
        grouped=options.grouped,
    )
    given = {k: v for k, v in options.metadata.items() if k not in model.metadata_props}
    model.metadata_props.update(given)
    save_onnx(model, path, options.weights)
    agreements = check_parity(program, open_session(path), grouped=options.grouped)
    notes["parity"][path.name] = [a.to_json() for a in agreements]
    notes["sizes"][path.name] = file_bytes(path)
    notes["parameters"][path.name] = program.num_parameters()
    return model


def check_forms(layout: str, weights: str, target: str = "onnxruntime") -> None:
    """Refuse, before any work, a layout, a place of weights or a target that does not exist.

    Raises:
        ExportError: one of these.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}; there is {', '.join(map(repr, TARGETS))}")
    if layout not in ("auto", *LAYOUTS):
        raise ExportError(f"layout is one of {['auto', *LAYOUTS]}, got {layout!r}")
    if weights not in WEIGHTS:
        raise ExportError(f"weights is one of {list(WEIGHTS)}, got {weights!r}")


def check_runs(target: str, program: Program, mark: Mark | None) -> None:
    """Refuse, before any work, a target that cannot run a program.

    Args:
        target: a key of `TARGETS`.
        program: to be exported, perhaps after passes.
        mark: how it will be quantized then; None for float.

    Raises:
        ExportError: it has no operators for the quantization scheme, or for float, or takes no such
            cache.
        GraphPruneError: it needs the library of kernels, which is not installed.
    """
    if target in GROUPED:
        check_cache(target, program.entries[program.deployed])
    if target == KERNELS:
        find_library()
    if target == KERNELS and mark is None:
        raise ExportError(
            f"target {target!r} multiplies sparse blocks in int8, and nothing marks the model for "
            "that: add Quantize('int8-dynamic') as the last pass, or --quantize int8-dynamic"
        )
    if mark is not None and mark.scheme not in TARGETS[target]:
        able = [name for name, schemes in TARGETS.items() if mark.scheme in schemes]
        raise ExportError(
            f"target {target!r} has no operators for scheme {mark.scheme!r}; it runs "
            f"{list(TARGETS[target])}, and {able} run {mark.scheme!r}"
        )


def _write_quantized(
    program: Program,
    mark: Mark,
    batches: Sequence[Feeds],
    folder: Path,
    layout: Layout,
    files: Mapping[str, str],
    notes: _Notes,
    options: _Options,
) -> dict[str, str]:
    """Quantize the model, in place or beside it, and the baseline into a file of its own.

    Returns:
        The files that are new, or take the place of others, by their part.
    """
    feeds, weights = _examples(program, program.deployed, options.grouped), options.weights
    source = folder / files["model"]
    name = quantized_name(mark.scheme) if layout is HUB else MODEL
    target = source.with_name(name)
    notes["quantization"][name] = quantize(
        source, target, mark, feeds, batches, weights, options.choose
    )
    warn_of_overflow(mark, notes["quantization"][name])
    notes["sizes"][name] = file_bytes(target)
    found = {"model": layout.onnx + name}
    if layout is HUB:
        found["float"] = files["model"]
    if "baseline" in files:
        baseline = folder / files["baseline"]
        name = low_bit_baseline(mark.scheme)
        # The baseline is there to be timed: nothing kept in float for its quality's sake.
        every = replace(mark, keep_error=None)
        if program.deployed != "forward":
            shapes = shapes_of(open_session(baseline, 1))
            feeds, batches = ([filled(shapes, feed) for feed in all_] for all_ in (feeds, batches))
        target = baseline.with_name(name)
        notes["quantization"][name] = quantize(baseline, target, every, feeds, batches, weights)
        notes["sizes"][name] = file_bytes(target)
        found["baseline_quantized"] = layout.own + name
    return found


def _calibration(
    program: Program, calibration: Iterable[Any] | None, mark: Mark | None
) -> list[Feeds]:
    """Calibration batches as ONNX Runtime takes them; read only where the program is marked.

    Raises:
        GraphPruneError: a batch does not fit the model's inputs.
        ExportError: a batch holds NaN or infinity, or there is none where one is needed.
    """
    found: list[Feeds] = []
    if mark is None:
        return found
    entry = program.forward
    for number, batch in enumerate(calibration or ()):
        flat = flat_batch(entry, batch, number)
        for name, tensor in zip(entry.input_names, flat, strict=True):
            if not bool(tensor.isfinite().all()):
                raise ExportError(f"calibration batch {number}: {name!r} holds NaN or infinity")
        found.append(_deployed_feeds(program, flat))
    if mark.needs_calibration and not found:
        raise ExportError(
            f"scheme {mark.scheme!r} takes the activations' ranges from calibration batches, and "
            "there are none: give export(..., calibration=batches)"
        )
    return found


def _deployed_feeds(program: Program, flat: Sequence[Tensor]) -> Feeds:
    """Flat inputs of `forward` for the exported file; a decoder with a cache reads them at once."""
    feeds = feeds_of(tuple(flat), input_names(program.forward))
    if program.deployed == "forward":
        return feeds
    entry = program.in_float32().entries[program.deployed]
    ids = feeds[IDS]
    given = {IDS: ids, MASK: feeds.get(MASK, np.ones_like(ids)), **empty_cache(entry, len(ids))}
    return feeds_of(tuple(given[name] for name in entry.input_names), input_names(entry))


def _examples(program: Program, name: str, grouped: bool = False) -> list[Feeds]:
    """The example inputs, and another batch size and length where those may change."""
    program = program.in_float32()
    entry = program.entries[name]
    inputs = [list(entry.example), *([second_inputs(entry)] if entry.dynamic else [])]
    if grouped:
        inputs = [grouped_inputs(entry, flat) for flat in inputs]
    return [feeds_of(tuple(flat), input_names(entry)) for flat in inputs]


def _measurements(
    program: Program, folder: Path, files: Mapping[str, str], grouped: bool
) -> list[Any]:
    """A short comparison on the example inputs: a first idea, not a benchmark."""
    if "baseline" not in files:
        return []
    sessions = [open_session(folder / files[part], 1) for part in ("model", "baseline")]
    example = _examples(program, program.deployed, grouped)[0]
    comparison = compare(sessions[0], sessions[1], example, repeats=5)
    return [{**comparison.to_json(), "cpu": cpu()["name"]}]


def _weights(
    program: Program,
    baseline: Program | Path | None,
    folder: Path,
    files: Mapping[str, str],
) -> dict[str, dict[str, int]]:
    """Bytes of the model and its baseline by what they are for."""
    roles = tensor_roles(program)
    if isinstance(baseline, Program) and baseline is not program:
        # It has the tensors that went as a whole too.
        roles = {**tensor_roles(baseline), **roles}
    found = [folder / files[part] for part in ("model", "baseline") if part in files]
    return {file.name: bytes_by_role(file, roles) for file in found}


def _manifest(
    program: Program,
    target: str,
    model: ir.Model,
    notes: _Notes,
    layout: Layout,
    files: Mapping[str, str],
) -> dict[str, Any]:
    floats = sorted({str(t.dtype)[6:] for t in program.tensors.values() if t.is_floating_point()})
    mark = program.quantization
    baselines = [name for part, name in files.items() if part.startswith("baseline")]
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": program.model,
        "target": target,
        "layout": layout.name,
        "files": dict(files),
        "removable": [file for name in baselines for file in (name, f"{name}_data")],
        "editable": [CARD],
        "entry": program.deployed,
        "opset": model.opset_imports[""],
        "precision": {"program": floats, "onnx": "float32" if mark is None else mark.scheme},
        "versions": _versions(),
        "inputs": [_described(v) for v in model.graph.inputs],
        "outputs": [_described(v) for v in model.graph.outputs],
        **limits_by_input(program.entries[program.deployed], cache=target not in GROUPED),
        "history": list(program.history),
        "kept": kept_indices(program.history),
        **notes,
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _described(value: ir.Value) -> dict[str, Any]:
    shape = [s if isinstance(s, int) else str(s) for s in value.shape or ()]
    found = {"name": value.name, "type": str(value.dtype).lower(), "shape": shape}
    # What has a value of its own need not be fed.
    return {**found, "optional": True} if value.const_value is not None else found


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "numpy")
    found = {name: version(name) for name in packages}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def _check_extra(extra: Mapping[str, Path | bytes], layout: Layout) -> None:
    baselines = {low_bit_baseline(scheme) for scheme in SCHEMES}
    own = {MODEL, BASELINE, MANIFEST, MARKDOWN, PAGE, "program", *baselines}
    reserved = {layout.own.rstrip("/"), layout.onnx.rstrip("/")} if layout is HUB else own
    for name, source in extra.items():
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or parts[0] in reserved:
            raise ExportError(f"an extra file cannot be called {name!r}; choose another name")
        if isinstance(source, Path) and not source.is_file():
            raise ExportError(f"the extra file {str(source)!r} does not exist")


def _copy_extra(extra: Mapping[str, Path | bytes], folder: Path, layout: Layout) -> None:
    for name, source in extra.items():
        target = folder / layout.place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            shutil.copyfile(source, target)
        else:
            target.write_bytes(source)
