"""Attention in ONNX Runtime is torch's: every kind of mask, grouped and uneven heads, any shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.exporters.onnx.convert import lower, to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.onnx.names import output_names
from graphprune.exporters.runtime.session import feeds_of, open_session
from graphprune.ir.batches import second_inputs
from graphprune.ir.program import Program
from graphprune.verify.error import relative_error

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def split(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads x width] -> [batch, heads, length, width]."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """The way back."""
    return x.transpose(1, 2).flatten(2)


def _plain(x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    q, k, v = (split(x[..., i * 8 : i * 8 + 8], 4) for i in range(3))
    return join(F.scaled_dot_product_attention(q, k, v, mask, **options))


def _float_mask(seen: Tensor, low: float) -> Tensor:
    return torch.where(seen[:, None, None, :], 0.1, low)


def _unseen_row(seen: Tensor, heads: int = 1) -> Tensor:
    """Every head's second position sees nothing; with several heads, only the last head's."""
    length = seen.shape[1]
    rows = torch.arange(length)[:, None] != 1
    mask = (rows & seen[:, None, None, :]).expand(-1, heads, length, length)
    if heads == 1:
        return mask
    return mask | (torch.arange(heads) < heads - 1)[:, None, None]


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return (
        x[:, :, None]
        .expand(batch, heads, times, length, width)
        .reshape(batch, heads * times, length, width)
    )


def _grouped(x: Tensor, repeat: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    q, k, v = split(x[..., :8], 4), split(x[..., 8:12], 2), split(x[..., 12:16], 2)
    return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), **options))


def _uneven_widths(x: Tensor) -> Tensor:
    q, k, v = split(x[..., :12], 3), split(x[..., 4:16], 3), split(x[..., 16:22], 3)
    return join(F.scaled_dot_product_attention(q, k, v))


def _cross(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    q, k, v = split(x[..., :8], 4), split(y[..., :8], 4), split(y[..., 8:16], 4)
    return join(F.scaled_dot_product_attention(q, k, v, **options))


def _kept_apart(x: Tensor, seen: Tensor) -> Tensor:
    """Queries that are changed between the split and the attention stay split."""
    q, k, v = (split(x[..., i * 8 : i * 8 + 8], 4) for i in range(3))
    q = torch.cat([-q[..., 1:], q[..., :1]], -1)
    return join(F.scaled_dot_product_attention(q, k, v, _unseen_row(seen)))


def _three_dims(x: Tensor, seen: Tensor) -> Tensor:
    mask = _unseen_row(seen)[:, 0]
    return F.scaled_dot_product_attention(x[..., :8], x[..., 8:16], x[..., 16:], mask)


def _five_dims(x: Tensor) -> Tensor:
    q, k, v = (split(x[..., i * 8 : i * 8 + 8], 4)[:, None] for i in range(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


# x: [batch, length, 24]; y: [batch, other length, 24]; seen: [batch, length], zeros are padding.
CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no_mask": lambda x, y, seen: _plain(x),
    "bool_mask": lambda x, y, seen: _plain(x, seen[:, None, None, :]),
    "bool_unseen_rows": lambda x, y, seen: _plain(x, _unseen_row(seen)),
    "bool_unseen_rows_of_one_head": lambda x, y, seen: _plain(x, _unseen_row(seen, 4)),
    "bool_two_dims": lambda x, y, seen: _plain(x, _unseen_row(seen)[0, 0]),
    "float_mask": lambda x, y, seen: _plain(x, _float_mask(seen, -3.0)),
    "float_minus_infinity": lambda x, y, seen: _plain(x, _float_mask(seen, -torch.inf)),
    "float_lowest": lambda x, y, seen: _plain(x, _float_mask(seen, torch.finfo(torch.float32).min)),
    "causal": lambda x, y, seen: _plain(x, is_causal=True),
    "causal_cross": lambda x, y, seen: _cross(x, y, is_causal=True),
    "cross": lambda x, y, seen: _cross(y, x, attn_mask=seen[:, None, None, :]),
    "scale": lambda x, y, seen: _plain(x, scale=0.3),
    "gqa_flag": lambda x, y, seen: _grouped(x, lambda z: z, enable_gqa=True),
    "gqa_expand": lambda x, y, seen: _grouped(x, lambda z: _repeated(z, 2), scale=0.5),
    "gqa_interleave": lambda x, y, seen: _grouped(
        x, lambda z: z.repeat_interleave(2, 1), attn_mask=_unseen_row(seen)
    ),
    "gqa_tile": lambda x, y, seen: _grouped(x, lambda z: torch.cat([z, z], 1)),
    "value_width": lambda x, y, seen: _uneven_widths(x),
    "split_kept": lambda x, y, seen: _kept_apart(x, seen),
    "three_dims": lambda x, y, seen: _three_dims(x, seen),
    "five_dims": lambda x, y, seen: _five_dims(x),
}


class Zoo(nn.Module):
    """All cases at once: one capture and one export serve every test."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {name: case(x, y, mask != 0) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Any, Any]:
    torch.manual_seed(0)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2] = 0
    inputs = {"x": torch.randn(3, 6, 24), "y": torch.randn(3, 4, 24), "mask": mask}
    program = capture(Zoo(), inputs)
    model = to_onnx(program)
    path = tmp_path_factory.mktemp("zoo") / "model.onnx"
    save_onnx(model, path)
    return program, model, open_session(path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("second", [False, True], ids=["example", "other sizes"])
def test_ort_agrees_with_torch(zoo: tuple[Program, Any, Any], case: str, second: bool) -> None:
    program, _, session = zoo
    inputs = second_inputs(program.forward) if second else list(program.forward.example)
    names = output_names(program.forward)
    expected = program.run(inputs)[names.index(case)]
    (actual,) = session.run([case], feeds_of(tuple(inputs), ["x", "y", "mask"]))
    assert expected.isfinite().all()
    assert relative_error(expected, torch.from_numpy(actual)) < 2e-6


@pytest.mark.slow
def test_the_cases_mean_what_they_say(zoo: tuple[Program, Any, Any]) -> None:
    """Rows that see nothing are zero in torch, and there are such rows, and rows that see."""
    program, _, _ = zoo
    names = output_names(program.forward)
    outputs = dict(zip(names, program.run(program.forward.example), strict=True))
    assert outputs["bool_unseen_rows"][0, 1].abs().max() == 0
    assert outputs["float_minus_infinity"][2].abs().max() == 0
    assert outputs["float_lowest"][2].abs().min() > 0
    assert outputs["bool_unseen_rows_of_one_head"][0, 1].count_nonzero() == 6


@pytest.mark.slow
def test_lowering_alone_changes_nothing(zoo: tuple[Program, Any, Any]) -> None:
    program, _, _ = zoo
    inputs = second_inputs(program.forward)
    for name, a, b in zip(
        output_names(program.forward), program.run(inputs), lower(program)(*inputs), strict=True
    ):
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.slow
def test_heads_are_split_by_the_kernel_and_repeated_heads_are_not_repeated(
    zoo: tuple[Program, Any, Any],
) -> None:
    _, model, _ = zoo
    fused = [n for n in model.graph if n.op_type == "Attention"]
    assert len(fused) == len(CASES) - 2  # three and five dimensions are spelled out
    ranks = Counter(len(n.inputs[0].shape) for n in fused)
    assert ranks == {3: len(fused) - 2, 4: 2}  # apart: the changed queries, and the tiled heads
    shared = [n for n in fused if n.attributes.get_int("kv_num_heads", 0) == 2]
    assert len(shared) == 3


class Layers(nn.Module):
    """Self-attention layers with 3, 1 and 5 heads, of widths 4, 8 and 2, over one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = (3, 1, 5)
        sizes = (12, 8, 10)
        self.ins = nn.ModuleList(nn.Linear(16, 3 * n) for n in sizes)
        self.outs = nn.ModuleList(nn.Linear(n, 16) for n in sizes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for heads, project, out in zip(self.heads, self.ins, self.outs, strict=True):
            q, k, v = (split(t, heads) for t in project(x).chunk(3, -1))
            x = x + out(join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None] != 0)))
        return x


def test_uneven_heads_share_one_bias(tmp_path: Path) -> None:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    program = capture(Layers(), {"x": torch.randn(2, 7, 16), "mask": mask})
    model = to_onnx(program)
    fused = [n for n in model.graph if n.op_type == "Attention"]
    assert [n.attributes["q_num_heads"].as_int() for n in fused] == [3, 1, 5]
    assert len({id(n.inputs[3]) for n in fused}) == 1
    assert not [n for n in model.graph if n.op_type == "Transpose"]
    save_onnx(model, tmp_path / "model.onnx")
    inputs = second_inputs(program.forward)
    feeds = feeds_of(tuple(inputs), ["x", "mask"])
    (actual,) = open_session(tmp_path / "model.onnx", 1).run(None, feeds)
    assert relative_error(program.run(inputs)[0], torch.from_numpy(actual)) < 2e-6
