"""Rewriting and its verifier: sizes, pinned scales, and planted faults that must be caught."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError, VerificationError
from graphprune.ir.graph import is_op, set_bound
from graphprune.ir.program import Program
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite

Captured = Callable[[str], Program]


@pytest.fixture
def cut(captured: Captured) -> tuple[Program, Program]:
    """A tiny encoder with half of all heads, dimensions and neurons gone, and masked."""
    program = captured("tiny-roberta")
    roles = ("head", "qk_dim", "v_dim", "neuron")
    kept = {g.id: range(g.size // 2) for g in axis_groups(program).with_role(*roles)}
    return mask(program, kept), shrink(program, kept)


def test_the_true_cut_verifies(cut: tuple[Program, Program]) -> None:
    report = verify_rewrite(*cut)
    assert report["max_error"] <= 1e-5


def first(program: Program, *names: str) -> tuple[Program, torch.fx.Node]:
    fork = program.fork()
    return fork, next(n for n in fork.forward.graph.nodes if is_op(n, *names))


def test_a_wrong_slice_is_caught(cut: tuple[Program, Program]) -> None:
    masked, shrunk = cut
    name = "roberta.encoder.layer.1.output.dense.weight"
    wrong = masked.tensors[name][:, 1 : 1 + shrunk.tensors[name].shape[1]]
    with pytest.raises(VerificationError, match=r"differs by .*first node that differs is 'linear"):
        verify_rewrite(masked, shrunk.with_tensors({name: wrong}))


def test_a_lost_mask_is_caught(cut: tuple[Program, Program]) -> None:
    masked, shrunk = cut
    fork, node = first(shrunk, "scaled_dot_product_attention")
    set_bound(node, {"attn_mask": None})
    with pytest.raises(VerificationError, match="first node that differs is 'linear"):
        verify_rewrite(masked, fork)


def test_a_stale_size_is_caught(cut: tuple[Program, Program]) -> None:
    _, shrunk = cut
    fork, node = first(shrunk, "reshape")
    sizes = list(node.args[1])  # type: ignore[arg-type]
    set_bound(node, {"shape": [*sizes[:-1], 8]})
    with pytest.raises(VerificationError, match="node 'view"):
        fork.with_graphs({"forward": fork.forward.graph})


def test_a_changed_scale_is_caught(cut: tuple[Program, Program]) -> None:
    masked, shrunk = cut
    fork, node = first(shrunk, "scaled_dot_product_attention")
    assert dict(node.kwargs)["scale"] == pytest.approx(8**-0.5)
    set_bound(node, {"scale": None})
    with pytest.raises(VerificationError, match="differs"):
        verify_rewrite(masked, fork)


def test_a_lost_bias_entry_is_caught(cut: tuple[Program, Program]) -> None:
    masked, shrunk = cut
    name = "roberta.encoder.layer.0.intermediate.dense.bias"
    wrong = shrunk.tensors[name].roll(1)
    with pytest.raises(VerificationError):
        verify_rewrite(masked, shrunk.with_tensors({name: wrong}))


def test_a_small_error_that_float32_noise_could_hide_is_caught(captured: Captured) -> None:
    program = captured("tiny-mlp")
    name = "layers.4.bias"
    wrong = program.tensors[name] + 3e-5 * program.run(program.forward.example)[0].abs().max()
    with pytest.raises(VerificationError):
        verify_rewrite(program, program.with_tensors({name: wrong}))


def test_the_input_program_is_untouched(captured: Captured) -> None:
    program = captured("tiny-bert")
    before = str(program.forward.graph), {k: v._version for k, v in program.tensors.items()}
    group = axis_groups(program).with_role("head")[0]
    shrink(program, {group.id: [0, 1]})
    mask(program, {group.id: [0, 1]})
    assert before == (
        str(program.forward.graph),
        {k: v._version for k, v in program.tensors.items()},
    )


def test_history_remembers_what_stayed(captured: Captured) -> None:
    program = captured("tiny-bert")
    group = axis_groups(program).with_role("head")[0]
    once = shrink(program, {group.id: [3, 1]})
    assert once.history[-1] == {"removed": {group.id: {"of": 4, "kept": [1, 3]}}}


def test_cuts_compose(captured: Captured) -> None:
    """Two cuts one after the other are one cut of both."""
    program = captured("tiny-gpt2")
    group = axis_groups(program).with_role("neuron")[0]
    twice = shrink(shrink(program, {group.id: range(10, 100)}), {group.id: range(5, 50)})
    once = shrink(program, {group.id: range(15, 60)})
    verify_rewrite(once, twice, tolerance=0.0)


def test_keeping_everything_changes_nothing(captured: Captured) -> None:
    program = captured("tiny-bert")
    kept = {g.id: range(g.size) for g in axis_groups(program)}
    verify_rewrite(program, shrink(program, kept), tolerance=0.0)


def test_frozen_axes_and_wrong_units_are_refused(captured: Captured) -> None:
    program = captured("tiny-bert")
    groups = axis_groups(program)
    residual = groups.with_role("residual")[0]
    with pytest.raises(UnsupportedError, match=r"residual axis .* output of the model"):
        shrink(program, {residual.id: [0]})
    head = groups.with_role("head")[0]
    for wrong in ([], [4], [-1, 0]):
        with pytest.raises(UnsupportedError, match="units 0 to 3 and keeps at least one"):
            shrink(program, {head.id: wrong})
    with pytest.raises(UnsupportedError, match="no axis group 'nonsense'"):
        shrink(program, {"nonsense": [0]})


def test_the_mask_sits_where_units_are_summed() -> None:
    """elu(x) + 1 is one at zero: zeroing the weights that make a unit would not remove it."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(F.elu(self.a(x)) + 1)
            return result

    program = capture(Shifted(), (torch.randn(2, 4),))
    kept = {"a.weight[0]": [0, 2, 5]}
    shrunk = shrink(program, kept)
    verify_rewrite(mask(program, kept), shrunk)
    gone = torch.tensor([1, 3, 4])
    zeroed = program.with_tensors(
        {n: program.tensors[n].index_fill(0, gone, 0.0) for n in ("a.weight", "a.bias")}
    )
    with pytest.raises(VerificationError):
        verify_rewrite(zeroed, shrunk)


def test_rms_norms_stay_exact() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.norm = nn.RMSNorm(6, eps=1e-2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            own = h / (h.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
            result: Tensor = self.b(self.norm(h) + own)
            return result

    program = capture(Normed(), (torch.randn(2, 4),))
    kept = {"a.weight[0]": [1, 4]}
    verify_rewrite(mask(program, kept), shrink(program, kept))


def test_a_layer_norm_is_normalized_and_reports_drift() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    program = capture(model, (torch.randn(2, 4),))
    group = axis_groups(program)["0.weight[0]"]
    assert group.normalized
    kept = {group.id: [0, 1, 2]}
    with pytest.raises(VerificationError):
        verify_rewrite(mask(program, kept), shrink(program, kept))
    report = verify_rewrite(mask(program, kept), shrink(program, kept), exact=False)
    assert report["max_error"] > 1e-3


def test_an_operator_without_a_rule_freezes_what_it_touches() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)
            self.c = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x).relu())
            result: Tensor = self.c(torch.renorm(h, 2.0, 0, 1.0))
            return result

    groups = axis_groups(capture(Strange(), (torch.randn(2, 4),)))
    assert not groups["a.weight[0]"].frozen
    assert "no rule for 'renorm'" in " ".join(groups["b.weight[0]"].frozen)
