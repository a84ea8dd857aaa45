"""Sizes that a captured graph is for: found, kept, named, and refused outside."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.api import compile, inspect, load
from graphprune.capture.capture import capture
from graphprune.errors import CaptureError, GraphPruneError
from graphprune.exporters.onnx.names import size_name
from graphprune.ir.program import Program
from graphprune.ir.sizes import Relation, check_sizes, limits_from_json, limits_to_json
from graphprune.report.report import Report

Change = Callable[[Tensor], Any]


class Net(nn.Module):
    """A linear layer, and what a test does to its output."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.a(x))


class Apart(nn.Module):
    """Every position by itself, which makes a constant of the length."""

    def __init__(self, apart: Change) -> None:
        super().__init__()
        self.a, self.apart = nn.Linear(6, 8), apart

    def forward(self, x: Tensor) -> Any:
        return torch.stack(self.apart(self.a(x)), 1)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.relu(self.a(x)).mean((2, 3)))


def long(h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] > 16 else h


def large_batch(h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] > 3 else h


def single(h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] == 1 else h


def single_position(h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] == 1 else h


def divisible(h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] % 3 == 0 else h


def area(h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] * h.shape[1] > 40 else h


def square(h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] ** 2 > 1000 else h


def rounded(h: Tensor) -> Tensor:
    return h * 2 if math.ceil(h.shape[1] / 4) > 3 else h


def pieces(h: Tensor) -> list[Tensor]:
    return [part.sum(1) for part in torch.tensor_split(h, 2, 1)]


def thirds(h: Tensor) -> Tensor:
    return torch.stack([part.sum(1) for part in h.chunk(3, 1)]).sum(0)


def free(h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 0, (-h.shape[1]) % 4)).reshape(h.shape[0], -1, 4, 4)


def right_or_refused(model: nn.Module, program: Program, shape: tuple[int, ...]) -> bool:
    """Whether the program takes the shape; it must be right there then."""
    x = torch.randn(shape)
    try:
        actual = program(x)
    except GraphPruneError:
        return False
    with torch.no_grad():
        torch.testing.assert_close(actual, model(x))
    return True


SHAPES = [(b, s, 6) for b in (1, 2, 3, 4, 9) for s in (1, 2, 5, 8, 9, 12, 13, 16, 17, 33, 40)]


@pytest.mark.parametrize(
    "change",
    [
        long, large_batch, single, single_position, divisible, area, square, rounded, pieces,
        thirds, free,
    ],
)  # fmt: skip
def test_a_graph_is_right_or_refuses(change: Change) -> None:
    model = Net(change).eval()
    program = capture(model, (torch.randn(2, 8, 6),))
    taken = [shape for shape in SHAPES if right_or_refused(model, program, shape)]
    assert {(2, 8, 6), (3, 8, 6)} <= set(taken)
    assert (len(taken) == len(SHAPES)) == (change is free)


@pytest.mark.parametrize(
    ("change", "bounds"),
    [
        (long, {"sequence": (1, 16)}),
        (large_batch, {"batch": (1, 3)}),
        (single, {"batch": (2, None)}),
        (single_position, {"sequence": (2, None)}),
        (free, {}),
    ],
)
def test_bounds_come_from_branches(
    change: Change, bounds: dict[str, tuple[int, int | None]]
) -> None:
    program = capture(Net(change).eval(), (torch.randn(2, 8, 6),))
    assert program.forward.bounds == bounds
    assert not program.forward.fixed


def test_a_size_outside_is_refused_in_one_sentence() -> None:
    program = capture(Net(long).eval(), (torch.randn(2, 8, 6),))
    with pytest.raises(GraphPruneError) as caught:
        program(torch.randn(2, 40, 6))
    assert str(caught.value) == (
        "input 'x' has size 40 in dimension 1 (sequence), and the captured graph is right only for "
        "sizes of up to 16; compile again with example inputs of that size"
    )


def test_a_relation_is_kept_where_bounds_say_nothing() -> None:
    program = capture(Net(divisible).eval(), (torch.randn(2, 12, 6),))
    assert [str(r) for r in program.forward.relations] == ["(x.shape[1] % 3) == 0"]
    with pytest.raises(GraphPruneError, match=r"x\.shape\[1\] is 10.*x\.shape\[1\] % 3.* == 0"):
        program(torch.randn(2, 10, 6))
    assert "sequence: verified at the example's size only" in program.limit_lines()


