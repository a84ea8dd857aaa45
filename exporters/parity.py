"""Parity: what ONNX Runtime computes is what the Program computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from graphprune.compare import batches, relative_error
from graphprune.decode import IDS, MASK, empty_cache
from graphprune.errors import ExportError
from graphprune.exporters.names import input_names, is_tensor_output, output_names
from graphprune.exporters.ort import feeds_of
from graphprune.program import Entry, Program

TOLERANCE = 1e-4  # of the largest value of an output


@final
@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one output of ORT is from the Program's, relative to its largest value."""

    output: str
    shape: tuple[int, ...]
    error: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_parity(program: Program, session: Any, tolerance: float = TOLERANCE) -> list[Agreement]:
    """Run the Program and ORT on the examples, and on another batch size and length with padding.

    A decoder with a cache also reads a prompt without any past, and a single token after one.

    Args:
        program: what was exported, in any float type; it is compared in float32.
        session: an ORT session over the exported file.
        tolerance: largest difference allowed, relative to the output's largest value.

    Raises:
        ExportError: an output differs by more, or has another shape; it is named.
    """
    program = program.in_float32()
    entry = program.entries[program.deployed]
    result = []
    cases = [*batches(entry), *_steps(entry)] if entry.dynamic else [list(entry.example)]
    for inputs in cases:
        result += _compare(program, session, inputs, tolerance)
    return result


def _steps(entry: Entry) -> list[list[Tensor]]:
    """For an entry with a cache: its example's new tokens without a past, and the first of them.

    The prompt's last sample is padded on the left, as batches of prompts are.
    """
    if not entry.cache:
        return []
    given = dict(zip(entry.input_names, entry.example, strict=True))
    length = given[IDS].shape[1]
    past = given[MASK].shape[1] - length
    mask = torch.ones_like(given[MASK][:, :length])
    mask[-1, 0] = 0
    prompt = {**given, MASK: mask, **empty_cache(entry, mask.shape[0])}
    token = {**given, IDS: given[IDS][:, :1], MASK: given[MASK][:, : past + 1]}
    return [[case[name] for name in entry.input_names] for case in (prompt, token)]


def _compare(
    program: Program, session: Any, inputs: Sequence[Tensor], tolerance: float
) -> list[Agreement]:
    entry = program.entries[program.deployed]
    shapes = [tuple(t.shape) for t in inputs]
    feeds = feeds_of(tuple(inputs), input_names(entry))
    try:
        actual = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    except Exception as e:
        raise ExportError(f"ONNX Runtime fails on inputs of shapes {shapes}: {e}") from e
    flags = is_tensor_output(entry)
    expected = [
        o for o, keep in zip(program.run(inputs, program.deployed), flags, strict=True) if keep
    ]
    result = []
    for name, a, b in zip(output_names(entry), expected, actual, strict=True):
        error = relative_error(a, torch.from_numpy(np.asarray(b)))
        if not error <= tolerance:
            raise ExportError(
                f"output {name!r} of ONNX Runtime differs from the program by {error:.1e} of its "
                f"largest value on inputs of shapes {shapes}, allowed is {tolerance:.0e}; "
                "please report this with the model"
            )
        result.append(Agreement(name, tuple(a.shape), error))
    return result
