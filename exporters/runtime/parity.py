"""Parity: what ONNX Runtime computes is what the Program computes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.errors import ExportError
from graphprune.exporters.onnx.names import input_names, is_tensor_output, output_names
from graphprune.exporters.runtime.kv_cache import optional_inputs
from graphprune.exporters.runtime.session import feeds_of, inputs_of
from graphprune.ir.batches import batches
from graphprune.ir.decoding import IDS, MASK, empty_cache, is_past
from graphprune.ir.graph import is_op
from graphprune.ir.program import Entry, Program
from graphprune.verify.error import relative_error, rounding_of, row_errors

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a row's scale (verify.error.row_errors)
_ROOM = 3  # positions after the new tokens in a cache that past and present share
_ROUNDING = 30  # times torch's own rounding: what another order of the same sums may make of it
_ANY_ROW = 3  # times torch's largest in any row: which rows lose most is chance
_SAMPLES = 4  # of rounding, beside torch's own, which may be next to nothing in a row by luck
_SIGMOID = 2.0**-22  # ORT's is off by up to 1.7e-7, however small the value is


@final
@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one output of ORT is from the Program's, in the worst row.

    Attributes:
        output: its name in the file.
        shape: on this batch.
        error: relative to the row's scale, or to what rounding makes of the row in torch.
    """

    output: str
    shape: tuple[int, ...]
    error: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_parity(
    program: Program, session: Any, tolerance: float = TOLERANCE, *, grouped: bool = False
) -> list[Agreement]:
    """Run the Program and ORT on every batch of `ir.batches.batches`.

    A decoder with a cache also reads a prompt without any past, and a single token after one. What
    need not be fed is fed, and once is not, where the program gets zeros.

    Args:
        program: what was exported, in any float type; it is compared in float32.
        session: an ORT session over the exported file.
        tolerance: largest difference allowed in a row, relative to the row's scale. Where float32
            rounds by more, as torch in float64 and other last bits of the weights show, rows may
            differ by a few times that.
        grouped: the file has GroupQueryAttention: several tokens on top of a past are read for one
            sample alone, and every step also with caches that have room for the present.

    Raises:
        ExportError: an output differs by more, or has another shape; it is named.
    """
    program = program.in_float32()
    entry = program.entries[program.deployed]
    examples, *drawn = batches(entry)
    # Drawn values may be none that the model takes; examples, and steps made of them, are.
    taken = [examples, *(b for b in drawn if _runs(program, b)), *_steps(entry)]
    if grouped:
        taken = [grouped_inputs(entry, inputs) for inputs in taken]
    found = [a for inputs in taken for a in _compare(program, session, inputs, tolerance)]
    if grouped:
        for inputs in taken:
            found += _compare(program, session, inputs, tolerance, shared=True)
    optional = {i.name for i in optional_inputs(session)}
    names = input_names(entry)
    if given := optional.intersection(names):
        zeros = [
            torch.zeros_like(t) if name in given else t
            for name, t in zip(names, examples, strict=True)
        ]
        found += _compare(program, session, zeros, tolerance, left_out=given)
    return found


