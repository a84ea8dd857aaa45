"""What the weight passes share: which weights, what their inputs were, what is said and refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
import graphprune.passes as gp_passes
from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, linear_sites
from graphprune.calibration.stream import Stream
from graphprune.capture.capture import capture
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import Magnitude, PruneHeads, Quantize, SparseGPT, SparseLLM, Wanda
from graphprune.passes.solvers.sparsegpt import Inputs, sparsegpt
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_mask
from graphprune.pipeline.base import Pass

Captured = Callable[[str], Program]
UNSTRUCTURED = parse_pattern("unstructured")


def batches_of(program: Program, count: int = 2, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        ids = torch.randint(3, 99, (4, 16), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, 9:] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def details(compiled: gp.Compiled) -> dict[str, Any]:
    return dict(compiled.report.passes[-1].details)


def sites_of(compiled: gp.Compiled) -> dict[str, Any]:
    return {s["name"]: s for s in details(compiled)["sites"]}


def skipped_of(compiled: gp.Compiled) -> dict[str, str]:
    return {s["name"]: s["reason"] for s in details(compiled)["skipped"]}


def seen_by(program: Program, nodes: set[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of some nodes by running the whole graph, without any streaming."""
    found: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in nodes:
                found[n.name] = value
            return value

    with torch.no_grad():
        Recorder(graph_module(program)).run(*(batch[n] for n in program.forward.input_names))
    return found


def gram_of(
    program: Program, operands: Sequence[torch.fx.Node], batches: Sequence[dict[str, Tensor]]
) -> Tensor:
    """Second moments of some activations, padding left out."""
    total: Any = 0
    for batch in batches:
        values = seen_by(program, {n.name for n in operands}, batch)
        mask = batch["attention_mask"].bool().reshape(-1)
        for node in operands:
            rows = values[node.name].double()
            rows = rows.reshape(-1, rows.shape[-1])[mask]
            total = total + rows.T @ rows
    result: Tensor = total
    return result


# Which weights.


@pytest.mark.slow
def test_output_heads_are_left_alone_unless_named(captured: Captured) -> None:
    program = captured("tiny-bert")
    plain = gp.compile(program, [Magnitude(0.5)])
    assert skipped_of(plain) == {
        "pooler.dense.weight": "an output head: left alone unless targets names it"
    }
    assert len(sites_of(plain)) == 12
    named = gp.compile(program, [Magnitude(0.5, targets=("pooler",))])
    assert list(sites_of(named)) == ["pooler.dense.weight"]
    changed = {n for n, t in named.program.tensors.items() if not t.equal(program.tensors[n])}
    assert changed == {"pooler.dense.weight"}


