"""Passes: what they are given and what they return."""

from __future__ import annotations

import abc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, final

import torch
from torch import Tensor

from graphprune.errors import RecipeError, VerificationError
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.pipeline.device import Device, Progress
from graphprune.pipeline.events import JSON, Event, Observer, PassProgress, emit
from graphprune.storage.kept import Kept
from graphprune.verify.invariants import Invariant as Invariant

if TYPE_CHECKING:
    from graphprune.axes.branches import Branch
    from graphprune.training.spec import Training

T = TypeVar("T")
Keep = Mapping[str, Sequence[int] | Tensor]


@dataclass(frozen=True, slots=True)
class PassResult:
    """The result of a pass.

    Attributes:
        program: the new program; the very object that was given when nothing was modified.
        modified: whether it differs from the one given.
        report: JSON that says what changed, and what was skipped with the reason.
    """

    program: Program
    modified: bool
    report: Mapping[str, JSON] = field(default_factory=dict)


@final
class Run:
    """The state of a pipeline while its passes run.

    Attributes:
        verify: whether passes are verified.
        observers: called with every event.
    """

    def __init__(self, verify: bool = True, observers: Sequence[Observer] = ()) -> None:
        self.verify = verify
        self.observers = tuple(observers)
        self.trainings = itertools.count()  # numbers of the passes that train
        self._facts: dict[tuple[Any, int], tuple[Program, Any]] = {}

    def emit(self, event: Event) -> None:
        """Send an event to every observer."""
        emit(self.observers, event)

    def get(self, analysis: Callable[[Program], T], program: Program) -> T:
        """The analysis of this program, computed once.

        Programs are values, so a fact about one never goes stale. The program is kept beside its
        fact because an `id` is only unique among living objects.
        """
        key = (analysis, id(program))
        held = self._facts.get(key)
        if held is None or held[0] is not program:
            self._facts[key] = held = (program, analysis(program))
        return cast(T, held[1])

    def forget(self, *keep: Program) -> None:
        """Drop the facts of every program but these (between passes)."""
        alive = {id(program) for program in keep}
        self._facts = {key: held for key, held in self._facts.items() if key[1] in alive}


class Context:
    """Everything that a pass is given beside the program.

    Attributes:
        calibration: batches for passes that need activations, or None.
        training: a loss and its batches for passes that train, or None.
        reference: the dense program that the pipeline began with: teacher and baseline.
        seed: everything random comes from it.
        devices: opens what measures time, as `exporters.open_device` does.
        kept: where tensors are kept that take long to compute; None for nowhere.
        quantization: how a later pass will have the result quantized; None for a float one.
        run: what the pipeline keeps, for passes that run others; one with no observers by default.
        running: name of the pass that runs now.
        training_number: which of the passes that train it is, from 0; it names the pass's folder of
            checkpoints, and gives each round of a pass its own seeds.
    """

    def __init__(
        self,
        *,
        reference: Program | None = None,
        calibration: Iterable[Any] | None = None,
        training: Training | None = None,
        seed: int = 0,
        devices: Callable[[str, int, Progress], Device] | None = None,
        kept: Kept | None = None,
        quantization: Mark | None = None,
        run: Run | None = None,
    ) -> None:
        self.reference = reference
        self.calibration = calibration
        self.training = training
        self.seed = seed
        self.devices = devices
        self.kept = kept
        self.quantization = quantization
        self.run = Run() if run is None else run
        self.running = ""
        self.training_number = 0
        self._generator = torch.Generator().manual_seed(seed)

    def during(self, run: Run, reference: Program, quantization: Mark | None) -> Context:
        """A context for one run: this one's data and seed, and its reference where it has one."""
        return Context(
            reference=reference if self.reference is None else self.reference,
            calibration=self.calibration,
            training=self.training,
            seed=self.seed,
            devices=self.devices,
            kept=self.kept,
            quantization=quantization,
            run=run,
        )

    @property
    def verify(self) -> bool:
        """Whether rewrites are verified on the way."""
        return self.run.verify

    @property
    def generator(self) -> torch.Generator:
        """The source of randomness; the pipeline seeds it before every pass."""
        return self._generator

    def batches(self) -> Iterable[Any]:
        """The calibration batches.

        Raises:
            RecipeError: there are none.
        """
        if self.calibration is None:
            raise RecipeError(
                f"pass {self.running!r} looks at activations and needs calibration batches: give "
                "compile(..., calibration=batches), or --calibration FILE"
            )
        return self.calibration

    def device(self, file: str, threads: int) -> Device:
        """Open the device that measures how long models take.

        Args:
            file: JSON of a device kit; "" for this machine.
            threads: of the runtime.

        Raises:
            RecipeError: nothing measures here.
        """
        if self.devices is None:
            raise RecipeError(
                f"pass {self.running!r} measures time, and this context has nothing that does: "
                "run it by graphprune.compile, or give Context(devices=...)"
            )
        return self.devices(file, threads, self.progress)

    def begin(self, name: str, index: int, *, trains: bool = False) -> None:
        """Set the pass that runs now (the pipeline calls this).

        Passes that train are numbered over the whole run, whatever runs them.
        """
        self.running = name
        if trains:
            self.training_number = next(self.run.trainings)
        # Seeded by position: a pass gives the same result whatever the passes before it drew.
        self._generator.manual_seed(self.seed * 1_000_003 + index)

    def get(self, analysis: Callable[[Program], T], program: Program) -> T:
        """The analysis of this program, computed once."""
        return self.run.get(analysis, program)

    def progress(
        self, done: int, total: int, unit: str = "", *, where: str = "", **values: float
    ) -> None:
        """Report the progress of the running pass to observers, with numbers such as the loss."""
        self.run.emit(PassProgress(self.running, done, total, unit, values, where))

    def shrink(
        self, program: Program, keep: Keep, prepared: Program | None = None
    ) -> tuple[Program, dict[str, JSON]]:
        """Remove units for good, and verify that this equals masking them.

            prepared --mask--> references       the old shapes, removed units set to zero: where
                                                they are summed, and wherever they are carried
            prepared --shrink--> result         the new shapes; all must compute the same

        Args:
            program: the program whose axis groups `keep` names.
            keep: group id -> indices of the units that stay.
            prepared: `program` with other values in the kept weights (compensation), same shapes.

        Returns:
            The smaller program, and the verification's report (`equivalence.verify_rewrite`):
            max_error, moved, observable, seconds. Where a group is normalized the two differ by
            nature: drift instead of max_error. Without verification:
            {"skipped": reason}.

        Raises:
            VerificationError: masked and shrunk do not agree.
        """
        from graphprune.axes import axis_groups
        from graphprune.rewrite.mask import mask
        from graphprune.rewrite.shrink import shrink

        source = program if prepared is None else prepared
        shrunk = shrink(source, keep)
        if not self.verify:
            return shrunk, {"skipped": "verification was switched off"}
        groups = self.get(axis_groups, program)
        exact = not any(groups[name].normalized for name in keep)
        also = [mask(source, keep, everywhere=True)] if exact else []
        report = self._verified(
            f"units of {_named(keep)}", mask(source, keep), shrunk, exact, also=also, dense=program
        )
        if not exact:
            report["drift"] = report.pop("max_error")
        return shrunk, report

    def drop(self, program: Program, branches: Sequence[Branch]) -> tuple[Program, dict[str, JSON]]:
        """Remove residual branches for good, and verify that this equals closing their gates.

        Args:
            program: left as it is.
            branches: of this program (`axes.branches`).

        Returns:
            The smaller program, and the verification's report, as `shrink` gives it.

        Raises:
            UnsupportedError: a decoder would be left without any cache.
            VerificationError: gated and dropped do not agree.
        """
        from graphprune.rewrite.drop import closed, drop, gated

        dropped = drop(program, branches)
        if not self.verify:
            return dropped, {"skipped": "verification was switched off"}
        gates_open, gates = gated(program, branches)
        what = f"branches {_named([branch.id for branch in branches])}"
        reference = closed(gates_open, gates.values())
        return dropped, self._verified(what, reference, dropped, True, dense=program)

    def _verified(
        self,
        what: str,
        masked: Program,
        smaller: Program,
        exact: bool,
        *,
        dense: Program,
        also: Sequence[Program] = (),
    ) -> dict[str, JSON]:
        from graphprune.verify.equivalence import verify_rewrite

        start = time.perf_counter()
        try:
            report = dict(verify_rewrite(masked, smaller, exact=exact, also=also, dense=dense))
        except VerificationError as e:
            raise VerificationError(
                f"pass {self.running!r}: removing {what} does not equal masking them: {e}"
            ) from e
        return {**report, "seconds": time.perf_counter() - start}


