"""The comparison behind verification: nothing in an output hides a wrong rewrite from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes import analysis, axis_groups
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError, VerificationError
from graphprune.ir.batches import batches, fresh_inputs, second_inputs
from graphprune.ir.program import Program
from graphprune.passes import PruneAxis, PruneHeads, PruneNeurons
from graphprune.pipeline.base import Context
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import TOLERANCE_FLOAT64, _error, verify_rewrite
from graphprune.verify.error import relative_error

Ending = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Neurons between two weights, and something at the end."""

    def __init__(self, ending: Ending, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, width)
        self.ending = ending

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(self.b(torch.relu(self.a(x))))


def blind_error(reference: Program, candidate: Program) -> float:
    """The comparison as it was: outputs, two batches, relative to the largest value."""
    worst = 0.0
    for inputs in (list(reference.forward.example), second_inputs(reference.forward)):
        pairs = zip(reference.run(inputs), candidate.run(inputs), strict=True)
        for a, b in pairs:
            same = (a == b) | (a.isnan() & b.isnan())
            finite = a[a.isfinite()]
            scale = float(finite.abs().max()) if finite.numel() else 0.0
            difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf).max()
            worst = max(worst, float(difference) / max(scale, 1e-30))
    return worst


ALLOWED = torch.arange(12) < 6
COLUMN = torch.tensor([1e7] + [1.0] * 11)
ENDINGS: dict[str, Ending] = {
    "masked scores": lambda y: torch.where(ALLOWED, y, torch.finfo(torch.float32).min),
    "a few masked scores": lambda y: y.masked_fill(~ALLOWED, -1e9),
    "a large constant": lambda y: y + 1e7,
    "one large column": lambda y: y * COLUMN,
    "NaN everywhere": lambda y: y * torch.nan,
}


def planted(program: Program, name: str, by: float = 0.01) -> tuple[Program, Program]:
    """A masked program, and the shrunk one with one row of a weight slightly wrong."""
    (group,) = [g for g in axis_groups(program) if g.role == "neuron"]
    kept = {group.id: list(range(0, group.size, 2))}
    shrunk = shrink(program, kept)
    wrong = shrunk.tensors[name].clone()
    wrong[1] *= 1 + by
    return mask(program, kept), shrunk.with_tensors({name: wrong})


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_planted_fault_is_seen_whatever_the_output_holds(ending: str) -> None:
    program = capture(Net(ENDINGS[ending]).eval(), (torch.randn(3, 6),))
    reference, wrong = planted(program, "b.weight", 1e-3)
    assert blind_error(reference, wrong) <= 1e-5
    with pytest.raises(VerificationError, match=r"linear_1|NaN everywhere"):
        verify_rewrite(reference, wrong)


def test_a_planted_fault_in_one_column_is_seen_at_the_output_alone() -> None:
    """The last operator is the first that differs, and a large column lies beside it."""
    model = Net(nn.Identity()).eval()
    with torch.no_grad():
        model.b.weight[0] *= 1e7
    reference, wrong = planted(capture(model, (torch.randn(3, 6),)), "b.bias", 1e-2)
    assert blind_error(reference, wrong) <= 1e-5
    with pytest.raises(VerificationError, match="linear_1"):
        verify_rewrite(reference, wrong)


def test_examples_of_zeros_hide_nothing() -> None:
    program = capture(Net(nn.Identity()).eval(), (torch.zeros(3, 6),))
    reference, wrong = planted(program, "a.weight")
    assert blind_error(reference, wrong) == 0
    with pytest.raises(VerificationError, match="linear"):
        verify_rewrite(reference, wrong)


