"""The public verbs: what they accept, what they refuse, and that training reaches the export."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import (
    ArtifactError,
    CaptureError,
    ExportError,
    RecipeError,
    UnsupportedError,
)
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneHeads, PruneNeurons, RemoveDeadNodes
from graphprune.pipeline.events import Event, PassFinished, PassStarted


def test_public_names_are_those_of_all() -> None:
    assert dir(gp) == sorted(gp.__all__)
    for name in gp.__all__:
        assert getattr(gp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'comple'"):
        gp.comple  # noqa: B018


def test_compile_takes_a_module_and_leaves_it_as_it_was() -> None:
    model, inputs = tiny("tiny-bert")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = gp.compile(model, [PruneNeurons(0.5)], example_inputs=inputs)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert compiled.program.num_parameters() < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "passes",
    [
        [PruneNeurons(0.25)],
        PruneNeurons(0.25),
        {"passes": [{"prune-neurons": {"ratio": 0.25}}]},
        [{"prune-neurons": {"ratio": 0.25}}],
    ],
    ids=["list", "pass", "dict", "data"],
)
def test_passes_come_as_objects_or_as_a_recipe(
    captured: Callable[[str], Program], passes: Any
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), passes)
    assert [p.step for p in compiled.report.passes] == [{"prune-neurons": {"ratio": 0.25}}]


def test_a_recipe_file_is_read(captured: Callable[[str], Program], tmp_path: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("passes:\n  - prune-neurons: {ratio: 0.5}\n")
    assert gp.compile(captured("tiny-mlp"), file).report.passes[0].name == "prune-neurons"


class Explodes(nn.Module):
    """A model that must not be run: bad input is refused before capture."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("captured")


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        (["prune-heds"], "prune-heads"),
        ([{"prune-heads": {"ratoi": 0.5}}], "ratio"),
        ([{"prune-heads": {"ratio": 1.0}}], "1.0"),
        ([{"prune-heads": {"ratio": "half"}}], "number"),
        ([PruneHeads], "PruneHeads is a class"),
        ("no-such-recipe", "no-such-recipe"),
        (0.5, "list of passes"),
        ({"steps": []}, "'steps'"),
    ],
)
def test_bad_recipes_are_refused_before_the_model_is_touched(passes: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        gp.compile(Explodes(), passes, example_inputs=(torch.ones(2, 3),))


def test_a_model_must_be_a_model() -> None:
    with pytest.raises(gp.GraphPruneError, match=r"nn\.Module"):
        gp.compile("minilm", [])  # type: ignore[arg-type]


def test_no_example_inputs_and_none_derivable() -> None:
    with pytest.raises(CaptureError, match="example_inputs"):
        gp.compile(nn.Linear(3, 3), [])


def test_example_inputs_are_derived_from_a_hugging_face_configuration() -> None:
    model, _ = tiny("tiny-bert")
    assert gp.compile(model, []).program.forward.input_names == ("input_ids", "attention_mask")


def test_an_untraceable_model_shows_its_own_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # this very line
                return x
            return -x

    with pytest.raises(CaptureError, match="this very line"):
        gp.compile(Branches(), [], example_inputs=(torch.ones(2, 3),))


def test_a_model_that_fails_on_its_examples_says_so() -> None:
    with pytest.raises(CaptureError, match=r"Linear itself fails|torch.export cannot capture"):
        gp.compile(nn.Linear(3, 3), [], example_inputs=(torch.ones(2, 3, dtype=torch.long),))


def test_a_program_brings_its_own_example_inputs(captured: Callable[[str], Program]) -> None:
    with pytest.raises(gp.GraphPruneError, match="omit example_inputs"):
        gp.compile(captured("tiny-mlp"), [], example_inputs=(torch.ones(2, 12),))


def test_heads_of_a_model_without_attention_are_refused(
    captured: Callable[[str], Program],
) -> None:
    with pytest.raises(UnsupportedError, match="neuron"):
        gp.compile(captured("tiny-mlp"), [PruneHeads(0.5)])


def test_compiling_again_goes_on_and_the_report_covers_both(
    captured: Callable[[str], Program],
) -> None:
    dense = captured("tiny-bert")
    once = gp.compile(dense, [PruneHeads(0.5)])
    for start in (once, once.program, once.module):
        twice = gp.compile(start, [PruneNeurons(0.5)])
        assert [p.name for p in twice.report.passes] == ["prune-heads", "prune-neurons"]
        assert twice.report.before.parameters == dense.num_parameters()
        assert twice.report.after.parameters == twice.program.num_parameters()
        assert twice.report.after.parameters < once.report.after.parameters


def test_the_module_computes_what_the_program_computes(
    captured: Callable[[str], Program],
) -> None:
    _, inputs = tiny("tiny-bert")
    compiled = gp.compile(captured("tiny-bert"), [PruneHeads(0.5)])
    with torch.no_grad():
        ours = compiled.module(**inputs)
    torch.testing.assert_close(ours[0], compiled.program(**inputs)[0])


def test_the_module_has_the_signature_of_the_captured_inputs(
    captured: Callable[[str], Program],
) -> None:
    module = gp.compile(captured("tiny-bert"), []).module
    named = inspect.signature(module.forward).parameters
    assert list(named)[:3] == ["input_ids", "attention_mask", "token_type_ids"]
    needed = [name for name, p in named.items() if p.default is inspect.Parameter.empty]
    assert needed == ["input_ids", "attention_mask"]
    assert inspect.signature(copy.deepcopy(module).forward) == inspect.signature(module.forward)


class Middle(nn.Module):
    """A flag and an input that is not always there, between and behind others."""

    def forward(self, x: Tensor, flag: bool = True, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return x + y if flag else x - y


def test_a_signature_may_have_constants_before_inputs() -> None:
    x, y = torch.randn(2, 3, 5)[:, :, 0:3].unbind()
    module = gp.compile(Middle(), [], example_inputs={"x": x, "flag": False, "y": y}).module
    assert str(inspect.signature(module.forward)) == "(x, flag, y)"
    module = gp.compile(Middle(), [], example_inputs={"x": x, "y": y}).module
    assert str(inspect.signature(module.forward)) == "(x, flag=True, y=None)"
    assert torch.equal(module(x, y=y), x + y)


def test_torch_export_takes_the_module_with_its_sizes_dynamic(
    captured: Callable[[str], Program],
) -> None:
    program = captured("tiny-bert")
    module = gp.compile(program, [PruneNeurons(0.5)]).module
    ids, mask = program.forward.example
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module,
        (),
        {"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": dims, "attention_mask": dims},
    ).module()
    other = {"input_ids": ids.repeat(2, 1)[:3, :7], "attention_mask": mask.repeat(2, 1)[:3, :7]}
    found, wanted = exported(**other)[0], module(**other)[0]
    torch.testing.assert_close(found, wanted)
    assert found.shape[:2] == (3, 7)


def test_labels_in_a_batch_are_ignored_where_capture_had_none(
    captured: Callable[[str], Program],
) -> None:
    program = captured("tiny-bert")
    ids, mask = program.forward.example
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(ids))}
    compiled = gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[batch])
    bare = {name: value for name, value in batch.items() if name != "labels"}
    same = gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[bare])
    assert torch.equal(compiled.module(**batch)[0], same.module(**bare)[0])
    with pytest.raises(gp.GraphPruneError, match=r"unknown inputs .'label'."):
        compiled.module(**bare, label=batch["labels"])