def _named(given: Iterable[str], at_most: int = 5) -> str:
    names = sorted(given)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(repr(name) for name in names[:at_most]) + more


class Pass(abc.ABC):
    """One program-to-program step. Subclasses are final frozen dataclasses: their own options.

    1. Pure: `run` never writes to the program it is given, nor to its tensors.
    2. Honest: `modified=False` returns the same object, `modified=True` another one.
    3. Fresh: metadata of the returned graphs agrees with the tensors (`Program.with_graphs`).
    4. Deterministic for a given configuration, program and `ctx.seed`.
    5. Explains itself: the report is JSON and says what was skipped, and why.

    Attributes:
        name: the kebab-case name in recipes and reports.
        preserves: what the pipeline checks to be unchanged afterwards.
        idempotent: whether a second run finds nothing to do.
        needs_float: whether it changes values or shapes of tensors, under their names, and so
            refuses a program that is marked for quantization
            (`ir.quantization.refuse_quantized`); asked before any work.
        trains: whether it calls `training.loop.fit`, which it may do once a run.
        without_data: options with which it needs no calibration; empty where it always does.
    """

    name: ClassVar[str]
    preserves: ClassVar[Invariant] = Invariant.ALL
    idempotent: ClassVar[bool] = False
    needs_float: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    without_data: ClassVar[str] = ""

    # Subclasses are slotted dataclasses; a base without slots would give them a dict again.
    __slots__ = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether `run` looks at activations and needs `ctx.calibration`; asked before any work."""
        return False

    @property
    def needs_training(self) -> bool:
        """Whether `run` trains and needs `ctx.training`; asked before any work."""
        return False

    def quantization(self, program: Program) -> Mark | None:
        """How it will have the exported program quantized; known before it runs."""
        return None

    @property
    def inner(self) -> tuple[Pass, ...]:
        """The passes that this one runs, in order."""
        return ()

    def check(self, program: Program) -> None:
        """Refuse options that do not fit the program that the passes begin with.

        Called once, before any of the passes runs. Only names of tensors are sure to be those that
        `run` will see.

        Raises:
            RecipeError: an option names what the program does not have.
        """
        return

    @abc.abstractmethod
    def run(self, program: Program, ctx: Context) -> PassResult:
        """Return the program with this pass applied."""


def flat(steps: Iterable[Pass]) -> Iterator[Pass]:
    """Passes, and those that they run, in order."""
    for step in steps:
        yield step
        yield from flat(step.inner)
