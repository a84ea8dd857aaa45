"""ONNX Runtime sessions, what they are fed, and the size of their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.exporters.kernels.library import with_library
from graphprune.exporters.runtime.kv_cache import Feeds as Feeds
from graphprune.exporters.runtime.kv_cache import optional_inputs
from graphprune.exporters.runtime.probe import new_session

# ORT's fused SkipLayerNormalization is a scalar loop: 0.22 ms where Add + LayerNormalization take
# 0.05 (ORT 1.31, 128 x 384, one thread).
UNFUSED = {"optimization.disable_specified_optimizers": "SkipLayerNormFusion"}

# Configuration entries of sessions that are timed, by the name of the set; docs/deploy.md says what
# they do. The flag for denormals counts from a process's first session on and is torch's and
# numpy's too, so that only a process of our own sets it.
TUNED = {**UNFUSED, "session.set_denormal_as_zero": "1"}
DEFAULT: Mapping[str, str] = {}


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU with pinned thread counts.

    It has the options `TUNED`, without the flag for denormals, and the library of kernels where the
    file needs it.

    Args:
        path: the ONNX file.
        threads: within operators; None leaves the choice to ORT. Between operators always one.

    Raises:
        ArtifactError: ORT refuses the file.
        GraphPruneError: the library of kernels is needed, and not installed.
    """
    check_threads(threads)
    try:
        return new_session(str(path), threads, with_library(UNFUSED, [path]))
    except GraphPruneError:
        raise
    except Exception as e:
        raise ArtifactError(f"ONNX Runtime cannot load {str(path)!r}: {e}") from e


def inputs_of(session: Any) -> list[str]:
    """The inputs of a session, those too that need not be fed."""
    return [value.name for value in [*session.get_inputs(), *optional_inputs(session)]]


def check_threads(threads: int | None) -> None:
    """Refuse thread counts that this machine does not have.

    Raises:
        GraphPruneError: below one, or far more than there are cores.
    """
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise GraphPruneError(
            f"threads must be between 1 and {most} on this machine, got {threads}"
        )


def feeds_of(batch: Any, names: Sequence[str]) -> Feeds:
    """A batch as ONNX Runtime takes it: arrays by input name.

    Args:
        batch: a mapping by argument name, a tuple or list in order, or one tensor; tensors or
            arrays, nested arguments nested as the model has them.
        names: the inputs of the ONNX file.

    Raises:
        GraphPruneError: an input is missing.
    """
    if isinstance(batch, Mapping):
        found = dict(_flat("", batch))
    else:
        values = batch if isinstance(batch, tuple | list) else [batch]
        flat = [v for _, v in _flat("", list(values))]
        found = dict(zip(names, flat, strict=False))
    missing = [name for name in names if name not in found]
    if missing:
        raise GraphPruneError(
            f"the batch lacks {missing}; the model takes {list(names)}, the batch has "
            f"{sorted(found)}"
        )
    return {name: _array(found[name]) for name in names}


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, tuple | list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [(prefix, value)]
    return [x for k, v in items for x in _flat(f"{prefix}.{k}" if prefix else k, v)]


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, Tensor):
        half = value.dtype in (torch.bfloat16, torch.float16)
        value = value.detach().cpu()
        value = (value.float() if half else value).numpy()
    array: npt.NDArray[Any] = np.asarray(value)
    return array
