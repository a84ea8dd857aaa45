"""The training loop: epochs over batches, on a program that may lose structure on the way.

    program --own copies--> module --epoch--> module --after_epoch--> program --shrink--> module ...

Weights, moments and masks are kept by tensor names and lose the same units in a cut, and training
goes on as if the units had only been masked.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from graphprune.errors import RecipeError, TrainingError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import JSON, Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.pipeline.base import Context, Keep
from graphprune.rewrite.shrink import take
from graphprune.training.checkpoint import Checkpoint, Identity, read, write
from graphprune.training.checks import (
    BatchChecks,
    check_folder,
    named_batch,
    notes,
    refuse_sparse_gradients,
)
from graphprune.training.distributed import Feed, Workers, seed_from
from graphprune.training.losses import IGNORED
from graphprune.training.metrics import Metric, metric_name
from graphprune.training.objective import Distillation, Objective, inputs_of
from graphprune.training.optimizer import Optimizer, Plan, cut_state, zero_masks
from graphprune.training.records import Epoch, TrainingReport
from graphprune.training.spec import Training, check_metric, run_eval
from graphprune.training.state import Held, Place, as_given, in_order_of, owned

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

        Called before each optimizer step, `step` from 0 of `total`, with the scored terms'
        gradients, summed over processes, in `.grad`. It must not draw random numbers: every
        process calls it.
        """

    def settled(self, step: int, total: int) -> bool:
        """Whether it chooses no more; until then metrics of epochs do not compare."""

    def state(self) -> Mapping[str, Tensor]:
        """Its state, for a checkpoint."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@final
@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that a pass adds to the training of its program.

    Attributes:
        penalty: of the parameters by name, added to the loss.
        masking: chooses weights to zero while training; early stopping waits until it has settled.
        after_epoch: (program, epoch from 0) -> (program, keep): other values for weights, and
            units to remove for good: axis group -> kept indices. It also runs after the last one.
        after_training: other values for the weights of the result, the best epoch or the last one,
            which is evaluated once more.
        arrange: where after_epoch has put units in another order before it removes some, the same
            for tensors of the same names and shapes: the optimizer's moments follow.
        bind: called with every new structure before it trains: the first, and after each cut.
    """

    penalty: Penalty | None = None
    masking: Masking | None = None
    after_epoch: AfterEpoch | None = None
    after_training: Callable[[Program], Program] | None = None
    arrange: Arrange | None = None
    bind: Callable[[Program], None] | None = None


@final
@dataclass(frozen=True, slots=True)
class Fitted:
    """The result of training: the program with other weights, and the record."""

    program: Program
    record: TrainingReport

    @property
    def report(self) -> dict[str, JSON]:
        """The record as JSON."""
        return self.record.to_json()


def fit(
    program: Program,
    training: Training | None,
    ctx: Context,
    plan: Plan,
    hooks: Hooks = Hooks(),
    *,
    distillation: Distillation | None = None,
    settings: Mapping[str, JSON] | None = None,
) -> Fitted:
    """Train a program; the one given stays as it is.

    Weights that a pass zeroed stay zero. Everything random comes from the context's seed, so equal
    calls give equal bits.

    Args:
        program: what to train; bfloat16 and float16 train in float32 and come back.
        training: data, loss, evaluation, checkpoints.
        ctx: of the running pass; its reference is the teacher, its number names the checkpoints.
        plan: how long, and with which steps.
        hooks: what the pass does meanwhile.
        distillation: learn from `ctx.reference` too.
        settings: further options that a checkpoint to resume from must agree with, as JSON.

    Raises:
        TrainingError: data or labels do not fit, the checkpoint is of another model, or the loss is
            not finite; its `program` holds the last good weights.
    """
    training = required(training, ctx)
    refuse_quantized(program, ctx.running)
    refuse_sparse_gradients(program)
    if distillation is not None and ctx.reference is None:
        raise RecipeError(f"pass {ctx.running!r} needs a teacher, and the context has no reference")
    with _own_randomness():
        return _Run(program, training, ctx, plan, hooks, distillation, settings or {}).train()


