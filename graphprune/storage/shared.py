"""Tensors of a program that lie in the weights of its ONNX file already, and are not saved twice.

An ONNX file with its weights beside it (`model.onnx_data`) has most of them in the bytes that a
program would save, or those of their transpose. program.json then says where:

    "shared": {"file": "onnx/model.onnx_data", "sha256": "…",
               "tensors": {"encoder.weight": {"offset": 4096, "shape": [4, 8], "transposed": true}}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import ArtifactError

JSON = Any

_SMALL = 1024  # bytes: smaller tensors are not worth the line


@final
@dataclass(frozen=True, slots=True)
class Weights:
    """A file of float32 weights beside an ONNX file.

    Attributes:
        root: the artifact's folder.
        file: the file, relative to it.
        places: offset and number of bytes of each weight.
    """

    root: Path
    file: str
    places: tuple[tuple[int, int], ...]


def shared_in(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, JSON]:
    """Where tensors lie in a file of weights, as program.json has it; those that do."""
    path = weights.root / weights.file
    offsets: dict[str, int] = {}
    for offset, size in weights.places:
        if size >= _SMALL:
            offsets.setdefault(_digest(_bytes(path, offset, size)), offset)
    found: dict[str, JSON] = {}
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32 or tensor.nbytes < _SMALL:
            continue
        for transposed, form in _forms(tensor.detach()):
            place = offsets.get(_digest(form.contiguous().numpy()))
            if place is not None:
                shape = list(form.shape)
                found[name] = {"offset": place, "shape": shape, "transposed": transposed}
                break
    return found


def read_shared(root: Path, data: Mapping[str, JSON]) -> dict[str, Tensor]:
    """The tensors that program.json says lie in a file of weights.

    Args:
        root: the artifact's folder.
        data: what `shared_in` wrote, as "tensors", and "file".

    Raises:
        ArtifactError: the file ends too early.
    """
    file = data["file"]
    path = root / file
    found = {}
    for name, place in data["tensors"].items():
        shape, offset = [int(n) for n in place["shape"]], int(place["offset"])
        size = 4 * int(np.prod(shape))
        if offset < 0 or min(shape, default=0) < 0 or offset + size > path.stat().st_size:
            raise ArtifactError(f"{name!r} lies beyond the end of {file!r}")
        # A copy: the file may be replaced while the program is in use.
        tensor = torch.from_numpy(np.array(_bytes(path, offset, size).view("<f4"))).reshape(shape)
        found[name] = tensor.t().contiguous() if place["transposed"] else tensor
    return found


def _forms(tensor: Tensor) -> Iterable[tuple[bool, Tensor]]:
    yield False, tensor
    if tensor.dim() == 2:
        yield True, tensor.t()


def _bytes(path: Path, offset: int, size: int) -> Any:
    return np.memmap(path, np.uint8, "r", offset, (size,))


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()