def test_small_rows_beside_large_ones_are_compared_by_their_own_scale() -> None:
    """A large sample in the batch, and a fault that only the others show."""
    scale = torch.tensor([[1e7], [1.0], [1.0]])
    small = torch.tensor([[0.0], [1.0], [1.0]])
    model = Net(nn.Identity()).eval()
    program = capture(model, (torch.randn(3, 6),), dynamic_shapes=None)
    (y,) = program.run(program.forward.example)
    a, b = y * scale, y * scale + 1e-3 * small
    assert float((a - b).abs().max() / a.abs().max()) < 1e-5
    assert relative_error(a, b) > 1e-4


def test_a_row_that_magnifies_rounding_may_lose_little_of_it_in_float32() -> None:
    """As in squares of SmolLM2's large activations: 150 times more in float64 than that says."""
    exact = torch.rand(5, 8, dtype=torch.float64)
    exact[:, 0] = 7e5
    rounded = exact.clone()
    rounded[:, 0] += 0.4
    lost = 0.4 * 2.0**-29
    near, wrong = exact.clone(), exact.clone()
    near[0, 0] += 150 * lost
    wrong[0, 0] += 1e4 * lost
    assert _error(exact, near, None) > TOLERANCE_FLOAT64
    assert _error(exact, near, rounded) <= TOLERANCE_FLOAT64
    assert _error(exact, wrong, rounded) > TOLERANCE_FLOAT64


def test_a_row_that_float32_has_exactly_rounds_like_the_others() -> None:
    """Short rows after a relu: their scale is 0, and one of them is exact in float32 by luck."""
    exact = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(5, 1)
    rounded = exact * (1 + 6e-8)
    rounded[0] = exact[0]
    near, wrong = exact.clone(), exact.clone()
    near[0, 1] += 4e-16
    wrong[0, 1] += 1e-6
    assert _error(exact, near, rounded) <= TOLERANCE_FLOAT64
    assert _error(exact, wrong, rounded) > TOLERANCE_FLOAT64
    assert _error(exact, near, exact) > TOLERANCE_FLOAT64


def test_an_output_of_nothing_but_nan_says_so() -> None:
    program = capture(Net(lambda y: y * torch.nan).eval(), (torch.randn(3, 6),))
    with pytest.raises(VerificationError, match="output 0 of 'forward' is NaN everywhere"):
        verify_rewrite(program, program)


