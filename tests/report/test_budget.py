"""Runs to a budget and fronts: their records, and how text, pages and the console show them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from graphprune.cli.tables import levels_table, passes_table
from graphprune.pipeline.events import PassFinished
from graphprune.report import charts as drawing
from graphprune.report.budget import BudgetReport, Candidate, Choice, Front, FrontPoint
from graphprune.report.page import front_page, report_page
from graphprune.report.report import ModelSize, PassReport, Report
from graphprune.training.outcome import Drop

FOUND = BudgetReport(
    asked={"speedup": 3.0},
    dense_ms=21.4,
    predicted_ms=7.125,
    measured_ms=7.08,
    dense_mb=90.9,
    mb=45.45,
    device="AMD <EPYC>",
    threads=1,
    batch="1x128",
    scheme=None,
    choices=(
        Choice("encoder.layer.0.attention", "attention", 8, 12, False, 0.41, 0.62),
        Choice("encoder.layer.0.output", "ffn", 1024, 1536, False, 0.9, 1.2),
        Choice("encoder.layer.1.attention", "attention", 0, 12, True, 0.0, 0.62),
        Choice("encoder.layer.1.output", "ffn", 512, 1536, False, 0.5, 1.2),
    ),
    runners_up=(Candidate(0.0871, 7.11, (12, 1536, 0, 0)), Candidate(0.0912, 7.0, (4, 8, 12, 8))),
    evaluations=5,
    losses=(0.25, 0.25, 0.125, 0.0625, 0.0625),
    fresh_loss=0.0703,
    corrections=1,
    drop=Drop(0.0041, 0.0093, -0.001, 0.95, 1379),
    warnings=("few <samples>",),
)
FRONT = Front(
    "mini<lm>",
    "Spearman",
    True,
    "AMD EPYC, 1 thread, 1x128",
    family=(
        FrontPoint("3x", 3.02, 2.95, 7.1, 45.4, 0.7901),
        FrontPoint("1.5x", 1.52, 1.5, 14.1, 70.2, 0.8177),
    ),
    others=(
        FrontPoint("dense", 1.0, None, 21.4, 90.9, 0.8203),
        FrontPoint("dense int8", 2.35, None, 9.1, 23.0, 0.8199),
    ),
)


def report(found: BudgetReport, **details: Any) -> Report:
    finished = PassFinished("budget", 0, 1, True, 1.0, 0.5, {**found.to_json(), **details})
    size = ModelSize(10, 40, 100)
    return Report("Net", size, size, (PassReport.of(finished, "budget", None),))


def text_of(page: str) -> str:
    """What is on a page, without its style and pictures."""
    shown = re.sub("(?s)<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page)
    return " ".join(shown.split())


@pytest.fixture(params=[True, False], ids=["charts", "tables"])
def charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the library that draws."""
    if not request.param:
        monkeypatch.setattr(drawing, "charts_available", lambda: False)
    elif not drawing.charts_available():
        pytest.skip("the package pygal is not installed")
    return bool(request.param)


def test_the_summary_says_what_was_asked_predicted_and_measured() -> None:
    alone = replace(FOUND, drop=None, device="AMD EPYC")
    assert alone.summary == (
        "3.02x faster than dense (asked 3x, predicted 3.00x): 7.08 of 21.4 ms on AMD EPYC, "
        "1 thread, 1x128"
    )
    assert FOUND.summary.endswith("; drop 0.0041, below 0.0093 with 95 % confidence (1,379 items)")
    elsewhere = replace(alone, measured_ms=None, scheme="int8-dynamic", threads=4)
    assert elsewhere.summary == (
        "predicted 3.00x faster than dense (asked 3x): 7.12 of 21.4 ms on AMD EPYC, 4 threads, "
        "1x128, int8-dynamic"
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ms": 5.0, "size_mb": 20.0}, "asked 5 ms, 20 MB,"),
        ({"flops": 0.3}, "asked 0.3 of the FLOPs,"),
        ({"max_drop": 0.01}, "asked a drop of at most 0.01,"),
    ],
)
def test_every_kind_of_budget_has_its_words(asked: dict[str, float], words: str) -> None:
    summary = replace(FOUND, asked=asked).summary
    assert words in summary
    assert ("45.5 of 90.9 MB" in summary) == ("size_mb" in asked)


def test_a_record_comes_back_from_the_report_of_its_pass() -> None:
    details = json.loads(json.dumps(report(FOUND).to_json()))
    again = Report.from_json(details)
    assert again.budgets() == [("budget", FOUND)]
    assert BudgetReport.of({"summary": "x"}) is None
    bare = replace(FOUND, drop=None, measured_ms=None, runners_up=(), losses=(), fresh_loss=None)
    assert report(bare).budgets() == [("budget", bare)]


