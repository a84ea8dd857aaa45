"""Budget: prune to milliseconds, megabytes or FLOPs at the least loss of quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.ir.quantization import PATTERNS, refuse_quantized
from graphprune.passes.budget.choose import Work
from graphprune.passes.budget.quality import largest_within
from graphprune.passes.name_patterns import check_names, check_patterns
from graphprune.passes.solvers.knapsack import check_scipy
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.outcome import Outcome
from graphprune.validate import check_number, check_whole

TARGETS = ("stream", "output")


@register
@final
@dataclass(frozen=True, slots=True)
class Budget(Pass):
    """Remove what costs least quality, until the model keeps a budget of time, size or FLOPs.

    1. There is a choice for attention heads (groups of them where they share keys) and hidden
       neurons, each at a grid of levels, and for whole residual branches; with `blocks` also for
       zero blocks in the products of what stays.
    2. Every level is timed on ONNX Runtime, a branch alone, as it will be exported.
    3. Order of removal and weights of every level come from calibration (structured OBS).
    4. A search over sensitivities chooses levels by the loss of the whole model: KL for logits,
       1 - cos for embeddings (SPDY, arXiv 2201.13096; ZipLM, arXiv 2302.04089).
    5. The choice is measured in the whole model; where it is off, times are corrected and it is
       solved again. Then branches go, and groups are cut one after another, each compensated on
       what the ones before it give.

    Several budgets hold together. A model that is within the budget already stays as it is.
    With `max_drop`, budgets are tried by bisection: the fastest model that loses no more is kept.

    Attributes:
        speedup: how many times faster than the dense float model, above 1.
        ms: milliseconds of one run.
        size_mb: megabytes of the ONNX file.
        flops: fraction of the dense model's FLOPs, in (0, 1).
        max_drop: largest loss on `task`, in its metric's unit, by the 95 % bound of a paired
            bootstrap; without other budgets.
        task: a function from a model to a `graphprune.training.outcome.Outcome`, on data that was
            not used for calibration; `graphprune.models.tasks.task_evaluation` makes one.
        batch: what a run is: samples, and tokens of each (after a cache: tokens of past); the
            example inputs' where it is not given.
        threads: of ONNX Runtime.
        device: JSON of a device kit; this machine where it is not given.
        drop: whether whole branches may go.
        blocks: a pattern of zero blocks, "32x4" or "16x4", that may be chosen as well; timed with
            graphprune-kernels, so it is for Quantize("int8-dynamic") after it and
            export(target="onnxruntime+kernels").
        target: what kept weights are fitted to: the "stream" after their branch in the dense
            model, with four calibration batches or more, or their own former "output".
        evaluations: number of models that the search may evaluate; a quarter as many again after
            each correction of the table.
        samples: calibration samples that each of them is evaluated on; fewer where the model
            answers with more than 256 MB, as language models do. Of eight batches or more they are
            in an eighth at most, which weights are not fitted to, and as many others are left to
            look at the result.
        round_to: large groups keep multiples of this many units.
        damping: fraction of the mean squared input added to the Gram matrix's diagonal; more where
            that fits batches held out better, of four or more.
        targets: name patterns; only groups and branches that reach such a tensor.
        ignore: name patterns to leave alone.
    """

    name: ClassVar[str] = "budget"
    # Caches of layers that are gone are no inputs any more.
    preserves: ClassVar[Invariant] = Invariant.NONE
    needs_float: ClassVar[bool] = True

    speedup: float | None = None
    ms: float | None = None
    size_mb: float | None = None
    flops: float | None = None
    max_drop: float | None = None
    task: Any = None
    batch: tuple[int, ...] = ()
    threads: int = 1
    device: str = ""
    drop: bool = True
    blocks: str = ""
    target: str = "stream"
    evaluations: int = 100
    samples: int = 64
    round_to: int = 16
    damping: float = 0.01
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_asked()
        for size in self.batch:
            check_whole("batch", size, "whole numbers from 1, such as (1, 128)")
        if len(self.batch) > 2:
            raise RecipeError(f"batch is samples and tokens, such as (1, 128), got {self.batch!r}")
        for name in ("threads", "evaluations", "samples", "round_to"):
            check_whole(name, getattr(self, name), "at least 1, and whole")
        check_number("damping", self.damping, "0 or more", low=0)
        if self.target not in TARGETS:
            raise RecipeError(f"target is one of {list(TARGETS)}, got {self.target!r}")
        if self.blocks not in ("", *PATTERNS):
            raise RecipeError(
                f"blocks is a pattern that sparse kernels skip, one of {list(PATTERNS)}, or '' for "
                f"none, got {self.blocks!r}"
            )
        if self.blocks and self.asked.keys() == {"flops"}:
            raise RecipeError(
                "zero blocks save time and bytes, and FLOPs do not count them: leave blocks out, "
                "or ask for speedup, ms or size_mb"
            )
        check_patterns("targets", self.targets)
        check_patterns("ignore", self.ignore)

    def _check_asked(self) -> None:
        asked = self.asked
        if not asked:
            raise RecipeError(
                "a budget says what to reach: speedup=3, ms=5, size_mb=20 or flops=0.3, one or "
                "several of them, or max_drop=0.01 with a task"
            )
        if "speedup" in asked:
            rule = "how many times faster, above 1"
            check_number("speedup", self.speedup, rule, low=1, open_low=True)
        for name in asked.keys() & {"ms", "size_mb", "max_drop"}:
            check_number(name, asked[name], "a number above 0", low=0, open_low=True)
        if "flops" in asked:
            rule = "a fraction of the dense model's, above 0 and below 1"
            check_number("flops", self.flops, rule, low=0, high=1, open_low=True, open_high=True)
        if "max_drop" in asked and len(asked) > 1:
            raise RecipeError(
                "max_drop asks for the fastest model that loses no more, so it stands alone: leave "
                f"{', '.join(sorted(asked.keys() - {'max_drop'}))} out, or max_drop"
            )
        if ("max_drop" in asked) != callable(self.task):
            raise RecipeError(
                "max_drop and task go together: task is a function from a model to an Outcome, "
                "such as graphprune.models.tasks.task_evaluation('sts', ...); on the command line "
                "--max-drop 0.01 --task sts --data FILE"
            )

    @property
    def asked(self) -> Mapping[str, float]:
        """The budgets asked for, by option."""
        names = ("speedup", "ms", "size_mb", "flops", "max_drop")
        named = {name: getattr(self, name) for name in names}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def needs_calibration(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        # A speed-up and milliseconds are both a limit of time.
        if len({"ms" if name == "speedup" else name for name in self.asked}) > 1:
            check_scipy()
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Choose, and remove.

        Raises:
            UnsupportedError: the budget cannot be reached; the least that can be is named.
            GraphPruneError: the device's file is not of this model.
        """
        refuse_quantized(program, ctx.running)
        work = Work(self, program, ctx)
        if self.max_drop is None:
            return work.reach(self.asked)
        task: Callable[[Any], Outcome] = self.task
        return largest_within(work, self.max_drop, task)