def test_two_sizes_that_a_branch_compares_stay_equal() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (x * 2, y) if x.shape[1] == y.shape[1] else (x, y)

    x = torch.randn(2, 8, 6)
    same = capture(Pair(), (x, torch.randn(2, 8, 3)))
    assert torch.equal(same(x, torch.randn(2, 8, 3))[0], x * 2)
    with pytest.raises(GraphPruneError, match=r"x\.shape\[1\] == y\.shape\[1\]"):
        same(x, torch.randn(2, 7, 3))
    other = capture(Pair(), (x, torch.randn(2, 5, 3)))
    assert torch.equal(other(x, torch.randn(2, 6, 3))[0], x)
    with pytest.raises(GraphPruneError, match=r"x\.shape\[1\] != y\.shape\[1\]"):
        other(x, torch.randn(2, 8, 3))


def test_independent_batches_need_not_be_equal() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    program = capture(Towers(), (torch.randn(2, 6), torch.randn(2, 3)))
    assert [t.shape[0] for t in program(torch.randn(3, 6), torch.randn(5, 3))] == [3, 5]


@pytest.mark.parametrize("change", [single, lambda h: h * 2 if h.shape[0] == 2 else h])
def test_a_batch_of_one_that_was_enlarged_must_be_right(change: Change) -> None:
    model = Net(change).eval()
    with pytest.raises(CaptureError, match=r"batch of two, not one.*dynamic_shapes=None"):
        capture(model, (torch.randn(1, 8, 6),))
    program = capture(model, (torch.randn(1, 8, 6),), dynamic_shapes=None)
    assert right_or_refused(model, program, (1, 8, 6))
    assert not right_or_refused(model, program, (2, 8, 6))


@pytest.mark.parametrize("name", ["unbind", "split"])
def test_a_fixed_length_is_named_with_its_operator(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    apart = {"unbind": lambda h: h.unbind(1), "split": lambda h: h.split(1, 1)}[name]
    program = capture(Apart(apart), (torch.randn(2, 7, 6),))
    reason = program.forward.fixed["x"][1]
    assert reason.startswith(f"operator {name} at {__file__}:")
    assert reason in caplog.text
    with pytest.raises(GraphPruneError, match=rf"size 9 in dimension 1.*7 alone.*{name}"):
        program(torch.randn(2, 9, 6))


def test_a_fixed_batch_is_named_with_its_branch() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 2:
                return x * 2
            return x

    program = capture(Two(), (torch.randn(2, 8),))
    assert "(if x.shape[0] == 2:)" in program.forward.fixed["x"][0]


def test_features_are_not_called_fixed(captured: Callable[[str], Program]) -> None:
    assert not captured("tiny-mlp").forward.fixed
    assert not captured("tiny-bert").forward.fixed


def test_sides_of_images_stay_unless_asked_for() -> None:
    model = Convolutional().eval()
    program = capture(model, (torch.randn(2, 3, 16, 12),))
    assert all("--dynamic height,width" in why for why in program.forward.fixed["x"].values())
    asked = capture(model, (torch.randn(2, 3, 16, 12),), dynamic_shapes=("height", "width"))
    assert asked.forward.dynamic == {"x": {0: "batch", 2: "height", 3: "width"}}
    assert not asked.forward.fixed
    assert right_or_refused(model, asked, (1, 3, 24, 9))
    one = capture(model, (torch.randn(2, 3, 16, 12),), dynamic_shapes=["x:3"])
    assert right_or_refused(model, one, (1, 3, 16, 9))
    assert not right_or_refused(model, one, (1, 3, 24, 9))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x:1"], "'x:1' cannot be dynamic: operator conv2d at"),
        (["sequence"], "'sequence' cannot be dynamic: no input of Convolutional has it"),
        (["depth"], "'depth' is no size that can be dynamic; write batch"),
    ],
)
def test_sizes_that_cannot_be_dynamic(names: list[str], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Convolutional().eval(), (torch.randn(2, 3, 16, 12),), dynamic_shapes=names)


def test_a_size_of_one_in_the_examples_cannot_be_dynamic() -> None:
    with pytest.raises(CaptureError, match=r"'height' cannot be dynamic: .* a size of one there"):
        capture(Convolutional().eval(), (torch.randn(2, 3, 1, 12),), dynamic_shapes=["height"])


def test_a_model_with_one_image_size_says_so(captured: Callable[[str], Program]) -> None:
    from graphprune.models.zoo.tiny import tiny

    (why,) = set(captured("tiny-vit").forward.fixed["pixel_values"].values())
    assert "takes no other: Input image size" in why
    with pytest.raises(CaptureError, match=r"'height' cannot be dynamic: .*modeling_vit"):
        capture(*tiny("tiny-vit"), dynamic_shapes=("height", "width"))


def test_declared_ranges_are_kept() -> None:
    length = torch.export.Dim("length", min=4, max=32)
    model = Net(torch.relu).eval()
    program = capture(model, (torch.randn(2, 8, 6),), dynamic_shapes={"x": {1: length}})
    assert program.forward.bounds == {"sequence": (4, 32)}