# --- the batches -------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(50, 8), nn.Embedding(1, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        h = self.e(ids) + self.f(kinds) + bias[..., None]
        scores = (h @ h.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
        return self.o(scores.softmax(-1) @ h)


def text() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(3, 9, (2, 9))
    ones = torch.ones(2, 9, dtype=torch.int64)
    return capture(Text().eval(), (ids, torch.zeros_like(ids), ones, torch.rand(2, 9)))


def test_fresh_floats_keep_the_scale_of_the_examples() -> None:
    program = capture(Net(nn.Identity()).eval(), (torch.randn(400, 6) * 50 + 7,))
    (x,) = fresh_inputs(program.forward)
    assert float(x.std()) == pytest.approx(50, rel=0.1)
    assert float(x.mean()) == pytest.approx(7, abs=5)


def test_a_mask_that_says_what_to_leave_out_is_padded_the_other_way_round() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return x.masked_fill(padding, 0.0)

    shape = (2, 6)
    program = capture(Masked(), (torch.randn(shape), torch.zeros(shape, dtype=torch.bool)))
    _, padding = second_inputs(program.forward)
    assert padding[-1].any()
    assert not padding[:, 0].any()


def test_a_finite_bound_is_a_batch_of_its_own() -> None:
    from dataclasses import replace

    entry = replace(text().forward, bounds={"sequence": (2, 20), "batch": (2, None)})
    assert [b[0].shape for b in batches(entry)] == [(2, 9), (3, 6), (2, 9), (2, 20)]
    far = replace(entry, bounds={"sequence": (2, 4096)})
    program = replace(text(), entries={"forward": far})
    assert verify_rewrite(program, program)["bounds_not_run"] == ["sequence <= 4096"]


# --- what the outputs show ---------------------------------------------------------------------


def verification(model: nn.Module, *inputs: Tensor, step: Any = None) -> tuple[Any, str]:
    compiled = gp.compile(model.eval(), [step or PruneNeurons(0.5)], example_inputs=inputs)
    return compiled.report.passes[0].details["verification"], str(compiled.report)


def test_the_report_says_by_how_much_the_cut_moved_the_outputs() -> None:
    check, report = verification(Net(nn.Identity()), torch.randn(3, 6))
    assert check["moved"] > 1e-2
    assert check["observable"]
    assert "removing the units equals masking them; masking moved the outputs by" in report


@pytest.mark.parametrize("kind", ["a last layer of zeros", "a constant output"])
def test_a_cut_that_no_output_shows_is_not_called_verified(kind: str) -> None:
    model = Net(nn.Identity() if kind.startswith("a last") else torch.zeros_like)
    if kind.startswith("a last"):
        nn.init.zeros_(model.b.weight)
    check, report = verification(model, torch.randn(3, 6))
    assert check["moved"] == 0
    assert not check["observable"]
    assert "not observable on these inputs: masking what prune-neurons removed" in report
    assert "equals masking" not in report


def test_dead_units_rightly_move_nothing() -> None:
    model = Net(nn.Identity())
    with torch.no_grad():
        model.a.weight[:8] = 0
        model.a.bias[:8] = -0.01
        model.b.weight[:, :8] = 0.01  # the weakest units
    check, report = verification(model, torch.randn(3, 6))
    assert check["moved"] == 0
    assert check["observable"]
    assert "equals masking" in report


def test_infinite_units_are_masked_and_not_multiplied_by_zero() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).log())

    torch.manual_seed(0)
    model = Log().eval()
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:4] = -1  # log(0)
        model.a.weight[4:] *= 0.01
        model.a.bias[4:] = 1
        model.a.weight[:4, 0] = 1e-3
    program = capture(model, (torch.randn(3, 6),))
    (group,) = [g for g in axis_groups(program) if g.role == "neuron"]
    kept = {group.id: range(4, 8)}
    report = verify_rewrite(mask(program, kept), shrink(program, kept))
    assert report["max_error"] < 1e-5


@pytest.mark.parametrize("extra", [None, 7, "name"])
def test_outputs_that_are_no_tensors_are_compared_too(extra: object) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(nn.Identity())

        def forward(self, x: Tensor) -> Any:
            return self.net(x), extra, x.shape[0]

    compiled = gp.compile(Mixed().eval(), [PruneNeurons(0.5)], example_inputs=(torch.randn(3, 6),))
    assert compiled.module(torch.randn(5, 6))[1:] == (extra, 5)


def test_a_batch_that_the_model_itself_refuses_is_reported() -> None:
    class Rows(nn.Module):
        """Rows 0 to 4 of a table by arithmetic on what comes in: most numbers are out of range."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 6)
            self.net = Net(nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.table(x.round().long()))

    examples = torch.tensor([[0.0, 4.0, 1.0], [2.0, 2.0, 3.0]])
    program = capture(Rows().eval(), (examples,))
    (refused,) = verify_rewrite(program, program)["refused"]
    assert "inputs of shapes [(2, 3)]" in refused


# --- premises ----------------------------------------------------------------------------------


class Weighted(nn.Module):
    """One weight between two others, changed by a statistic of itself."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(6, 16), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(F.linear(torch.relu(self.a(x)), self.change(self.weight))))


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight standardization": lambda w: w - w.mean(1, keepdim=True),
    "normalize": lambda w: F.normalize(w, dim=1),
    "a spectral norm by hand": lambda w: w / (w @ torch.ones(16)).norm(),
    "a sum": lambda w: w / w.abs().sum(),
    "einsum": lambda w: w / torch.einsum("oi,oi->o", w, w)[:, None],
}


