"""Pages: everything is on them, nothing on them needs a network, and names cannot break them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.exporters import open_artifact
from graphprune.exporters.artifact.results import add_results
from graphprune.ir.program import Program
from graphprune.passes import PruneHeads, PruneNeurons, Quantize
from graphprune.pipeline.events import PassFinished
from graphprune.report import charts as drawing
from graphprune.report import page as html
from graphprune.report.report import ModelSize, PassReport, Report
from graphprune.report.sensitivity import Cost, Sensitivity, Time

Captured = Callable[[str], Program]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in {"src", "href"} and not v.startswith("#")]
        assert tag not in {"script", "link", "iframe"}

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> str:
    """The page's text; it is well formed and fetches nothing."""
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/)", page)
    return parser.text


def _need_charts() -> None:
    # Not by importing it: see page._pygal.
    if not drawing.charts_available():
        pytest.skip("the package pygal is not installed")


@pytest.fixture(
    params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["charts", "tables"]
)
def charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the library that draws."""
    if request.param:
        _need_charts()
    else:
        monkeypatch.setattr(drawing, "charts_available", lambda: False)
    return bool(request.param)


def test_an_artifact_has_a_page_and_results_go_on_it(
    captured: Captured, tmp_path: Path, charts: bool
) -> None:
    program = captured("tiny-bert")
    compiled = gp.compile(
        program,
        [PruneHeads(0.5, score="obs"), PruneNeurons(0.5, score="obs"), PruneNeurons(0.5)],
        calibration=[tuple(program.forward.example)],
    )
    artifact = compiled.export(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    text = read(page)
    for part in ("Before and after", "2 of 4", "16 of 64", "score: obs", "ONNX Runtime agrees"):
        assert part in text
    assert "Output error" in text
    assert "input input_ids" in text
    assert ("<svg" in page) is charts
    assert page.count('<i class="gone"></i>') == 2 * 2 + 2 * 48

    quality = {
        which: {"task": "sts", "metric": "Spearman", "value": value, "count": 9}
        for which, value in (("pruned", 0.8012), ("dense", 0.8203))
    }
    noted = add_results(artifact, compiled.report, {"quality": quality})
    text = read((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "0.8012" in text
    assert "-0.0191" in text
    # Opening checks every hash, that of the new page too.
    assert open_artifact(tmp_path / "out").manifest["results"] == noted.manifest["results"]
    assert not list((tmp_path / "out").glob(".*"))
    # The next artifact has a page of its own.
    again = gp.compile(gp.load(tmp_path / "out"), [PruneNeurons(0.5)]).export(tmp_path / "more")
    assert "results" not in again.manifest


def test_a_page_names_what_is_quantized(captured: Captured, tmp_path: Path) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [Quantize("int8-dynamic")])
    compiled.export(tmp_path / "out")
    assert "int8-dynamic" in read((tmp_path / "out" / "report.html").read_text("utf-8"))


def report(**details: Any) -> Report:
    size = ModelSize(10, 40, 100)
    done = PassReport("a<b>&", {"x": "<i>"}, True, "<u>", None, None, 0.0, ("<s>",), details)
    return Report("<script>alert(1)</script>", size, size, (done,))


def test_the_sizes_that_a_model_is_for_are_on_the_page(captured: Captured, tmp_path: Path) -> None:
    class Limited(nn.Module):
        """Takes at least three, in threes, and one size alone."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x[:, :3].sum(1) / 3 + x.reshape(len(x), -1, 3).mean() + y.unbind(1)[0]

    inputs = (torch.randn(2, 12), torch.randn(2, 5))
    compiled = gp.compile(Limited(), [], example_inputs=inputs)
    lines = compiled.program.limit_lines()
    assert len(lines) >= 3
    made = compiled.export(tmp_path / "out", baseline=False)
    page = read((made.path / "report.html").read_text())
    text = (made.path / "report.md").read_text()
    for line in lines:
        assert line in page
        assert line in text
    assert "Sizes of inputs" not in html.report_page(report(), {})


def test_names_are_text_not_markup(charts: bool) -> None:
    error = {"<img src=x>": 0.25, "</svg><p>": 0.5}
    page = html.report_page(report(output_error=error, warnings=["<w>"]), {})
    text = read(page)
    for part in ("<script>alert(1)</script>", "a<b>&", "<u>", "<s>", "<w>", "<img src=x>"):
        assert part in text


def test_score_curves_are_drawn_where_a_pass_has_them() -> None:
    _need_charts()
    page = html.report_page(report(score_curves={"layer.0.w": [0, 0.1, 0.4]}), {})
    assert "in order of removal" in read(page)


