"""Opset 20: the same numbers as torch, with padding and several samples; or the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.capture.capture import capture
from graphprune.errors import ExportError
from graphprune.exporters.onnx.convert import check_opset, to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.program import Program
from graphprune.passes import PruneHeads, Quantize
from graphprune.pipeline.base import Pass

Captured = Callable[[str], Program]


class Attends(nn.Module):
    """Three heads of width 4; of the key heads as many as asked, apart or side by side."""

    def __init__(self, kv_heads: int = 3, turned: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.turned, self.causal = kv_heads, turned, causal
        self.q, self.o = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k, self.v = nn.Linear(12, 4 * kv_heads), nn.Linear(12, 4 * kv_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.turned:  # by position, so that heads cannot stay side by side
            turn = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            q, k, v = q * turn.cos(), k * turn.sin(), v.flip(3)
        seen = None if self.causal else (mask != 0)[:, None, None, :]
        y = F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=self.causal, enable_gqa=self.kv_heads < 3
        )
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def program_of(**options: Any) -> Program:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return capture(Attends(**options).eval(), {"x": torch.randn(3, 7, 12), "mask": mask})


def checked(program: Program, folder: Path) -> list[str]:
    """Operators of the file, which ONNX Runtime computes as torch does on every batch."""
    path = folder / "model.onnx"
    save_onnx(to_onnx(program, opset=20), path)
    check_parity(program, open_session(path, 1))
    model = onnx.load(path)
    assert {i.domain: i.version for i in model.opset_import}[""] == 20
    assert model.ir_version == 9
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_contributed_operator(tmp_path: Path, turned: bool, causal: bool) -> None:
    kinds = checked(program_of(turned=turned, causal=causal), tmp_path)
    assert kinds.count("MultiHeadAttention") == 1
    assert "Attention" not in kinds


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-vit"])
def test_models_compute_the_same(captured: Captured, tmp_path: Path, name: str) -> None:
    assert checked(captured(name), tmp_path).count("MultiHeadAttention") == 2


def test_rms_norms_are_written_out(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.RMSNorm(12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.up(self.norm(x))
            return out

    program = capture(Normed().eval(), {"x": torch.randn(3, 7, 12)})
    assert "RMSNormalization" not in checked(program, tmp_path)
    assert "RMSNormalization" in [node.op_type for node in to_onnx(program).graph]


def test_grouped_queries_are_refused_by_name() -> None:
    with pytest.raises(ExportError, match="3 query heads and 1 key heads; omit opset"):
        to_onnx(program_of(kv_heads=1), opset=20)


def test_another_opset_is_refused() -> None:
    with pytest.raises(ExportError, match=r"opset is one of \[20, 23\], got 17"):
        to_onnx(program_of(), opset=17)


def test_a_cache_is_refused_before_any_work() -> None:
    with pytest.raises(ExportError, match="opset 20 has no attention with a key/value cache"):
        check_opset(20, cached=True)


@pytest.mark.parametrize("scheme", ["", "int8-dynamic"])
def test_an_artifact_and_its_baseline_are_written_so(tmp_path: Path, scheme: str) -> None:
    program = program_of()
    passes: list[Pass] = [PruneHeads(0.5)]
    if scheme:
        passes.append(Quantize(scheme, reduce_range=True))
    artifact = graphprune.compile(program, passes).export(tmp_path / "out", opset=20)
    assert artifact.manifest["opset"] == 20
    for name in ("model.onnx", "baseline.onnx"):
        model = onnx.load(artifact.path / name)
        assert {i.domain: i.version for i in model.opset_import}[""] == 20
        assert "Attention" not in [node.op_type for node in model.graph.node]
    assert max(a["error"] for a in artifact.manifest["parity"]["model.onnx"]) < 1e-4