def role_of(program: Program, tensor: str, dim: int) -> Any:
    (group,) = axis_groups(program).of(tensor, dim)
    return group


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_sum_over_weights_alone_is_a_statistic(statistic: str) -> None:
    program = capture(Weighted(STATISTICS[statistic]).eval(), (torch.randn(3, 6),))
    assert role_of(program, "a.weight", 0).normalized
    with pytest.raises(UnsupportedError, match="normalization"):
        gp.compile(program, [PruneNeurons(0.5, targets=("a.weight",))])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_masks_where_units_are_carried_see_what_masks_at_sums_cannot(
    statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the rule wrong, the second way of masking would say so."""
    monkeypatch.setattr(analysis, "_normalize_weight_sums", lambda facts: None)
    program = capture(Weighted(STATISTICS[statistic]).eval(), (torch.randn(3, 6),))
    kept = {role_of(program, "a.weight", 0).id: range(8)}
    verify_rewrite(mask(program, kept), shrink(program, kept))
    with pytest.raises(VerificationError, match="differs"):
        Context().shrink(program, kept)


def test_a_product_of_weights_over_an_axis_of_their_own_is_exact() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 6))
            self.c = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.linear(x, self.u @ self.v))

    torch.manual_seed(0)
    program = capture(LowRank().eval(), (torch.randn(3, 6),))
    rank = role_of(program, "u", 1)
    assert not rank.normalized
    smaller, report = Context().shrink(program, {rank.id: [0, 3]})
    assert smaller.tensors["v"].shape == (2, 6)
    assert report["max_error"] < 1e-5


def _moved(x: Tensor) -> Tensor:
    t = x.transpose(-1, -2)
    return (t - t.mean(-2, keepdim=True)).transpose(-1, -2)


class Hidden(nn.Module):
    """Something by hand on the values between two weights."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(6, 16), nn.Linear(16, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.change(self.a(x)))


def _layer_norm(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


CENTERED: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm by hand": _layer_norm,
    "sum over a number": lambda x: x - (x.sum(-1) / 16).unsqueeze(-1),
    "scaled": lambda x: torch.add(x, x.mean(-1, keepdim=True), alpha=-1),
    "in place": lambda x: x.clone().sub_(x.mean(-1, keepdim=True)),
    "expanded": lambda x: x - x.mean(-1, keepdim=True).expand_as(x),
    "weighted": lambda x: x - x.mean(-1, keepdim=True) * torch.arange(16.0),
    "negative": lambda x: x + -x.mean(-1, keepdim=True),
    "moved": _moved,
    "lerp": lambda x: torch.lerp(x, x.mean(-1, keepdim=True), 0.5),
}
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "RMS by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "L2": lambda x: F.normalize(x, dim=-1),
    "gate": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "RMS norm and a residual": lambda x: x + F.rms_norm(x, (16,)),
    "RMS and a residual": lambda x: x + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1),
}


@pytest.mark.parametrize("kind", CENTERED)
def test_a_mean_subtracted_along_its_own_axis_normalizes_it(kind: str) -> None:
    program = capture(Hidden(CENTERED[kind]).eval(), (torch.randn(2, 5, 6),))
    assert role_of(program, "a.weight", 0).normalized


@pytest.mark.parametrize("kind", EXACT)
def test_a_sum_that_only_scales_is_exact(kind: str) -> None:
    program = capture(Hidden(EXACT[kind]).eval(), (torch.randn(2, 5, 6),))
    group = role_of(program, "a.weight", 0)
    assert not group.normalized
    _, report = Context().shrink(program, {group.id: range(0, 16, 3)})
    assert report["max_error"] < 1e-5
    assert report["observable"]


# --- single rules ------------------------------------------------------------------------------


