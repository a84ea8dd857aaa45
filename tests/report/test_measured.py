"""What was measured: the three tiles and their colors, one size, quality kept, guesses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphprune.pipeline.events import PassFinished
from graphprune.report.advice import next_steps
from graphprune.report.measured import FAIR, GOOD, POOR, UNKNOWN, Measured
from graphprune.report.page import report_page
from graphprune.report.report import ModelSize, PassReport, Report

SIZE = ModelSize(1000, 4_000_000, 2_000_000)


def timing(speedup: float, low: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "batch": "1x128",
        "threads": 1,
        "cpu": "AMD EPYC",
        "clock": "cpu",
        "rounds": 20,
        "against": "dense",
        "dense_ms": 10.0,
        "pruned_ms": 10.0 / speedup,
        "speedup": speedup,
        "speedup_low": speedup if low is None else low,
        "speedup_high": speedup,
        **more,
    }


def quality(dense: float, pruned: float, **more: Any) -> dict[str, Any]:
    shared = {"task": "sts", "metric": "Spearman", "count": 1379, "items": "pairs", **more}
    return {"dense": {**shared, "value": dense}, "pruned": {**shared, "value": pruned}}


def manifest(**results: Any) -> dict[str, Any]:
    """Of a model that was quantized in a hub folder."""
    return {
        "files": {
            "model": "onnx/model_quantized.onnx",
            "float": "onnx/model.onnx",
            "baseline": "graphprune/baseline.onnx",
            "baseline_quantized": "graphprune/baseline-int8.onnx",
        },
        "sizes": {
            "model.onnx": 62_000_000,
            "model_quantized.onnx": 15_800_000,
            "baseline.onnx": 90_900_000,
            "baseline-int8.onnx": 23_000_000,
        },
        "quantization": {
            "model_quantized.onnx": {
                "scheme": "int8-dynamic",
                "products": 36,
                "tables": 1,
                "float": {},
                "drift": [{"output": "y", "error": 0.0312, "largest": 0.5}],
            }
        },
        "versions": {"onnxruntime": "1.31.1"},
        "results": results,
    }


def quantized_report() -> Report:
    finished = PassFinished(
        "quantize", 0, 1, True, 1.0, 0.0,
        {"scheme": "int8-dynamic", "weights": 37, "verification": {"max_error": 0.0}},
    )  # fmt: skip
    done = PassReport.of(finished, {"quantize": {"scheme": "int8-dynamic"}}, None)
    return Report("Net", SIZE, SIZE, (done,))


@pytest.mark.parametrize(
    ("results", "colors"),
    [
        ({}, (UNKNOWN, GOOD, UNKNOWN)),
        ({"timing": timing(1.5), "quality": quality(0.8, 0.795)}, (GOOD, GOOD, GOOD)),
        # Faster in the middle, but not in three of four rounds.
        ({"timing": timing(1.5, low=0.98), "quality": quality(0.8, 0.78)}, (FAIR, GOOD, FAIR)),
        ({"timing": timing(1.1), "quality": quality(0.8, 0.6)}, (FAIR, GOOD, POOR)),
        ({"timing": timing(0.9), "quality": quality(0.8, -0.1)}, (POOR, GOOD, POOR)),
        ({"quality": quality(20.0, 20.1, higher_is_better=False)}, (UNKNOWN, GOOD, GOOD)),
        ({"quality": quality(20.0, 30.0, higher_is_better=False)}, (UNKNOWN, GOOD, POOR)),
    ],
)
def test_tiles_are_green_by_the_stated_thresholds(
    results: dict[str, Any], colors: tuple[str, ...]
) -> None:
    found = Measured(manifest(**results))
    assert tuple(tile.color for tile in found.tiles()) == colors


def test_a_larger_file_is_not_green() -> None:
    data = manifest()
    data["sizes"]["model_quantized.onnx"] = 100_000_000
    assert Measured(data).tiles()[1].color == POOR
    assert Measured(data).tiles()[1].value == "1.10x larger"
    del data["sizes"]["baseline.onnx"]
    assert Measured(data).tiles()[1].color == UNKNOWN


def test_what_is_quantized_has_one_size_and_its_drift_in_its_row() -> None:
    report = quantized_report()
    for text in (report_page(report, manifest()), report.to_markdown(manifest())):
        assert "15.8" in text
        assert "62.0" not in text
        assert "drift 3.1e-02" in text
        assert "0.0e+00 |" not in text
        assert "36 products and 1 table in int8-dynamic" in text
        assert "see its report" not in text
    assert report.rows()[0][1:4] == ("to be exported in int8-dynamic", "", "")
    assert "MB" not in report.headline()


def test_where_times_were_measured_and_the_command_are_said() -> None:
    others = {"int8": timing(0.8, dense_ms=5.0)}
    results = {"timing": timing(1.6, threads=2, others=others), "quality": quality(0.8, 0.7)}
    page, text = (
        report_page(quantized_report(), manifest(**results)),
        quantized_report().to_markdown(manifest(**results)),
    )
    command = "graphprune bench OUT --batch 1x128 --threads 2 --against dense,int8"
    for shown in (page, text):
        for part in ("AMD EPYC, 2 threads", "batch 1x128", "ONNX Runtime 1.31.1", command):
            assert part in shown
        assert "1,379 pairs" in shown
        assert "1.60x faster" in shown
    assert "takes 5 ms, 2.00x faster than in float; the pruned model is 1.25x slower" in page
    assert "a wide spread" not in page
    noisy = Measured(manifest(timing={**timing(1.6), "speedup_low": 1.2}))
    assert "1.20x to 1.60x, a wide spread" in noisy.measured_on()
    found = Measured(manifest(**results))
    assert found.header() == ("", "dense", "dense int8", "pruned", "change")
    rows = {row[0]: row[1:] for row in found.rows([])}
    assert rows["MB on disk (model_quantized.onnx)"][:3] == ("90.9", "23.0", "15.8")
    assert rows["ms, batch 1x128, 2 threads"] == ("10", "5", "6.25", "1.60x faster")


@pytest.mark.parametrize(
    ("value", "guess", "error", "guesses"),
    [(0.51, 0.509, None, False), (0.509, 0.509, None, True), (0.53, 0.509, 0.03, True),
     (0.9, None, None, False), (-0.02, 0.0, None, True), (0.02, 0.0, None, False)],
)  # fmt: skip
def test_a_dense_model_that_guesses_is_pointed_out(
    value: float, guess: float | None, error: float | None, guesses: bool
) -> None:
    results = {"quality": quality(value, value, guess=guess, standard_error=error)}
    found = Measured(manifest(**results))
    assert bool(found.guessing()) is guesses
    if guesses:
        assert found.tiles()[2].color == POOR
        for text in (
            report_page(quantized_report(), manifest(**results)),
            quantized_report().to_markdown(manifest(**results)),
        ):
            assert "learned no better than guessing" in text


def test_what_older_artifacts_lack_is_unknown() -> None:
    old = timing(1.5)
    for key in ("cpu", "speedup_low", "speedup_high"):
        del old[key]
    both = quality(0.8, 0.7)
    for result in both.values():
        del result["items"]
    found = Measured(manifest(timing=old, quality=both))
    assert found.measured_on().startswith("unknown CPU, 1 thread")
    assert "1,379 items" in found.quality_meaning()
    del both["pruned"]["count"]
    assert found.quality_meaning() == "Spearman."
    assert found.operators == {}
    assert found.weights == {}
    json.dumps([found.tiles()[0].value])


def test_what_to_try_next_follows_from_the_results() -> None:
    def commands(report: Report, **results: Any) -> str:
        return "\n".join(step.command for step in next_steps(report, Measured(manifest(**results))))

    nothing = commands(quantized_report())
    assert "graphprune eval OUT" in nothing
    assert "graphprune bench OUT --note" in nothing
    held = commands(quantized_report(), timing=timing(1.5), quality=quality(0.8, 0.8))
    assert "--faster 2" in held
    assert "--quantize" not in held
    lost = commands(quantized_report(), timing=timing(1.5), quality=quality(0.8, 0.5))
    assert "--max-drop 0.01 --task sts" in lost
    assert "graphprune sensitivity" in lost
    guessed = commands(quantized_report(), quality=quality(0.0, 0.0, guess=0.0))
    assert "--epochs" in guessed
    finished = PassFinished("prune-heads", 0, 1, True, 1.0, 0.0,
                            {"parameters_before": 9, "parameters_after": 4})  # fmt: skip
    plain = PassReport.of(finished, {"prune-heads": {"ratio": 0.5}}, None)
    by_weights = commands(Report("Net", SIZE, SIZE, (plain,)), quality=quality(0.8, 0.5))
    assert "--calibration FILE" in by_weights


def test_operators_and_megabytes_are_on_the_page_largest_first() -> None:
    data = manifest(operators={"dense": {"MatMul": 3.0, "Add": 1.0}, "pruned": {"MatMul": 1.5}})
    data["weights"] = {
        "baseline.onnx": {"embeddings": 45_000_000, "attention": 5_000_000},
        "model_quantized.onnx": {"embeddings": 11_000_000},
    }
    page = report_page(quantized_report(), data)
    for part in ("Where the time goes", "75.0 %", "Where the megabytes are", "90.0 %", "45"):
        assert part in page
    assert page.index("MatMul") < page.index(">Add<")
    bare = report_page(quantized_report(), manifest())
    assert "Where the time goes" not in bare
    assert "Where the megabytes are" not in bare


def test_an_agreement_is_not_called_quality() -> None:
    agreed = {"task": "neighbors", "metric": "agreement of 10 nearest", "compares": True}
    tile = Measured(manifest(quality=quality(1.0, 0.83, **agreed))).tiles()[2]
    assert tile.title == "Agreement with dense"
    assert tile.value == "83.0 %"
    assert "quality" not in tile.note.replace("no measure of quality", "")
    assert Measured(manifest(quality=quality(0.9, 0.83))).tiles()[2].title == "Quality kept"