def test_heads_stay_where_two_passes_leave_them() -> None:
    """The second pass counts among those that the first left."""
    first = {
        "groups": [{"id": "layer.0.q", "role": "head", "before": 4, "after": 3}],
        "kept": {"layer.0.q": [0, 2, 3]},
        "skipped": [{"id": "layer.10.q", "role": "head", "size": 4, "reason": "ignored"}],
    }
    second = {
        "groups": [{"id": "layer.0.q", "role": "head", "before": 3, "after": 1}],
        "kept": {"layer.0.q": [1]},
        "skipped": [],
    }
    both = report(**first)
    both = Report(both.model, both.before, both.after, (*both.passes, *report(**second).passes))
    (role,) = html._roles(both)
    assert role["layers"][0]["units"] == [False, False, True, False]
    assert role["layers"][1]["count"] == "4 of 4"


def test_units_are_drawn_only_where_it_is_told_which_stayed() -> None:
    """Else a bar of the same length; and what a later pass kept of unknown ones is unknown."""
    groups = [
        {"id": "layer.0.q", "role": "qk_dim", "before": 8, "after": 6},
        {"id": "layer.1.q", "role": "qk_dim", "before": 8, "after": 8},
        {"id": "layer.2.q", "role": "qk_dim", "before": 8, "after": 2},
    ]
    first = report(groups=groups, kept={"layer.2.q": [1, 7]})
    again = {"id": "layer.0.q", "role": "qk_dim", "before": 6, "after": 3}
    second = report(groups=[again], kept={"layer.0.q": [0, 1, 2]})
    both = Report(first.model, first.before, first.after, (*first.passes, *second.passes))
    (role,) = html._roles(both)
    assert [layer["units"] for layer in role["layers"]] == [
        [],
        [True] * 8,
        [i in (1, 7) for i in range(8)],
    ]
    assert [layer["percent"] for layer in role["layers"]] == ["37.5", "100.0", "25.0"]
    page = html.report_page(both, {})
    assert "width: 37.5%" in page
    assert page.count('<i class="gone"></i>') == 6


def test_what_ran_in_rounds_is_on_the_page(charts: bool) -> None:
    """Trainings, units, matrices and skipped things of inner passes; not of a round given up."""

    def epochs(loss: float) -> list[dict[str, Any]]:
        return [{"epoch": 1, "loss": loss, "metric": 0.5}, {"epoch": 2, "loss": loss / 2}]

    def cut(before: int, kept: list[int]) -> dict[str, Any]:
        group = {"id": "layer.0.w", "role": "neuron", "before": before, "after": len(kept)}
        skipped = [{"id": "layer.1.w", "reason": "ignored on request"}]
        return {
            "pass": "prune-neurons",
            "modified": True,
            "groups": [group],
            "kept": {"layer.0.w": kept},
            "skipped": skipped,
        }

    def tuned(loss: float) -> dict[str, Any]:
        return {"pass": "finetune", "modified": True, "epochs": epochs(loss), "metric": "accuracy"}

    rounds = [
        {"passes": [cut(4, [0, 2, 3]), tuned(0.8125)]},
        {"passes": [cut(3, [1, 2]), tuned(0.6125)]},
        {"passes": [cut(2, [0]), tuned(0.4375)]},
    ]
    finished = PassFinished(
        "prune-recover", 0, 1, True, 0.0, 0.0, {"rounds": rounds, "taken": 2, "stopped": True}
    )
    size = ModelSize(10, 40, 100)
    found = Report("m", size, size, (PassReport.of(finished, "prune-recover", None),))
    text = read(html.report_page(found, {}))
    for part in ("round 1: finetune", "round 2: finetune", "accuracy", "0.8125", "0.6125"):
        assert part in text
    assert "round 3" not in text
    assert "0.4375" not in text
    (role,) = html._roles(found)
    assert role["layers"][0]["units"] == [False, False, True, True]
    assert found.skipped_lines() == ["prune-recover: prune-neurons: layer.1.w: ignored on request"]
    # The rounds of repeat are plain lists, and a pass in it may have rounds of its own.
    nested = {"rounds": [[{"pass": "prune-recover", "rounds": rounds}]]}
    deep = PassReport.of(PassFinished("repeat", 0, 1, True, 0, 0, nested), "repeat", None)
    titles = [title for title, _ in deep.steps()]
    assert titles[:3] == ["repeat", "round 1: prune-recover", "round 1: prune-recover, "
                          "round 1: prune-neurons"]  # fmt: skip
    assert len(titles) == 2 + 6


def test_training_is_told_epoch_by_epoch_and_connections_before_and_after(charts: bool) -> None:
    def wiring(dead: int, counts: list[int]) -> dict[str, Any]:
        histogram = {"from": 0, "to": 12, "counts": counts}
        return {"units": 8, "mean": 9.5, "sd": 1.25, "dead": dead, "histogram": histogram}

    epochs = [
        {"epoch": 1, "loss": 0.71, "penalty": 0.2, "metric": 0.8125, "seconds": 3.0},
        {"epoch": 2, "loss": 0.55, "penalty": 0.1, "metric": 0.875, "seconds": 3.0},
    ]
    degrees = {
        "before": {"expanding": wiring(0, [0, 8]), "contracting": {}},
        "after": {"expanding": wiring(3, [3, 5]), "contracting": {}},
    }
    page = html.report_page(report(epochs=epochs, metric="accuracy", degrees=degrees), {})
    text = read(page)
    for word in ("Training", "accuracy", "0.875", "0.55", "weights into neurons, after", "1.25"):
        assert word in text
    assert "weights out of neurons" not in text
    assert (page.count("<svg") == 3) == charts  # loss, accuracy, connections