@pytest.mark.parametrize("name", ["transformer.wte", "lm_head"])
def test_a_head_tied_to_the_embedding_goes_by_either_name(name: str, captured: Captured) -> None:
    program = captured("tiny-gpt2")
    assert "transformer.wte.weight" in skipped_of(gp.compile(program, [Magnitude(0.5)]))
    compiled = gp.compile(program, [Magnitude(0.5, targets=(name,))])
    assert list(sites_of(compiled)) == ["transformer.wte.weight"]
    weight = compiled.program.tensors["transformer.wte.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_targets_and_ignore(captured: Captured) -> None:
    program = captured("tiny-bert")
    step = Magnitude(0.5, targets=("encoder.layer.0",), ignore=("*.attention.self",))
    compiled = gp.compile(program, [step])
    assert list(sites_of(compiled)) == [
        f"encoder.layer.0.{n}.dense.weight" for n in ("attention.output", "intermediate", "output")
    ]
    assert set(skipped_of(compiled).values()) == {"ignored on request"}
    assert len(skipped_of(compiled)) == 3
    with pytest.raises(RecipeError, match=r"targets: 'encoder.layer.7' matches nothing"):
        gp.compile(program, [Magnitude(0.5, targets=("encoder.layer.7",))])
    with pytest.raises(UnsupportedError, match=r"no weight to prune.*ignored on request"):
        gp.compile(program, [Magnitude(0.5, ignore=("*",))])
    with pytest.raises(UnsupportedError, match="multiplies no activation by a weight"):
        gp.compile(program, [Magnitude(0.5, targets=("embeddings.word_embeddings",))])


def test_a_weight_used_at_two_places_is_pruned_once_for_both(captured: Captured) -> None:
    """ALBERT: the moments are those of both layers together."""
    program = captured("tiny-albert")
    batches = batches_of(program, padded=True)
    compiled = gp.compile(program, [SparseGPT(0.5)], calibration=batches)
    places: dict[str, list[LinearSite]] = {}
    for site in linear_sites(axis_groups(program)):
        places.setdefault(site.name, []).append(site)
    shared = {name: found for name, found in places.items() if len(found) == 2}
    assert len(shared) == 6
    found_sites = sites_of(compiled)
    for name, (site, again) in shared.items():
        gram = gram_of(program, [site.operand, again.operand], batches)
        expected = sparsegpt(
            site.matrix(program).double(), Inputs.of(gram, 0.01), 0.5, UNSTRUCTURED
        ).float()
        torch.testing.assert_close(compiled.program.tensors[name], expected, rtol=1e-3, atol=1e-4)
        assert found_sites[name]["sparsity"] == 0.5


def test_experts_are_pruned_one_by_one(captured: Captured) -> None:
    program = captured("tiny-mixtral")
    compiled = gp.compile(program, [SparseGPT(0.5)], calibration=batches_of(program))
    for name in ("gate_up_proj", "down_proj"):
        whole = f"model.layers.0.mlp.experts.{name}"
        weight = compiled.program.tensors[whole]
        assert weight.shape == program.tensors[whole].shape
        for e in range(4):
            assert int((weight[e] == 0).sum()) == weight[e].numel() // 2
            assert sites_of(compiled)[f"{whole}[{e}]"]["sparsity"] == 0.5


@pytest.mark.parametrize("step", [Wanda(0.5), SparseGPT(0.5), SparseLLM(0.5)])
def test_an_expert_that_no_token_reaches_goes_by_size(step: Pass, captured: Captured) -> None:
    """Three tokens cannot reach every expert of both layers here; the others use their inputs."""
    program = captured("tiny-mixtral")
    batch = {k: v[:1, :3] for k, v in batches_of(program, 1)[0].items()}
    compiled = gp.compile(program, [step], calibration=[batch])
    notes = [w for w in details(compiled)["warnings"] if "no calibration row reaches it" in w]
    assert notes
    sites = {s.name: s for s in linear_sites(axis_groups(program))}
    unseen = {note.split(":")[0] for note in notes}
    assert len(unseen) == len(notes)
    for name in unseen:
        dense = sites[name].matrix(program)
        gone = removed_mask(dense.abs(), 0.5, UNSTRUCTURED, False)
        assert torch.equal(sites[name].matrix(compiled.program), dense.masked_fill(gone, 0))
        assert "error" not in sites_of(compiled)[name]
    assert any("error" in s for n, s in sites_of(compiled).items() if "[" in n)


# What their inputs were.


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama"])
def test_a_region_sees_what_the_pruned_ones_before_it_make(name: str, captured: Captured) -> None:
    """Every region's result from a whole run of the model with the pruned weights before it."""
    program = captured(name)
    batches = batches_of(program, padded=True)
    compiled = gp.compile(program, [SparseGPT(0.6)], calibration=batches)
    sites = [s for s in linear_sites(axis_groups(program)) if s.name in sites_of(compiled)]
    regions = Stream(program, batches).regions(sites)
    assert len(regions) == 4
    prefix = program
    for region in regions:
        grams = {s.operand: gram_of(prefix, [s.operand], batches) for s in region}
        for site in region:
            dense = site.matrix(program).double()
            expected = sparsegpt(dense, Inputs.of(grams[site.operand], 0.01), 0.6, UNSTRUCTURED)
            torch.testing.assert_close(
                site.matrix(compiled.program).double(), expected, rtol=1e-2, atol=1e-3
            )
        pruned = {s.tensor: compiled.program.tensors[s.tensor] for s in region}
        prefix = prefix.with_tensors(pruned)
    # It can tell: on the dense model's activations the last region comes out otherwise.
    last = regions[-1][-1]
    dense_gram = Inputs.of(gram_of(program, [last.operand], batches), 0.01)
    other = sparsegpt(last.matrix(program).double(), dense_gram, 0.6, UNSTRUCTURED)
    assert float((last.matrix(compiled.program) - other).abs().max()) > 0.05


@pytest.mark.parametrize("step", [Wanda(0.5), SparseGPT(0.5), SparseGPT(0.5, allocation="owl")])
def test_what_stands_on_padding_changes_nothing(step: Pass, captured: Captured) -> None:
    program = captured("tiny-bert")
    results = []
    for filler in (1, 50):
        batch = batches_of(program, 1)[0]
        batch["attention_mask"][:, 12:] = 0
        batch["input_ids"][:, 12:] = filler
        results.append(gp.compile(program, [step], calibration=[batch]))
    for name, tensor in results[0].program.tensors.items():
        torch.testing.assert_close(tensor, results[1].program.tensors[name], rtol=1e-3, atol=1e-4)
    assert details(results[0])["calibration_rows"] == 48


def test_fewer_rows_than_features_are_told_with_the_numbers(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    program = captured("tiny-bert")
    few = [{k: v[:1, :5] for k, v in batches_of(program, 1)[0].items()}]
    with caplog.at_level(logging.WARNING, "graphprune"):
        compiled = gp.compile(program, [SparseGPT(0.5)], calibration=few)
    notes = details(compiled)["warnings"]
    sentence = (
        "encoder.layer.0.output.dense.weight and 7 more: 5 calibration rows for 64 features; "
        "more batches would do better"
    )
    assert [n for n in notes if "calibration rows" in n] == [sentence]
    assert [r.getMessage() for r in caplog.records].count(sentence) == 1
    assert not [note for note in notes if note.startswith("encoder.layer.1")]
    enough = gp.compile(program, [SparseGPT(0.5)], calibration=batches_of(program))
    assert details(enough)["warnings"] == []


def test_damping_that_was_raised_is_told(captured: Captured) -> None:
    program = captured("tiny-bert")
    few = [{k: v[:1, :5] for k, v in batches_of(program, 1)[0].items()}]
    compiled = gp.compile(program, [SparseGPT(0.5, damping=0.0)], calibration=few)
    assert any("damping was raised from 0 to" in w for w in details(compiled)["warnings"])


@pytest.mark.parametrize("data", [False, True])
def test_weights_that_are_not_finite_are_named(data: bool, captured: Captured) -> None:
    program = captured("tiny-bert")
    name = "encoder.layer.1.output.dense.weight"
    broken = program.with_tensors({name: program.tensors[name] / 0})
    step: Pass = SparseGPT(0.5) if data else Magnitude(0.5)
    with pytest.raises(UnsupportedError, match=rf"weight '{name}' holds NaN or infinity"):
        gp.compile(broken, [step], calibration=batches_of(program))


def test_inputs_that_are_not_finite_are_named() -> None:
    program = capture(Block(), (torch.randn(2, 6),))
    batches = [torch.randn(9, 6), torch.full((9, 6), float("nan"))]
    with pytest.raises(GraphPruneError, match=r"batch 1 gives NaN or infinity .*'up.weight'"):
        gp.compile(program, [Wanda(0.5)], calibration=batches)


# Storage.


class Block(nn.Module):
    """Two matrices and a head; stored [in, out] like GPT-2's on request."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        generator = torch.Generator().manual_seed(0)
        up, down = torch.randn(8, 6, generator=generator), torch.randn(5, 8, generator=generator)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.up.weight = nn.Parameter(up.T.contiguous() if transposed else up)
        self.down.weight = nn.Parameter(down.T.contiguous() if transposed else down)
        self.head = nn.Linear(5, 3)

    def layer(self, x: Tensor, linear: nn.Linear) -> Tensor:
        if self.transposed:
            return torch.addmm(linear.bias, x, linear.weight)
        return F.linear(x, linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.layer(x, self.up))
        result: Tensor = self.head(F.layer_norm(self.layer(hidden, self.down), (5,)))
        return result


@pytest.mark.parametrize(
    "step",
    [
        Magnitude(0.5, scope="row"),
        Magnitude(pattern="1:2"),
        Wanda(0.5),
        SparseGPT(0.5),
        SparseGPT(0.5, pattern="1x2"),
        SparseGPT(0.25, pattern="columns"),
        SparseLLM(0.5),
    ],
    ids=str,
)
def test_transposed_storage_is_only_storage(step: Pass) -> None:
    x = torch.randn(80, 6)
    torch.manual_seed(3)
    plain, turned = Block(), Block(transposed=True)
    for name in ("up", "down"):
        getattr(turned, name).bias = getattr(plain, name).bias
    a, b = (
        gp.compile(capture(model, (x[:4],)), [step], calibration=[x]).program
        for model in (plain, turned)
    )
    for name in ("up.weight", "down.weight"):
        assert 0 < int((a.tensors[name] == 0).sum()) < a.tensors[name].numel()
        torch.testing.assert_close(a.tensors[name], b.tensors[name].T, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_its_type_and_its_zeros(captured: Captured) -> None:
    program = captured("tiny-llama").cast(torch.float32, torch.bfloat16)
    compiled = gp.compile(program, [SparseGPT(0.5)], calibration=batches_of(program))
    for name in sites_of(compiled):
        weight = compiled.program.tensors[name]
        assert weight.dtype is torch.bfloat16
        assert int((weight == 0).sum()) == weight.numel() // 2


# What comes out.


@pytest.mark.parametrize("step", [Wanda(0.5), SparseGPT(pattern="2:4"), SparseLLM(0.5)], ids=str)
def test_the_model_with_these_weights_gives_these_outputs(step: Pass, captured: Captured) -> None:
    """The compiled program is the original torch module with the pruned weights copied in."""
    model, inputs = tiny("tiny-llama")
    program = captured("tiny-llama")
    compiled = gp.compile(program, [step], calibration=batches_of(program))
    model.load_state_dict(compiled.program.tensors, strict=False)
    with torch.no_grad():
        expected = model(**inputs).logits
    flat = [inputs[n] for n in program.forward.input_names]
    torch.testing.assert_close(compiled.program.run(flat)[0], expected, rtol=1e-4, atol=1e-5)
    # What is not among the sites is the same object still.
    for name, tensor in program.tensors.items():
        assert (compiled.program.tensors[name] is tensor) is (name not in sites_of(compiled))


@pytest.mark.parametrize("step", [Wanda(0.5), SparseGPT(0.5), SparseGPT(0.5, pattern="1x2")])
def test_the_report_says_what_running_the_layer_says(step: Pass) -> None:
    x = torch.randn(120, 6)
    model = Block()
    program = capture(model, (x[:4],))
    compiled = gp.compile(program, [step], calibration=[x[:50], x[50:]])
    site = sites_of(compiled)["up.weight"]
    dense, pruned = program.tensors["up.weight"], compiled.program.tensors["up.weight"]
    assert site["shape"] == [8, 6]
    assert site["sparsity"] == float((pruned == 0).double().mean())
    assert site["pattern"] == getattr(step, "pattern")  # noqa: B009
    assert site["seconds"] >= 0

    def part(weight: Tensor) -> float:
        return float((x @ (dense - weight).T).square().sum() / (x @ dense.T).square().sum())

    assert site["error"] == pytest.approx(part(pruned), rel=1e-3)
    masked = part(dense.masked_fill(pruned == 0, 0))
    assert site["error_masked"] == pytest.approx(masked, rel=1e-3)
    if isinstance(step, SparseGPT):
        assert site["error"] < site["error_masked"]
    whole = details(compiled)
    assert set(whole["seconds"]) == {"allocation", "calibration", "solving"}
    weights = [compiled.program.tensors[n] for n in sites_of(compiled)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert whole["sparsity"] == pytest.approx(zeros / sum(w.numel() for w in weights))
    assert whole["parameters_before"] == whole["parameters_after"] == program.num_parameters()


def test_nothing_to_do_is_not_called_a_change(captured: Captured) -> None:
    program = captured("tiny-bert")
    for step in (Magnitude(0.0), Wanda(0.0), SparseGPT(0.0)):
        compiled = gp.compile(program, [step], calibration=batches_of(program))
        assert not compiled.report.passes[0].modified
        assert all(t is program.tensors[n] for n, t in compiled.program.tensors.items())
    twice = gp.compile(program, [Magnitude(0.5), Magnitude(0.5)])
    assert [p.modified for p in twice.report.passes] == [True, False]


def test_it_works_after_structure_was_removed(captured: Captured) -> None:
    program = captured("tiny-bert")
    batches = batches_of(program)
    compiled = gp.compile(program, [PruneHeads(0.5), SparseGPT(0.5)], calibration=batches)
    value = compiled.program.tensors["encoder.layer.0.attention.self.value.weight"]
    assert value.shape == (16, 32)
    for name in sites_of(compiled):
        weight = compiled.program.tensors[name]
        assert int((weight == 0).sum()) == weight.numel() // 2
    apart = gp.compile(program, [PruneHeads(0.5)])
    again = gp.compile(apart, [SparseGPT(0.5)], calibration=batches)
    for name, tensor in compiled.program.tensors.items():
        assert torch.equal(tensor, again.program.tensors[name])


def test_one_block_alone_is_a_block_still(captured: Captured) -> None:
    """Which sites are asked for does not move a cut into the middle of a feed-forward block."""
    program = captured("tiny-bert")
    layer = "encoder.layer.1"
    targets = (f"{layer}.intermediate", f"{layer}.output")
    compiled = gp.compile(
        program, [SparseLLM(0.5, targets=targets)], calibration=batches_of(program)
    )
    assert [len(s["block_errors"]) for s in sites_of(compiled).values()] == [4, 4]


# What is refused.


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("1:5", r"does not fit 'encoder.layer.0.attention.self.query.weight': its 32 inputs are "
                r"no multiple of 5; name it in ignore, give indivisible='skip'"),
        ("128x128", "all of its 32 outputs and 32 inputs are one block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_or_skipped(
    pattern: str, sentence: str, captured: Captured
) -> None:
    program = captured("tiny-bert")
    sparsity = None if ":" in pattern else 0.5
    with pytest.raises(UnsupportedError, match=sentence):
        gp.compile(program, [Magnitude(sparsity, pattern=pattern)])
    with pytest.raises(UnsupportedError, match="no weight to prune"):
        gp.compile(program, [Magnitude(sparsity, pattern=pattern, indivisible="skip")])


def test_what_fits_is_pruned_where_the_rest_is_skipped(captured: Captured) -> None:
    program = captured("tiny-bert")
    compiled = gp.compile(program, [Magnitude(0.5, pattern="32x32", indivisible="skip")])
    assert {name.rpartition("layer.")[2][1:] for name in sites_of(compiled)} == {
        ".intermediate.dense.weight",
        ".output.dense.weight",
    }
    reason = skipped_of(compiled)["encoder.layer.0.attention.self.query.weight"]
    assert (
        reason == "pattern '32x32' does not fit: all of its 32 outputs and 32 inputs are one block"
    )


@pytest.mark.parametrize("cls", [Magnitude, Wanda, SparseGPT, SparseLLM])
@pytest.mark.parametrize("pattern", ["32x4", "16x4", "4x4"])
def test_blocks_at_the_edges_are_smaller(cls: Any, pattern: str) -> None:
    """After structure shapes are no multiples: 42 outputs, 42 inputs. Exactly half goes, whole."""
    x = torch.randn(80, 30)
    model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 21), nn.Linear(21, 5))
    scope = {"scope": "layer"} if cls is Wanda else {}
    steps: list[Any] = [gp_passes.PruneNeurons(0.3), cls(0.5, pattern=pattern, **scope)]
    compiled = gp.compile(model, steps, example_inputs=(x[:4],), calibration=[x])
    parsed = parse_pattern(pattern)
    for name, shape in (("0.weight", (42, 30)), ("2.weight", (15, 42))):
        weight = compiled.program.tensors[name]
        assert weight.shape == shape
        alive = parsed.units(weight.abs()) > 0
        sizes = parsed.units(torch.ones(shape)).square()
        assert int((~alive).sum()) == math.floor(0.5 * alive.numel() + 0.5)
        assert int((weight == 0).sum()) == round(float(sizes[~alive].sum()))


CLASSES: list[Any] = [Magnitude, Wanda, SparseGPT, SparseLLM]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be the fraction .* below 1, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be the fraction"),
        ({"sparsity": float("nan")}, "sparsity must be the fraction"),
        ({"sparsity": "half"}, "sparsity must be the fraction .*got 'half'"),
        ({"sparsity": True}, "sparsity must be the fraction"),
        ({}, "pattern 'unstructured' needs a sparsity, such as 0.5"),
        ({"pattern": "columns"}, "pattern 'columns' needs a sparsity"),
        ({"pattern": "2:4", "sparsity": 0.6}, "which is a sparsity of 0.5, not 0.6: leave"),
        ({"pattern": "4:2"}, "write n:m with 0 < n < m"),
        ({"sparsity": 0.5, "pattern": "sinlge"}, "there is no pattern 'sinlge'"),
        ({"sparsity": 0.5, "allocation": "owls"}, "there is no allocation 'owls'"),
        ({"pattern": "2:4", "allocation": "global"}, "allocation 'global' has nothing to choose"),
        (
            {"sparsity": 0.5, "pattern": "rows", "allocation": "global"},
            "unlike length do not compare",
        ),
        ({"pattern": "2:4", "allocation": "owl"}, "owl_spread counts weights of each 4"),
        ({"sparsity": 0.5, "indivisible": "drop"}, "indivisible is 'refuse' or 'skip'"),
        ({"sparsity": 0.5, "targets": "encoder"}, "targets must be a tuple"),
        ({"sparsity": 0.5, "ignore": ("re:(",)}, "is no regular expression"),
        ({"sparsity": 0.5, "owl_threshold": 0.0}, "owl_threshold must be above 0"),
        ({"sparsity": 0.5, "owl_spread": -1.0}, "owl_spread must be above 0"),
    ],
    ids=str,
)
def test_options_are_checked_at_once(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cls(**options)


@pytest.mark.parametrize("cls", [SparseGPT, SparseLLM])
@pytest.mark.parametrize("damping", [-0.1, float("inf"), float("nan"), "much", None])
def test_damping_is_checked_at_once(cls: Any, damping: Any) -> None:
    with pytest.raises(RecipeError, match="damping must be 0 or more"):
        cls(0.5, damping=damping)


@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_scopes_are_checked_at_once(cls: Any) -> None:
    with pytest.raises(RecipeError, match="there is no scope 'rows'; did you mean 'row'"):
        cls(0.5, scope="rows")


def test_n_of_m_agrees_with_its_own_sparsity() -> None:
    for pattern, sparsity in (("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25)):
        assert SparseGPT(sparsity, pattern=pattern).pattern == pattern


@pytest.mark.parametrize(
    "step",
    [
        Wanda(0.5),
        SparseGPT(0.5),
        SparseLLM(0.5),
        Magnitude(0.5, allocation="owl"),
        Wanda(0.5, allocation="global"),
    ],
    ids=str,
)
def test_calibration_is_asked_for_before_any_work(step: Pass) -> None:
    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran")

    with pytest.raises(RecipeError, match=f"{step.name}.*needs? calibration"):
        gp.compile(Untouched(), [step], example_inputs=(torch.randn(2, 6),))


def test_magnitude_needs_no_calibration(captured: Captured) -> None:
    for allocation in ("uniform", "global"):
        assert not Magnitude(0.5, allocation=allocation).needs_calibration
        gp.compile(captured("tiny-bert"), [Magnitude(0.5, allocation=allocation)])


@pytest.mark.parametrize("step", [Magnitude(0.5), SparseGPT(0.5)], ids=str)
def test_after_quantization_it_is_too_late(step: Pass, captured: Captured) -> None:
    program = captured("tiny-bert")
    with pytest.raises(RecipeError, match="prune first and quantize last"):
        gp.compile(program, [Quantize("int8-dynamic"), step], calibration=batches_of(program))


def test_zeros_are_noted_and_promise_no_speed(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    program = captured("tiny-bert")
    with caplog.at_level(logging.WARNING, "graphprune"):
        compiled = gp.compile(program, [Magnitude(0.5, targets=("encoder.layer.0.output",))])
    assert any("no faster" in record.getMessage() for record in caplog.records)
    assert compiled.program.zeroed == {"encoder.layer.0.output.dense.weight"}
    more = gp.compile(compiled, [Magnitude(0.5, targets=("encoder.layer.1.output",))])
    assert more.program.zeroed == {f"encoder.layer.{i}.output.dense.weight" for i in range(2)}


def test_ids_of_another_tokenizer_are_named(captured: Captured) -> None:
    program = captured("tiny-llama")
    batches = [{k: v + 100_000 for k, v in b.items()} for b in batches_of(program)]
    with pytest.raises(GraphPruneError, match=r"the model has a table of .* not the model's"):
        gp.compile(program, [SparseGPT(0.5)], calibration=batches)


class BothWays(nn.Module):
    """One weight as it is and transposed, as autoencoders with tied weights have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.first(x), self.weight).relu()
        result: Tensor = self.head(F.layer_norm(hidden @ self.weight, (8,)))
        return result


def test_a_weight_used_both_ways_is_left_alone() -> None:
    x = torch.randn(40, 8)
    compiled = gp.compile(BothWays(), [Wanda(0.5)], example_inputs=(x[:4],), calibration=[x])
    assert skipped_of(compiled)["weight"] == "it is multiplied both as it is and transposed"
    assert "first.weight" in sites_of(compiled)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "4x4"])
