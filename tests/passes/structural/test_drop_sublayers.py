"""DropSublayers: which sublayers go, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes.branches import branches
from graphprune.capture.capture import capture
from graphprune.capture.decoder import with_decode
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.exporters import export
from graphprune.exporters.runtime.generate import Decoder, generate
from graphprune.ir.program import Program
from graphprune.models.loading.inputs import text_batch
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import DropSublayers, LeastSquares, PruneHeads, PruneNeurons
from graphprune.passes.solvers.output_loss import output_loss
from graphprune.pipeline.base import Context
from graphprune.pipeline.recipe import loads
from graphprune.report.page import report_page
from graphprune.rewrite.drop import closed, gated

Captured = Callable[[str], Program]


def texts(count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of ids whose last sample is padded."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        ids, mask = torch.randint(5, 99, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
        mask[-1, 7:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def run(program: Program, step: DropSublayers, batches: list[Any]) -> tuple[Program, Any]:
    result = step.run(program, Context(calibration=batches, reference=program))
    return result.program, result.report


def scores(report: Mapping[str, Any]) -> dict[str, float]:
    return {s["id"]: s["score"] for key in ("sublayers", "left") for s in report[key]}


def test_similarity_is_what_hooks_on_the_model_measure() -> None:
    model, inputs = tiny("tiny-bert")
    inputs.pop("token_type_ids", None)
    program = capture(model, {k: inputs[k] for k in ("input_ids", "attention_mask")})
    batches = texts()
    _, report = run(program, DropSublayers(count=1), batches)
    seen: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []

    def hook(name: str) -> Any:
        def measure(module: nn.Module, args: Any, output: Tensor) -> None:
            hidden, x = args  # before the norm the layer adds both
            after = x + module.dense(hidden)  # type: ignore[operator]
            cos = F.cosine_similarity(x.double(), after.double(), dim=-1)
            seen.setdefault(name, []).append((1 - cos)[masks[-1].bool()])

        return measure

    for i in range(2):
        layer = model.get_submodule(f"encoder.layer.{i}")
        name = f"encoder.layer.{i}"
        layer.attention.output.register_forward_hook(hook(f"{name}.attention"))  # type: ignore[union-attr]
        layer.output.register_forward_hook(hook(name))  # type: ignore[union-attr]
    for batch in batches:
        masks.append(batch["attention_mask"])
        with torch.no_grad():
            model(**batch)
    expected = {name: float(torch.cat(rows).mean()) for name, rows in seen.items()}
    assert scores(report) == pytest.approx(expected, rel=1e-4)
    assert report["sublayers"][0]["id"] == min(expected, key=expected.__getitem__)


def greedy(program: Program, batches: list[Any], count: int, kind: str) -> list[str]:
    """The same search with one forward of a program with closed gates for each candidate."""
    found = [b for b in branches(program) if kind in ("any", b.kind)]
    behind, gates = gated(program, branches(program))
    loss = output_loss(program)
    gone: list[str] = []
    guarded = [b.id for b in found if b.kind == "attention"] or [b.id for b in found]
    for _ in range(count):
        costs = {}
        for branch in found:
            last = set(guarded) - set(gone) == {branch.id}
            if branch.id in gone or last:
                continue
            candidate = closed(behind, [gates[name] for name in [*gone, branch.id]])
            rows = []
            for batch in batches:
                flat = program.forward.flatten((), batch)
                rows.append(loss(program.run(flat), candidate.run(flat), flat))
            costs[branch.id] = float(torch.cat(rows).double().mean())
        gone.append(min(costs, key=costs.__getitem__))
    return gone


@pytest.mark.parametrize(("kind", "count"), [("any", 3), ("ffn", 1)])
def test_loss_is_the_greedy_search_with_all_scored_again(kind: str, count: int) -> None:
    model, _ = tiny("tiny-llama")
    batches = texts()
    program = capture(model, batches[0])
    _, report = run(program, DropSublayers(count=count, kind=kind, score="loss"), batches)
    assert [s["id"] for s in report["sublayers"]] == greedy(program, batches, count, kind)


def test_a_block_is_scored_and_dropped_as_a_whole() -> None:
    batches = texts()
    model, _ = tiny("tiny-llama")
    program = capture(model, batches[0])
    for score in ("loss", "similarity"):
        step = DropSublayers(0.5, kind="block", score=score)
        dropped, report = run(program, step, batches)
        (gone,), (left,) = report["sublayers"], report["left"]
        assert len(gone["branches"]) == 2
        assert gone["score"] <= left["score"]
        assert [b.id for b in branches(dropped)] == left["branches"]
    cosine: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch, output_hidden_states=True).hidden_states
            # The last hidden state is behind the final norm.
            x, y = (h[batch["attention_mask"].bool()].double() for h in hidden[:2])
            cosine.append(1 - F.cosine_similarity(x, y, dim=-1))
    first = float(torch.cat(cosine).mean())
    assert scores(report)["model.layers.0.self_attn"] == pytest.approx(first, rel=1e-4)


def test_channels_are_the_features_of_a_convolution(captured: Captured) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.a(x)
            return x + self.b(x)

    model = Two().eval()
    batch = {"x": torch.randn(2, 3, 5, 5)}
    _, report = run(capture(model, batch), DropSublayers(count=1), [batch])
    with torch.no_grad():
        x = model.stem(batch["x"])
        expected = float((1 - F.cosine_similarity(x, x + model.a(x), dim=1)).mean())
    assert scores(report)["a"] == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(ratio=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["attention", "any", "ffn"]))
def test_as_many_go_as_the_ratio_says(ratio: float, kind: str, captured: Captured) -> None:
    program = captured("tiny-bert")
    total = 4 if kind == "any" else 2
    step = DropSublayers(ratio, kind=kind)
    choice = step._choice(program, Context())
    wanted = int(ratio * total + 0.5)
    if wanted == total:
        with pytest.raises(UnsupportedError, match="ask for less"):
            step._wanted(choice)
    else:
        assert step._wanted(choice) == wanted


def test_nothing_goes_where_the_ratio_rounds_to_none(captured: Captured) -> None:
    program = captured("tiny-bert")
    result, report = run(program, DropSublayers(0.1), [])
    assert result is program
    assert "ratio 0.1 keeps all" in str(report["skipped"])


def test_patterns_choose(captured: Captured) -> None:
    program = captured("tiny-bert")
    example = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    step = DropSublayers(count=1, targets=("encoder.layer.1",), ignore=("*.attention",))
    _, report = run(program, step, [example])
    assert [s["id"] for s in report["sublayers"]] == ["encoder.layer.1"]
    assert report["skipped"] == dict.fromkeys(
        ("encoder.layer.0.attention", "encoder.layer.1.attention"), "ignored on request"
    )


@pytest.mark.parametrize(
    ("name", "step", "line"),
    [
        ("tiny-mlp", DropSublayers(0.5), "the model has no residual branch"),
        (
            "tiny-cnn",
            DropSublayers(0.5, kind="ffn"),
            "has no feed-forward sublayer, only sublayers",
        ),
        ("tiny-bert", DropSublayers(0.9), "ratio 0.9 would drop 4 of 4 sublayers, of which 3 can"),
        ("tiny-bert", DropSublayers(count=9, kind="ffn"), "count 9 would drop 9 of 2 feed-forward"),
        ("tiny-bert", DropSublayers(count=2, kind="attention"), "one always stays"),
        (
            "tiny-bert",
            DropSublayers(0.5, kind="ffn", targets=("*.attention",)),
            "leave none of 2 feed-forward sublayers",
        ),
    ],
)
def test_what_cannot_be_dropped_is_refused(
    name: str, step: DropSublayers, line: str, captured: Captured
) -> None:
    program = captured(name)
    with pytest.raises(UnsupportedError, match=line):
        run(
            program,
            step,
            [dict(zip(program.forward.input_names, program.forward.example, strict=True))],
        )


def test_options_and_names_are_checked_before_work(captured: Captured) -> None:
    for options, line in (
        ({}, "give either ratio"),
        ({"ratio": 0.5, "count": 1}, "give either ratio"),
        ({"ratio": 1.0}, "at least 0 and below 1"),
        ({"count": 0}, "at least 1"),
        ({"ratio": 0.5, "kind": "heads"}, "kind is one of"),
        ({"ratio": 0.5, "score": "los"}, "did you mean 'loss'"),
        ({"ratio": 0.5, "targets": "x"}, "tuple of name patterns"),
    ):
        with pytest.raises(RecipeError, match=line):
            DropSublayers(**options)
    program = captured("tiny-bert")
    example = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    with pytest.raises(RecipeError, match="matches nothing"):
        gp.compile(program, [DropSublayers(0.5, targets=("nowhere",))], calibration=[example])
    with pytest.raises(RecipeError, match="needs calibration batches"):
        gp.compile(program, [DropSublayers(0.5)])


def test_recipes_name_it(captured: Captured) -> None:
    text = "passes:\n- drop-sublayers: {ratio: 0.25, kind: ffn}\n- drop-sublayers: {count: 1}\n"
    assert loads(text) == [DropSublayers(0.25, kind="ffn"), DropSublayers(count=1)]


def test_it_goes_with_other_passes_and_shows_in_the_reports(
    captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-bert")
    example = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    drop = DropSublayers(count=1, kind="attention", score="loss")
    for steps in (
        [PruneHeads(0.5), drop, PruneNeurons(0.5), LeastSquares()],
        [drop, PruneHeads(0.5), PruneNeurons(0.5), LeastSquares()],
    ):
        compiled = gp.compile(program, steps, calibration=[example])
        (gone,) = next(p for p in compiled.report.passes if p.name == drop.name).details[
            "sublayers"
        ]
        assert not any(n.startswith(f"{gone['id']}.self") for n in compiled.program.tensors)
        fits = compiled.report.passes[-1].details["sites"]
        left = [n for n in compiled.program.tensors if n.endswith("dense.weight")]
        assert {f["name"] for f in fits} >= {n for n in left if "pooler" not in n}
        line = f"1 of 2 attention sublayers: {gone['id']}"
        assert line in compiled.report.to_markdown()
        assert line in report_page(compiled.report, {})
    compiled.save(tmp_path / "saved")
    again = gp.load(tmp_path / "saved")
    flat = program.forward.example
    for a, b in zip(compiled.program.run(flat), again.program.run(flat), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, Program]:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=48, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model.eval()
    return model, with_decode(model, capture(model, text_batch(99, 12)), check=False)


def test_a_decoder_generates_what_torch_does_without_the_sublayers(
    decoder: tuple[nn.Module, Program], tmp_path: Path
) -> None:
    import onnxruntime

    model, program = decoder
    compiled = gp.compile(
        program, [DropSublayers(count=1), DropSublayers(count=2, kind="attention")],
        calibration=texts(),
    )  # fmt: skip
    gone = [s["id"] for p in compiled.report.passes for s in p.details["sublayers"]]
    artifact = export(compiled.program, tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    pasts = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    layers = sum(b.kind == "attention" for b in branches(compiled.program))
    assert layers == 4 - sum("attn" in name for name in gone) < 4
    assert pasts == [f"past_key_values.{i}.{p}" for i in range(layers) for p in ("key", "value")]
    ids = torch.tensor([[7, 8, 9, 10]])
    tokens = [int(t[0]) for t in itertools.islice(
        generate(Decoder(session), ids.numpy(), max_new_tokens=6), 6)]  # fmt: skip

    class Nothing(nn.Module):
        def __init__(self, attention: bool) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            zeros = torch.zeros_like(hidden_states)
            return (zeros, None) if self.attention else zeros

    removed = {name: model.get_submodule(name) for name in gone}
    for name in gone:
        model.set_submodule(name, Nothing("attn" in name))
    expected = []
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            expected.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
    for name, module in removed.items():
        model.set_submodule(name, module)
    assert tokens == expected
    assert artifact is not None
    json.dumps(compiled.report.to_json())
