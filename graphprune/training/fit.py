"""The training loop: epochs over batches, on a program that may lose structure on the way.

    program --own copies--> module --epoch--> module --after_epoch--> program --shrink--> module ...

Weights, moments and masks are known by tensor names; after a cut they are cut alike, and training
goes on as if the units had only been masked.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor, fx, nn

from graphprune.axes.rules.registry import size_of
from graphprune.calibration.stream import flat_batch
from graphprune.errors import GraphPruneError, RecipeError, TrainingError
from graphprune.ir.graph import bound_arguments, is_op, value_of
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import JSON, Entry, Program
from graphprune.ir.quantization import refuse_quantised
from graphprune.pipeline.base import Context, Keep
from graphprune.rewrite.shrink import shrink, take
from graphprune.storage.folders import check_target
from graphprune.training.checkpoint import Checkpoint, Identity, is_checkpoint, read, write
from graphprune.training.distributed import Feed, Workers, seed_from
from graphprune.training.losses import (
    IGNORED,
    Score,
    check_labels,
    labels_of,
    metric_name,
    scores_of,
)
from graphprune.training.objective import Distillation, Objective, inputs_of, refuse_unknown
from graphprune.training.optimizer import Optimiser, Plan, cut_state, zero_masks
from graphprune.training.spec import Training, check_batch, check_metric, judged

Penalty = Callable[[Mapping[str, Tensor]], Tensor]
AfterEpoch = Callable[[Program, int], tuple[Program, Keep | None]]
Arrange = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Masking(Protocol):
    """Chooses, step after step, which weights may live; what it has zeroed stays zero.

    Attributes:
        scored: terms of the loss whose gradients it looks at; others are added afterwards. None
            where it needs no gradients.
    """

    scored: Sequence[str] | None

    def choose(
        self, parameters: Mapping[str, nn.Parameter], step: int, total: int
    ) -> Mapping[str, Tensor] | None:
        """By tensor name, true where weights may live; None where nothing is new.

        Called before each optimiser step, `step` from 0 of `total`, with the scored terms'
        gradients, summed over processes, in `.grad`. It must not draw lots: every process calls it.
        """

    def settled(self, step: int, total: int) -> bool:
        """Whether it will choose no more: only then one epoch compares with another."""

    def state(self) -> Mapping[str, Tensor]:
        """What it remembers, for a checkpoint."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Remember that again."""


@final
@dataclass(frozen=True, slots=True)
class Fitted:
    """What training gives: the program with other weights, and JSON about the way there."""

    program: Program
    report: Mapping[str, JSON]


