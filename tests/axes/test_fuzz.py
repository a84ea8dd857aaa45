"""The fuzzer: fixed graphs stay right, planted faults are seen, and a failure becomes small."""

import os
import re
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.fuzz.absence import Evaluator
from benchmarks.fuzz.check import Outcome, _rounding, check, difference
from benchmarks.fuzz.drawing import draw, write
from benchmarks.fuzz.minimize import minimized, script
from benchmarks.fuzz.source import Graph, Step, module_of
from graphprune.axes import algebra
from graphprune.axes.rules import REWRITERS, RULES
from graphprune.axes.rules.context import RewriteContext, RuleContext

SEED = 13
RELU = "F.relu({})"


@pytest.fixture(autouse=True)
def same_default_dtype() -> Iterator[None]:
    """The fuzzer works in float64 and must leave the default as it was."""
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() is before


def failed(outcome: Outcome) -> list[str]:
    return [f"{f.kind}: {f.detail} {f.kept}" for f in outcome.failures]


def graph_of(kind: str, variant: int = 0, domain: str = "sequence", act: str = RELU) -> Graph:
    return Graph(domain, 4, 2, 4, False, (Step(kind, 2, act, variant),), seed=5)


@pytest.mark.parametrize("number", range(20))
def test_fixed_graphs(number: int) -> None:
    assert failed(check(replace(draw(SEED, number), dynamic=number < 2), 1)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20, 220 if os.environ.get("GRAPHPRUNE_LONG") else 120))
def test_more_fixed_graphs(number: int) -> None:
    assert failed(check(draw(SEED, number), 2)) == []


def test_graphs_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert draw(3, 8) == draw(3, 8)
    assert len({draw(3, n).to_json() for n in range(20)} | {draw(4, 8).to_json()}) == 21
    assert Graph.from_json(draw(3, 8).to_json()) == draw(3, 8)
    assert write(draw(3, 8)).text() == write(draw(3, 8)).text()


def test_a_written_module_holds_what_it_reads_and_no_more() -> None:
    for number in range(30):
        source = write(draw(5, number))
        names = {name.split(".")[0] for name in module_of(source.text()).state_dict()}
        body = "\n".join([*source.body, *source.outputs])
        assert all(f"self.{name}" in body for name in names)


def test_the_cut_is_seen() -> None:
    outcomes = [check(replace(draw(SEED, number), dynamic=False), 1) for number in (2, 3)]
    assert sum(o.cuts for o in outcomes) > sum(o.unseen for o in outcomes)


# Planted faults: each as wrong as the rewrite could be, and seen by the oracle of that name.


def test_a_mean_that_is_not_pinned_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("reduced")  # a mean over a part of the hidden units
    assert failed(check(graph, 2, thorough=True)) == []
    monkeypatch.delitem(REWRITERS, "mean")
    kinds = {f.kind for f in check(graph, 2, thorough=True).failures}
    assert kinds == {"wrong: absence"}


def test_a_scale_that_is_not_pinned_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("attention")
    assert failed(check(graph, 2, thorough=True)) == []
    monkeypatch.delitem(REWRITERS, "scaled_dot_product_attention")
    assert {f.kind for f in check(graph, 2, thorough=True).failures} == {"wrong: absence"}


def test_an_axis_that_should_be_frozen_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = next(
        g
        for g in (graph_of("chosen", v) for v in range(1, 400))
        if ".softmax(-1)" in write(g).text()
    )
    assert failed(check(graph, 2, thorough=True)) == []
    monkeypatch.setitem(RULES, "softmax", lambda c: c.dims(c.node.args[0]))
    failures = check(graph, 2, thorough=True).failures
    assert {f.kind for f in failures} == {"wrong: absence"}
    assert "depends on a removed unit" in failures[0].detail


def test_other_units_kept_in_a_weight_than_in_the_next_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contracted axes cut at shifted places: all shapes fit, and nothing else does."""
    import graphprune.rewrite.shrink as rewrite

    graph = graph_of("linear")
    assert failed(check(graph, 1)) == []
    indexed = rewrite._indexed

    def shifted(groups: Any, name: str, tensor: Tensor, keep: Any) -> Tensor:
        dims = groups.axes.tensors[name]
        rolled = {
            axis: ((index + 1) % int(axis.size)).sort().values for axis, index in keep.items()
        }
        reads = len(dims) == 2 and any(leaf in keep for leaf in algebra.leaves(dims[1]))
        return indexed(groups, name, tensor, rolled if reads else keep)

    monkeypatch.setattr(rewrite, "_indexed", shifted)
    assert {f.kind for f in check(graph, 2, thorough=True).failures} == {"wrong: absence"}


def test_a_rule_that_orders_units_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A concatenation with its parts the other way round."""
    graph = next(
        g
        for g in (graph_of("rearranged", v) for v in range(1, 400))
        if re.search(r"torch\.cat\(\[h\d+, x\]", write(g).text())
    )
    assert failed(check(graph, 2, thorough=True)) == []
    cat = RULES["cat"]

    def reversed_cat(c: RuleContext) -> Any:
        c.arguments["tensors"] = list(reversed(c.get("tensors")))
        return cat(c)

    monkeypatch.setitem(RULES, "cat", reversed_cat)
    assert check(graph, 2, thorough=True).failures


