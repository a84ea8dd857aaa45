"""Reports: JSON and back, what went away in words, and what was verified."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from graphprune.pipeline.events import PassFinished
from graphprune.report.measured import change_text, megabytes_text
from graphprune.report.report import ModelSize, PassReport, Report, count_text

BEFORE, AFTER = ModelSize(1000, 4_000_000, 2_000_000), ModelSize(750, 3_000_000, 1_000_000)


def passed(name: str = "prune-neurons", *, modified: bool = True, **details: Any) -> PassReport:
    """What a pass reports, as the pipeline hands it on."""
    return PassReport.of(PassFinished(name, 0, 1, modified, 1.0, 0.5, details), name, None)


def report(*passes: PassReport) -> Report:
    return Report("Net", BEFORE, AFTER, passes, 0.25, 3.0)


GROUPS = [
    {"id": "a", "role": "neuron", "before": 8, "after": 6},
    {"id": "b", "role": "neuron", "before": 2000, "after": 1},
    {"id": "c", "role": "head", "before": 4, "after": 3},
]


def test_json_comes_back_equal() -> None:
    one = passed(parameters_before=9, parameters_after=4, skipped=("x", "y"), nested={"a": (1,)})
    full = replace(report(one, passed(modified=False)), limits=("batch: 2 and more",))
    data = json.loads(json.dumps(full.to_json()))
    again = Report.from_json(data)
    assert again.to_json() == data
    assert again.passes[0].parameters == (9, 4)
    assert replace(again, passes=()) == replace(full, passes=())
    assert (str(again), again.to_markdown()) == (str(full), full.to_markdown())
    del data["limits"]  # as reports were written before there were limits
    assert Report.from_json(data).limits == ()


def test_more_passes_add_their_seconds_and_keep_the_size_before() -> None:
    smaller = ModelSize(1, 2, 3)
    longer = report(passed("a")).extended(smaller, [passed("b")], 4.0)
    assert (longer.before, longer.after, longer.seconds) == (BEFORE, smaller, 7.0)
    assert [p.name for p in longer.passes] == ["a", "b"]


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"groups": GROUPS}, "2,001 of 2,008 neurons in 2 groups, 1 of 4 heads in 1 group"),
        ({"groups": {"x": GROUPS[2]}}, "1 of 4 heads in 1 group"),
        ({"groups": [{**GROUPS[0], "role": "residual"}]}, "2 of 8 residual units in 1 group"),
        ({"nodes": {"forward": [1, 2], "decode": [3]}, "tensors": ["w"]}, "3 nodes, 1 tensor"),
        ({"nodes": [], "tensors": []}, "see its report"),
        ({"summary": "all of it", "groups": GROUPS}, "all of it"),
    ],
)
def test_what_went_away_is_counted_by_role(details: dict[str, Any], words: str) -> None:
    assert passed(**details).removed == words
    assert passed(modified=False, **details).removed == "nothing"


def test_factors_of_the_same_channels_count_them_once() -> None:
    channels = [{"id": "c", "before": 12, "after": 9}]
    factors = [{**GROUPS[0], "role": "x", "channels": channels} for _ in range(2)]
    assert passed(groups=factors).removed == "3 of 12 x units in 1 group"


@pytest.mark.parametrize(
    "skipped",
    [{"a": "frozen"}, ["a: frozen"], [{"id": "a", "reason": "frozen"}], [{"group": "a", "id": "",
     "reason": "frozen"}]],
)  # fmt: skip
def test_skipped_things_are_sentences_however_they_are_listed(skipped: Any) -> None:
    assert report(passed(skipped=skipped)).skipped_lines() == ["prune-neurons: a: frozen"]


def test_what_operators_freeze_is_listed_once_the_largest_first() -> None:
    def frozen(*shares: float) -> list[dict[str, Any]]:
        return [{"reason": f"r{s}", "share": s, "text": f"{s} by r{s}"} for s in shares]

    few = report(passed(frozen=frozen(0.1, 0.3)), passed(frozen=frozen(0.3, 0.2)))
    assert few.frozen_lines() == ["0.3 by r0.3", "0.2 by r0.2", "0.1 by r0.1"]
    many = report(passed(frozen=frozen(*(i / 100 for i in range(10)))))
    assert many.frozen_lines()[0] == "0.09 by r0.09"
    assert many.frozen_lines()[-1] == "and 2 more"
    assert len(many.frozen_lines()) == 9


def checked(**check: Any) -> PassReport:
    return passed(parameters_before=9, parameters_after=4, verification=check)


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([], "nothing was changed"),
        ([passed(modified=False)], "nothing was changed"),
        ([passed(parameters_before=9, parameters_after=4)], "not done (verify=False)"),
        ([passed("finetune", epochs=[])], "no shape was changed, only values"),
        ([passed("magnitude", sites={})], "no shape was changed, only values"),
        ([checked(max_error=1e-7, moved=0.5), checked(max_error=3e-6, moved=0.25)],
         "equals masking them; masking moved the outputs by 2.5e-01, largest difference 3.0e-06"),
        ([checked(max_error=0, observable=False)], "not observable on these inputs"),
        ([checked(max_error=0), passed("odd")], "not compared: odd"),
        ([checked(drift=0.125)], "largest drift 1.2e-01"),
    ],
)  # fmt: skip
def test_what_was_verified_is_said(passes: list[PassReport], says: str) -> None:
    assert says in report(*passes).verification()


def test_text_and_markdown_hold_sizes_and_one_row_a_pass() -> None:
    full = report(checked(max_error=1e-7), passed(modified=False))
    assert full.headline() == (
        "1,000 -> 750 parameters (-25.0 %), 4.0 -> 3.0 MB of weights, 2 M -> 1 M FLOPs (2.00x "
        "fewer)"
    )
    assert full.rows()[0] == ("prune-neurons", "see its report", "-55.6 %", "1.0e-07", "1.5")
    for row in [*full.rows(), *full.size_rows()]:
        assert "| " + " | ".join(row) + " |" in full.to_markdown()
    assert len({len(line) for line in str(full).splitlines() if "prune-neurons" in line}) == 1


def test_numbers_are_written_short() -> None:
    texts = [count_text(n) for n in (0, 999, 1000, 864_321, 1_380_000_000, 10**13)]
    assert texts == ["0", "999", "1 k", "864 k", "1.38 G", "10 T"]
    assert [megabytes_text(n) for n in (999_999, 1_000_000)] == ["1.000", "1.0"]
    assert [change_text(*c) for c in ((4, 3), (3, 4), (0, 5))] == ["-25.0 %", "+33.3 %", "0 %"]