def test_a_budget_in_a_round_of_another_pass_is_found() -> None:
    rounds = {"rounds": [[{"pass": "budget", **FOUND.to_json()}]]}
    finished = PassFinished("repeat", 0, 1, True, 1.0, 0.5, rounds)
    size = ModelSize(10, 40, 100)
    outer = Report("Net", size, size, (PassReport.of(finished, "repeat", None),))
    assert outer.budgets() == [("round 1: budget", FOUND)]


def test_sublayers_are_called_by_layer_and_kind_or_by_their_id() -> None:
    assert FOUND.names() == [
        "layer 0 attention",
        "layer 0 feed-forward",
        "layer 1 attention",
        "layer 1 feed-forward",
    ]
    other = replace(FOUND, choices=(Choice("stem", "other", 3, 4, False, 1.0, 1.0),))
    assert other.names() == ["stem"]


def test_text_and_markdown_list_levels_candidates_and_notes() -> None:
    done = report(FOUND)
    markdown = done.to_markdown()
    for line in (
        "| budget | 3.02x faster than dense (asked 3x,",
        "| ms, predicted | 21.4 | 7.12 | 3.00x faster |",
        "| ms, measured when chosen | 21.4 | 7.08 | 3.02x faster |",
        "| MB | 90.9 | 45.5 | 2.00x smaller |",
        "| layer 0 attention | 8 of 12 | 0.41 | 0.62 |",
        "| layer 1 attention | removed | 0 | 0.62 |",
        "| chosen | 7.12 | 0.0625 | attention 8 -; feed-forward 1024 512 |",
        "| 2 | 7.11 | 0.0871 | attention 12 -; feed-forward 1536 - |",
        "- 5 candidates were evaluated on the whole model.",
        "- Loss on samples that neither calibration nor the search used: 0.0703; on those of the "
        "search 0.0625.",
        "- The table of costs was corrected once by a measurement.",
        "- Task: drop 0.0041,",
        "- Warning: few <samples>",
    ):
        assert line in markdown
    assert "layer 1 attention     removed" in str(done)
    # Every table has as many columns in its rule as in its head.
    for table in re.findall(r"(?m)(?:^\|.*\n)+", markdown):
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_what_was_not_done_is_not_shown() -> None:
    bare = replace(
        FOUND,
        measured_ms=None,
        runners_up=(),
        evaluations=0,
        losses=(),
        fresh_loss=None,
        corrections=0,
        drop=None,
        warnings=(),
    )
    for shown in (report(bare).to_markdown(), text_of(report_page(report(bare), {}))):
        assert "layer 0 attention" in shown
        for word in (
            "ms, measured when chosen",
            "candidate",
            "corrected",
            "Warning",
            "What came close",
            "Search",
        ):
            assert word not in shown


def test_the_page_draws_levels_and_the_search(charts: bool) -> None:
    page = report_page(report(FOUND), {})
    text = text_of(page)
    for part in (
        "To a budget: budget",
        "AMD &lt;EPYC&gt;",
        "layer 0 attention 8 of 12 0.41 of 0.62 ms",
        "layer 1 attention removed 0 of 0.62 ms",
        "2 7.11 0.0871 attention 12 -; feed-forward 1536 -",
        "few &lt;samples&gt;",
    ):
        assert part in text
    body = page.split("</style>", 1)[1]
    assert body.count('class="bar dropped"') == 1
    assert 'style="width: 66.7%"' in body
    assert ("lowest loss so far, by evaluation" in text) is charts
    assert ("1 0.25 3 0.125 4 0.0625" in text) is not charts


def test_the_console_has_the_sentence_and_a_bar_a_sublayer() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(passes_table(report(FOUND)))
    console.print(levels_table(FOUND))
    text = console.export_text()
    assert "3.02x faster than dense" in text
    assert re.search(r"layer 0 attention +█{11}░{5} +8 of 12 +0.41 +0.62", text)
    assert re.search(r"layer 1 attention +░{16} +removed", text)


def test_a_front_has_its_family_and_what_it_is_compared_with(charts: bool) -> None:
    page = front_page(FRONT)
    text = text_of(page)
    assert "mini&lt;lm&gt;" in text
    assert "Spearman, higher is better" in text
    rows = (
        "dense 1.00x 21.4 90.9 0.8203",
        "1.5x 1.52x 1.50x 14.1 70.2 0.8177",
        "dense int8 2.35x 9.1 23 0.8199",
        "3x 3.02x 2.95x 7.1 45.4 0.7901",
    )
    assert " ".join(rows) in text
    assert ("<svg" in page) is charts
    if charts:
        assert page.count('class="line reactive nofill"') == 1
        assert page.count('class="dot reactive tooltip-trigger"') == 4
    assert json.loads(json.dumps(FRONT.to_json()))["family"][0]["mb"] == 45.4
    worse = front_page(replace(FRONT, metric="perplexity", higher_is_better=False))
    assert "perplexity, lower is better" in text_of(worse)
