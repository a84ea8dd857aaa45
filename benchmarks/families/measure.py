"""One family: captured, cut, verified, exported, run; a row, whatever happens."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks.common import Row
from benchmarks.families.base import Family
from graphprune.axes import AxisGroups, axis_groups, frozen_parameters
from graphprune.errors import UnsupportedError
from graphprune.exporters.artifact.artifact import Artifact
from graphprune.ir.batches import batches
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.passes import FoldParametrizations, PruneAxis, PruneHeads, PruneNeurons
from graphprune.passes.structural.base import StructuralPass
from graphprune.verify.error import relative_error

RATIO = 0.5
# What is exact beside what every recipe cuts.
REST = PruneAxis(RATIO, role=("qk_dim", "v_dim", "residual", "pooled", "other"))
CUTS: tuple[StructuralPass, ...] = (PruneHeads(RATIO), PruneNeurons(RATIO), REST)


def measured(family: Family) -> Row:
    """The row of a family; `failed` says in one line what went wrong, `missing` what to install."""
    row: Row = {"family": family.name, "domain": family.domain}
    start = time.process_time()
    stage = "build"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, inputs = family.made()
        stage = "capture"
        dense = graphprune.compile(
            model, [FoldParametrizations()], example_inputs=inputs, dynamic_shapes=family.dynamic
        )
        row |= _structure(dense.program)
        stage = "cut"
        passes, refused = _usable(dense.program)
        row["refused"] = refused
        compiled = graphprune.compile(dense, passes)
        row |= _cut(dense.program, compiled)
        stage = "export"
        with tempfile.TemporaryDirectory() as folder:
            artifact = compiled.export(Path(folder) / "out", baseline=False, layout="flat")
            stage = "run"
            row |= _agreement(compiled.program, artifact)
    except ImportError as e:
        row["missing"] = str(e)
    except Exception as e:  # a row, not the end of the run
        row["failed"] = f"{stage}: {first_line(e)}"
    row["CPU seconds"] = time.process_time() - start
    return row


def first_line(error: Exception) -> str:
    """The class and first line of an error, without the folders of this machine."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: " + re.sub(r"\S*/site-packages/", "", lines[0])


def _usable(program: Program) -> tuple[list[StructuralPass], list[str]]:
    """The cuts that find something, and what the others say of what is there but stays."""
    groups = axis_groups(program)
    usable: list[StructuralPass] = []
    refused: list[str] = []
    for step in CUTS:
        try:
            if step.selected(program, groups).groups:
                usable.append(step)
        except UnsupportedError as e:
            if any(group.role in step.selector.roles for group in groups) and step is not REST:
                refused.append(first_line(e).split(": ", 1)[1])
    return usable, refused


def _structure(program: Program) -> Row:
    """What can go and what stays, of the dense model."""
    groups = axis_groups(program)
    between = [g for g in groups if g.cost and g.size > 1]
    return {
        "parameters": program.num_parameters(),
        "free": sum(not (g.frozen or g.normalized) for g in between),
        "frozen groups": sum(bool(g.frozen) for g in between),
        "normalized": _counted(
            [(g.role, g.size) for g in between if g.normalized and not g.frozen]
        ),
        "frozen": [
            {"share": f.share, "reason": f.reason, "text": f.text}
            for f in frozen_parameters(groups)
        ],
        "stays": _stays(groups),
    }


def _stays(groups: AxisGroups) -> list[str]:
    """Roles that were wanted and that no operator freezes: the model's own outputs and inputs."""
    found: Counter[tuple[str, int, str]] = Counter()
    for group in groups:
        if group.frozen and group.role not in ("vocab", "expert", "other") and group.cost:
            found[group.role, group.size, group.frozen[0]] += 1
    return [f"{role} {size}{_times(n)}: {why}" for (role, size, why), n in found.items()]


def _counted(pairs: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{role} {size}{_times(n)}" for (role, size), n in Counter(pairs).items()]


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""


def _cut(dense: Program, compiled: Any) -> Row:
    """Sizes after, and what went: role, units before and after, how often."""
    found: Counter[tuple[str, int, int]] = Counter()
    error = 0.0
    for done in compiled.report.passes:
        for cut in done.details.get("groups", ()):
            found[cut["role"], cut["before"], cut["after"]] += 1
        error = max(error, done.max_error or 0.0)
    program = compiled.program
    return {
        "parameters after": program.num_parameters(),
        "FLOPs": flops(program) / max(flops(dense), 1),
        "cut": [f"{role} {a}→{b}{_times(n)}" for (role, a, b), n in found.items()],
        "verified": error,
    }


def _agreement(program: Program, artifact: Artifact) -> Row:
    """The largest difference of ONNX Runtime and torch on two batches, relative to each row."""
    session: Any = artifact.session(threads=1)
    entry = program.forward
    error, shapes = 0.0, []
    for inputs in batches(entry)[:2]:
        got = session.run(None, artifact.feeds(tuple(inputs)))
        for a, b in zip(program.run(inputs), got, strict=True):
            error = max(error, relative_error(a, torch.from_numpy(b)))
        shapes.append(" ".join("×".join(map(str, t.shape)) for t in inputs if t.dim()))
    return {"ORT": error, "shapes": shapes}
