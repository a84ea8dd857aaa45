"""Losses by name, as sums with their counts.

A sum and a count, because a mean of means is wrong where batches differ in size: processes add both
and divide once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import GraphPruneError, TrainingError
from graphprune.ir.outputs import ANSWERS

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
Loss = str | LossFunction

IGNORED = -100  # a label that is ignored

# name -> the metric of an evaluation; higher is better in each
LOSSES: Mapping[str, str] = {
    "classification": "accuracy",
    "regression": "Spearman",
    "causal-lm": "negative loss",
}


@final
@dataclass(frozen=True, slots=True)
class Summed:
    """A loss summed over what it counts; their quotient is the mean."""

    total: Tensor
    count: int


def logits_of(outputs: Any) -> Tensor:
    """The scores among a model's outputs: those called so (`ir.outputs`), else the first floats.

    Raises:
        TrainingError: there are none.
    """
    named = _named(outputs)
    if named is not None:
        return named
    for leaf in _floats(outputs):
        if leaf.dim():
            return leaf
    raise TrainingError("the model returns no tensor of floats, so there is no loss to compute")


def scores_of(loss: str, outputs: Any, labels: Tensor) -> Tensor:
    """The scores for a loss by name; where several outputs fit the labels, it does not guess.

    Raises:
        TrainingError: there are none, or several and none is called `logits`.
    """
    found, floats = logits_of(outputs), _floats(outputs)
    # After a loss, which is one number, come the scores.
    if _named(outputs) is not None or any(not leaf.dim() for leaf in floats):
        return found
    fitting = [leaf for leaf in floats if _fits(loss, leaf.shape, labels.shape)]
    if len(fitting) > 1:
        raise TrainingError(
            f"the model returns {len(fitting)} outputs that could be the scores, of shapes "
            f"{[list(leaf.shape) for leaf in fitting]}: return a dict with the right one as "
            "'logits', or give a function of (outputs, batch) as the loss"
        )
    return found


def _named(outputs: Any) -> Tensor | None:
    for name in ANSWERS:
        named = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(named, Tensor):
            return named
    return None


def _floats(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _fits(loss: str, shape: torch.Size, labels: torch.Size) -> bool:
    return shape.numel() == labels.numel() if loss == "regression" else shape[:-1] == labels


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch.

    Raises:
        TrainingError: it has none.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise TrainingError(
            f"the batch has no tensor 'labels', only {sorted(batch)}; a loss by name needs them "
            "(for a language model: the token ids, -100 where a token does not count)"
        )
    return labels


def check_labels(loss: str, shape: torch.Size, labels: Tensor) -> None:
    """Refuse labels that do not fit logits of this shape.

    Raises:
        TrainingError: another shape or type, or a class that the head does not have.
    """
    if loss == "regression":
        if not _fits(loss, shape, labels.shape):
            raise TrainingError(
                f"labels of shape {list(labels.shape)} do not fit scores of shape {list(shape)}: "
                "regression has one score an example"
            )
        if not bool(labels.isfinite().all()):
            raise TrainingError("the labels hold NaN or infinity")
        return
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TrainingError(f"labels are class numbers (int64), got {labels.dtype}")
    if not _fits(loss, shape, labels.shape):
        raise TrainingError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(shape)}: "
            "there is one label for each row of logits"
        )
    counted = labels[labels != IGNORED]
    outside = counted[(counted < 0) | (counted >= shape[-1])]
    if outside.numel():
        raise TrainingError(
            f"label {int(outside[0])} is outside the head's range: it has classes 0 to "
            f"{shape[-1] - 1} ({IGNORED} for what does not count)"
        )


def loss_of(loss: Loss, outputs: Any, batch: Mapping[str, Any]) -> Summed:
    """The loss of a batch, differentiable.

    1. "classification": cross entropy; labels int64, one for each row of logits.
    2. "regression": squared error of a single score; labels float.
    3. "causal-lm": cross entropy of the next token; labels are the tokens themselves.
    4. A function of (outputs, batch): the mean over the batch, counted as one.

    Raises:
        TrainingError: labels are missing or do not fit, or the function raised something.
    """
    if not isinstance(loss, str):
        with named_function("loss"):
            value = loss(outputs, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TrainingError(
                f"the loss must return a tensor with one number, got {_words(value)}"
            )
        return Summed(value.reshape(()), 1)
    labels = labels_of(batch)
    logits = scores_of(loss, outputs, labels)
    check_labels(loss, logits.shape, labels)
    if loss == "regression":
        # Half precision holds no label near 1003.
        kind = torch.promote_types(logits.dtype, torch.float32)
        wanted = labels.reshape(logits.shape).to(kind)
        return Summed((logits.to(kind) - wanted).square().sum(), labels.numel())
    logits, labels = _aligned(loss, logits, labels.long())
    rows = logits.reshape(-1, logits.shape[-1])
    total = F.cross_entropy(rows, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
    return Summed(total, int((labels != IGNORED).sum()))


@contextmanager
def named_function(what: str) -> Iterator[None]:
    """Turn an exception of the user's function into a TrainingError that names it."""
    try:
        yield
    except GraphPruneError:
        raise
    except Exception as e:
        raise TrainingError(
            f"the {what} function that was given raised {type(e).__name__}: {e}"
        ) from e


def _aligned(loss: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A language model's logits at a token are for the token after it."""
    return (logits[:, :-1], labels[:, 1:]) if loss == "causal-lm" else (logits, labels)


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
