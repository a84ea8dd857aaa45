"""Capture: names, dynamic sizes, ties, half precision, in-place operators, and clear refusals."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.api import compile
from graphprune.api import load as load_compiled
from graphprune.capture.capture import capture
from graphprune.errors import CaptureError, GraphPruneError, VerificationError
from graphprune.ir.batches import batches, second_inputs
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.storage.program import load, save
from graphprune.verify.error import relative_error


def agrees(model: nn.Module, program: Program, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model.eval()(**inputs))
    actual = torch.utils._pytree.tree_leaves(program(**inputs))
    for a, b in zip(expected, actual, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-t5", "tiny-mixtral", "tiny-cnn"])
def test_a_program_runs_like_its_model_on_every_size(name: str) -> None:
    model, inputs = tiny(name)
    program = capture(model, inputs)
    agrees(model, program, inputs)
    flat = second_inputs(program.forward)
    agrees(model, program, dict(zip(program.forward.input_names, flat, strict=True)))
    assert program.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_second_batch_has_another_size_length_and_padding(captured: Any) -> None:
    program = captured("tiny-bert")
    first, second = batches(program.forward)[:2]
    mask = program.forward.input_names.index("attention_mask")
    assert second[mask].shape[0] != first[mask].shape[0]
    assert second[mask].shape[1] != first[mask].shape[1]
    assert 0 < int(second[mask].sum()) < second[mask].numel()
    assert program.forward.dynamic["input_ids"] == {0: "batch", 1: "sequence"}


def test_a_batch_of_one_stays_dynamic() -> None:
    model, inputs = tiny("tiny-bert")
    program = capture(model, {k: v[:1] for k, v in inputs.items()})
    assert program.forward.dynamic["input_ids"][0] == "batch"
    agrees(model, program, inputs)


def test_fixed_shapes_when_asked() -> None:
    model, inputs = tiny("tiny-mlp")
    program = capture(model, inputs, dynamic_shapes=None)
    assert not program.forward.dynamic


def test_tied_weights_are_one_tensor() -> None:
    model, inputs = tiny("tiny-gpt2")
    program = capture(model, inputs)
    assert program.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in program.tensors
    module = ProgramModule(program)
    state = dict(module.named_parameters(remove_duplicate=False))
    assert state["lm_head.weight"] is state["transformer.wte.weight"]


def test_overlapping_tensors_are_frozen() -> None:
    from graphprune.axes import axis_groups

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(12, 4)
            self.first, self.second = nn.Parameter(whole[:8]), nn.Parameter(whole[4:])
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.first.T + (x @ self.second.T)
            result: Tensor = self.out(h.relu())
            return result

    program = capture(Sliced(), (torch.randn(2, 4),))
    assert program.overlapping == {"first", "second"}
    groups = axis_groups(program)
    assert any("shares a part of its memory" in r for r in groups["first[0]"].frozen)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = tiny("tiny-llama")
    model.config.use_cache = True  # type: ignore[union-attr]
    model.train()
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()}
    program = capture(model, inputs)
    assert model.training
    assert all(m.training for m in model.modules())
    assert model.config.use_cache is True  # type: ignore[union-attr]
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k][0])
        assert v.data_ptr() == before[k][1]
    held = {t.data_ptr() for t in program.tensors.values()}
    assert not held & {v.data_ptr() for v in model.state_dict().values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = tiny("tiny-llama")
    program = capture(model.to(dtype), inputs)
    assert program.tensors["lm_head.weight"].dtype is dtype
    wide = program.in_float32()
    assert all(t.dtype is not dtype for t in wide.tensors.values())
    # The same graph in another precision: close, and finer than half precision itself.
    expected = program.run(program.forward.example)[0]
    actual = wide.run(wide.forward.example)[0]
    assert actual.dtype is torch.float32
    assert relative_error(actual, expected) < 0.1


def test_training_mode_reaches_dropout_and_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3))
    x = torch.randn(16, 8)
    module = ProgramModule(capture(model, (x,)))
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    assert torch.equal(module(x), module(x))


class InPlace(nn.Module):
    """Writes through views, as sequence-to-sequence models do when they shift their labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        shifted = ids.new_zeros(ids.shape)
        shifted[:, 1:] = ids[:, :-1].clone()
        shifted[:, 0] = 3
        x = self.table(shifted)
        x += 1
        y = x * 2
        x.mul_(y)
        result: Tensor = self.out(x + y)
        return result