def test_short_names_tell_apart_or_stay_whole() -> None:
    assert drawing.short_names(["a.0.x", "a.1.x"]) == {"a.0.x": "a 0", "a.1.x": "a 1"}
    assert drawing.short_names(["a.0.x", "a.0.y"]) == {"a.0.x": "a.0.x", "a.0.y": "a.0.y"}


def test_a_sensitivity_page(charts: bool) -> None:
    costs = [Cost(f"layer.{i}.w", "neuron", 8, 4, r, i + r) for i in (0, 1) for r in (0.25, 0.5)]
    times = (Time("neuron", 0.25, 2.0, 3.0), Time("neuron", 0.5, 1.0, 3.0))
    found = Sensitivity("obs", "least-squares", 9, tuple(costs), times, {"x": "<why>"})
    page = html.sensitivity_page(found, "a<b>")
    text = read(page)
    for part in ("a<b>", "layer.1.w", "1.5000", "3.00x", "<why>", "50 % removed"):
        assert part in text
    assert ("<svg" in page) is charts


def test_points(charts: bool) -> None:
    assert "0.82" in read(html.points_page("t", "c", {"dense": [(3.0, 0.82)]}))


def test_a_report_survives_json_with_a_page() -> None:
    again = Report.from_json(json.loads(json.dumps(report(output_error={"g": 0.5}).to_json())))
    assert "0.5000" in html.report_page(again, {}) or drawing.charts_available()


def sensitivity(errors: dict[str, list[float]], *times: Time) -> Sensitivity:
    """Errors at ratios 0.25 and 0.5 by "role.layer"."""
    costs = [
        Cost(
            f"layer.{name.split('.')[1]}.{name.split('.')[0]}.w[0]", name.split(".")[0], 8, 4, r, e
        )
        for name, both in errors.items()
        for r, e in zip((0.25, 0.5), both, strict=True)
    ]
    return Sensitivity("obs", "least-squares", 9, tuple(costs), times, {})


def test_a_sensitivity_analysis_concludes_and_spares() -> None:
    found = sensitivity(
        {
            **{f"neuron.{i}": [0.01, 0.02] for i in (0, 1, 2)},
            "neuron.4": [0.1, 0.3],
            **{f"head.{i}": [0.09, 0.12] for i in (0, 1, 2)},
        }
    )
    lines = found.conclusion()
    assert lines[0].startswith("Cut neurons first: at 50 % removed")
    assert lines[1].startswith("Then attention heads")
    assert "spare layer 4 (0.300)" in lines[2]
    assert "no layer stands out" in lines[3]
    steps, said = found.recipe()
    assert steps == [
        {"prune-neurons": {"ratio": 0.5, "score": "obs", "ignore": ["layer.4.neuron.w"]}},
        {"prune-heads": {"ratio": 0.25, "score": "obs"}},
    ]
    assert "about 0.16" in said
    assert "spare layer 4" in html.sensitivity_page(found, "m")


def test_time_decides_what_to_cut_first_and_too_much_is_said() -> None:
    errors = {"neuron.0": [0.5, 0.9], "head.0": [0.6, 0.9]}
    slow = [Time("neuron", r, 9.9, 10) for r in (0.25, 0.5)]
    fast = [Time("head", r, 5.0, 10) for r in (0.25, 0.5)]
    found = sensitivity(errors, *slow, *fast)
    assert found.conclusion()[0].startswith("Cut attention heads first")
    assert "save 50 % of the time" in found.conclusion()[0]
    steps, said = found.recipe()
    assert steps == [{"prune-neurons": {"ratio": 0.25, "score": "obs"}}]
    assert "more than 0.2: add --distill" in said


def test_sensitivity_charts_have_one_scale() -> None:
    _need_charts()
    found = sensitivity({"neuron.0": [0.01, 0.02], "head.0": [0.5, 0.75]})
    small, large = drawing.sensitivity_charts(found.costs)
    marks = [re.findall(r'class="axis y.*?</g></g>', c["svg"], re.DOTALL) for c in (small, large)]
    labels = [re.findall(r">([\d.]+)</text>", "".join(m)) for m in marks]
    assert labels[0] == labels[1] != []


def test_charts_have_values_where_the_mouse_is_and_named_axes() -> None:
    _need_charts()
    (chart,) = drawing.bars("c", ["a"], {"dense": [2.5]}, x_title="operator", y_title="ms a run")
    assert "<title>a dense: 2.5</title>" in chart["svg"]
    assert ">ms a run</text>" in chart["svg"]
    assert ">operator</text>" in chart["svg"]
    assert "Pygal" not in chart["svg"]
    (chart,) = drawing.scatter("c", {"m": [(1, 2, "x")]}, x_title="speed", y_title="quality")
    assert "<title>x: speed 1, quality 2</title>" in chart["svg"]