def fit(
    program: Program,
    training: Training | None,
    ctx: Context,
    plan: Plan,
    *,
    penalty: Penalty | None = None,
    distillation: Distillation | None = None,
    masking: Masking | None = None,
    after_epoch: AfterEpoch | None = None,
    after_training: Callable[[Program], Program] | None = None,
    arrange: Arrange | None = None,
    bind: Callable[[Program], None] | None = None,
    settings: Mapping[str, JSON] | None = None,
) -> Fitted:
    """Train a program; the one given stays as it is.

    Weights that a pass zeroed stay zero. Everything random comes from the context's seed, so equal
    calls give equal bits.

    Args:
        program: what to train; bfloat16 and float16 train in float32 and come back.
        training: data, loss, evaluation, checkpoints.
        ctx: of the running pass; its reference is the teacher.
        plan: how long, and with which steps.
        penalty: of the parameters by name, added to the loss.
        distillation: learn from `ctx.reference` too.
        masking: chooses weights to zero while training; early stopping waits until it has settled.
        after_epoch: (program, epoch from 0) -> (program, keep): other values for weights, and
            units to remove for good: axis group -> kept indices. It also runs after the last one.
        after_training: other values for the weights of what is given back, the best epoch or the
            last one; it is judged once more.
        arrange: where after_epoch has put units in another order before it removes some, the same
            for tensors of the same names and shapes: the optimiser's moments follow.
        bind: told of every new structure before it trains: the first, and after each cut.
        settings: further options that a checkpoint to resume from must agree with, as JSON.

    Raises:
        TrainingError: data or labels do not fit, the checkpoint is of another model, or the loss is
            not finite; its `program` holds the last good weights.
    """
    if training is None:
        raise RecipeError(
            f"pass {ctx.running!r} trains and needs data and a loss: give compile(..., "
            "training=Training(batches, loss=...))"
        )
    refuse_quantised(program, ctx.running)
    _refuse_sparse_gradients(program)
    if distillation is not None and ctx.reference is None:
        raise RecipeError(f"pass {ctx.running!r} needs a teacher, and the context has no reference")
    name = f"{ctx.fits}-{ctx.running or 'fit'}"
    ctx.fits += 1
    with _own_randomness():
        return _Run(
            program,
            training,
            ctx,
            plan,
            penalty,
            distillation,
            masking,
            after_epoch,
            after_training,
            arrange,
            bind,
            settings or {},
            name,
        ).train()


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the caller's generators go on as if nothing had been."""
    devices = range(torch.cuda.device_count())
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@final
@dataclass(slots=True)
class _Place:
    """Where training is: what a checkpoint has to say beside tensors."""

    step: int = 0
    epoch: int = 0
    round: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    log: list[dict[str, JSON]] = field(default_factory=list)
    cuts: list[dict[str, list[int]]] = field(default_factory=list)
    checks: list[dict[str, JSON]] = field(default_factory=list)
    metric_before: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    done: bool = False

    def to_json(self) -> dict[str, JSON]:
        return {name: getattr(self, name) for name in self.__slots__}


