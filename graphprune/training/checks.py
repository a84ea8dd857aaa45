"""Checks before training: folders, batches, and graphs that cannot train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import fx

from graphprune.axes.facts import size_of
from graphprune.calibration.stream import flat_batch
from graphprune.errors import GraphPruneError, TrainingError
from graphprune.ir.graph import bound_arguments, is_op, value_of
from graphprune.ir.program import Entry, Program
from graphprune.storage.folders import check_target
from graphprune.training.checkpoint import is_checkpoint
from graphprune.training.losses import Loss, check_labels, labels_of, scores_of
from graphprune.training.objective import inputs_of, refuse_unknown
from graphprune.training.spec import Batch, check_batch


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder for checkpoints that holds something else, or an earlier run.

    Raises:
        ExportError: it holds something else than checkpoints, or cannot be written.
        TrainingError: it holds a checkpoint, and `resume` is not asked for.
    """
    check_target(folder, is_checkpoint)
    if folder.exists() and not resume:
        raise TrainingError(
            f"{str(folder)!r} holds a checkpoint of an earlier run: go on from it with "
            "--resume (resume=True in Python), remove it, or choose another folder for "
            "checkpoints"
        )


@final
class BatchChecks:
    """Checks of batches against a model and a loss; batch norms once for each shape."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._seen: set[tuple[torch.Size, ...]] = set()

    def check(self, program: Program, batch: Any, number: int, kind: str = "training") -> None:
        """Refuse a batch that does not fit the model.

        Raises:
            TrainingError: it does not; it is named by its kind and number.
        """
        check_batch(batch, f"{kind} batch {number}")
        with named_batch(number, kind):
            refuse_unknown(program, batch, self.loss)
        try:
            flat = flat_batch(program.forward, inputs_of(program, batch), number)
        except GraphPruneError as e:
            raise TrainingError(f"{kind} {str(e).removeprefix('calibration ')}") from e
        sizes = tuple(tensor.shape for tensor in flat)
        if kind == "training" and sizes not in self._seen:
            with named_batch(number):
                _check_norms(program.forward, sizes)
            self._seen.add(sizes)

    def look(
        self,
        program: Program,
        first: Batch,
        data: Iterable[Batch],
        outputs_of: Callable[[Batch], Any],
        *,
        labels_needed: bool,
    ) -> bool:
        """Check the first batch, and all of them where they are at hand.

        Args:
            program: the model.
            first: the first batch.
            data: all of them; a list is looked through.
            outputs_of: the model.
            labels_needed: false where training goes on without labels if there are none.

        Returns:
            Whether there are labels.

        Raises:
            TrainingError: a batch does not fit the model, or its labels the head.
        """
        self.check(program, first, 0)
        named = isinstance(self.loss, str)
        if not labels_needed and "labels" not in first and named:
            return False
        outputs = outputs_of(first)
        if not isinstance(self.loss, str):
            return True
        with named_batch(0):
            shape = scores_of(self.loss, outputs, labels_of(first)).shape
        for i, batch in enumerate(data if isinstance(data, Sequence) else [first]):
            self.check(program, batch, i)
            with named_batch(i):
                labels = labels_of(batch)
                scores = shape[1:] if self.loss == "regression" else shape[-1:]
                lead = labels.shape[:1] if self.loss == "regression" else labels.shape
                if i == 0:
                    check_labels(self.loss, shape, labels)
                check_labels(self.loss, torch.Size([*lead, *scores]), labels)
        return True


@contextlib.contextmanager
def named_batch(number: int, kind: str = "training") -> Iterator[None]:
    """Name the batch in a TrainingError raised inside."""
    try:
        yield
    except TrainingError as e:
        raise TrainingError(f"{kind} batch {number}: {e}", e.program) from e


def refuse_sparse_gradients(program: Program) -> None:
    """Refuse an embedding with sparse gradients, which cannot be clipped.

    Raises:
        TrainingError: there is one; it is named.
    """
    for node in program.forward.graph.nodes:
        if is_op(node, "embedding", "embedding_bag") and bound_arguments(node).get("sparse"):
            raise TrainingError(
                f"the embedding {node.args[0].target!r} has sparse gradients, which cannot be "
                "clipped: build the model with sparse=False and compile that"
            )


def _check_norms(entry: Entry, sizes: Sequence[torch.Size]) -> None:
    """Refuse a batch norm that sees one value a channel, which has no variance.

    torch.nn raises where a module is called; the operator in a graph gives NaN.

    Raises:
        TrainingError: one sees a single value a channel; it is named.
    """
    placeholders = [n for n in entry.graph.nodes if n.op == "placeholder"]
    known = {
        size_of(symbol): size
        for node, shape in zip(placeholders, sizes, strict=True)
        for symbol, size in zip(value_of(node).shape, shape, strict=True)
    }
    for node in entry.graph.nodes:
        if not is_op(node, "batch_norm", "instance_norm"):
            continue
        rows, _, *places = (size_of(size) for size in value_of(node).shape)
        count = math.prod(places) * (rows if is_op(node, "batch_norm") else 1)
        if (count if isinstance(count, int) else count.subs(known)) == 1:
            mean = bound_arguments(node).get("running_mean")
            name = str(mean.target) if isinstance(mean, fx.Node) else node.name
            raise TrainingError(
                f"the batch norm {name.removesuffix('.running_mean')!r} gets one value a channel "
                "and needs two or more to train: leave a batch of one example out (drop_last=True "
                "of a DataLoader), or choose another batch size"
            )


def notes(program: Program) -> list[str]:
    """Notes for the user about the graph in training."""
    nodes = list(program.forward.graph.nodes)
    notes = []
    if frozen := program.frozen & program.parameters:
        notes.append(f"{len(frozen):,} parameters were frozen when captured, and stay as they are")
    dropouts = [n for n in nodes if is_op(n, "dropout")]
    if not dropouts:
        notes.append("the graph has no dropout: it was captured without, or a pass removed it")
    silent = [
        n
        for n in nodes
        if is_op(n, "scaled_dot_product_attention") and not bound_arguments(n).get("dropout_p")
    ]
    if silent:
        notes.append(
            "attention weights train without dropout: capture in eval mode leaves none inside "
            "scaled_dot_product_attention"
        )
    return notes