class Scored(nn.Module):
    """A model whose labels were captured."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return x if labels is None else (x - labels).square()


def test_labels_that_were_captured_are_an_input() -> None:
    x, labels = torch.randn(2, 3), torch.randn(2, 3)
    module = gp.compile(Scored(), [], example_inputs={"x": x, "labels": labels}).module
    torch.testing.assert_close(module(x, labels), (x - labels).square())
    with pytest.raises(gp.GraphPruneError, match="'labels' is missing"):
        module(x)
    module = gp.compile(Scored(), [], example_inputs=(x,)).module
    assert torch.equal(module(x=x, labels=labels), x)


def test_training_the_module_reaches_the_program_and_nothing_else(
    captured: Callable[[str], Program],
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)])
    before = compiled.program
    values = {name: tensor.clone() for name, tensor in before.tensors.items()}
    x = torch.randn(3, 12)
    _train_one_step(compiled.module, x)

    after = compiled.program
    assert all(torch.equal(values[name], before.tensors[name]) for name in values)
    assert not torch.equal(values["layers.0.weight"], after.tensors["layers.0.weight"])
    with torch.no_grad():
        torch.testing.assert_close(after(x), compiled.module(x))
    assert after.history[-1] == {"trained": sorted(values)}
    assert compiled.program is after  # nothing trained since

    snapshot = after.tensors["layers.0.weight"].clone()
    _train_one_step(compiled.module, x)
    assert torch.equal(snapshot, after.tensors["layers.0.weight"])
    assert compiled.program is not after
    assert len(compiled.program.history) == len(after.history)


def test_what_was_trained_is_what_onnx_runtime_computes(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)])
    x = torch.randn(3, 12)
    untrained = compiled.program(x)
    _train_one_step(compiled.module, x)
    artifact = compiled.export(tmp_path / "out")
    (output,) = artifact.session().run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), compiled.module(x))
    assert (torch.from_numpy(output) - untrained).abs().max() > 1e-3


def test_an_artifact_goes_on_with_its_report_and_its_files(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)])
    compiled.files["labels.json"] = b'{"0": "no"}'
    compiled.export(tmp_path / "out")
    again = gp.load(tmp_path / "out")
    assert again.report == compiled.report
    assert again.files == {"labels.json": tmp_path / "out" / "labels.json"}
    more = gp.compile(again, [PruneNeurons(0.5)])
    exported = more.export(tmp_path / "more")
    baseline = (tmp_path / "out" / "baseline.onnx").read_bytes()
    assert exported.has_baseline
    assert (tmp_path / "more" / "baseline.onnx").read_bytes() == baseline
    assert (tmp_path / "more" / "labels.json").read_bytes() == b'{"0": "no"}'
    (tmp_path / "more" / "labels.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=r"labels\.json"):
        gp.load(tmp_path / "more")


def test_a_saved_program_goes_on_too(captured: Callable[[str], Program], tmp_path: Path) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)])
    compiled.save(tmp_path / "saved")
    again = gp.load(tmp_path / "saved")
    assert again.report == compiled.report
    x = torch.randn(3, 12)
    assert torch.equal(again.program(x), compiled.program(x))


def test_a_loaded_program_says_that_it_has_no_dense_model(
    captured: Callable[[str], Program], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gp.compile(captured("tiny-mlp"), []).save(tmp_path / "saved")
    artifact = gp.load(tmp_path / "saved").export(tmp_path / "out")
    assert not artifact.has_baseline
    assert "no dense model" in caplog.text


def test_a_parameter_put_in_the_place_of_another_reaches_the_program(
    captured: Callable[[str], Program],
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [])
    layer = compiled.module.get_submodule("layers.0")
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))  # type: ignore[arg-type]
    assert not compiled.program.tensors["layers.0.weight"].any()
    layer.weight = nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(gp.GraphPruneError, match="change shapes with passes"):
        _ = compiled.program


def test_training_a_tied_model_keeps_it_tied(captured: Callable[[str], Program]) -> None:
    _, inputs = tiny("tiny-gpt2")
    compiled = gp.compile(captured("tiny-gpt2"), [PruneNeurons(0.5)])
    assert compiled.program.aliases
    optimizer = torch.optim.SGD(compiled.module.parameters(), lr=0.1)
    compiled.module(**inputs)[0].pow(2).mean().backward()
    optimizer.step()
    program = compiled.program
    with torch.no_grad():
        torch.testing.assert_close(program(**inputs)[0], compiled.module(**inputs)[0])


def test_observers_see_every_pass(captured: Callable[[str], Program]) -> None:
    seen: list[Event] = []
    gp.compile(
        captured("tiny-mlp"), [RemoveDeadNodes(), PruneNeurons(0.5)], observers=[seen.append]
    )
    assert [e.name for e in seen if isinstance(e, PassStarted)] == [
        "remove-dead-nodes",
        "prune-neurons",
    ]
    assert sum(isinstance(e, PassFinished) for e in seen) == 2


def test_the_seed_decides_what_random_removes(captured: Callable[[str], Program]) -> None:
    def weights(seed: int) -> Tensor:
        compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5, score="random")], seed=seed)
        return compiled.program.tensors["layers.0.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_report_says_what_was_removed_and_survives_json(
    captured: Callable[[str], Program],
) -> None:
    report = gp.compile(captured("tiny-bert"), [PruneHeads(0.5), RemoveDeadNodes()]).report
    text = str(report)
    assert "4 of 8 heads in 2 groups" in text
    assert "removing the units equals masking them" in text
    assert f"{report.before.parameters:,} -> {report.after.parameters:,} parameters" in text
    assert "prune-heads" in report.to_markdown()
    assert gp.Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.max_error is not None
    assert report.max_error <= 1e-5


def test_a_report_without_verification_says_so(captured: Callable[[str], Program]) -> None:
    report = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)], verify=False).report
    assert "not done" in str(report)
    assert report.max_error is None


def test_an_empty_list_of_passes_changes_nothing(captured: Callable[[str], Program]) -> None:
    report = gp.compile(captured("tiny-mlp"), []).report
    assert report.before == report.after
    assert "nothing was changed" in str(report)


def test_inspect_finds_heads_and_neurons_of_a_module() -> None:
    model, inputs = tiny("tiny-bert")
    groups = gp.inspect(model, example_inputs=inputs)
    assert [g.size for g in groups.with_role("head")] == [4, 4]
    assert [g.size for g in groups.with_role("neuron") if not g.frozen] == [64, 64]


def _train_one_step(module: nn.Module, x: Tensor) -> None:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).pow(2).mean().backward()
    optimizer.step()
    module.eval()


def test_metadata_survives_what_is_compiled_from_an_artifact(
    captured: Callable[[str], Program], tmp_path: Any
) -> None:
    """What a detector's or a recognizer's runtime reads: names, stride, kind of model."""
    given = {"names": "{0: 'person', 1: 'bicycle'}", "stride": "32", "task": "detect"}
    program = captured("tiny-cnn")
    gp.compile(program, []).export(tmp_path / "first", metadata=given)
    again = gp.compile(gp.load(tmp_path / "first"), [PruneNeurons(0.5)])
    again.export(tmp_path / "second", metadata={"stride": "16", "imgsz": "[64, 64]"})
    expected = given | {"stride": "16", "imgsz": "[64, 64]"}
    for name, wanted in (("first", given), ("second", expected)):
        artifact = gp.open(tmp_path / name)
        found = artifact.session().get_modelmeta().custom_metadata_map
        assert wanted.items() <= found.items()
        assert artifact.manifest["metadata"] == wanted


def test_metadata_that_is_no_text_is_refused(
    captured: Callable[[str], Program], tmp_path: Any
) -> None:
    numbers: Any = {"stride": 32}
    with pytest.raises(ExportError, match=r"metadata 'stride' is a int.*give str"):
        gp.compile(captured("tiny-mlp"), []).export(tmp_path / "out", metadata=numbers)
    assert not (tmp_path / "out").exists()