@final
class _Run:
    """One training, from the first look at the data to the last epoch."""

    def __init__(
        self,
        program: Program,
        training: Training,
        ctx: Context,
        plan: Plan,
        penalty: Penalty | None,
        distillation: Distillation | None,
        masking: Masking | None,
        after_epoch: AfterEpoch | None,
        after_training: Callable[[Program], Program] | None,
        arrange: Arrange | None,
        bind: Callable[[Program], None] | None,
        more_settings: Mapping[str, JSON],
        name: str,
    ) -> None:
        self.source, self.training, self.ctx, self.plan = program, training, ctx, plan
        self.penalty, self.masking = penalty, masking
        self.after_epoch, self.after_training = after_epoch, after_training
        self.arrange, self.bind = arrange, bind
        self.more_settings = more_settings
        self.start = time.perf_counter()
        self.folder = training.folder(name)
        self.workers = Workers(training.device)
        # By position in the pipeline, for which the generator was seeded. A pass that trains in
        # rounds is at one position: the number of the training tells these apart.
        self.seed = int(torch.randint(2**62, (), generator=ctx.generator)) + ctx.fits - 1
        self.identity = Identity.of(program)
        if self.folder is not None:
            self._check_folder()
        wide = program.in_float32()
        self.is_half = wide is not program
        working = wide.on(self.workers.device)
        self.program = working.with_tensors(_owned(working))
        self.feed = Feed(training.data, self.seed, self.workers)
        self.seen_sizes: set[tuple[torch.Size, ...]] = set()
        has_labels = self._look_at_data(distillation)
        teacher = None
        if distillation is not None:
            assert ctx.reference is not None
            teacher = ctx.reference.in_float32().on(self.workers.device)
        self.objective = Objective(self.program, training.loss, teacher, distillation, has_labels)
        self.place = _Place()
        self.best: dict[str, Tensor] = {}
        self._begin(self.program, zero_masks(self.program), None)
        self.workers.spread(self.optimiser.parameters.values())
        self.good = self._snapshot()

    # --- before ----------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        assert self.folder is not None
        check_target(self.folder, is_checkpoint)
        if self.folder.exists() and not self.training.resume:
            raise TrainingError(
                f"{str(self.folder)!r} holds a checkpoint of an earlier run: go on from it with "
                "--resume (resume=True in Python), remove it, or choose another folder for "
                "checkpoints"
            )

    def _look_at_data(self, distillation: Distillation | None) -> bool:
        """Check the first batch, and all of them where they are at hand; whether there are labels.

        Raises:
            TrainingError: a batch does not fit the model, or its labels the head.
        """
        first = self.feed.first()
        self._check_batch(first, 0)
        has_labels = "labels" in first or not isinstance(self.training.loss, str)
        if distillation is not None and not has_labels:
            return False
        with torch.no_grad():
            outputs = ProgramModule(self.program)(**inputs_of(self.program, self._moved(first)))
        if not isinstance(self.training.loss, str):
            return True
        with _named_batch(0):
            shape = scores_of(self.training.loss, outputs, labels_of(first)).shape
        data = self.training.data
        for i, batch in enumerate(data if isinstance(data, Sequence) else [first]):
            self._check_batch(batch, i)
            with _named_batch(i):
                labels = labels_of(batch)
                scores = shape[1:] if self.training.loss == "regression" else shape[-1:]
                lead = labels.shape[:1] if self.training.loss == "regression" else labels.shape
                if i == 0:
                    check_labels(self.training.loss, shape, labels)
                check_labels(self.training.loss, torch.Size([*lead, *scores]), labels)
        return True

    def _check_batch(self, batch: Any, number: int, kind: str = "training") -> None:
        check_batch(batch, f"{kind} batch {number}")
        with _named_batch(number, kind):
            refuse_unknown(self.program, batch, self.training.loss)
        try:
            flat = flat_batch(self.program.forward, inputs_of(self.program, batch), number)
        except GraphPruneError as e:
            raise TrainingError(f"{kind} {str(e).removeprefix('calibration ')}") from e
        sizes = tuple(tensor.shape for tensor in flat)
        if kind == "training" and sizes not in self.seen_sizes:
            with _named_batch(number):
                _check_norms(self.program.forward, sizes)
            self.seen_sizes.add(sizes)

    def _moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.workers.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _begin(
        self, program: Program, masks: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> None:
        """Take up a program whose tensors are ours to write to."""
        self.program = program
        self.module = self.objective.module(program)
        self.module.train()
        if self.bind is not None:
            self.bind(program)
        self.optimiser = Optimiser(self.module, program, self.plan, masks, state)

    # --- the loop --------------------------------------------------------------------------------

    def train(self) -> Fitted:
        if self.training.resume:
            self._resume()
        if self.training.eval is not None and self.place.metric_before is None:
            self.place.metric_before = self._metric()
        while self.place.epoch < self.plan.epochs and not self.place.done:
            self._epoch()
        return self._finish()

    def _epoch(self) -> None:
        place, start = self.place, time.perf_counter()
        for number, batch in self.feed.rounds(place.epoch, place.round):
            self._step(number, batch)
            if self.training.every and place.step % self.training.every == 0:
                self._save()
        if not place.sums["loss"][1]:
            raise TrainingError(
                f"no label in epoch {place.epoch + 1} counts: all of them are {IGNORED}"
            )
        self.workers.spread(t for t in self.module.buffers() if t.is_floating_point())
        self._change_structure(place.epoch)
        record: dict[str, JSON] = {"epoch": place.epoch + 1, **self._means()}
        if self.training.eval is not None:
            record["metric"] = self._metric()
        record["seconds"] = time.perf_counter() - start
        place.log.append(record)
        place.epoch, place.round, place.sums = place.epoch + 1, 0, {}
        self._keep_best(record.get("metric"))
        self.good = self._snapshot()
        place.done |= place.epoch == self.plan.epochs
        self._save()
        self._progress(record["loss"])

    def _step(self, number: int, batch: Any) -> None:
        """One step of all processes together."""
        place = self.place
        torch.manual_seed(seed_from(self.seed, "step", place.step, self.workers.rank))
        if batch is not None:
            self._check_batch(batch, number)
        loss = self._gradients(number, batch)
        if not math.isfinite(loss):
            raise self._astray(f"the loss is {loss}")
        total = self.feed.rounds_an_epoch * self.plan.epochs
        norm = self.optimiser.step(self.plan.rate(place.step, total))
        if not math.isfinite(norm):
            raise self._astray("the loss is finite and its gradient is not")
        place.step += 1
        place.round += 1
        self._progress(loss)

    def _gradients(self, number: int, batch: Any) -> float:
        """Leave the gradient of the loss over all processes' batches; return that loss."""
        found = {}
        if batch is not None:
            with self.workers.autocast(), _named_batch(number):
                found = self.objective.terms(self.module, self.program, self._moved(batch))
        names = list(self.objective.weights)
        numbers = torch.zeros(2, len(names), dtype=torch.float64, device=self.workers.device)
        for i, name in enumerate(names):
            if name in found:
                numbers[0, i] = found[name].total.detach()
                numbers[1, i] = found[name].count
        sums, counts = self.workers.summed(numbers).tolist()
        scored = () if self.masking is None else self.masking.scored or ()
        first = torch.zeros((), device=self.workers.device)
        rest, value = first, 0.0
        for name, part, count in zip(names, sums, counts, strict=True):
            weight = self.objective.weights[name]
            if count:
                value += weight * part / count
                if name in found:
                    term = found[name].total * (weight / count)
                    first, rest = (first + term, rest) if name in scored else (first, rest + term)
            self._add(name, part, count)
        if self.penalty is not None:
            # The same in every process; gradients are summed over processes.
            extra = self.penalty(self.optimiser.parameters)
            rest = rest + extra / self.workers.count
            value += float(extra.detach())
            self._add("penalty", float(extra.detach()), 1)
        counted = any(counts) or self.penalty is not None
        mine = found or self.penalty is not None
        if counted and mine and not (first.requires_grad or rest.requires_grad):
            raise TrainingError("the loss does not depend on the model's weights")
        if math.isfinite(value):
            # By the counts, which all processes know: one without a batch has nothing of its own.
            any_scored = any(
                count and name in scored for name, count in zip(names, counts, strict=True)
            )
            self._backward(first, rest, any_scored)
        self._add("loss", value, int(counted))
        return value

    def _backward(self, scored: Tensor, rest: Tensor, any_scored: bool) -> None:
        """Leave the gradient of both; in between, let masks be chosen by the first one's.

        `any_scored` is whether a process has the first one: then all of them share its gradient.
        """
        parameters = self.optimiser.parameters
        if scored.requires_grad:
            self.workers.backward(scored, retain_graph=rest.requires_grad)
        if any_scored:
            self.workers.share_gradients(parameters)
        chosen = None
        if self.masking is not None:
            total = self.feed.rounds_an_epoch * self.plan.epochs
            with torch.no_grad():
                chosen = self.masking.choose(parameters, self.place.step, total)
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.optimiser.forget_gradients()
        if rest.requires_grad:
            self.workers.backward(rest)
        self.workers.share_gradients(parameters)
        for name, gradient in held.items():
            parameter = parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if chosen is not None:
            self.optimiser.restrict(chosen)

    def _add(self, name: str, total: float, count: float) -> None:
        held = self.place.sums.setdefault(name, [0.0, 0.0])
        held[0] += total
        held[1] += count

    def _means(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self.place.sums.items() if count}
        # One term alone is the loss itself.
        return means if len(means) > 2 else {"loss": means["loss"]}

    def _astray(self, what: str) -> TrainingError:
        place = self.place
        kept = f"from the end of epoch {place.epoch}" if place.epoch else "from before training"
        if self.folder is not None and self.folder.exists():
            kept = f"in the last good checkpoint, {str(self.folder)!r},"
        return TrainingError(
            f"pass {self.ctx.running!r}: {what} at step {place.step + 1}, in epoch "
            f"{place.epoch + 1}; training stopped before that step, and the weights {kept} "
            "are kept: look at that batch, or train anew with a lower lr or a longer warmup"
            + (", and another folder for checkpoints" if self.folder is not None else ""),
            self._returned(self.good),
        )

    def _progress(self, loss: float) -> None:
        total = self.feed.rounds_an_epoch * self.plan.epochs
        values = {"loss": float(loss)}
        if self.place.log and "metric" in self.place.log[-1]:
            values["metric"] = float(self.place.log[-1]["metric"])
        self.ctx.progress(self.place.step, total, "steps", **values)

    # --- structure -------------------------------------------------------------------------------

    def _change_structure(self, epoch: int) -> None:
        """Let the pass change weights and remove units; moments and masks lose the same ones."""
        if self.after_epoch is None:
            return
        before = self._snapshot()
        after, keep = self.after_epoch(before, epoch)
        if after is before and not keep:
            return
        state = self.optimiser.state()
        masks = zero_masks(after)
        if keep:
            state = cut_state(after, keep, state, self.arrange)
            masks = take(after, keep, masks)
            units = {n: [int(i) for i in indices] for n, indices in keep.items()}
            after, check = self.ctx.shrink(before, keep, after)
            self.place.checks.append(check)
            self.place.cuts.append(units)
            # Later epochs are of another model: none of the earlier ones can be gone back to.
            self.place.best, self.best = None, {}
        self.objective.bind(after)
        self._begin(after.with_tensors(_owned(after)), masks, state)

    # --- judging, and going back ----------------------------------------------------------

    def _metric(self) -> float:
        judge = self.training.eval
        assert judge is not None

        def measured() -> float:
            if callable(judge):
                with torch.no_grad():
                    return judged(judge, self._returned(self._snapshot()))
            score = Score(self.training.loss)
            self.module.eval()
            try:
                with torch.no_grad():
                    for i, batch in enumerate(judge):
                        self._check_batch(batch, i, "eval")
                        moved = self._moved(batch)
                        with _named_batch(i, "eval"):
                            score.add(self.module(**inputs_of(self.program, moved)), moved)
            finally:
                self.module.train()
            return check_metric(score.value())

        return self.workers.told(measured)

    def _keep_best(self, metric: JSON) -> None:
        """Remember the best epoch, and stop when none has been better for long enough."""
        place, patience = self.place, self.training.patience
        if patience is None or metric is None:
            return
        total = self.feed.rounds_an_epoch * self.plan.epochs
        if self.masking is not None and not self.masking.settled(place.step, total):
            return
        if place.best is None or metric > place.best:
            place.best, place.best_epoch = metric, place.epoch
            self.best = {n: t.clone() for n, t in self.module.program().tensors.items()}
        elif place.best_epoch is not None and place.epoch - place.best_epoch >= patience:
            place.done = True

    def _snapshot(self) -> Program:
        """The program as it is now, which later steps do not change."""
        program = self.module.program()
        return program.with_tensors(_owned(program))

    def _returned(self, program: Program) -> Program:
        """A program of ours as the caller's: its device, its types, and shared what is the same."""
        first = next(iter(self.source.tensors.values()))
        moved = program.on(first.device)
        if self.is_half:
            # Graphs in float32 do not become the caller's again; the same cuts make them.
            graphs = self.source
            for units in self.place.cuts:
                graphs = shrink(graphs, units)
            tensors = {n: t.to(graphs.tensors[n].dtype) for n, t in moved.tensors.items()}
            moved = replace(moved, entries=graphs.entries, tensors={**graphs.tensors, **tensors})
        return moved.with_tensors(
            {
                name: old
                for name, old in self.source.tensors.items()
                if name in moved.tensors and torch.equal(moved.tensors[name], old)
            }
        )

    # --- checkpoints ----------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, JSON]:
        plan = {name: getattr(self.plan, name) for name in self.plan.__slots__}
        loss = self.training.loss
        distillation = self.objective.distillation
        return {
            **plan,
            **self.more_settings,
            **({} if distillation is None else {"distillation": asdict(distillation)}),
            "loss": loss if isinstance(loss, str) else "a function",
            "batches": self.feed.batches,
            "processes": self.workers.count,
            "seed": self.ctx.seed,
        }

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.workers.is_main:
            tensors = {
                **self.optimiser.state(),
                **{f"mask/{n}": t for n, t in self.optimiser.masks.items()},
                **{f"best/{n}": t for n, t in self.best.items()},
            }
            if self.masking is not None:
                tensors |= {f"masking/{n}": t for n, t in self.masking.state().items()}
            self.place.seconds += time.perf_counter() - self.start
            self.start = time.perf_counter()
            checkpoint = Checkpoint(self._snapshot(), tensors, self.place.to_json())
            write(self.folder, checkpoint, self.identity, self._settings)
        self.workers.wait()

    def _resume(self) -> None:
        assert self.folder is not None
        checkpoint = read(self.folder, self.identity, self._settings)
        if checkpoint is None:
            return
        self.place = _Place(**checkpoint.place)
        device = self.workers.device
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "best": {}, "masking": {}}
        state: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition("/")
            moved = tensor.to(device)
            if kind in parts:
                parts[kind][rest] = moved
            else:
                state[name] = moved
        self.best = parts["best"]
        read_back = checkpoint.program.on(device)
        # Files sort tensors by name, and a group's id is its first tensor's.
        names = (n for n in self.program.tensors if n in read_back.tensors)
        program = replace(read_back, tensors={n: read_back.tensors[n] for n in names})
        self.objective.bind(program)
        self._begin(program, parts["mask"], state)
        if self.masking is not None:
            self.masking.load(parts["masking"])
        self.good = self._snapshot()

    # --- the end --------------------------------------------------------------------------

    def _finish(self) -> Fitted:
        place = self.place
        program = self.good
        if self.best:
            program = program.with_tensors(self.best)
        metrics = [r["metric"] for r in place.log if "metric" in r]
        after = place.best if self.best else (metrics[-1] if metrics else None)
        last = program if self.after_training is None else self.after_training(program)
        if last is not program:
            program = last
            self._begin(last.with_tensors(_owned(last)), zero_masks(last), None)
            if self.training.eval is not None:
                after = self._metric()
        result = self._returned(program)
        report: dict[str, JSON] = {
            "epochs": place.log,
            "steps": place.step,
            "processes": self.workers.count,
            "metric": None if self.training.eval is None else self._metric_name(),
            "metric_before": place.metric_before,
            "metric_after": after,
            "masked_weights": sum(int((~m).sum()) for m in self.optimiser.masks.values()),
            "seconds": place.seconds + time.perf_counter() - self.start,
            "notes": _notes(self.source),
            "cuts": place.checks,
            **self.objective.report(),
        }
        if self.best:
            report["best_epoch"] = place.best_epoch
            report["stopped_early"] = len(place.log) < self.plan.epochs
        return Fitted(result, report)

    def _metric_name(self) -> str:
        return "eval" if callable(self.training.eval) else metric_name(self.training.loss)


def _owned(program: Program) -> dict[str, Tensor]:
    """Copies of what training may write to: floats; a batch norm's statistics are among them."""
    return {
        n: t.detach().clone() if t.is_floating_point() else t for n, t in program.tensors.items()
    }


@contextlib.contextmanager
def _named_batch(number: int, kind: str = "training") -> Iterator[None]:
    """Say which batch it was."""
    try:
        yield
    except TrainingError as e:
        raise TrainingError(f"{kind} batch {number}: {e}", e.program) from e


def _refuse_sparse_gradients(program: Program) -> None:
    for node in program.forward.graph.nodes:
        if is_op(node, "embedding", "embedding_bag") and bound_arguments(node).get("sparse"):
            raise TrainingError(
                f"the embedding {node.args[0].target!r} has sparse gradients, which cannot be "
                "clipped: build the model with sparse=False and compile that"
            )


def _check_norms(entry: Entry, sizes: Sequence[torch.Size]) -> None:
    """Whether every batch norm sees more than one value a channel: one alone has no variance.

    torch.nn says so where a module is called; the operator in a graph makes NaN of it.

    Raises:
        TrainingError: one does not.
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


def _notes(program: Program) -> list[str]:
    """What a user should know about the graph in training."""
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
