"""The public verbs: compile, load, open, inspect, and Compiled, what compile returns."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from graphprune.calibration.stream import check_not_empty, flat_batch
from graphprune.errors import (
    ArtifactError,
    ExportError,
    GraphPruneError,
    RecipeError,
    UnsupportedError,
)
from graphprune.ir.graph import bound_arguments, is_op, value_of
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Pass, flat
from graphprune.pipeline.events import JSON, Observer, PassFinished
from graphprune.pipeline.pipeline import Pipeline, check_order
from graphprune.pipeline.recipe import load as load_recipe
from graphprune.pipeline.recipe import to_data
from graphprune.report.report import ModelSize, PassReport, Report
from graphprune.storage.folders import cache_dir, check_writable
from graphprune.storage.kept import Kept
from graphprune.storage.layout import layout_of
from graphprune.suggest import suggesting
from graphprune.training.spec import Training

if TYPE_CHECKING:
    from graphprune.axes import AxisGroups
    from graphprune.exporters import Artifact
    from graphprune.pipeline.device import Device, Progress

_log = logging.getLogger(__name__)

Passes = Sequence[Pass] | str | os.PathLike[str] | Mapping[str, Any]


@final
class Compiled:
    """A compiled model: the program, the same as a trainable module, and the report.

    Attributes:
        report: what every pass did, sizes before and after, verification.
        files: what goes into the artifact beside the model (a tokenizer, labels): name in the
            folder -> a file to copy, or bytes.
        calibration: the batches that passes saw; export quantizes by them where it has to.
        metadata: lines for the ONNX file's metadata, of the artifact that was loaded.
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        *,
        dense: Program | Path | None = None,
        files: Mapping[str, Path | bytes] | None = None,
        calibration: Sequence[Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.report = report
        self.metadata = dict(metadata or {})
        self.files = dict(files or {})
        self.calibration = calibration
        self._program = program
        self._dense = dense
        self._module: ProgramModule | None = None

    @property
    def program(self) -> Program:
        """The program; once `module` has been trained, with the module's weights.

        A snapshot: later training does not change a program already read. Another one is made only
        where a tensor of the module differs, which reading compares: writes leave no sure trace.
        """
        if self._module is not None:
            self._program = _snapshot(self._program, self._module)
        return self._program

    @property
    def module(self) -> ProgramModule:
        """The compiled model as an nn.Module with the inputs and outputs of the original.

        It is trainable, and always the same object: what is trained here is what is exported.
        """
        if self._module is None:
            # The program shares tensors with others; training must write to copies.
            own = {name: tensor.clone() for name, tensor in self._program.tensors.items()}
            self._module = ProgramModule(self._program.with_tensors(own))
            for name, parameter in self._module.named_parameters():
                if name in self._program.frozen:
                    parameter.requires_grad_(False)
        return self._module

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        target: str = "onnxruntime",
        device: str | os.PathLike[str] | None = None,
        batch: Sequence[int] = (),
        threads: int = 1,
        baseline: bool = True,
        calibration: Iterable[Any] | None = None,
        opset: int | None = None,
        tokenizer: Any = None,
        layout: str = "auto",
        weights: str = "auto",
        metadata: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Write the artifact: the ONNX model, its baseline, the program, manifest and reports.

        Of a text model with a configuration or tokenizer it is a hub folder: config.json, tokenizer
        and model card at the root, onnx/model.onnx, and graphprune's own under graphprune/. Others
        are flat: model.onnx at the root. Quantized programs have their float form beside them in a
        hub folder (model.onnx, and model_quantized.onnx or model_q4.onnx, which is what
        `Artifact.session` opens), and only the quantized one in a flat folder.

        Args:
            path: the folder to make; one that graphprune made before is replaced as a whole.
            target: what will run it: "onnxruntime"; "genai", which is onnxruntime-genai with a
                cache that is not copied from token to token, for decoders compiled with cache=True;
                or "onnxruntime+kernels", ONNX Runtime with the library of graphprune-kernels, where
                products with zero blocks become sparse if that takes less time on this machine,
                or on `device`.
            device: JSON that a device kit of this model, made from an artifact with that target,
                wrote on another machine.
            batch: samples, and tokens of each, at which that target times layers, such as (1, 128);
                the example inputs' where it is empty.
            threads: of ONNX Runtime, with which it times them.
            baseline: write the dense model as baseline.onnx too, to measure against.
            calibration: batches for quantization that needs them; by default those that were given
                to `compile`.
            opset: 23, for ONNX Runtime from 1.23 on; 20, from 1.21 on, for models without a cache
                whose attention has as many key heads as query heads; by default 20 for those, 23
                for others. Both are equally fast.
            tokenizer: a folder with its files, or a tokenizer of transformers or tokenizers.
            layout: "hub", "flat", or "auto": hub for text models.
            weights: in a second file "beside" the graph, which ONNX Runtime maps instead of
                copying; "inside" it, for consumers of one file; or "auto": beside above 20 MB.
            metadata: more lines for the ONNX file's metadata, beside those of an ONNX file that lay
                in the model's folder, and of the artifact that was compiled. What runs the file
                reads them: class names and stride of a detector, say.

        Raises:
            ExportError: the folder is not ours, cannot be written, or ONNX Runtime disagrees with
                the program.
            GraphPruneError: the tokenizer is none, or not this model's.
        """
        from graphprune.exporters import export
        from graphprune.exporters.artifact.export import check_forms
        from graphprune.models.hub.folder import OPTIONAL, check_tokenizer, is_hub_model, source_of
        from graphprune.models.hub.source import CONFIG, saved_tokenizer
        from graphprune.storage.layout import FLAT, HUB

        check_forms(layout, weights, target)
        program = self.program
        given = {} if tokenizer is None else saved_tokenizer(tokenizer)
        check_tokenizer(given, _table_rows(program))
        if target == "genai" and (CONFIG not in self.files or layout == FLAT.name):
            raise ExportError(
                "target 'genai' makes genai_config.json of the model's configuration, in a hub "
                "folder: compile a model that has one, and omit layout"
            )
        self.files |= given
        hub = is_hub_model(self.files, program.forward.input_names) and layout != FLAT.name
        if baseline and self._dense is None:
            _log.warning(
                "a program that was loaded from where no baseline.onnx lies has no dense model to "
                "write; measure against another artifact instead"
            )
        return export(
            program,
            Path(path).expanduser(),
            target=target,
            device=None if device is None else Path(device).expanduser(),
            batch=batch,
            threads=threads,
            baseline=self._dense if baseline else None,
            extra=self.files,
            calibration=self.calibration if calibration is None else _listed(calibration),
            opset=opset,
            layout=HUB if hub or layout == HUB.name else FLAT,
            weights=weights,
            optional=OPTIONAL,
            metadata={
                **source_of(self.files).get("metadata", {}),
                **self.metadata,
                **(metadata or {}),
            },
            finish=self.described,
        )

    def described(self, manifest: Mapping[str, Any]) -> dict[str, bytes]:
        """The files of an artifact that say what became of the model: config.json, model card.

        Args:
            manifest: the artifact's.
        """
        from graphprune.models.hub.folder import finished

        return finished(self.files, manifest, self.report) if manifest["layout"] == "hub" else {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program alone, to go on from with `graphprune.load`."""
        from graphprune.storage.program import save

        save(self.program, Path(path).expanduser())

    def __repr__(self) -> str:
        return repr(self.report).replace("Report", "Compiled", 1)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def compile(
    model: nn.Module | Program | Compiled,
    passes: Passes,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    calibration: Iterable[Any] | None = None,
    training: Training | None = None,
    cache: bool = False,
    verify: bool = True,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    progress: bool = False,
) -> Compiled:
    """Capture a model, run passes over it, and verify each of them.

    Args:
        model: any module, which is never changed; or a Program or Compiled to go on from.
        passes: a list of passes; or a recipe: the name of a built-in one, a file, or a dict.
        example_inputs: a dict of keyword arguments or a tuple; batch and sequence become dynamic.
        dynamic_shapes: "auto"; a list of sizes that must be dynamic too, such as ("height",
            "width"), see `graphprune.capture.capture.capture`; or what torch.export takes.
        calibration: batches like example_inputs, for passes that look at activations; read once.
        training: batches, a loss and an evaluation, for passes that train.
        cache: also capture a decoder's form with a key/value cache, which is what is exported then:
            one ONNX file that reads prompts and goes on token by token.
        verify: check after every pass that removing equals masking.
        seed: everything random comes from it.
        observers: called with events (graphprune.pipeline.events) while passes run.
        progress: show how far it is: bars in a terminal or a notebook, else a line now and then.

    Raises:
        RecipeError: a pass, an option or a recipe is not valid; raised before any work.
        TrainingError: the data do not fit the model, or the loss is no number any more.
        CaptureError: there are no example inputs, torch.export refuses the model, or it has no
            cache that grows by keys and values.
        GraphPruneError: a calibration batch does not fit the captured model.
        UnsupportedError: a pass declines, for instance because an axis is frozen.
        VerificationError: a pass did not do what it claims; an internal error.
    """
    from graphprune.progress import shown

    start = time.perf_counter()
    steps = _steps(passes)
    check_order(steps)
    if calibration is None and isinstance(model, Compiled):
        calibration = model.calibration
    batches = calibration_for(steps, calibration)
    check_training(steps, training)
    with shown(progress) as display:
        with nullcontext() if display is None else display.step("capture"):
            program, dense, captured = _begin(model, example_inputs, dynamic_shapes, cache)
        for number, batch in enumerate(batches or ()):
            flat_batch(program.forward, batch, number)
        files = _files_of(model)
        capture_seconds = time.perf_counter() - start if captured else 0.0
        report = _report_of(program, capture_seconds)
        context = Context(
            reference=dense if isinstance(dense, Program) else program,
            calibration=batches,
            training=training,
            seed=seed,
            devices=_device,
            kept=Kept(cache_dir() / "kept"),
        )
        watching = observers if display is None else [*observers, display.observe]
        result = Pipeline(steps, verify, watching).run(program, context)
    done = _pass_reports(steps, result.results, result.program.history[len(program.history) :])
    after = ModelSize.of(result.program)
    report = report.extended(after, done, time.perf_counter() - start)
    finished = replace(result.program, report=report.to_json())
    known = model.metadata if isinstance(model, Compiled) else {}
    return Compiled(finished, report, dense=dense, files=files, calibration=batches, metadata=known)


compile = suggesting(compile, "graphprune.compile")


def _device(file: str, threads: int, progress: Progress) -> Device:
    """What measures times for passes: this machine, or what a device kit's file describes."""
    from graphprune.exporters import open_device

    return open_device(file, threads, progress)


def load(path: str | os.PathLike[str], *, expect: str | None = None) -> Compiled:
    """Go on from an artifact, or from what `Compiled.save` wrote. Executes nothing in it.

    Args:
        path: the folder.
        expect: the `digest` of the artifact, "sha256:…", which its author published. The hashes
            inside an artifact show a damaged copy; they show no author, who may change both.

    Raises:
        ArtifactError: there is none, or it is corrupt, tampered with, or not ours.
    """
    from graphprune.storage.program import load as load_program

    folder = Path(path).expanduser()
    program = load_program(folder, expect)
    layout = layout_of(folder)
    dense = None if layout is None else folder / layout.own / "baseline.onnx"
    return Compiled(
        program,
        _report_of(program, 0.0),
        dense=dense if dense is not None and dense.is_file() else None,
        files=_side_files(folder),
        metadata=_metadata(folder),
    )


def open(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact, to run, measure and evaluate it; `load` is for going on with its program.

    Args:
        path: the folder that `Compiled.export` wrote.

    Raises:
        ArtifactError: there is none, or it is corrupt, tampered with, or not ours.
    """
    from graphprune.exporters import open_artifact

    return open_artifact(Path(path).expanduser())


def inspect(
    model: nn.Module | Program | Compiled,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
) -> AxisGroups:
    """The axis groups of a model: what could be removed together, and what is frozen and why.

    Printed, they say too which sizes of inputs the captured model is for.

    Raises:
        CaptureError: there are no example inputs, or torch.export refuses the model.
    """
    from graphprune.axes import axis_groups

    program, _, _ = _begin(model, example_inputs, dynamic_shapes, cache=False)
    return axis_groups(program)


def _metadata(path: Path) -> dict[str, str]:
    """The lines of an artifact's ONNX metadata that its maker gave."""
    from graphprune.storage.program import read_json

    layout = layout_of(path)
    found = {} if layout is None else read_json(path / layout.manifest).get("metadata")
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _side_files(path: Path) -> dict[str, Path | bytes]:
    """What lies in an artifact beside the model, to go into the next one too, by its name."""
    layout = layout_of(path)
    if layout is None:
        return {}
    from graphprune.models.hub.folder import MADE
    from graphprune.storage.program import check_hashes, read_json

    own = tuple(layout.own + name for name in ("baseline", "program/", "report."))
    made = (*own, layout.onnx + "model", *MADE)
    found = {}
    for name in read_json(path / layout.manifest)["sha256"]:
        if name.startswith(own[0]) or not name.startswith(made):  # baselines are copied too
            check_hashes(path, name)
        if not name.startswith(made):
            found[name.removeprefix(layout.own)] = path / name
    return found


def _table_rows(program: Program) -> int | None:
    """Rows of the table that input_ids look up; None where it is not found."""
    for node in program.forward.graph.nodes:
        if node.op == "placeholder" and node.name == "input_ids":
            for user in node.users:
                if is_op(user, "embedding"):
                    weight = bound_arguments(user)["weight"]
                    return int(value_of(weight).shape[0])
    return None


def _steps(passes: Passes) -> list[Pass]:
    if isinstance(passes, Pass):
        return [passes]
    if isinstance(passes, Sequence) and not isinstance(passes, str):
        for item in passes:
            if isinstance(item, type) and issubclass(item, Pass):
                raise RecipeError(
                    f"{item.__name__} is a class; make a pass of it, for instance "
                    f"{item.__name__}(...) with its options"
                )
    return load_recipe(passes)


def calibration_for(steps: Sequence[Pass], calibration: Iterable[Any] | None) -> list[Any] | None:
    """The calibration batches as a list, because several passes read them and a generator ends.

    Raises:
        RecipeError: a pass needs them and there are none.
        GraphPruneError: what was given is no iterable of batches, or is empty.
    """
    if calibration is not None:
        return _listed(calibration)
    wanting = {s.name: s.without_data for s in flat(steps) if s.needs_calibration and not s.inner}
    if wanting:
        ways = " and ".join(f"{way} for {name}" for name, way in wanting.items() if way)
        need = "need" if len(wanting) > 1 else "needs"
        raise RecipeError(
            f"{' and '.join(wanting)} as configured {need} calibration batches, and there are "
            "none: give compile(..., calibration=batches), on the command line --calibration FILE"
            + (f", or choose what looks at no data: {ways}" if ways else "")
        )
    return None


def check_training(steps: Sequence[Pass], training: object) -> None:
    """Refuse, before any work, passes that train without data, and what is no Training.

    Raises:
        RecipeError: a pass trains and there is no training, or what was given is none.
        ExportError: the folder for its checkpoints cannot be written.
    """
    wanting = dict.fromkeys(step.name for step in steps if step.needs_training)
    if training is not None and not isinstance(training, Training):
        raise RecipeError(
            f"training is a graphprune.Training(batches, loss=...), got a {type(training).__name__}"
        )
    if wanting and training is None:
        raise RecipeError(
            f"there is nothing to train {' and '.join(wanting)} with: give compile(..., "
            "training=Training(batches, loss=...))"
        )
    if isinstance(training, Training) and training.checkpoints is not None:
        check_writable(Path(training.checkpoints) / "checkpoint")


def _listed(calibration: Iterable[Any]) -> list[Any]:
    if isinstance(calibration, Mapping | Tensor | str) or not isinstance(calibration, Iterable):
        raise GraphPruneError(
            f"calibration is an iterable of batches, got a {type(calibration).__name__}; one "
            "batch alone goes into a list: calibration=[batch]"
        )
    batches = list(calibration)
    if not batches:
        raise GraphPruneError(
            "calibration yields no batch; pass an iterable of batches like example_inputs, and "
            "make another generator if something has read it already"
        )
    for number, batch in enumerate(batches):
        check_not_empty(batch, number)
    return batches


def _begin(
    model: nn.Module | Program | Compiled, example_inputs: Any, dynamic_shapes: Any, cache: bool
) -> tuple[Program, Program | Path | None, bool]:
    """The program to begin with, its dense one, and whether it was captured just now."""
    if isinstance(model, Compiled | Program | ProgramModule):
        if example_inputs is not None:
            raise GraphPruneError(
                f"a {type(model).__name__} brings its own example inputs: omit example_inputs"
            )
        if cache:
            _check_cached(model)
        if isinstance(model, Compiled):
            return model.program, model._dense, False
        if isinstance(model, Program):
            return model, model if model.report is None else None, False
        program = _copied(model.program())
        return program, program if program.report is None else None, False
    if not isinstance(model, nn.Module):
        raise GraphPruneError(
            f"model must be an nn.Module, a Program or a Compiled, got {type(model).__name__}"
        )
    from graphprune.capture.capture import capture

    if example_inputs is None:
        example_inputs = _derived_inputs(model)
    program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    if cache:
        from graphprune.capture.decoder import with_decode

        program = with_decode(model, program)
    return program, program, True


def _files_of(model: nn.Module | Program | Compiled) -> Mapping[str, Path | bytes]:
    """What travels with a model: its configuration, where it has one."""
    if isinstance(model, Compiled):
        return model.files
    if isinstance(model, Program) or not any(hasattr(model, a) for a in ("config", "encoder")):
        return {}
    from graphprune.models.hub.source import source_files

    return source_files(model)


def _check_cached(model: Program | Compiled | ProgramModule) -> None:
    program = model.program if isinstance(model, Compiled) else model
    program = program.program() if isinstance(program, ProgramModule) else program
    if "decode" not in program.entries:
        raise UnsupportedError(
            "cache=True needs the model itself: this program was captured without a key/value "
            "cache, which cannot be added afterwards; compile the model again with cache=True"
        )


def _derived_inputs(model: nn.Module) -> Any:
    """Example inputs from the model's own configuration, where it has one that we can read."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        return None
    from graphprune.models.loading.inputs import example_inputs

    return example_inputs(model, config)


def _report_of(program: Program, capture_seconds: float) -> Report:
    """The report that a program carries, or a new one for a dense program."""
    if program.report is not None:
        try:
            return Report.from_json(program.report)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ArtifactError(
                f"the report inside the program is not one that graphprune wrote ({e!r}); compile "
                "the model again"
            ) from e
    size = ModelSize.of(program)
    name = program.model or "model"
    limits = tuple(program.limit_lines())
    return Report(name, before=size, after=size, capture_seconds=capture_seconds, limits=limits)


def _pass_reports(
    steps: Sequence[Pass], results: Sequence[PassFinished], records: Sequence[JSON]
) -> list[PassReport]:
    """One report a pass, with the pipeline's line of history about it where there is one."""
    lines = [r for r in records if isinstance(r, Mapping) and "pass" in r]
    return [
        PassReport.of(finished, step, next((r for r in lines if r["pass"] == step), None))
        for step, finished in zip(to_data(steps), results, strict=True)
    ]


def _snapshot(program: Program, module: ProgramModule) -> Program:
    """The program with those tensors of the module that training has changed, copied."""
    changed: dict[str, Tensor] = {}
    for name, tensor in module.program().tensors.items():
        if tensor.shape != program.tensors[name].shape:
            raise ExportError(
                f"the module's {name!r} has shape {tuple(tensor.shape)} now, but the program's "
                f"graph is for {tuple(program.tensors[name].shape)}; change shapes with passes"
            )
        if not torch.equal(tensor, program.tensors[name]):
            changed[name] = tensor.detach().clone()
    if not changed:
        return program
    event = {"trained": sorted(changed)}
    updated = program.with_tensors(changed)
    # Saving after every epoch leaves one line, not one an epoch.
    return updated if program.history[-1:] == (event,) else updated.record(event)


def _copied(program: Program) -> Program:
    return program.with_tensors({name: t.clone() for name, t in program.tensors.items()})