def test_a_rewriter_that_acts_when_nothing_goes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(r: RewriteContext) -> None:
        r.scale_after(0.5)

    monkeypatch.setitem(REWRITERS, "relu", always)
    assert [f.kind for f in check(graph_of("linear"), 1).failures] == ["wrong: identity"]


def test_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(c: RuleContext) -> Any:
        raise KeyError("gone")

    monkeypatch.setitem(RULES, "relu", broken)
    assert [f.kind for f in check(graph_of("linear"), 1).failures] == ["crash: axes KeyError"]


def test_plain_torch_sees_what_a_blind_interpreter_would_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second oracle alone: the first one follows the faulty program here."""
    monkeypatch.delitem(REWRITERS, "scaled_dot_product_attention")
    monkeypatch.setattr("benchmarks.fuzz.check._compared", lambda *a: "")
    kinds = {f.kind for f in check(graph_of("attention"), 2, thorough=True).failures}
    assert kinds == {"wrong: zeroed weights"}


def test_a_failure_becomes_small_and_prints_as_a_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(REWRITERS, "mean")
    steps = (
        Step("reduced", 2, "F.silu({})", 0),
        Step("linear", 3, RELU, 7),
    )
    graph = Graph("sequence", 8, 2, 4, False, steps, seed=1)
    failure = check(graph, 2, thorough=True).failures[0]
    small = minimized(failure)
    assert [s.kind for s in small.graph.steps] == ["reduced"]
    assert small.graph.width == 4
    assert len(small.kept) == 1
    assert [f.kind for f in check(small.graph, 4, thorough=True).failures] == [failure.kind]
    path = tmp_path / "small.py"
    path.write_text(script(small))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith("wrong: absence: output 0 differs by")


@pytest.mark.parametrize(
    ("expected", "actual", "wrong"),
    [
        ([[1.0, 2.0], [1e6, 1e6]], [[1.0, 2.0 + 1e-6], [1e6, 1e6]], True),
        ([[1.0, float("nan")]], [[1.0, float("nan")]], False),
        ([[1.0, float("nan")]], [[1.0, float("inf")]], True),
        ([[1.0, float("inf")]], [[1.0, float("-inf")]], True),
        ([[0.0, 0.0]], [[0.0, 1e-3]], True),
        ([[1.0, 3.0]], [[1.0 + 1e-14, 3.0]], False),
    ],
)
def test_rows_are_compared_each_by_its_own_size(expected: Any, actual: Any, wrong: bool) -> None:
    error = difference(torch.tensor(expected).double(), torch.tensor(actual).double())
    assert (not error <= 1e-8) is wrong


@pytest.mark.parametrize(
    ("function", "least", "most"),
    [
        (lambda x: [2 * x], 1e-8, 1e-8),
        (lambda x: [1e6 * (x - x.flip(-1))], 1e-6, 9e-6),
        (lambda x: [x.floor()], 1e-4, 1e-4),
    ],
)
def test_what_float64_cannot_tell_is_no_failure(function: Any, least: float, most: float) -> None:
    """Sums that nearly cancel make its last bit large; more than 1e-4 is never allowed."""
    x = torch.tensor([[1.0, 1.0 + 2e-9]], dtype=torch.float64)
    assert least <= _rounding(function, [x], function(x)) <= most


class Absent(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = (x + 1).exp()
        return y, y.sum(-1), y.mean(-1), y.flip(-1), y.amax(-1), torch.ones_like(x)


def test_absent_terms_are_left_out_and_followed() -> None:
    """What each kind of operator makes of an absent unit, against numbers by hand."""
    x = torch.tensor([[1.0, 2.0, 3.0]])
    mark = torch.tensor([[False, True, False]])
    exported = torch.export.export(Absent(), (x,))
    graph: fx.Graph = exported.module().graph
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        graph.erase_node(node)
    run = Evaluator(graph, {}, {}).run([x], [mark])
    values = (x + 1).exp()[0]
    torch.testing.assert_close(run.outputs[1][0], values[0] + values[2])
    torch.testing.assert_close(run.outputs[2][0], (values[0] + values[2]) / 3)
    marks = [None if m is None else m.tolist() for m in run.absent]
    assert marks[0] == [[False, True, False]]
    assert marks[3] == [[False, True, False]]
    assert marks[4] == [True]  # the largest may be any of them
    assert marks[5] == [[False, True, False]]
    assert not any(m is not None and any(m) for m in marks[1:3])


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Buffer(torch.tensor([0, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.numbers]


def test_absent_indices_are_followed_where_all_rows_are_alike() -> None:
    """Graph 5591 of seed 2026: behind a saturated tanh no row tells which was looked up."""
    x = torch.ones(1, 2, 2)
    graph: fx.Graph = torch.export.export(Numbered(), (x,)).module().graph
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        graph.erase_node(node)
    mark = torch.tensor([False, True, False])
    (found,) = (
        Evaluator(graph, {"numbers": torch.tensor([0, 0, 1])}, {"numbers": mark})
        .run([x], [None])
        .absent
    )
    assert found is not None
    assert found[0, :, 0].tolist() == mark.tolist()