def test_in_place_operators_become_functional() -> None:
    model, ids = InPlace(), torch.randint(4, 20, (2, 7))
    program = capture(model, (ids,))
    for node in program.forward.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable
    agrees(model, program, {"ids": ids})
    kept = ids.clone()
    program(ids)
    assert torch.equal(ids, kept)


Write = Callable[[Tensor], object]

# What writes through an alias of a tensor [batch, sequence, 8], which is read afterwards.
WRITES: dict[str, Write] = {
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, False).add_(1),
    "nothing but a type": lambda x: x.to(torch.float32).detach().contiguous().add_(1),
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, dim=-1)[0].sigmoid_(),
    "tensor_split": lambda x: torch.tensor_split(x, 3, dim=2)[1].add_(1),
    "split": lambda x: torch.split(x, 3, dim=-1)[2].add_(1),
    "chunk": lambda x: x.chunk(2, dim=-1)[0].mul_(2),
    "hsplit": lambda x: torch.hsplit(x, [1])[0].add_(1),
    "dsplit": lambda x: torch.dsplit(x, 2)[1].add_(1),
    "unbind": lambda x: x.unbind(-1)[3].add_(1),
    "swapdims": lambda x: x.swapdims(0, 2).add_(torch.arange(x.shape[0])),
    "transpose": lambda x: x.transpose(1, 2).mul_(torch.arange(8)[:, None]),
    "permute": lambda x: x.permute(2, 0, 1).mul_(torch.arange(8)[:, None, None]),
    "movedim": lambda x: x.movedim(2, 0).mul_(torch.arange(8)[:, None, None]),
    "mT": lambda x: x.mT.mul_(torch.arange(8)[:, None]),
    "ravel": lambda x: x.ravel()[3:7].add_(1),
    "flatten": lambda x: x.flatten(1)[:, 3:7].add_(1),
    "view": lambda x: x.view(x.shape[0], -1, 2, 4)[:, :, 1].add_(1),
    "unflatten": lambda x: torch.unflatten(x, -1, (2, 4))[..., 3].add_(1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).add_(1),
    "narrow": lambda x: x.narrow(-1, -3, 2).add_(1),
    "unfold": lambda x: x.unfold(2, 3, 3).mul_(torch.arange(3)),
    "diagonal": lambda x: x[:, :4, :4].diagonal(dim1=1, dim2=2).add_(1),
    "broadcast_to": lambda x: x.broadcast_to(x.shape).add_(1),
    "expand_as": lambda x: x.expand_as(x).add_(1),
    "a part of a part": lambda x: x[:, :, 1:][..., ::2].transpose(1, 2)[:, 0].fill_(7),
}


