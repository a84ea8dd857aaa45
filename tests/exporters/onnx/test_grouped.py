"""GroupQueryAttention: the numbers of torch, whatever the cache's length and the padding's side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.capture.decoder import with_decode
from graphprune.errors import ExportError
from graphprune.exporters import Artifact, export
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.onnx.grouped import check_cache, to_grouped
from graphprune.exporters.runtime.generate import Decoder, generate
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.decoding import empty_cache, is_past, step
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.rewrite.shrink import shrink

ROOM = 32  # positions of a buffer that past and present share


def session_of(program: Program, folder: Path) -> Any:
    path = folder / "model.onnx"
    save_onnx(to_onnx(program, "decode", grouped=True), path)
    return open_session(path, 1)


@pytest.fixture(scope="module")
def session(ragged_artifact: Callable[[str], Artifact]) -> Any:
    return ragged_artifact("genai").session(1)


@pytest.mark.slow
def test_every_layer_has_its_heads_and_all_share_the_lengths(
    ragged_artifact: Callable[[str], Artifact],
) -> None:
    import onnx_ir as ir

    model = ir.load(ragged_artifact("genai").path / "model.onnx")
    found = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    heads = [
        tuple(node.attributes[f"{kind}num_heads"].as_int() for kind in ("", "kv_"))
        for node in found
    ]
    assert heads == [(6, 3), (6, 3), (4, 2)]
    assert len({node.inputs[i] for node in found for i in (5, 6, 10)}) == 3
    operators = [node.op_type for node in model.graph]
    assert "Attention" not in operators
    assert model.opset_imports["com.microsoft"] == 1
    names = [v.name for v in model.graph.outputs[1:]]
    assert names == [f"present.{i}.{part}" for i in range(3) for part in ("key", "value")]


def test_it_computes_as_torch_does(ragged_artifact: Callable[[str], Artifact]) -> None:
    agreements = ragged_artifact("genai").manifest["parity"]["model.onnx"]
    assert max(a["error"] for a in agreements) < 1e-4
    shapes = [tuple(a["shape"]) for a in agreements if a["output"] == "logits"]
    # A prompt and a step of a batch, and several tokens behind a past of one sample; each with a
    # cache as long as the past, and with a longer one.
    for shape in ((2, 5, 99), (2, 1, 99), (1, 5, 99)):
        assert shapes.count(shape) >= 2


@pytest.mark.slow
def test_only_the_masks_length_says_what_the_past_is(
    ragged_artifact: Callable[[str], Artifact],
) -> None:
    relations = [ragged_artifact(t).manifest["relations"] for t in ("onnxruntime", "genai")]
    assert [len(r) for r in relations] == [1, 0]


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-opt", "tiny-qwen2", "tiny-mistral"])
@pytest.mark.slow
def test_other_decoders_compute_the_same(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    program = with_decode(model, capture(model, inputs))
    check_parity(program, session_of(program, tmp_path), grouped=True)


@pytest.mark.slow
def test_windows_stay_windows(tmp_path: Path) -> None:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16, sliding_window=3, use_cache=False,
    )  # fmt: skip
    made: Any = transformers.MistralForCausalLM(config)
    model = made.eval()
    ids = torch.randint(5, 99, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = with_decode(model, capture(model, inputs))
    check_parity(program, session_of(program, tmp_path), grouped=True)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Prompts of seven and four tokens."""
    ids = torch.randint(5, 99, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_past_and_present_in_one_buffer(side: str, ragged_decoder: Program, session: Any) -> None:
    """As a runtime does: one array a layer, which the operator reads and writes."""
    import onnxruntime

    ids, mask = padded(side)
    cache = {
        i.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((2, i.shape[1], ROOM, i.shape[3]), np.float32)
        )
        for i in session.get_inputs()
        if is_past(i.name)
    }
    state = empty_cache(ragged_decoder.entries["decode"], 2)
    for _ in range(4):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids.numpy())
        binding.bind_cpu_input("attention_mask", mask.numpy())
        binding.bind_output("logits")
        for name, buffer in cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        session.run_with_iobinding(binding)
        found = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
        expected, state = step(ragged_decoder, ids, mask, state)
        seen = mask[:, -ids.shape[1] :].bool()
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
        ids = expected[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def test_generation_is_that_of_the_other_target(
    ragged_artifact: Callable[[str], Artifact],
) -> None:
    ids, mask = (t.numpy() for t in padded("left"))
    decoders = [Decoder(ragged_artifact(t).session(1)) for t in ("onnxruntime", "genai")]
    tokens = [
        np.stack(list(generate(d, ids, mask, max_new_tokens=12)), 1).tolist() for d in decoders
    ]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0][0])) >= 3


def test_several_tokens_after_a_past_are_one_samples(session: Any) -> None:
    """What onnxruntime refuses today; where it does no more, `grouped_inputs` can go."""
    decoder = Decoder(session)
    decoder.prefill(np.ones((2, 3), np.int64))
    with pytest.raises(Exception, match="batch_size must be 1"):
        decoder._read(np.ones((2, 2), np.int64), np.ones((2, 2), np.int64))


def refuse_work(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("work was done before the refusal")


def test_a_model_without_a_cache_is_refused_before_any_work(
    captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.exporters.artifact.export.to_onnx", refuse_work)
    with pytest.raises(ExportError, match=r"target 'genai' needs .*compile\(..., cache=True\)"):
        export(captured("tiny-bert"), tmp_path / "out", target="genai")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("qk_dim", "v_dim"), "multiple of 8; those of layer 0 are 4 wide"),
        (("v_dim",), "one width; in layer 0 they are 8 and 4 wide"),
    ],
)
def test_heads_of_other_widths_are_refused(
    roles: tuple[str, ...], reason: str, ragged_decoder: Program
) -> None:
    groups = [g for role in roles for g in axis_groups(ragged_decoder).with_role(role)]
    free = {g.id: list(range(g.size // 2)) for g in groups if not g.frozen}
    entry = shrink(ragged_decoder, free).entries["decode"]
    with pytest.raises(ExportError, match=reason):
        check_cache("genai", entry)


def test_a_cache_with_another_reader_is_refused(
    ragged_artifact: Callable[[str], Artifact],
) -> None:
    import onnx_ir as ir

    model = ir.load(ragged_artifact("onnxruntime").path / "model.onnx")
    past = next(v for v in model.graph.inputs if is_past(v.name or ""))
    model.graph.append(ir.node("Identity", [past], name="copy"))
    with pytest.raises(ExportError, match=r"'past_key_values.0.key' is read by"):
        to_grouped(model)