def required(training: Training | None, ctx: Context) -> Training:
    """Return the training data and loss.

    Raises:
        RecipeError: nothing was given.
    """
    if training is None:
        raise RecipeError(
            f"pass {ctx.running!r} trains and needs data and a loss: give compile(..., "
            "training=Training(batches, loss=...))"
        )
    return training


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the caller's random generators afterwards."""
    devices = range(torch.cuda.device_count())
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@final
class _Run:
    """One training, from the first look at the data to the last epoch."""

    def __init__(
        self,
        program: Program,
        training: Training,
        ctx: Context,
        plan: Plan,
        hooks: Hooks,
        distillation: Distillation | None,
        settings: Mapping[str, JSON],
    ) -> None:
        self.source, self.training, self.ctx, self.plan = program, training, ctx, plan
        self.hooks, self.more_settings = hooks, settings
        self.start = time.perf_counter()
        self.folder = training.folder(f"{ctx.training_number}-{ctx.running or 'fit'}")
        self.workers = Workers(training.device)
        # By position in the pipeline, for which the generator was seeded. A pass that trains in
        # rounds is at one position: the number of the training tells these apart.
        self.seed = int(torch.randint(2**62, (), generator=ctx.generator))
        self.seed += ctx.training_number
        self.identity = Identity.of(program)
        if self.folder is not None:
            check_folder(self.folder, resume=training.resume)
        wide = program.in_float32()
        self.is_half = wide is not program
        working = wide.on(self.workers.device)
        self.program = working.with_tensors(owned(working))
        self.feed = Feed(training.data, self.seed, self.workers)
        self.checks = BatchChecks(training.loss)
        has_labels = self.checks.look(
            self.program,
            self.feed.first(),
            training.data,
            self._outputs,
            labels_needed=distillation is None,
        )
        teacher = None
        if distillation is not None:
            assert ctx.reference is not None
            teacher = ctx.reference.in_float32().on(self.workers.device)
        self.objective = Objective(self.program, training.loss, teacher, distillation, has_labels)
        self.place = Place()
        self.best: Mapping[str, Tensor] = {}
        self._begin(self.program, zero_masks(self.program), None)
        self.workers.broadcast(self.optimizer.parameters.values())
        self.good = self._snapshot()

    # --- before ----------------------------------------------------------------------------------

    def _outputs(self, batch: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return ProgramModule(self.program)(**inputs_of(self.program, self._moved(batch)))

    def _moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.workers.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _begin(
        self, program: Program, masks: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> None:
        """Begin with a program whose tensors may be written to."""
        self.program = program
        self.module = self.objective.module(program)
        self.module.train()
        if self.hooks.bind is not None:
            self.hooks.bind(program)
        self.optimizer = Optimizer(self.module, program, self.plan, masks, state)

    @property
    def total(self) -> int:
        """Steps from the first epoch to the last."""
        return self.feed.rounds_an_epoch * self.plan.epochs

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
        self.workers.broadcast(t for t in self.module.buffers() if t.is_floating_point())
        self._change_structure(place.epoch)
        metric = None if self.training.eval is None else self._metric()
        seconds = time.perf_counter() - start
        epoch = Epoch(place.epoch + 1, self._means(), metric, seconds)
        place.log.append(epoch)
        place.epoch, place.round, place.sums = place.epoch + 1, 0, {}
        self._keep_best(metric)
        self.good = self._snapshot()
        place.done |= place.epoch == self.plan.epochs
        self._save()
        self._progress(epoch.loss)

    def _step(self, number: int, batch: Any) -> None:
        """One step of all processes together."""
        place = self.place
        torch.manual_seed(seed_from(self.seed, "step", place.step, self.workers.rank))
        if batch is not None:
            self.checks.check(self.program, batch, number)
        loss = self._gradients(number, batch)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        norm = self.optimizer.step(self.plan.rate(place.step, self.total))
        if not math.isfinite(norm):
            raise self._diverged("the loss is finite and its gradient is not")
        place.step += 1
        place.round += 1
        self._progress(loss)

    def _gradients(self, number: int, batch: Any) -> float:
        """Leave the gradient of the loss over all processes' batches; return that loss."""
        found = {}
        if batch is not None:
            with self.workers.autocast(), named_batch(number):
                found = self.objective.terms(self.module, self.program, self._moved(batch))
        names = list(self.objective.weights)
        numbers = torch.zeros(2, len(names), dtype=torch.float64, device=self.workers.device)
        for i, name in enumerate(names):
            if name in found:
                numbers[0, i] = found[name].total.detach()
                numbers[1, i] = found[name].count
        sums, counts = self.workers.all_reduce(numbers).tolist()
        scored = () if self.hooks.masking is None else self.hooks.masking.scored or ()
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
        if self.hooks.penalty is not None:
            # The same in every process; gradients are summed over processes.
            extra = self.hooks.penalty(self.optimizer.parameters)
            rest = rest + extra / self.workers.count
            value += float(extra.detach())
            self._add("penalty", float(extra.detach()), 1)
        counted = any(counts) or self.hooks.penalty is not None
        mine = found or self.hooks.penalty is not None
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
        parameters = self.optimizer.parameters
        if scored.requires_grad:
            self.workers.backward(scored, retain_graph=rest.requires_grad)
        if any_scored:
            self.workers.share_gradients(parameters)
        chosen = None
        if self.hooks.masking is not None:
            with torch.no_grad():
                chosen = self.hooks.masking.choose(parameters, self.place.step, self.total)
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.optimizer.forget_gradients()
        if rest.requires_grad:
            self.workers.backward(rest)
        self.workers.share_gradients(parameters)
        for name, gradient in held.items():
            parameter = parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if chosen is not None:
            self.optimizer.restrict(chosen)

    def _add(self, name: str, total: float, count: float) -> None:
        held = self.place.sums.setdefault(name, [0.0, 0.0])
        held[0] += total
        held[1] += count

    def _means(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self.place.sums.items() if count}
        # One term alone is the loss itself.
        return means if len(means) > 2 else {"loss": means["loss"]}

    def _diverged(self, what: str) -> TrainingError:
        place = self.place
        kept = f"from the end of epoch {place.epoch}" if place.epoch else "from before training"
        if self.folder is not None and self.folder.exists():
            kept = f"in the last good checkpoint, {str(self.folder)!r},"
        return TrainingError(
            f"pass {self.ctx.running!r}: {what} at step {place.step + 1}, in epoch "
            f"{place.epoch + 1}; training stopped before that step, and the weights {kept} "
            "are kept: look at that batch, or train again with a lower lr or a longer warmup"
            + (", and another folder for checkpoints" if self.folder is not None else ""),
            self._as_given(self.good),
        )

    def _progress(self, loss: float) -> None:
        values = {"loss": loss}
        if self.place.log and self.place.log[-1].metric is not None:
            values["metric"] = self.place.log[-1].metric
        # Between two epochs it is at the end of the one before.
        epoch = self.place.epoch + (self.place.round > 0)
        where = f"epoch {epoch}/{self.plan.epochs}"
        self.ctx.progress(self.place.step, self.total, "steps", where=where, **values)

    # --- structure -------------------------------------------------------------------------------

    def _change_structure(self, epoch: int) -> None:
        """Let the pass change weights and remove units; moments and masks lose the same ones."""
        if self.hooks.after_epoch is None:
            return
        before = self._snapshot()
        after, keep = self.hooks.after_epoch(before, epoch)
        if after is before and not keep:
            return
        state = self.optimizer.state()
        masks = zero_masks(after)
        if keep:
            state = cut_state(after, keep, state, self.hooks.arrange)
            masks = take(after, keep, masks)
            units = {n: [int(i) for i in indices] for n, indices in keep.items()}
            after, check = self.ctx.shrink(before, keep, after)
            self.place.checks.append(check)
            self.place.cuts.append(units)
            # Later epochs are of another model: earlier ones can no longer be restored.
            self.place.best, self.best = None, {}
        self.objective.bind(after)
        self._begin(after.with_tensors(owned(after)), masks, state)

    # --- evaluation, and the best epoch ---------------------------------------------------

    def _metric(self) -> float:
        evaluation = self.training.eval
        assert evaluation is not None

        def measured() -> float:
            if callable(evaluation):
                with torch.no_grad():
                    return run_eval(evaluation, self._as_given(self._snapshot()))
            score = Metric(self.training.loss)
            self.module.eval()
            try:
                with torch.no_grad():
                    for i, batch in enumerate(evaluation):
                        self.checks.check(self.program, batch, i, "eval")
                        moved = self._moved(batch)
                        with named_batch(i, "eval"):
                            score.add(self.module(**inputs_of(self.program, moved)), moved)
            finally:
                self.module.train()
            return check_metric(score.value())

        return self.workers.run_on_main(measured)

    def _keep_best(self, metric: float | None) -> None:
        """Remember the best epoch, and stop when none has been better for long enough."""
        place, patience = self.place, self.training.patience
        if patience is None or metric is None:
            return
        if self.hooks.masking is not None and not self.hooks.masking.settled(
            place.step, self.total
        ):
            return
        if place.best is None or metric > place.best:
            place.best, place.best_epoch = metric, place.epoch
            self.best = {n: t.clone() for n, t in self.module.program().tensors.items()}
        elif place.best_epoch is not None and place.epoch - place.best_epoch >= patience:
            place.done = True

    def _snapshot(self) -> Program:
        """The program as it is now, which later steps do not change."""
        program = self.module.program()
        return program.with_tensors(owned(program))

    def _as_given(self, program: Program) -> Program:
        return as_given(program, self.source, self.place.cuts, half=self.is_half)

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
            held = Held(
                self.optimizer.state(),
                self.optimizer.masks,
                self.best,
                {} if self.hooks.masking is None else self.hooks.masking.state(),
            )
            self.place.seconds += time.perf_counter() - self.start
            self.start = time.perf_counter()
            checkpoint = Checkpoint(self._snapshot(), held.to_tensors(), self.place.to_json())
            write(self.folder, checkpoint, self.identity, self._settings)
        self.workers.wait()

    def _resume(self) -> None:
        assert self.folder is not None
        checkpoint = read(self.folder, self.identity, self._settings)
        if checkpoint is None:
            return
        self.place = Place.from_json(checkpoint.place)
        device = self.workers.device
        held = Held.of(checkpoint, device)
        self.best = held.best
        program = in_order_of(checkpoint.program.on(device), self.program)
        self.objective.bind(program)
        self._begin(program, held.masks, held.optimizer)
        if self.hooks.masking is not None:
            self.hooks.masking.load(held.masking)
        self.good = self._snapshot()

    # --- the end --------------------------------------------------------------------------

    def _finish(self) -> Fitted:
        place = self.place
        program = self.good
        if self.best:
            program = program.with_tensors(self.best)
        after = place.best if self.best else (place.log[-1].metric if place.log else None)
        last = program if self.hooks.after_training is None else self.hooks.after_training(program)
        if last is not program:
            program = last
            self._begin(last.with_tensors(owned(last)), zero_masks(last), None)
            if self.training.eval is not None:
                after = self._metric()
        result = self._as_given(program)
        record = TrainingReport(
            epochs=tuple(place.log),
            steps=place.step,
            processes=self.workers.count,
            metric=None if self.training.eval is None else self._metric_name(),
            metric_before=place.metric_before,
            metric_after=after,
            masked_weights=sum(int((~m).sum()) for m in self.optimizer.masks.values()),
            seconds=place.seconds + time.perf_counter() - self.start,
            notes=notes(self.source),
            cuts=place.checks,
            objective=self.objective.report(),
            best_epoch=place.best_epoch if self.best else None,
            stopped_early=bool(self.best) and len(place.log) < self.plan.epochs,
        )
        return Fitted(result, record)

    def _metric_name(self) -> str:
        return "eval" if callable(self.training.eval) else metric_name(self.training.loss)
