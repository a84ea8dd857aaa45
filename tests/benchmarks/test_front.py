"""The front benchmark's arithmetic; the run itself takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.front import drawn, front

ROWS = [
    {"faster": f, "quality": q, "ms": 10 / f, "metric": "Spearman", "precision": p}
    for f, q, p in ((1.0, "0.82", "fp32"), (2.0, "0.80", "fp32"), (2.5, "0.81", "int8"))
]


def test_a_point_that_another_beats_in_both_is_not_on_the_front() -> None:
    assert [row["faster"] for row in front(ROWS)] == [1.0, 2.5]
    same = [ROWS[0], dict(ROWS[0])]
    assert front(same) == same


@pytest.mark.parametrize("scored", [True, False])
def test_drawing_passes_the_rows_on(tmp_path: Path, scored: bool) -> None:
    score = "obs" if scored else ""
    rows = [{**r, "score": score, "compensate": "", "allocation": ""} for r in ROWS]
    assert list(drawn(rows, tmp_path / "page.html")) == rows
    assert "the front" in (tmp_path / "page.html").read_text()
