"""Budget: what is asked is met on a device of known times, and refused where it cannot be."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.branches import branches
from graphprune.axes.sites import linear_sites
from graphprune.calibration.stream import HELD_OUT
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.models.hub.folder import _dropped
from graphprune.passes import Budget, Quantize
from graphprune.passes.budget import choose
from graphprune.passes.budget.blocks import block_sites
from graphprune.passes.budget.choose import Work
from graphprune.passes.budget.sized import sized_for
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_count
from graphprune.pipeline.base import Context
from graphprune.pipeline.device import Cost
from graphprune.pipeline.pipeline import Pipeline
from graphprune.report.budget import BudgetReport
from graphprune.report.report import ModelSize, PassReport, Report
from graphprune.storage.kept import Kept
from graphprune.training.outcome import MeanOutcome

Captured = Callable[[str], Program]


@dataclass
class Clock:
    """A device whose milliseconds are FLOPs, and so many more for the whole model.

    With `wrong`, branches alone seem to take so many times what they take in the model.
    """

    fixed: float = 0.0
    wrong: float = 1.0
    asked: list[Mapping[str, Program]] = field(default_factory=list)
    name: str = "a clock"
    threads: int = 1
    can_measure: bool = True

    def measure(
        self,
        models: Mapping[str, Program],
        *,
        inputs: Mapping[str, Sequence[Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[str, Cost]:
        self.asked.append(models)
        return {name: self._cost(p, name in (inputs or {})) for name, p in models.items()}

    def _cost(self, program: Program, whole: bool) -> Cost:
        ms = flops(program, program.deployed) / 1e6 * (1.0 if whole else self.wrong)
        ms += self.fixed if whole else 0.0
        ms *= 0.5 if program.quantization else 1.0
        return Cost(ms, program.nbytes(), ms, ms)


def batches(program: Program, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def drawn(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator)
        if bool(((tensor == 0) | (tensor == 1)).all()):
            return torch.ones_like(tensor)
        return torch.randint(0, int(tensor.max()) + 1, tensor.shape, generator=generator)

    named = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    return [{name: drawn(t) for name, t in named.items()} for _ in range(count)]


def context(program: Program, count: int = 4, **options: Any) -> Context:
    return Context(
        calibration=batches(program, count),
        devices=lambda file, threads, progress: Clock(),
        **options,
    )


def run(
    program: Program,
    step: Budget,
    clock: Clock | None = None,
    *after: Any,
    kept: Any = None,
    count: int = 4,
) -> tuple[Program, BudgetReport, dict[str, Any]]:
    device = clock or Clock()
    ctx = Context(
        calibration=batches(program, count),
        devices=lambda file, threads, progress: device,
        kept=kept,
    )
    result = Pipeline([step, *after]).run(program, ctx)
    details = dict(result.results[0].report)
    report = BudgetReport.of(details)
    assert report is not None
    return result.program, report, details


def small(**options: Any) -> Budget:
    return Budget(**{"evaluations": 12, "samples": 4, "round_to": 8, **options})


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-vit", "tiny-mlp"])
def test_flops_are_within_the_budget(captured: Captured, name: str) -> None:
    program = captured(name)
    # A language model's head is most of a tiny one.
    asked = 0.75 if name in ("tiny-gpt2", "tiny-llama") else 0.5
    result, report, details = run(program, small(flops=asked))
    assert flops(result) <= asked * flops(program)
    assert report.measured_ms == pytest.approx(flops(result) / 1e6, rel=1e-6)
    assert details["verification"]["max_error"] < 1e-5
    assert result.num_parameters() == details["parameters_after"] < program.num_parameters()


def test_every_budget_holds_of_several(captured: Captured) -> None:
    pytest.importorskip("scipy", reason="several budgets at once need scipy")
    program = captured("tiny-bert")
    megabytes = 0.8 * program.nbytes() / 1e6
    result, report, _ = run(program, small(speedup=1.5, size_mb=megabytes))
    assert flops(result) <= flops(program) / 1.5
    assert result.nbytes() <= megabytes * 1e6
    assert report.asked == {"speedup": 1.5, "size_mb": megabytes}


def test_a_table_that_is_wrong_is_corrected(captured: Captured) -> None:
    program = captured("tiny-bert")
    clock = Clock(fixed=0.05, wrong=0.7)
    _, report, _ = run(program, small(speedup=1.6), clock)
    assert report.corrections > 0
    assert report.measured is not None
    assert report.measured > 0.98 * 1.6
    assert report.measured == pytest.approx(report.predicted, rel=0.03)
    first, *_, last = report.checks
    assert abs(first[1] / first[0] - 1) > 0.03
    assert last == (report.predicted, report.measured)
    assert report.evaluations > 12
    assert f"{first[0]:.2f}x and {first[1]:.2f}x, then" in " ".join(report.notes())


def test_a_prediction_is_one_from_before_the_measurement(captured: Captured) -> None:
    """Also where nothing is searched again: after the last correction, or without a limit in ms."""

    class Busier(Clock):
        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            cut = whole and program.num_parameters() < size
            late = (0.97, 1.15)[len(self.asked) % 2]
            return replace(cost, ms=cost.ms * (late if cut else 1))

    program = captured("tiny-bert")
    size = program.num_parameters()
    _, report, details = run(program, small(speedup=1.6), Busier())
    assert report.corrections == 3
    assert report.measured is not None
    assert report.measured < 0.95 * report.predicted
    assert "corrections of the table: the machine may be busy" in details["warnings"][-1]
    megabytes = 0.8 * program.nbytes() / 1e6
    _, report, _ = run(program, small(size_mb=megabytes), Clock(fixed=0.05, wrong=0.7))
    assert report.corrections == 0
    assert report.measured is not None
    assert abs(report.measured / report.predicted - 1) > 0.03


def test_a_file_that_is_larger_than_its_parts_is_made_smaller(captured: Captured) -> None:
    class Padded(Clock):
        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            cut = whole and program.num_parameters() < size
            return replace(cost, bytes=cost.bytes + (more if cut else 0))

    program = captured("tiny-bert")
    size, more = program.num_parameters(), program.nbytes() // 20
    megabytes = 0.8 * program.nbytes() / 1e6
    result, report, details = run(program, small(size_mb=megabytes), Padded())
    assert report.corrections > 0
    assert report.mb == pytest.approx((result.nbytes() + more) / 1e6)
    assert report.mb <= megabytes
    assert not any("asked for" in warning for warning in details["warnings"])


def test_a_file_over_its_limit_by_little_is_not_taken(captured: Captured) -> None:
    """By less than the difference from the table that is let pass elsewhere."""

    class Padded(Clock):
        more = 0

        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            return replace(cost, bytes=cost.bytes + (self.more if len(self.asked) > 1 else 0))

    program, clock = captured("tiny-bert"), Padded()
    ctx = Context(calibration=batches(program), devices=lambda file, threads, progress: clock)
    work = Work(small(size_mb=1), program, ctx)
    levels = work._alike({"bytes": 0.8 * program.nbytes()})
    asked = {"size_mb": work.table.total("bytes", levels) / 1e6}
    assert work._checked(asked, levels) is None
    clock.more = program.nbytes() // 200
    assert work._checked(asked, levels) is not None


def test_budgets_that_exclude_each_other_are_refused_before_statistics(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="several budgets at once need scipy")
    program = captured("tiny-mlp")
    work = Work(small(speedup=2, flops=0.5), program, context(program))
    monkeypatch.setattr(Work, "_prior", property(lambda self: pytest.fail("it searched")))
    # What is fast has many FLOPs here.
    turned = tuple(tuple(1 + row[-1] - x for x in row) for row in work.table.amounts["ms"])
    whole = {**work.table.whole, "flops": sum(row[-1] for row in turned)}
    amounts = {**work.table.amounts, "flops": turned}
    work.table = replace(work.table, amounts=amounts, whole=whole)
    for alone in ({"speedup": 1.5}, {"flops": 1.0}):
        work.check_reachable(alone)
    with pytest.raises(UnsupportedError, match="cannot be kept together"):
        work.choose({"speedup": 1.5, "flops": 1.0})


def test_several_budgets_say_early_that_scipy_is_missing(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RecipeError, match="scipy, which is not installed"):
        small(speedup=2, flops=0.5).check(captured("tiny-mlp"))
    for step in (small(flops=0.5), small(speedup=2, ms=5)):
        step.check(captured("tiny-mlp"))


def test_samples_to_search_on_and_to_look_at_the_result_are_left_out(captured: Captured) -> None:
    program = captured("tiny-bert")
    _, report, _ = run(program, small(flops=0.5, samples=1000), count=16)
    assert report.samples == 4  # of 32
    assert report.fresh_loss is not None
    _, report, details = run(program, small(flops=0.5, samples=1000), count=7)
    assert report.samples == 14
    assert report.fresh_loss is None
    assert any("calibration has 7 batches: with 8" in warning for warning in details["warnings"])


@pytest.mark.parametrize("count", [8, 17, 32])
def test_no_batch_is_taken_twice_and_most_of_them_calibrate(captured: Captured, count: int) -> None:
    program = captured("tiny-mlp")
    given = batches(program, count)
    (name,) = given[0]
    given[-1] = {name: given[-1][name].repeat(50, 1)}  # one is as large as all others
    for seed in range(5):
        ctx = context(program, seed=seed)
        ctx.calibration = given
        samples = Work(small(flops=0.5), program, ctx)._samples
        used = list(samples.used.batches())
        found = [id(batch[name]) for batch in (*used, *samples.searched, *samples.fresh)]
        assert sorted(found) == sorted(id(batch[name]) for batch in given)
        assert len(samples.searched) > 0
        assert len(samples.fresh) > 0
        assert len(used) >= 3 / 4 * count


def test_few_batches_all_calibrate_and_the_warning_names_the_stream(captured: Captured) -> None:
    program = captured("tiny-mlp")
    for count, followed in ((3, False), (7, True)):
        work = Work(small(flops=0.5), program, context(program, count))
        assert len(list(work._samples.used.batches())) == count
        assert work._samples.fresh == []
        assert (f"with {HELD_OUT} or more, the dense" in work.warnings[-1]) != followed


def test_warnings_are_of_one_budget(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """As max_drop tries one after another."""

    class Slow(Clock):
        late = 1.2

        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            cut = whole and program.num_parameters() < size
            return replace(cost, ms=cost.ms * (self.late if cut else 1))

    program, clock = captured("tiny-bert"), Slow()
    size = program.num_parameters()
    ctx = Context(calibration=batches(program), devices=lambda file, threads, progress: clock)
    work = Work(small(speedup=1.6), program, ctx)
    monkeypatch.setattr(choose, "CORRECTIONS", 0)
    missed = work.choose({"speedup": 1.6}).report.warnings
    clock.late = 1.0
    met = work.choose({"speedup": 1.3}).report.warnings
    assert any("more, after 0 corrections" in warning for warning in missed)
    assert not any("more, after" in warning for warning in met)


def test_a_prediction_of_int8_is_one_from_before_the_measurement(captured: Captured) -> None:
    class Uneven(Clock):
        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            late = len(self.asked) > 1 and program.quantization is None
            return replace(cost, ms=cost.ms * (1.015 if late else 1.0))

    _, report, _ = run(captured("tiny-bert"), small(speedup=3), Uneven(), Quantize("int8-dynamic"))
    assert report.corrections == 0
    assert report.measured is not None
    assert report.measured / report.predicted == pytest.approx(1.015)


def test_samples_to_look_at_the_result_change_nothing_of_it(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step, every = small(flops=0.5), batches(program, 8)
    (name,) = every[0]
    (apart,) = Work(step, program, context(program, 8))._samples.fresh
    found = []
    for scale in (1.0, 3.0):
        ctx = context(program)
        ctx.calibration = [
            {name: batch[name] * (scale if torch.equal(batch[name], apart[name]) else 1.0)}
            for batch in every
        ]
        found.append(Pipeline([step]).run(program, ctx))
    first, second = (result.program.tensors for result in found)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    losses = [dict(result.results[0].report)["budget"]["fresh_loss"] for result in found]
    assert losses[0] != losses[1]


def test_the_search_holds_no_more_answers_than_fit(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "ANSWERS", 1)
    _, report, _ = run(captured("tiny-bert"), small(flops=0.5, samples=1000))
    assert report.samples == 2
    assert "on 2 samples" in " ".join(report.notes())


def test_whole_branches_may_go_and_need_not(captured: Captured) -> None:
    program = captured("tiny-bert")
    _, report, details = run(program, small(flops=0.05))
    assert [c.id for c in report.choices if c.dropped] == details["dropped"] != []
    _, report, details = run(program, small(flops=0.5, drop=False))
    assert details["dropped"] == []
    assert all(choice.level for choice in report.choices)


def test_speed_is_of_the_float_model_where_the_result_is_quantized(captured: Captured) -> None:
    program = captured("tiny-bert")
    clock = Clock()
    _, report, _ = run(program, small(speedup=3), clock, Quantize("int8-dynamic"))
    assert report.scheme == "int8-dynamic"
    assert report.dense_ms == pytest.approx(flops(program) / 1e6)
    assert report.predicted >= 3 > report.dense_ms / (0.5 * flops(program) / 1e6)
    assert any(p.quantization for p in clock.asked[0].values())


def test_a_dense_model_that_was_timed_wrong_is_searched_again(captured: Captured) -> None:
    class Uneven(Clock):
        def _cost(self, program: Program, whole: bool) -> Cost:
            cost = Clock._cost(self, program, whole)
            # While the table was measured, something else slowed float down.
            late = len(self.asked) > 1 and program.quantization is None
            return replace(cost, ms=cost.ms * (0.8 if late else 1.0))

    program = captured("tiny-bert")
    _, report, _ = run(program, small(speedup=3), Uneven(), Quantize("int8-dynamic"))
    assert report.corrections == 1
    assert report.dense_ms == pytest.approx(0.8 * flops(program) / 1e6)
    assert report.measured is not None
    assert report.measured >= 3


def test_what_is_within_the_budget_stays(captured: Captured) -> None:
    program = captured("tiny-bert")
    clock = Clock()
    result, report, details = run(program, small(speedup=1.5), clock, Quantize("int8-dynamic"))
    assert torch.equal(
        result.tensors["encoder.layer.0.output.dense.weight"],
        program.tensors["encoder.layer.0.output.dense.weight"],
    )
    assert report.evaluations == 0
    assert "within the budget" in details["warnings"][0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speedup": 1e6}, r"cannot be reached.*are left.*outside"),
        ({"size_mb": 1e-6}, r"MB cannot be reached"),
        ({"flops": 1e-6}, r"GFLOPs cannot be reached"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_the_search(
    captured: Captured, options: dict[str, float], says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        run(captured("tiny-bert"), small(**options), Clock(fixed=0.1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "says what to reach"),
        ({"speedup": 1.0}, "above 1"),
        ({"ms": 0.0}, "above 0"),
        ({"flops": 1.5}, "below 1"),
        ({"max_drop": 0.01}, "go together"),
        ({"max_drop": 0.01, "speedup": 2.0, "task": print}, "stands alone"),
        ({"speedup": 2.0, "task": print}, "go together"),
        ({"speedup": 2.0, "target": "dense"}, "target is one of"),
        ({"speedup": 2.0, "batch": (1, 2, 3)}, "samples and tokens"),
        ({"speedup": 2.0, "evaluations": 0}, "evaluations"),
        ({"speedup": 2.0, "blocks": "8x8"}, "32x4"),
        ({"flops": 0.5, "blocks": "32x4"}, "FLOPs do not count them"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Budget(**options)


def test_a_context_without_devices_says_so(captured: Captured) -> None:
    program = captured("tiny-mlp")
    with pytest.raises(RecipeError, match="measures time"):
        Pipeline([small(speedup=2)]).run(program, Context(calibration=batches(program)))


def test_is_repeatable(captured: Captured) -> None:
    program = captured("tiny-bert")
    first, second = (run(program, small(flops=0.5))[1] for _ in range(2))
    assert first == second


def test_statistics_are_kept_for_the_next_run(captured: Captured, tmp_path: Any) -> None:
    program = captured("tiny-bert")
    first = run(program, small(flops=0.5), kept=Kept(tmp_path))[1]
    parts = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert len(parts) == 4
    again = run(program, small(flops=0.5), kept=Kept(tmp_path))[1]
    assert again == first
    assert parts == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.safetensors"))]
    # Other weights, other statistics.
    changed = {n: t + 1e-3 for n, t in program.tensors.items() if t.is_floating_point()}
    run(program.with_tensors(changed), small(flops=0.5), kept=Kept(tmp_path))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8


def test_the_stream_is_followed_where_the_branch_ends(captured: Captured) -> None:
    """Fitted to the dense stream, the cut model is nearer to it than fitted to its own outputs."""
    program = captured("tiny-bert")
    losses = {
        target: run(program, small(flops=0.4, target=target, drop=False), count=32)[1].fresh_loss
        for target in ("stream", "output")
    }
    assert losses["stream"] is not None
    assert losses["output"] is not None
    assert losses["stream"] < losses["output"]


class Agreement:
    """A task: the fraction of samples whose strongest output is the dense model's."""

    def __init__(self, program: Program) -> None:
        self.inputs = batches(program, 30)
        self.expected = [self._strongest(program(**inputs)) for inputs in self.inputs]

    def __call__(self, model: nn.Module) -> MeanOutcome:
        found = [model(**inputs) for inputs in self.inputs]
        return MeanOutcome(
            torch.cat(
                [
                    (self._strongest(f) == e).float()
                    for f, e in zip(found, self.expected, strict=True)
                ]
            )
        )

    def _strongest(self, output: Any) -> Tensor:
        tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
        return tensor.flatten(1).argmax(1)