@pytest.mark.parametrize("cls", [Magnitude, Wanda, SparseGPT])
def test_something_of_every_matrix_stays(cls: Any, pattern: str) -> None:
    x = torch.randn(80, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    step = cls(0.99, pattern=pattern)
    compiled = gp.compile(model, [step], example_inputs=(x[:4],), calibration=[x])
    assert bool(compiled.program.tensors["0.weight"].any())


def test_a_global_ranking_spares_unseen_experts_and_tells_of_emptied_layers(
    captured: Captured,
) -> None:
    program = captured("tiny-mixtral")
    ids = torch.full((2, 1), 5)
    names = program.forward.input_names
    batch = {n: ids if n == "input_ids" else torch.ones_like(ids) for n in names}
    compiled = gp.compile(program, [SparseGPT(0.5, allocation="global")], calibration=[batch])
    experts = {n: s for n, s in sites_of(compiled).items() if n.endswith("]")}
    unseen = [s["sparsity"] for s in experts.values() if "error" not in s]
    assert unseen
    assert unseen == pytest.approx([0.5] * len(unseen), abs=0.01)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)  # type: ignore[operator]
    compiled = gp.compile(
        model, [Magnitude(0.5, allocation="global")], example_inputs=(torch.randn(4, 16),)
    )
    assert sites_of(compiled)["1.weight"]["sparsity"] == 255 / 256
    assert any("'1.weight'" in w and "ignore" in w for w in details(compiled)["warnings"])


def test_least_squares_after_zeroing_is_told(captured: Captured) -> None:
    program = captured("tiny-llama")
    compiled = gp.compile(
        program,
        [SparseGPT(0.5), gp_passes.PruneNeurons(0.25, score="obs")],
        calibration=batches_of(program),
    )
    down = "model.layers.0.mlp.down_proj.weight"
    assert down not in compiled.program.zeroed
    assert "model.layers.0.self_attn.q_proj.weight" in compiled.program.zeroed
    assert any("filled the zeros" in w for w in compiled.report.passes[1].details["warnings"])
