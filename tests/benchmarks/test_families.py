"""The benchmark of model families: three of them, and what it makes of failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, QUICK
from benchmarks.families.base import Family
from benchmarks.families.measure import measured
from benchmarks.families.table import BEGIN, END, write


def test_names_are_names() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names)) >= 60
    assert set(QUICK) <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_family_is_cut_and_runs(name: str) -> None:
    pytest.importorskip("transformers")
    (family,) = (f for f in FAMILIES if f.name == name)
    row = measured(family)
    assert "failed" not in row, row
    assert row["cut"]
    assert row["parameters after"] < row["parameters"]
    assert row["FLOPs"] < 1
    assert row["ORT"] <= 1e-4
    assert len(set(row["shapes"])) == 2


def _branching() -> tuple[nn.Module, tuple[Tensor]]:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    return Branching(), (torch.randn(2, 3),)


def _absent() -> tuple[nn.Module, tuple[Tensor]]:
    raise ImportError("nowhere is not installed")


def test_failures_are_rows(tmp_path: Path) -> None:
    failed = measured(Family("branching", "any", _branching))
    assert failed["failed"].startswith("capture: CaptureError: ")
    missing = measured(Family("absent", "any", _absent))
    assert missing["missing"] == "nowhere is not installed"
    page = tmp_path / "page.md"
    page.write_text(f"Before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    write(page, [failed, missing])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| branching |" in text
    assert "absent" not in text
