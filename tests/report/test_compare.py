"""Artifacts side by side: the front, what was measured where, and what does not compare."""

from __future__ import annotations

import json
from typing import Any

from graphprune.report.compare import Overview
from graphprune.report.measured import Measured
from graphprune.report.page import compare_page


def artifact(
    speedup: float, megabytes: float, value: float, cpu: str = "A", **more: Any
) -> Measured:
    row = {
        "batch": "1x128", "threads": 1, "cpu": cpu, "clock": "cpu", "rounds": 20,
        "dense_ms": 10.0, "pruned_ms": 10 / speedup, "speedup": speedup,
    }  # fmt: skip
    shared = {"task": "sts", "metric": "Spearman", "count": 9, "items": "pairs", **more}
    return Measured(
        {
            "sizes": {"model.onnx": int(megabytes * 1e6), "baseline.onnx": 90_000_000},
            "versions": {"onnxruntime": "1"},
            "results": {
                "timing": row,
                "quality": {
                    "dense": {**shared, "value": 0.8},
                    "pruned": {**shared, "value": value},
                },
            },
        }
    )


def test_the_front_is_what_nothing_beats_in_all_three() -> None:
    found = Overview.of(
        [
            ("quick", artifact(3, 40, 0.7)),
            ("good", artifact(2, 40, 0.79)),
            ("beaten", artifact(2, 45, 0.75)),
        ]
    )
    assert [e.name for e in found.entrants] == ["dense", "good", "beaten", "quick"]
    assert [e.name for e in found.front()] == ["dense", "good", "quick"]
    assert found.notes == ()
    assert found.header()[-2:] == ("sts: Spearman", "on the front")
    rows = {row[0]: row for row in found.rows()}
    assert rows["quick"][1:] == (
        "3.00x", "3.33", "A", "40.0", "2.25x", "0.7000", "yes"
    )  # fmt: skip
    assert rows["beaten"][-1] == ""
    assert json.loads(json.dumps(found.to_json()))["models"][1]["front"] is True


def test_lower_perplexity_is_on_the_front() -> None:
    lower: dict[str, Any] = {"higher_is_better": False}
    found = Overview.of(
        [("a", artifact(2, 40, 0.9, **lower)), ("b", artifact(2, 40, 0.7, **lower))]
    )
    assert "a" not in [e.name for e in found.front()]


def test_other_machines_tasks_and_what_is_missing_are_said() -> None:
    bare = Measured({"sizes": {"model.onnx": 5}, "results": {}})
    found = Overview.of(
        [
            ("here", artifact(2, 40, 0.7)),
            ("there", artifact(2, 40, 0.7, cpu="B")),
            ("few", artifact(2, 40, 0.9, count=3)),
            ("bare", bare),
        ]
    )
    notes = "\n".join(found.notes)
    assert "different machines" in notes
    assert "different tasks or data" in notes
    assert "bare was not benchmarked: graphprune bench bare --note" in notes
    assert "bare was not evaluated" in notes
    assert "different dense models" in notes
    assert len(found.places) == 2
    page = compare_page(found)
    for part in ("here", "there", "<li>A: A, 1 thread", "<li>B: B, 1 thread"):
        assert part in page
    # Figures of other items do not beat.
    assert {e.name for e in found.front()} >= {"here", "few"}
