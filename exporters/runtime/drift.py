"""Drift: how far a quantized file is from its float model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from graphprune.errors import ExportError
from graphprune.exporters.runtime.session import Feeds, inputs_of
from graphprune.ir.decoding import PRESENT
from graphprune.ir.outputs import answer_of
from graphprune.verify.error import relative_error

Outputs = list[list[npt.NDArray[Any]]]  # of every feed


@final
@dataclass(frozen=True, slots=True)
class Drift:
    """The worst over the inputs tried, for one output.

    Attributes:
        cosine: between all values of the output and of the float model.
        error: ||quantized - float|| / ||float||.
        largest: the largest difference in any row, relative to the row's scale, as verification
            and parity have it (`verify.error.relative_error`).
    """

    output: str
    cosine: float
    error: float
    largest: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_all(session: Any, feeds: Sequence[Feeds]) -> Outputs:
    """Outputs for every feed.

    Raises:
        ExportError: ONNX Runtime fails.
    """
    names = inputs_of(session)
    try:
        return [
            session.run(None, {name: feed[name] for name in names if name in feed})
            for feed in feeds
        ]
    except Exception as e:
        raise ExportError(f"ONNX Runtime fails on the quantized model: {e}") from e


def drifts(names: Sequence[str], expected: Outputs, actual: Outputs) -> list[Drift]:
    """One Drift for each floating-point output.

    Raises:
        ExportError: a quantized output is not finite where the float one is.
    """
    result = []
    for i, name in enumerate(names):
        pairs = [(a[i], b[i]) for a, b in zip(expected, actual, strict=True)]
        if any(not np.issubdtype(a.dtype, np.floating) for a, _ in pairs):
            continue
        measured = [_measure(name, a, b) for a, b in pairs]
        result.append(
            Drift(
                name,
                min(m.cosine for m in measured),
                max(m.error for m in measured),
                max(m.largest for m in measured),
            )
        )
    return result


def _measure(name: str, expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> Drift:
    finite = np.isfinite(expected)
    a, b = expected[finite].astype(np.float64), actual[finite].astype(np.float64)
    if not np.isfinite(b).all():
        raise ExportError(
            f"output {name!r} of the quantized model is not finite where the float one is; keep "
            "layers in float with ignore=, or by keep_error="
        )
    largest = relative_error(torch.from_numpy(expected), torch.from_numpy(actual))
    norm, other = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norm == 0 or other == 0:
        same = norm == other
        return Drift(name, 1.0 if same else 0.0, 0.0 if same else 1.0, 0.0 if same else 1.0)
    difference = a - b
    cosine = float(a @ b) / norm / other
    error = float(np.linalg.norm(difference)) / norm
    return Drift(name, min(cosine, 1.0), error, largest)


def worst(found: Sequence[Drift]) -> float:
    """The largest relative error over the outputs; 0 where none is a floating-point number.

    Of a model with an answer (`ir.outputs`) that and the cache count: among vectors of tokens are
    those of padding.
    """
    answer = answer_of(d.output for d in found)
    counted = [
        d.error
        for d in found
        if answer is None or d.output == answer or d.output.startswith(PRESENT)
    ]
    return max(counted, default=0.0)