class Writes(nn.Module):
    """Writes through an alias, and reads what it wrote to, itself and through other views."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 3
        flat, head = x.view(-1), x[..., 0]
        self.write(x)
        first = x * 2
        self.write(x)
        return first, x + 1, flat * 2, head * 2


@pytest.mark.parametrize("name", WRITES)
def test_writes_through_an_alias_reach_all_that_sees_the_memory(name: str) -> None:
    model, x = Writes(WRITES[name]), torch.randn(2, 5, 8)
    program = capture(model, (x,))
    for size in ((2, 5, 8), (3, 5, 8), (2, 9, 8), (4, 6, 8)):
        x = torch.randn(size)
        for found, wanted in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted)


def test_pieces_are_written_to_one_after_another() -> None:
    class Pieces(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x * 1
            a, b = x.chunk(2, dim=-1)
            a.mul_(b)
            b.add_(a)
            a.sub_(1)
            return x, a, b

    x = torch.randn(2, 5, 8)
    program = capture(Pieces(), (x,))
    for found, wanted in zip(program(x), Pieces()(x), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda x: x.unfold(2, 4, 2).add_(1), r"through 'unfold' \(unfold\), which has no funct"),
        (lambda x: x.as_strided((2,), (1,)).add_(1), r"\(as_strided\), which has no functional"),
        (lambda x: x.view(torch.int32).add_(1), r"\(view\), which has no functional"),
        (lambda x: x[:, :2].transpose_(1, 2), r"\(transpose_\) changes the shape of a tensor"),
    ],
)
def test_writes_that_cannot_be_followed_are_refused_by_name(write: Write, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        capture(Writes(write), (torch.randn(2, 5, 8),))


def test_a_write_that_nothing_else_sees_needs_no_way_back() -> None:
    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 3).view(torch.int32).clamp_(min=0)

    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(capture(Alone(), (x,))(x), Alone()(x))


def test_a_slice_needs_the_size_that_forward_computed_with() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x[:, :3]
            return first.sum(1) / first.shape[1]

    x = torch.randn(2, 5, 8)
    program = capture(Mean(), (x,))
    assert program.limit_lines() == ["sequence: 3 and more only"]
    with pytest.raises(GraphPruneError, match=r"at least 3|3 and more"):
        program(x[:, :2])  # the graph divides by three
    torch.testing.assert_close(program(x[:, :3]), Mean()(x[:, :3]))


def test_no_inputs() -> None:
    with pytest.raises(CaptureError, match=r"no example inputs for Linear.*pass example_inputs"):
        capture(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "must be a dict or a tuple, got str"),
        ({"x": 3}, "holds no tensor"),
        ({"y": torch.zeros(2, 2)}, "do not fit Linear.forward"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(nn.Linear(2, 2), inputs)


def test_control_flow_on_values_names_the_line_and_the_way_out() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match=r"Branch at .*x.sum\(\) > 0.*torch\.where"):
        capture(Branch(), (torch.ones(2, 2),))


def test_a_size_fixed_by_capture_is_noticed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.detach().shape[0] > 2)

    try:
        program = capture(Fixed(), (torch.ones(3, 4),))
    except CaptureError:
        return
    # torch.export may instead keep the batch static: then the program says so.
    assert 0 not in program.forward.dynamic.get("x", {}) or torch.equal(
        program(torch.ones(2, 4)), torch.zeros(2, 4)
    )


def test_calls_are_checked_against_the_capture(captured: Any) -> None:
    program = captured("tiny-bert")
    ids = torch.randint(3, 99, (2, 6))
    with pytest.raises(GraphPruneError, match="'attention_mask' is missing"):
        program(input_ids=ids)
    with pytest.raises(GraphPruneError, match=r"unknown inputs \['label'\]"):
        program(input_ids=ids, attention_mask=ids, label=ids)
    with pytest.raises(GraphPruneError, match="must be a tensor"):
        program(input_ids=ids, attention_mask="x")


def test_an_axis_cut_to_one_unit_keeps_its_dimension(captured: Any) -> None:
    from graphprune.axes import axis_groups
    from graphprune.rewrite.mask import mask
    from graphprune.rewrite.shrink import shrink
    from graphprune.verify.equivalence import verify_rewrite

    program = captured("tiny-gpt2")
    kept = {g.id: [g.size - 1] for g in axis_groups(program) if not g.frozen and not g.normalized}
    verify_rewrite(mask(program, kept), shrink(program, kept))


def test_labels_and_keyword_arguments_are_captured() -> None:
    model, inputs = tiny("tiny-t5")
    model.config.decoder_start_token_id = 0  # type: ignore[union-attr]
    labels = torch.randint(3, 99, (2, 7))
    program = capture(model, {"input_ids": inputs["input_ids"][:2], "labels": labels})
    with torch.no_grad():
        expected = model.eval()(input_ids=inputs["input_ids"][:2], labels=labels)
    actual = program(input_ids=inputs["input_ids"][:2], labels=labels)
    assert relative_error(expected.loss, actual.loss) < 1e-5

    class Extra(nn.Module):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return x + more["y"]

    program = capture(Extra(), {"x": torch.zeros(2, 3), "y": torch.ones(2, 3)})
    assert torch.equal(program(x=torch.zeros(4, 3), y=torch.ones(4, 3)), torch.ones(4, 3))


def test_positional_and_default_arguments() -> None:
    class Many(nn.Module):
        def forward(self, *xs: Tensor, scale: float = 2.0, flag: bool | None = None) -> Tensor:
            return torch.stack(xs).sum(0) * scale

    x = torch.ones(2, 3)
    program = capture(Many(), (x, x))
    assert torch.equal(program(x, x), torch.full((2, 3), 4.0))
    assert torch.equal(program(x, x, scale=2.0, flag=None), torch.full((2, 3), 4.0))
    with pytest.raises(GraphPruneError, match=r"captured as 2.0 and cannot be 3.0"):
        program(x, x, scale=3.0)

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    program = capture(Two(), {"b": x, "a": 3 * x})  # in another order than the signature
    assert torch.equal(program(3 * x, x), 2 * x)


def test_a_model_with_a_least_length_gets_a_second_batch_that_it_accepts() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 6, 5), nn.Conv1d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x.transpose(1, 2)).relu())
            return result

    program = capture(Windows(), (torch.randn(2, 6, 8),))
    second = second_inputs(program.forward)
    assert second[0].shape == (3, 6, 8)
    program.run(second)


def test_buffers_that_forward_counts_in_are_left_as_they_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Counter(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model = Counter()
    capture(model, (torch.ones(2, 3),))
    assert float(model.calls) == 0
    assert "writes to calls" in caplog.text


def test_branches_inside_the_graph_are_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            return result

    with pytest.raises(CaptureError):
        capture(Branch(), (torch.ones(2, 3),))


def test_disjoint_parameters_of_one_storage_stay_free() -> None:
    from graphprune.axes import axis_groups

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(12 * 4 + 12 * 3)
            self.a = nn.Parameter(flat[:48].view(12, 4))
            self.b = nn.Parameter(flat[48:].view(3, 12))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.a).relu(), self.b)

    groups = axis_groups(capture(Flat(), (torch.randn(2, 4),)))
    assert not groups["a[0]"].frozen


def test_in_place_operators_keep_the_type_they_write_to() -> None:
    class Types(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            h.mul_(torch.ones(3, dtype=torch.float64))
            h.gt_(0)
            return h

    program = capture(Types(), (torch.randn(2, 3),))
    assert program(torch.randn(2, 3)).dtype is torch.float32


def test_submodules_may_be_called_like_our_methods() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.program(x)
            return result

    model, x = Named(), torch.randn(2, 3)
    module = ProgramModule(capture(model, (x,)))
    assert torch.equal(module(x), model(x))
    assert set(module.state_dict()) == set(model.state_dict())


def test_norms_without_running_statistics_train_and_evaluate() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4), nn.AlphaDropout(0.5))
    x = torch.randn(2, 3, 5)
    module = ProgramModule(capture(model, (x,)))
    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.allclose(module(x), model.eval()(x), atol=1e-6)


def test_one_tensor_given_for_two_inputs_stays_two() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 2 * y

    x = torch.randn(3, 6)
    for example in ((x, x), (x, x[:])):
        program = capture(Sum(), example)
        p, q = torch.randn(4, 6), torch.randn(4, 6)
        assert torch.equal(program(p, q), p + 2 * q)
        assert program.forward.input_names == ("x", "y")


def test_an_argument_left_out_means_its_default(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0, shift: tuple[int, int] = (1, 2)) -> Tensor:
            return x * scale + shift[0]

    x = torch.ones(2, 3)
    same = capture(Scaled(), {"x": x, "scale": 1.0, "shift": (1, 2)})
    assert torch.equal(same(x), x * 2)
    other = capture(Scaled(), {"x": x, "scale": 100.0, "shift": (5, 2)})
    save(other, tmp_path / "saved")
    for program in (other, load(tmp_path / "saved")):
        assert torch.equal(program(x, 100.0, (5, 2)), x * 105)
        with pytest.raises(GraphPruneError, match=r"'scale' means 1\.0.*with 100\.0"):
            program(x, shift=(5, 2))
        with pytest.raises(GraphPruneError, match=r"'shift' means \(1, 2\).*with \(5, 2\)"):
            program(x, scale=100.0)
        with pytest.raises(GraphPruneError, match=r"captured as 100\.0 and cannot be"):
            program(x, torch.tensor(100.0), (5, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: torch.vmap(torch.sin)(x), r"calls torch\.vmap"),
        (lambda x: x[: int(x.abs().max().item())], r"a size depends on tensor values"),
        (lambda x: x if x.sum() > 0 else -x, r"torch\.where"),
        (
            lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
            r"a branch or loop of its own",
        ),
    ],
)
def test_what_cannot_be_captured_is_one_sentence(
    change: Callable[[Tensor], Tensor], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(x)

    with pytest.raises(CaptureError, match=message) as caught:
        capture(Net(), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)
    assert "unhinted" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_flexible_attention_names_the_way_out() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            result: Any = flex_attention(q, q, q)
            return result

    with pytest.raises(CaptureError, match=r"'flex_attention'.*use scaled_dot_product_attention"):
        capture(Attention(), (torch.randn(2, 2, 16, 8),))


def test_modules_of_other_tools_are_refused() -> None:
    x = torch.randn(2, 8)
    exported = torch.export.export(nn.Linear(8, 8), (x,)).module()
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = jit.script(nn.Linear(8, 8)), jit.trace(nn.Linear(8, 8), x)
    for model, message in [
        (scripted, r"torch\.jit module.*compile the nn\.Module"),
        (traced, r"torch\.jit module"),
        (nn.Sequential(scripted), r"'0' in Sequential is a torch\.jit module"),
        (exported, r"module of an ExportedProgram.*compile the nn\.Module"),
    ]:
        with pytest.raises(CaptureError, match=message):
            capture(model, (x,))


def test_a_graph_that_fits_no_symbol_is_a_capture_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise VerificationError("node 'x' does not fit")

    monkeypatch.setattr("graphprune.capture.capture.propagate", fails)
    with pytest.raises(CaptureError, match=r"graph of Linear .*does not fit; pass dynamic_shapes"):
        capture(nn.Linear(6, 4), (torch.randn(2, 6),))


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.__ior__(m.roll(1)),
        lambda m: m.__iand__(m.roll(1)),
        lambda m: m.__ixor__(m.roll(1)),
        lambda m: m.int().__ilshift__(2),
        lambda m: m.int().__irshift__(1),
        lambda m: m.float().pow_(2),
        lambda m: m.float().add_(1.5).floor_divide_(2),
    ],
)
def test_operators_that_write_are_functional(write: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * write(x > 0)

    program = capture(Net(), (torch.randn(3, 6),))
    x = torch.randn(4, 6)
    assert torch.equal(program(x), x * write(x > 0))
    for node in program.forward.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable


def test_a_hook_that_the_first_call_installs_is_there_once() -> None:
    """Models of transformers install what records hidden states when they are first called."""

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
            self.recorded: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "installed"):
                self.inner.register_forward_hook(lambda *call: self.recorded.append(call[2]))
                self.installed = True
            self.recorded = []
            self.inner(x)
            return self.outer(sum(self.recorded, torch.zeros_like(x)))

    model, x = Recording(), torch.randn(3, 4)
    program = capture(model, (x,))
    assert not model.inner._forward_hooks
    torch.testing.assert_close(program(x), model(x))
    assert len(model.inner._forward_hooks) == 1


def test_what_forward_keeps_for_next_time_is_not_what_was_traced() -> None:
    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = torch.arange(6.0)
            return x * self.table

    model, x = Lazy(), torch.randn(3, 6)
    program = capture(model, (x,))
    assert not hasattr(model, "table")
    assert torch.equal(model(x), x * torch.arange(6.0))
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize("extra", [None, 7, "name", "size"])
def test_outputs_that_are_no_tensors(extra: Any, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            return self.a(x), x.shape[0] if extra == "size" else extra

    compiled = compile(Net(), [], example_inputs=(torch.randn(2, 6),))
    compiled.export(tmp_path / "out", baseline=False)
    x = torch.randn(5, 6)
    for module in (compiled.module, load_compiled(tmp_path / "out").module):
        result = module(x)
        assert isinstance(result, tuple)
        assert result[0].shape == (5, 4)
        assert result[1] == (5 if extra == "size" else extra)


def test_a_graph_that_fails_at_another_length_is_kept_to_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(6, 4)
    run = Program.run

    def only_eight(self: Program, flat: Any, entry: str = "forward") -> Any:
        flat = list(flat)
        if flat[0].shape[1] != 8:
            raise RuntimeError("shape '[5]' is invalid")
        return run(self, flat, entry)

    monkeypatch.setattr(Program, "run", only_eight)
    program = capture(model, (torch.randn(2, 8, 6),))
    monkeypatch.undo()
    assert program.forward.bounds == {"sequence": (8, 8)}
    assert "is invalid; so it is kept to {'sequence': 8}" in caplog.text
    assert program(torch.randn(5, 8, 6)).shape == (5, 8, 4)
    with pytest.raises(GraphPruneError, match="only for sizes of 8;"):
        program(torch.randn(2, 5, 6))


@pytest.mark.slow
def test_a_scan_in_chunks_is_captured_at_whole_chunks() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=2,
        chunk_size=4,
        use_cache=False,
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    program = capture(model, {"input_ids": torch.randint(0, 99, (2, 8))})
    assert "sequence: verified at the example's size only" in program.limit_lines()
    for length, right in [(8, True), (12, True), (10, False), (5, False)]:
        ids = torch.randint(0, 99, (3, length))
        if right:
            agrees(model, program, {"input_ids": ids})
        else:
            with pytest.raises(GraphPruneError, match=r"input_ids|is right only"):
                program(input_ids=ids)


def test_long_and_short_rotary_frequencies_are_both_captured() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=2,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        use_cache=False,
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 8))
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for length in (8, 16, 17, 40):
        ids = torch.randint(3, 99, (2, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            agrees(model, program, inputs)
        except GraphPruneError:
            assert length > 16
