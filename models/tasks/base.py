"""Shared by all tasks: running any kind of model, and embedding sentences with it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.ir.decoding import is_past, zero_pasts
from graphprune.ir.outputs import answer_of
from graphprune.models.data.batches import Batches
from graphprune.models.data.tables import Schema
from graphprune.models.data.tokenize import TOKENS, tokenizer
from graphprune.models.zoo.sentence import masked_mean
from graphprune.pipeline.events import JSON
from graphprune.training.outcome import Outcome

Runner = Callable[[Mapping[str, Tensor]], Tensor]
Progress = Callable[[int, int], None]
T = TypeVar("T")


def silent(done: int, total: int) -> None:
    """Ignore progress."""


@final
@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task's figure.

    Attributes:
        task: its name in TASKS.
        metric: what `value` is.
        value: the figure that the task reports, that of all items of the outcome.
        count: of how many things: pairs, images, questions, predicted tokens.
        outcome: what the model did on each item, for comparing it with another model.
        higher_is_better: False for a perplexity.
        standard_error: one standard error of `value`, from drawing the items evaluated; else None.
        details: how it was measured, where that can vary: window, part of the data.
        more: other figures of the same run by their metric.
        guess: what a model gets that gives every item the same answer; None where that is unknown.
        meaning: what the figure says, in a sentence.
        items: what the things counted are called.
        compares: whether it is an agreement with the dense model, which says nothing about either.
    """

    task: str
    metric: str
    value: float
    count: int
    outcome: Outcome = field(repr=False, compare=False)
    higher_is_better: bool = True
    standard_error: float | None = None
    details: str = ""
    more: Mapping[str, float] = field(default_factory=dict)
    guess: float | None = None
    meaning: str = ""
    items: str = "items"
    compares: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Plain data: the figures, without the outcome."""
        names = (f.name for f in fields(self) if f.name != "outcome")
        return {**{name: getattr(self, name) for name in names}, "more": dict(self.more)}


@final
@dataclass(frozen=True, slots=True)
class Request:
    """A request to evaluate a model by a task.

    Attributes:
        model: a torch module, a Program or an onnxruntime session.
        tokenizer_dir: where its tokenizer is, for a task that reads text.
        dense: the unpruned model, for a task that compares.
        data: the task's file or folder, or None for that under $GRAPHPRUNE_DATA.
        schema: columns and classes of a labeled file.
        progress: called with (done, total) batches.
        options: the task's own options by name.
    """

    model: Any
    tokenizer_dir: Path
    dense: Any
    data: Path | None
    schema: Schema
    progress: Progress
    options: Mapping[str, int]


@final
@dataclass(frozen=True, slots=True)
class Task:
    """A way to evaluate a model.

    Attributes:
        name: how the command line calls it.
        purpose: what it is for, in one line.
        metric: what its figure is.
        meaning: what the figure says, in a sentence.
        items: what the things counted are called: "pairs", "texts".
        run: evaluates a model; its defaults are those of the function that it calls.
        higher_is_better: False for a perplexity.
        file: "folder/file" of its data under $GRAPHPRUNE_DATA; empty where it needs none.
        source: where the data come from.
        options: names of its own options.
        reads_text: whether it needs the model's tokenizer.
        compares: whether it needs the dense model too.
        labeled: whether its file has texts and labels, which can train a model too.
        examples: inputs and labels [n] of "train" or "test", where it brings such; else None.
        rate: learning rate for a model of its kind, where the usual one is not.
    """

    name: str
    purpose: str
    metric: str
    meaning: str
    items: str
    run: Callable[[Request], TaskResult]
    higher_is_better: bool = True
    file: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    reads_text: bool = True
    compares: bool = False
    labeled: bool = False
    examples: Callable[[str], tuple[dict[str, Tensor], Tensor]] | None = None
    rate: float | None = None

    def result(self, outcome: Outcome, count: int | None = None, **more: Any) -> TaskResult:
        """The figure of an outcome of this task; `count` where it is not that of its items.

        `more` as in TaskResult.
        """
        return TaskResult(
            self.name,
            self.metric,
            outcome.value(),
            count or outcome.count,
            outcome,
            higher_is_better=self.higher_is_better,
            meaning=self.meaning,
            items=self.items,
            compares=self.compares,
            **more,
        )

    def find_data(self, data: Path | None) -> Path:
        """Its file: the one given, that in the folder given, or that under $GRAPHPRUNE_DATA.

        Raises:
            GraphPruneError: there is none.
        """
        folder, name = self.file.split("/")
        root = os.environ.get("GRAPHPRUNE_DATA")
        if data is None and root:
            data = Path(root) / folder
        if data is None:
            raise GraphPruneError(
                f"the task {self.name!r} needs its file: give --data FILE ({name} of "
                f"{self.source}), or set GRAPHPRUNE_DATA to the folder that holds {self.file}"
            )
        file = data / name if data.is_dir() else data
        if not file.is_file():
            raise GraphPruneError(f"there is no file {str(file)!r}")
        return file


@final
@dataclass(frozen=True, slots=True)
class Watched:
    """A model that can be evaluated like any other, and keeps the inputs that it is fed.

    Attributes:
        model: as `runner` takes it.
        fed: the inputs of each run, without labels; for `overlap` of models.data.
    """

    model: Any
    fed: list[Mapping[str, Tensor]] = field(default_factory=list)

    def keeping(self, run: Runner) -> Runner:
        """A runner that keeps its inputs here."""

        def kept(inputs: Mapping[str, Tensor]) -> Tensor:
            self.fed.append(inputs)
            return run(inputs)

        return kept


def runner(model: Any, *, quiet: bool = False) -> Runner:
    """The model's answer as a function of its named inputs; it is given those that it has.

    The answer is the output that is called so (`ir.outputs`), else the first.

    1. an onnxruntime session; `quiet` keeps it from printing an error that it raises as well.
    2. a `Watched` model: its model's answer; with `quiet`, which is for trials, it keeps nothing.
    3. anything else: called with keyword arguments, without gradients.
    """
    if isinstance(model, Watched):
        run = runner(model.model, quiet=quiet)
        return run if quiet else model.keeping(run)
    if hasattr(model, "get_inputs") and hasattr(model, "run"):
        # Inputs that need not be fed are initializers, which session-like objects may lack.
        optional: list[Any] = getattr(model, "get_overridable_initializers", list)()
        names = {i.name for i in [*model.get_inputs(), *optional]}
        options = [_quiet()] if quiet else []
        outputs = [o.name for o in model.get_outputs()]
        wanted = answer_of(outputs) or outputs[0]

        def run_session(inputs: Mapping[str, Tensor]) -> Tensor:
            feeds = {name: value.numpy() for name, value in inputs.items() if name in names}
            shapes = {i.name: i.shape for i in model.get_inputs() if is_past(i.name)}
            feeds |= zero_pasts(shapes, len(next(iter(inputs.values()))))
            return torch.from_numpy(np.asarray(model.run([wanted], feeds, *options)[0]))

        return run_session

    accepted = _accepted(model)

    def run_torch(inputs: Mapping[str, Tensor]) -> Tensor:
        known = {name: value for name, value in inputs.items() if name in accepted}
        with torch.no_grad():
            outputs = model(**known)
        name = answer_of(outputs) if isinstance(outputs, Mapping) else None
        found: Tensor = outputs[name] if name else pytree.tree_leaves(outputs)[0]
        return found

    return run_torch


def _quiet() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


def longest(model: Any, at_most: int = TOKENS) -> int:
    """How many tokens of a text a model takes: `at_most`, or as many as it has positions.

    It is tried, since not every model says it, and some number their positions from 2. A model that
    takes not even one token gets `at_most`: what is wrong with it shows where it is used.

    Args:
        model: a torch module, a Program or a session.
        at_most: tokens.
    """
    run = runner(model, quiet=True)

    def takes(length: int) -> bool:
        zeros = torch.zeros(1, length, dtype=torch.int64)
        inputs = {"input_ids": zeros, "attention_mask": zeros + 1, "token_type_ids": zeros}
        try:
            run(inputs)
        except Exception:  # of torch or ONNX Runtime, in one of many classes
            return False
        return True

    if takes(at_most):
        return at_most
    low, high = 0, at_most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) else (low, middle)
    return low or at_most


def _accepted(model: Any) -> set[str]:
    """The arguments that a program or a module names."""
    program = getattr(model, "program", None)
    entries = getattr(program() if callable(program) else model, "entries", None)
    if entries is not None:
        # By the names of the call: a flat input may have another. What was baked in is none.
        arguments = entries["forward"].arguments
        return {a.name for a in arguments if any(isinstance(leaf, str) for leaf in a.leaves)}
    return set(inspect.signature(getattr(model, "forward", model)).parameters)


def scored(
    model: Any,
    batches: Batches,
    progress: Progress,
    check: Callable[[Tensor, Tensor], None] = lambda scores, labels: None,
) -> tuple[Tensor, Tensor]:
    """A model's first outputs on batches, and their labels [n].

    Args:
        model: as `runner` takes it.
        batches: inputs by name, and "labels".
        progress: called with (done, total) batches.
        check: called with the outputs and labels of each batch.
    """
    run = runner(model)
    parts, labels = [], []
    for done, batch in enumerate(batches, 1):
        labels.append(batch.pop("labels"))
        parts.append(run(batch))
        check(parts[-1], labels[-1])
        progress(done, len(batches))
    return torch.cat(parts), torch.cat(labels)


def majority(labels: Tensor) -> float:
    """Accuracy of naming the most frequent of labels [n] for every item."""
    return int(torch.unique(labels, return_counts=True)[1].max()) / len(labels)


def by_length(
    items: Sequence[Sized],
    evaluate: Callable[[list[int]], Iterable[T]],
    batch: int,
    progress: Progress,
) -> list[T]:
    """One result an item, where items of like length share a batch: less padding, the same result.

    Args:
        items: texts, or rows of token ids.
        evaluate: from the indices of a batch's items to their results.
        batch: items of a batch.
        progress: called with (done, total) batches.
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    found: dict[int, T] = {}
    starts = range(0, len(order), batch)
    for done, start in enumerate(starts, 1):
        part = order[start : start + batch]
        found.update(zip(part, evaluate(part), strict=True))
        progress(done, len(starts))
    return [found[i] for i in range(len(items))]