def grouped_inputs(entry: Entry, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of a step that GroupQueryAttention takes: the first sample's, where it must be one."""
    given = dict(zip(entry.input_names, inputs, strict=True))
    tokens, positions = (given[name].shape[1] for name in (IDS, MASK))
    return list(inputs) if tokens in (1, positions) else [t[:1] for t in inputs]


def _runs(program: Program, inputs: Sequence[Tensor]) -> bool:
    try:
        program.run(inputs, program.deployed)
    except (RuntimeError, IndexError, ValueError) as e:
        shapes = [tuple(t.shape) for t in inputs]
        log.info(
            "not compared on drawn inputs of shapes %s, which the program refuses: %s", shapes, e
        )
        return False
    return True


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
    program: Program,
    session: Any,
    inputs: Sequence[Tensor],
    tolerance: float,
    left_out: Collection[str] = (),
    shared: bool = False,
) -> list[Agreement]:
    entry = program.entries[program.deployed]
    shapes = [tuple(t.shape) for t in inputs]
    feeds = feeds_of(tuple(inputs), input_names(entry))
    if shared:
        longer = ((0, 0), (0, 0), (0, feeds[IDS].shape[1] + _ROOM), (0, 0))
        feeds = {n: np.pad(a, longer) if is_past(n) else a for n, a in feeds.items()}
    wanted = [n for n in inputs_of(session) if n in feeds and n not in left_out]
    try:
        actual = session.run(None, {name: feeds[name] for name in wanted})
    except Exception as e:
        raise ExportError(f"ONNX Runtime fails on inputs of shapes {shapes}: {e}") from e
    flags = is_tensor_output(entry)
    kept = [i for i, keep in enumerate(flags) if keep]
    cached = set(entry.cache.values())
    results = program.run(inputs, program.deployed)
    exact: list[Any] = []
    rounded: list[list[Any]] = []
    result = []
    for number, name, b in zip(kept, output_names(entry), actual, strict=True):
        a = results[number]
        found = torch.from_numpy(np.asarray(b))
        if shared and number in cached:
            found = found[:, :, : a.shape[2]]
        error = relative_error(a, found)
        if not error <= tolerance:
            exact = exact or _in_float64(program, inputs)
            least = _SIGMOID if _is_sigmoid(entry, number) else 0.0
            error = _beyond_rounding([a], found, exact[number], tolerance, least)
            if not error <= tolerance:
                rounded = rounded or _in_the_last_bits(program, inputs)
                samples = [a, *(other[number] for other in rounded)]
                error = _beyond_rounding(samples, found, exact[number], tolerance, least)
        if not error <= tolerance:
            raise ExportError(
                f"output {name!r} of ONNX Runtime differs from the program by {error:.1e} of a "
                f"row's scale on inputs of shapes {shapes}, allowed is {tolerance:.0e}; "
                "please report this with the model"
            )
        result.append(Agreement(name, tuple(a.shape), error))
    return result


def _in_float64(program: Program, inputs: Sequence[Tensor]) -> list[Any]:
    wide = program.cast(torch.float32, torch.float64, refresh=False)
    given = [t.double() if t.dtype is torch.float32 else t for t in inputs]
    return wide.run(given, program.deployed)


def _in_the_last_bits(program: Program, inputs: Sequence[Tensor]) -> list[list[Any]]:
    """Results of the program with other last bits of its weights, several times.

    What float32 computes is exact for weights that differ in about their last bits, so these runs
    show what rounding may do; a single one shows what it happened to do.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor
        for name, tensor in program.tensors.items()
        if name in program.parameters and tensor.dtype is torch.float32
    }

    def changed(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 2 - 1
        return tensor + tensor * noise * torch.finfo(tensor.dtype).eps

    def sample() -> list[Any]:
        other = program.with_tensors({name: changed(t) for name, t in weights.items()})
        return other.run(inputs, program.deployed)

    return [sample() for _ in range(_SAMPLES if weights else 0)]


def _is_sigmoid(entry: Entry, number: int) -> bool:
    """Whether a flat output is what a sigmoid gives."""
    output = next(iter(reversed(entry.graph.nodes))).args[0][number]
    return isinstance(output, fx.Node) and is_op(output, "sigmoid")


def _beyond_rounding(
    rounded: Sequence[Any], ort: Tensor, torch64: Any, tolerance: float, least: float
) -> float:
    """ORT's error in the worst row; rounding there, or torch's own elsewhere, may widen its scale.

    Args:
        rounded: samples in float32, torch's own first. Elsewhere others do not count: where one
            decides otherwise, by a threshold, every row of it would allow anything.
        ort: what ORT gives.
        torch64: what is exact.
        tolerance: the largest error that is allowed.
        least: the difference that is allowed in any row.
    """
    if not isinstance(torch64, Tensor) or ort.shape != torch64.shape:
        return relative_error(rounded[0], ort)
    difference, scale = row_errors(torch64, ort)
    rounding = torch.stack([rounding_of(torch64, sample) for sample in rounded]).amax(0)
    widened = torch.maximum(scale, _ROUNDING / tolerance * rounding)
    own = rounding_of(torch64, rounded[0])
    widened = torch.maximum(widened, _ANY_ROW / tolerance * (own / scale).max() * scale)
    return float((difference / widened.clamp_min(least / tolerance)).max())