def test_limits_survive_saving_and_are_told(tmp_path: Path) -> None:
    compiled = compile(Net(long).eval(), [], example_inputs=(torch.randn(2, 8, 6),))
    line = "sequence: up to 16 only"
    assert compiled.report.limits == (line,)
    assert line in str(compiled.report)
    assert line in compiled.report.to_markdown()
    assert line in str(inspect(compiled))
    assert Report.from_json(json.loads(json.dumps(compiled.report.to_json()))) == compiled.report
    compiled.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.program.forward.bounds == {"sequence": (1, 16)}
    with pytest.raises(GraphPruneError, match="up to 16"):
        again.module(torch.randn(2, 17, 6))


@pytest.mark.parametrize("change", [long, divisible, single])
def test_an_artifact_refuses_what_its_model_is_not_for(change: Change, tmp_path: Path) -> None:
    import onnx

    model = Net(change).eval()
    compiled = compile(model, [], example_inputs=(torch.randn(2, 8, 6),))
    made = compiled.export(tmp_path / "out")
    session, dense = made.session(1), made.baseline_session(1)
    taken = 0
    for shape in SHAPES:
        x = torch.randn(shape)
        if not right_or_refused(model, compiled.program, shape):
            for run in (made.feeds, made.benchmark):
                with pytest.raises(GraphPruneError, match=r"'x'|x\.shape"):
                    run({"x": x})
            for runs in (session, dense):
                with pytest.raises(GraphPruneError, match=r"'x'|x\.shape"):
                    runs.run(None, {"x": x.numpy()})
            continue
        taken += 1
        (actual,) = session.run(None, made.feeds({"x": x}))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(actual), model(x), rtol=1e-4, atol=1e-5)
    assert 0 < taken < len(SHAPES)
    entry = compiled.program.forward
    bounds = {size_name(symbol): bound for symbol, bound in entry.bounds.items()}
    assert limits_from_json(made.manifest)["bounds"] == bounds
    assert limits_from_json(made.manifest)["relations"] == entry.relations
    metadata = {
        p.key: json.loads(p.value)
        for p in onnx.load(made.path / "model.onnx").metadata_props
        if p.key.startswith("graphprune.")
    }
    limits = limits_to_json(**{**entry.limits, "bounds": bounds})
    assert metadata == {f"graphprune.{key}": value for key, value in limits.items() if value}


def test_relations_are_arithmetic_and_nothing_else() -> None:
    sizes = {"a": ("x", 0), "b": ("y", 1)}
    shapes = {"x": (6, 1), "y": (1, 4)}
    for text, holds in [
        ("a % 3 == 0", True),
        ("a // b == 2 or not a > b", False),
        ("max(a, b) - min(a, b) == 2 and -a < 0", True),
        ("a ** 2 / b == 9.0", True),
        ("sqrt(b) == 2 and ceil(a / b) == 2 and floor(a / b) == 1", True),
        ("a % (b - 4) == 0", False),
        ("sqrt(b - 5) >= 0", False),
        ("2 ** a ** b > 0", False),
    ]:
        relation = Relation(text, sizes)
        assert relation.holds(shapes) == holds, text
        data = json.loads(json.dumps(limits_to_json({}, [relation], {})))
        assert limits_from_json(data)["relations"] == (relation,)
    for text in ("__import__('os')", "a.real", "(lambda: a)()", "[a for a in b]", "c == 1", "a ="):
        with pytest.raises((ValueError, SyntaxError)):
            Relation(text, sizes)


def test_every_size_is_checked() -> None:
    nothing: dict[str, Any] = {"bounds": {}, "relations": (), "fixed": {}}
    check_sizes({"x": ["batch", 4]}, {"x": (9, 4)}, **nothing)
    with pytest.raises(GraphPruneError, match=r"'x' has 3 dimensions.* with 2"):
        check_sizes({"x": ["batch", 4]}, {"x": (9, 4, 1)}, **nothing)
    with pytest.raises(GraphPruneError, match=r"size 5 in dimension 1.*4 alone, because of it"):
        check_sizes({"x": ["batch", 4]}, {"x": (9, 5)}, **{**nothing, "fixed": {"x": {1: "of it"}}})
    for low, high, size, refused in [(1, 8, 0, False), (3, None, 2, True), (1, 8, 9, True)]:
        limits = {**nothing, "bounds": {"n": (low, high)}}
        if refused:
            with pytest.raises(GraphPruneError, match=rf"size {size} in dimension 0 \(n\)"):
                check_sizes({"x": ["n"]}, {"x": (size,)}, **limits)
        else:
            check_sizes({"x": ["n"]}, {"x": (size,)}, **limits)