def embed(
    model: Any,
    tokenizer_dir: Path,
    sentences: Sequence[str],
    *,
    batch: int = 32,
    length: int = TOKENS,
    progress: Progress = silent,
) -> Tensor:
    """Unit-length embeddings [n, width] of sentences, cut to the length that the model takes.

    A model that returns one vector a token has them averaged over the attention mask.

    Raises:
        GraphPruneError: the tokenizer cannot be read, or the model's output is no embedding
            or holds NaN.
    """
    run = runner(model)
    tokenize = tokenizer(tokenizer_dir)
    length = longest(model, length)

    def embedded(part: list[int]) -> Tensor:
        inputs = tokenize([sentences[i] for i in part], length)
        output = run(inputs)
        if output.dim() == 3:
            output = masked_mean(output, inputs["attention_mask"])
        if output.dim() != 2:
            raise GraphPruneError(
                f"the model's first output has shape {tuple(output.shape)}; an embedding has two "
                "or three dimensions"
            )
        if not bool(output.isfinite().all()):
            raise GraphPruneError(
                "the model's embeddings hold NaN or infinity, so there is nothing to compare: a "
                "layer before overflows, or its weights are broken"
            )
        return torch.nn.functional.normalize(output.float(), dim=-1)

    return torch.stack(by_length(sentences, embedded, batch, progress))