def test_max_drop_takes_the_fastest_that_loses_no_more(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = small(max_drop=0.3, task=Agreement(program), drop=False)
    _, report, details = run(program, step)
    assert report.drop is not None
    assert report.drop.upper <= 0.3
    assert report.predicted > 1
    tighter = small(max_drop=0.1, task=Agreement(program), drop=False)
    assert run(program, tighter)[1].predicted <= report.predicted
    assert len(details["tried"]) == 6


def test_max_drop_says_so_where_nothing_may_go(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = small(max_drop=1e-9, task=Agreement(program), drop=False)
    result, report, details = run(program, step)
    assert axis_groups(result)[0].size == axis_groups(program)[0].size
    assert report.predicted == 1
    assert any("nothing was removed" in warning for warning in details["warnings"])


@pytest.fixture
def interrupted() -> Callable[[Any], None]:
    def stop(event: Any) -> None:
        if getattr(event, "unit", "") == "models":
            raise KeyboardInterrupt

    return stop


def test_an_interrupted_search_keeps_the_statistics(
    captured: Captured, tmp_path: Any, interrupted: Callable[[Any], None]
) -> None:
    program = captured("tiny-mlp")
    ctx = Context(
        calibration=batches(program),
        devices=lambda file, threads, progress: Clock(),
        kept=Kept(tmp_path),
    )
    with pytest.raises(KeyboardInterrupt):
        Pipeline([small(flops=0.5)], observers=[interrupted]).run(program, ctx)
    assert list(tmp_path.rglob("*.safetensors"))


def test_compile_times_on_onnx_runtime(
    captured: Captured, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    program = captured("tiny-mlp")
    step = small(size_mb=0.8 * program.nbytes() / 1e6)
    compiled = gp.compile(program, [step], calibration=batches(program))
    found = BudgetReport.of(compiled.report.passes[0].details)
    assert found is not None
    assert found.device
    assert found.measured_ms is not None
    assert compiled.program.nbytes() < program.nbytes()


def test_a_folder_says_which_branches_are_gone(captured: Captured, tmp_path: Any) -> None:
    """A text model's folder has them beside its configuration."""
    program = captured("tiny-bert")
    result, report, details = run(program, small(flops=0.05))
    passed = PassReport("budget", "", True, "", None, None, 0.0, (), details)
    before, after = ModelSize.of(program), ModelSize.of(result)
    whole = Report("m", before=before, after=after, capture_seconds=0.0)
    whole = whole.extended(after, [passed], 1.0)
    assert _dropped(whole) == [c.id for c in report.choices if c.dropped] != []


def test_decoders_keep_a_cache(ragged_decoder: Program) -> None:
    result, report, _ = run(ragged_decoder, small(flops=0.6))
    assert result.entries["decode"].cache
    assert not report.choices[0].dropped


class Convolutions(nn.Module):
    """Layer after layer, without branches: what a unit saves depends on the layers beside it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, 24, 48, 32)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(32 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        result: Tensor = self.head(nn.functional.max_pool2d(x, 2).flatten(1))
        return result


@dataclass
class Skipping(Clock):
    """A device that skips zeros: half of them take a sixteenth of the time."""

    def _cost(self, program: Program, whole: bool) -> Cost:
        cost = Clock._cost(self, program, whole)
        if program.quantization is None or not program.quantization.blocks:
            return cost
        sites = linear_sites(axis_groups(program))
        weights = [site.matrix(program) for site in sites]
        alive = sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        return replace(cost, ms=cost.ms * alive**4)


def test_blocks_are_chosen_where_they_are_fast(captured: Captured) -> None:
    program, int8 = captured("tiny-bert"), Quantize("int8-dynamic")
    step = small(speedup=6, blocks="16x4", drop=False)
    clock = Skipping()
    result, report, details = run(program, step, clock, int8)
    some = [choice for choice in report.choices if choice.zeros]
    assert some
    assert result.zeroed
    assert report.measured is not None
    assert report.measured > 5.7
    assert "zero blocks" in " ".join(row[1] for row in report.level_rows())
    assert BudgetReport.of(details) == report
    pattern = parse_pattern("16x4")
    for branch in branches(program):
        choice = next(c for c in report.choices if c.id == branch.id)
        for site in block_sites(axis_groups(result), branch.tensors, pattern):
            units = pattern.units(site.matrix(result).abs())
            gone = int((units == 0).sum())
            assert gone == (removed_count(choice.zeros, units.numel()) if choice.zeros else 0)
    # What is asked of the device is what is chosen: marked for sparse products.
    assert {p.quantization.blocks for p in clock.asked[-1].values() if p.quantization} == {"16x4"}


def test_layers_that_are_quantized_otherwise_are_timed_apart(captured: Captured) -> None:
    """A layer in float has the structure of one in int8, and not its time."""
    program = captured("tiny-bert")
    mark = Quantize("int8-dynamic", ignore=("*layer.0*",)).quantization(program)
    sized = sized_for(small(speedup=2, blocks="16x4"), program, mark)
    models = sized.models()
    for item in sized.items:
        assert bool(item.sparse) == ("layer.1" in item.id)
        for level in item.levels:
            if level is not None:
                names = models[item.id, level].tensors
                assert any(item.id in name for name in names)


def test_what_stays_float_has_no_zero_blocks(captured: Captured) -> None:
    program = captured("tiny-bert")
    mark = Quantize("int8-dynamic", ignore=("*intermediate*",)).quantization(program)
    sized = sized_for(small(speedup=2, blocks="16x4"), program, mark)
    names = {name for item in sized.items for name in item.sparse}
    assert names
    assert not any("intermediate" in name for name in names)


def test_zero_blocks_are_for_int8(captured: Captured) -> None:
    program = captured("tiny-bert")
    for after in ([], [Quantize("int4-weights")]):
        with pytest.raises(RecipeError, match="skipped in int8: put Quantize"):
            run(program, small(speedup=2, blocks="32x4"), Clock(), *after)


@pytest.mark.parametrize("asked", [2.0, 3.0, 5.0, 10.0])
def test_a_chain_of_convolutions_meets_its_budget(asked: float) -> None:
    program = capture(Convolutions().eval(), (torch.randn(4, 1, 6, 6),))
    result, report, details = run(program, small(speedup=asked))
    speed = flops(program) / flops(result)
    assert report.measured == pytest.approx(speed, rel=1e-6)
    # Levels are a seventh apart.
    assert 0.98 * asked < speed < 1.2 * asked
    assert details["verification"]["max_error"] < 1e-5
