"""Checkpoints of a training: the program, the optimizer and the place, without a pickle anywhere.

    FOLDER/program.json, tensors.safetensors, examples.safetensors   the program as it was then
    FOLDER/optimiser.safetensors                                     moments, masks, best weights,
                                                                     some weights of the beginning
    FOLDER/training.json                                             the place, and what it is of

There is no generator's state among it: every step draws from a seed made of its number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from graphprune.errors import ArtifactError, TrainingError
from graphprune.ir.program import JSON, Program
from graphprune.storage.folders import check_target, restore, sha256, whole_folder
from graphprune.storage.program import load, read_json, read_tensors, save_files, write_tensors

STATE = "training.json"
TENSORS = "optimiser.safetensors"
_FORMAT = "graphprune-training"
_VERSION = 2
_START = "start/"
_SAMPLES = 64  # of each parameter


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place in a training.

    Attributes:
        program: with the weights of then, and the structure.
        tensors: "exp_avg/NAME" and so on, "mask/NAME", "best/NAME".
        place: numbers: steps done, epochs done, rounds of the next epoch done, and so on.
    """

    program: Program
    tensors: Mapping[str, Tensor]
    place: Mapping[str, JSON] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """The program that a checkpoint's training began with.

    Attributes:
        structure: a hash of the graphs, every tensor's name, shape and type, and the zeros.
        weights: up to 64 values of each parameter. They are compared with a tolerance: another
            machine may compute the passes before with other last bits.
    """

    structure: str
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, program: Program) -> Identity:
        return cls(
            _structure(program),
            {name: _sampled(program.tensors[name]) for name in sorted(program.parameters)},
        )

    def equals(self, structure: object, weights: Mapping[str, Tensor]) -> bool:
        """Whether a checkpoint is of this one."""
        return (
            structure == self.structure
            and weights.keys() == self.weights.keys()
            and all(_is_near(weights[name], own) for name, own in self.weights.items())
        )


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), _SAMPLES),
                            dtype=torch.float64)  # fmt: skip
    return flat[places.long().to(flat.device)].float().cpu()


def _is_near(found: Tensor, own: Tensor) -> bool:
    if found.shape != own.shape:
        return False
    scale = float(own.abs().max()) if own.numel() else 0.0
    return torch.allclose(found, own, rtol=0, atol=1e-3 * scale)


def _structure(program: Program) -> str:
    data = [
        sorted((n, str(t.dtype), list(t.shape)) for n, t in program.tensors.items()),
        sorted(program.parameters),
        sorted(program.aliases.items()),
        sorted(program.zeroed),
        [
            [
                name,
                [[n.name, n.op, str(n.target), str(n.args), str(n.kwargs)] for n in e.graph.nodes],
            ]
            for name, e in sorted(program.entries.items())
        ],
    ]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def write(
    path: Path, checkpoint: Checkpoint, identity: Identity, settings: Mapping[str, JSON]
) -> None:
    """Write a checkpoint in place of the one that is there, or not at all.

    Raises:
        ExportError: graphprune did not write the folder, or it cannot be written.
    """
    check_target(path, is_checkpoint)
    with whole_folder(path) as folder:
        save_files(checkpoint.program, folder)
        start = {_START + name: weights for name, weights in identity.weights.items()}
        write_tensors({**checkpoint.tensors, **start}, folder / TENSORS)
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "of": identity.structure,
            "settings": dict(settings),
            "place": dict(checkpoint.place),
            "sha256": {TENSORS: sha256(folder / TENSORS)},
        }
        text = json.dumps(data, indent=1, allow_nan=False)
        (folder / STATE).write_text(text, encoding="utf-8")


def read(path: Path, identity: Identity, settings: Mapping[str, JSON]) -> Checkpoint | None:
    """The checkpoint of a training with this identity and these settings; None where none is.

    Raises:
        TrainingError: it is of another model, or was made with other settings.
        ArtifactError: it is corrupt, or graphprune did not write it.
    """
    restore(path)
    if not path.exists():
        return None
    data = read_json(path / STATE)
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ArtifactError(f"{str(path / STATE)!r} is not a checkpoint that graphprune wrote")
    if data.get("version") != _VERSION:
        raise ArtifactError(
            f"{str(path / STATE)!r} has version {data.get('version')!r}, this graphprune reads "
            f"{_VERSION}; install the graphprune that wrote it"
        )
    try:
        tensors = read_tensors(path / TENSORS, data["sha256"][TENSORS])
        place = dict(data["place"])
    except (KeyError, TypeError, ValueError) as e:
        raise ArtifactError(f"{str(path / STATE)!r} is corrupt: {type(e).__name__}: {e}") from e
    start = {n.removeprefix(_START): t for n, t in tensors.items() if n.startswith(_START)}
    if not identity.equals(data.get("of"), start):
        raise TrainingError(
            f"the checkpoint {str(path)!r} is of another model, or of this one with other weights "
            "or after other passes; choose another folder for checkpoints, or train without "
            "--resume (resume=True)"
        )
    _check_settings(path, data.get("settings"), settings)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(_START)}
    return Checkpoint(load(path), tensors, place)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a checkpoint that graphprune wrote."""
    return (path / STATE).is_file()


def _check_settings(path: Path, found: Any, wanted: Mapping[str, JSON]) -> None:
    found = found if isinstance(found, dict) else {}
    # Also what it had and is no more wanted.
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            raise TrainingError(
                f"the checkpoint {str(path)!r} was made with {name}={found.get(name)!r}, now it is "
                f"{wanted.get(name)!r}: give what it was made with, or another folder for "
                "checkpoints"
            )
