"""The state of a training: where it is, and the tensors beside the weights; to and from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from graphprune.ir.program import JSON, Program
from graphprune.rewrite.shrink import shrink
from graphprune.training.checkpoint import Checkpoint
from graphprune.training.records import Epoch


@final
@dataclass(slots=True)
class Place:
    """Where training is: what a checkpoint has to say beside tensors."""

    step: int = 0
    epoch: int = 0
    round: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    log: list[Epoch] = field(default_factory=list)
    cuts: list[dict[str, list[int]]] = field(default_factory=list)
    checks: list[dict[str, JSON]] = field(default_factory=list)
    metric_before: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    done: bool = False

    def to_json(self) -> dict[str, JSON]:
        found = {name: getattr(self, name) for name in self.__slots__}
        return {**found, "log": [epoch.to_json() for epoch in self.log]}

    @classmethod
    def from_json(cls, data: Mapping[str, JSON]) -> Place:
        return cls(**{**data, "log": [Epoch.from_json(record) for record in data["log"]]})


@final
@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of a checkpoint beside the weights.

    Attributes:
        optimizer: "exp_avg/NAME" and so on.
        masks: tensor name -> where it may change.
        best: weights of the best epoch by name; empty where none is kept.
        masking: what the pass that chooses weights remembers.
    """

    optimizer: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    masking: Mapping[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by names that tell the kinds apart."""
        kinds = {"mask": self.masks, "best": self.best, "masking": self.masking}
        named = {f"{kind}/{n}": t for kind, held in kinds.items() for n, t in held.items()}
        return {**self.optimizer, **named}

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device) -> Held:
        """Read it back."""
        kinds: dict[str, dict[str, Tensor]] = {"mask": {}, "best": {}, "masking": {}}
        optimizer: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition("/")
            if kind in kinds:
                kinds[kind][rest] = tensor.to(device)
            else:
                optimizer[name] = tensor.to(device)
        return cls(optimizer, kinds["mask"], kinds["best"], kinds["masking"])


def owned(program: Program) -> dict[str, Tensor]:
    """Copies of what training may write to: floats; a batch norm's statistics are among them."""
    return {
        n: t.detach().clone() if t.is_floating_point() else t for n, t in program.tensors.items()
    }


def in_order_of(program: Program, order: Program) -> Program:
    """A program that was read back, its tensors in the order of another one.

    Files sort tensors by name, and a group's id is its first tensor's.
    """
    names = (name for name in order.tensors if name in program.tensors)
    return replace(program, tensors={name: program.tensors[name] for name in names})


def as_given(
    program: Program,
    source: Program,
    cuts: Sequence[Mapping[str, Sequence[int]]],
    *,
    half: bool,
) -> Program:
    """A trained program with the caller's device and types, sharing tensors that are the same.

    Args:
        program: in float32, wherever it trained.
        source: what the caller gave.
        cuts: group id -> kept indices, for each removal since.
        half: whether the caller's has half precision.
    """
    first = next(iter(source.tensors.values()))
    moved = program.on(first.device)
    if half:
        # Graphs in float32 do not become the caller's again; the same cuts make them.
        graphs = source
        for units in cuts:
            graphs = shrink(graphs, units)
        tensors = {n: t.to(graphs.tensors[n].dtype) for n, t in moved.tensors.items()}
        moved = replace(moved, entries=graphs.entries, tensors={**graphs.tensors, **tensors})
    return moved.with_tensors(
        {
            name: old
            for name, old in source.tensors.items()
            if name in moved.tensors and torch.equal(moved.tensors[name], old)
        }
    )
