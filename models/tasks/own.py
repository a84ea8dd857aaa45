"""A metric of the user's own: a function in a Python file, from a model to a number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.models.loading.names import own_source
from graphprune.models.loading.own import function_in, raised
from graphprune.models.tasks.base import Request, Task, TaskResult, runner
from graphprune.training.outcome import MeanOutcome

_log = logging.getLogger(__name__)


def own_task(metric: str, *, per_item: bool = False) -> Task:
    """A task whose figure is what a function returns, of which more is better.

    The function is given the model as a function from a dict of tensors to its first output, or the
    one called logits or the like: a torch module, a program and an ONNX file look alike to it. It
    returns a number, or one number an item [n], of which the mean is the figure.

    Args:
        metric: "FILE.py:FUNCTION"; the file is run.
        per_item: whether a drop will be bounded by it, which takes one number an item.

    Raises:
        GraphPruneError: there is no such file or function, or it is not written so.
    """
    source = own_source(metric)
    if source is None:
        raise GraphPruneError(f"a metric is FILE.py:FUNCTION, got {metric!r}")
    file, name = source
    function = function_in(file, name)

    def run(request: Request) -> TaskResult:
        outcome = MeanOutcome(_items(metric, function, request.model))
        if per_item and outcome.count == 1:
            _log.warning(
                "%s returns one number, so that a drop is compared as it is, without a bound: "
                "return one number an item, such as 0 or 1 for each image",
                metric,
            )
        return task.result(outcome)

    meaning = f"what {name} of {file.name} returns, on average over its items"
    task = Task(metric, meaning, name, meaning, "items", run, reads_text=False)
    return task


def _items(metric: str, function: Callable[[Any], Any], model: Any) -> torch.Tensor:
    """What the function returns of a model, as float64 [n].

    Raises:
        GraphPruneError: it raised, or returned something else, or a number that is not finite.
    """
    try:
        found = function(runner(model))
    except Exception as e:
        raise raised(f"{metric!r} failed", e) from e
    try:
        items = torch.as_tensor(found, dtype=torch.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        items = torch.empty(0)
    if not len(items):
        raise GraphPruneError(
            f"{metric!r} returned {found!r:.60}: return a number, or one number an item"
        )
    if not bool(items.isfinite().all()):
        what = f"{found!r}" if isinstance(found, Real) else "numbers that are not all finite"
        raise GraphPruneError(f"{metric!r} returned {what}: there is nothing to compare by it")
    return items