class AfterPin(nn.Module):
    """An operator that reads the axes of its operand, right behind a pinned result."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b = kind, nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.small = nn.RMSNorm(16), nn.RMSNorm(8)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.small.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "unflatten":
            return self.b(self.norm(h).unflatten(-1, (4, 4)).tanh().flatten(-2))
        if self.kind == "mean of a mean":
            return h.unflatten(-1, (4, 4)).mean(-1).mean(-1)
        if self.kind == "mean of a norm":
            return x * self.norm(h).mean(-1, keepdim=True)
        q, v = (h.unflatten(-1, (2, 8)).transpose(1, 2) for _ in range(2))
        z = F.scaled_dot_product_attention(self.small(q), self.small(q.tanh()), v)
        return self.b(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["unflatten", "mean of a mean", "mean of a norm", "attention"])
def test_operators_after_a_pinned_result(kind: str) -> None:
    program = capture(AfterPin(kind).eval(), (torch.randn(2, 5, 8),))
    free = [g for g in axis_groups(program) if not g.frozen and not g.normalized]
    assert free
    for group in free:
        _, report = Context().shrink(program, {group.id: range(group.size // 2)})
        assert report["max_error"] < 1e-5


def test_what_is_pinned_keeps_the_name_of_what_it_computes() -> None:
    program = capture(AfterPin("mean of a mean").eval(), (torch.randn(2, 5, 8),))
    group = next(g for g in axis_groups(program) if not g.frozen)
    shrunk = shrink(program, {group.id: range(2)})
    targets = {n.name: n.target for n in shrunk.forward.graph.nodes}
    # The outer four are averaged second.
    assert targets["mean"] is torch.ops.aten.mean.dim
    assert targets["mean_1"] is torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("made", ["zeros", "eye", "linspace", "ones", "full"])
def test_tensors_made_without_a_type_follow_into_float64(made: str) -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(nn.Identity(), 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            if made == "zeros":
                z = torch.zeros(x.shape[0], 8)
                z[..., :8] = y
                return z
            if made == "eye":
                return y @ torch.eye(8)
            if made == "linspace":
                return y @ torch.diag(torch.linspace(0, 1, 8))
            return torch.cat([y, torch.ones(len(y), 1) if made == "ones" else
                              torch.full((len(y), 1), 0.5)], 1)  # fmt: skip

    program = capture(Makes().eval(), (torch.randn(3, 6),))
    wide = program.cast(torch.float32, torch.float64)
    assert wide.run(wide.forward.example)[0].dtype is torch.float64
    name = "net.b.weight"
    with pytest.raises(VerificationError, match="differs"):
        verify_rewrite(program, program.with_tensors({name: program.tensors[name] * 1.0001}))


class Maps(nn.Module):
    def __init__(self, average: bool, returned: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.average, self.returned = average, returned

    def forward(self, x: Tensor) -> Any:
        out, maps = self.attention(x, x, x, average_attn_weights=self.average)
        return (out, maps) if self.returned else out


@pytest.mark.parametrize("average", [True, False])
def test_heads_whose_maps_the_model_returns_stay(average: bool) -> None:
    compiled: Sequence[Any] = axis_groups(capture(Maps(average).eval(), (torch.randn(2, 5, 16),)))
    (heads,) = [g for g in compiled if g.role == "head"]
    assert heads.frozen
    with pytest.raises(UnsupportedError, match=r"model returns an average|output of the model"):
        gp.compile(Maps(average).eval(), [PruneHeads(0.5)], example_inputs=(torch.randn(2, 5, 16),))


def test_heads_whose_maps_are_thrown_away_go() -> None:
    check, _ = verification(Maps(True, returned=False), torch.randn(2, 5, 16), step=PruneHeads(0.5))
    assert check["max_error"] < 1e-5


def test_prune_axis_may_still_cut_a_normalized_axis_on_request() -> None:
    step = PruneAxis(0.5, groups=("a.weight*0*",), normalized=True)
    check, _ = verification(Hidden(_layer_norm), torch.randn(2, 5, 6), step=step)
    assert check["drift"] > 1e-3
