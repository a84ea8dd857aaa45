"""Training: the data, the loss and the evaluation that passes which train are given."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.ir.program import Program
from graphprune.suggest import suggest
from graphprune.training.losses import LOSSES, Loss, named_function
from graphprune.validate import check_whole

Batch = Mapping[str, Any]
Evaluation = Callable[[Program], float] | Iterable[Batch]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Batches, a loss and an evaluation, for `compile(..., training=...)`.

    A batch is a mapping of tensors: the model's inputs by name, and `labels`.

    Attributes:
        data: batches, to be read once an epoch: a list, a torch DataLoader, anything that can be
            iterated several times. Randomness of torch in it (shuffling) is seeded by
            `compile(seed=...)`.
        loss: "classification" (labels int64), "regression" (labels float), "causal-lm" (labels are
            the token ids, -100 where they do not count), or a function of (outputs, batch) that
            returns a tensor with one number, the batch's mean.
        eval: a function of a Program that returns a number, higher is better; or batches, scored by
            accuracy, Spearman, or the negative loss. Without it nothing is measured.
        checkpoints: a folder for checkpoints, one in it for each pass that trains.
        every: write one every so many steps; 0 for the ends of epochs only.
        resume: go on from the checkpoints that are there.
        patience: stop after so many epochs without a better `eval`, and keep the best epoch's
            weights; None trains to the end and keeps the last.
        device: "cpu" or "cuda"; by default what there is. Which GPU is chosen by
            CUDA_VISIBLE_DEVICES or `accelerate launch`.
    """

    data: Iterable[Batch]
    loss: Loss = "classification"
    eval: Evaluation | None = None
    checkpoints: str | os.PathLike[str] | None = None
    every: int = 0
    resume: bool = False
    patience: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check_data("data", self.data)
        if isinstance(self.loss, str):
            if self.loss not in LOSSES:
                raise TrainingError(
                    f"there is no loss {self.loss!r}; {suggest(self.loss, LOSSES)} "
                    "Or give a function of (outputs, batch)"
                )
        elif not callable(self.loss):
            raise TrainingError(
                f"loss is one of {sorted(LOSSES)} or a function of (outputs, batch), got a "
                f"{type(self.loss).__name__}"
            )
        if self.eval is not None and not callable(self.eval):
            _check_data("eval", self.eval)
        self._check_numbers()
        if self.device is not None:
            _check_device(self.device)

    def _check_numbers(self) -> None:
        rule = "a whole number of steps"
        check_whole("every", self.every, rule, low=0, error=TrainingError)
        if self.patience is not None:
            rule = "a whole number of epochs, at least 1"
            check_whole("patience", self.patience, rule, error=TrainingError)
            if self.eval is None:
                raise TrainingError("patience stops by eval, and there is none: give eval=")
        if self.checkpoints is None and (self.resume or self.every):
            wanted = "resume" if self.resume else "every"
            raise TrainingError(f"{wanted} is about checkpoints: give checkpoints=FOLDER")

    def folder(self, name: str) -> Path | None:
        """Where one pass's checkpoints go."""
        return None if self.checkpoints is None else Path(self.checkpoints) / name


def run_eval(evaluate: Callable[[Program], object], program: Program) -> float:
    """Call an eval function on a program.

    Raises:
        TrainingError: the function raised something, or returned no finite number.
    """
    with named_function("eval"):
        value = evaluate(program)
    return check_metric(value)


def check_metric(value: Any) -> float:
    """Check and convert what eval returned.

    Raises:
        TrainingError: it is not a number, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TrainingError(
            f"eval gives a {type(value).__name__}: it must return a number, higher is better"
        ) from e
    if not math.isfinite(number):
        raise TrainingError(
            f"eval gives {number}: it must return a finite number, higher is better"
        )
    return number


def _check_data(name: str, data: object) -> None:
    what = f"{name} must be batches that can be read again every epoch"
    if isinstance(data, Mapping | Tensor | str) or not isinstance(data, Iterable):
        raise TrainingError(
            f"{what} (a list, a DataLoader), got a {type(data).__name__}; one batch alone goes "
            f"into a list: {name}=[batch]"
        )
    if isinstance(data, Iterator):
        raise TrainingError(
            f"{what}, and a {type(data).__name__} ends after one: make a list of it, or a class "
            "with __iter__"
        )
    if isinstance(data, Sequence):
        if not data:
            raise TrainingError(f"{name} is empty: there is no batch")
        for i, batch in enumerate(data):
            check_batch(batch, f"{name}[{i}]")


def check_batch(batch: object, where: str) -> None:
    """Refuse a batch that is no mapping of names to tensors.

    Raises:
        TrainingError: it has no keys; `where` is named.
    """
    if not hasattr(batch, "keys"):
        raise TrainingError(
            f"{where} is a {type(batch).__name__}; a batch is a mapping of tensors, the model's "
            "inputs by name and 'labels'"
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as e:
        raise TrainingError(f"there is no device {name!r}: say 'cpu' or 'cuda'") from e
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"training runs on 'cpu' or 'cuda', not on {name!r}")
    if device.index:
        raise TrainingError(
            f"training cannot pick the device {name!r}: say {device.type!r}, and which GPU by "
            "CUDA_VISIBLE_DEVICES or `accelerate launch --gpu_ids`"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError(f"device {name!r} was asked for and torch finds no CUDA device")
