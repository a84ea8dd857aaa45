"""genai_config.json: what it says of a graph, and which graphs it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from graphprune.errors import ExportError
from graphprune.models.hub.genai import genai_config

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Values = list[dict[str, Any]]


def described(name: str, *shape: int | str, kind: str = "float") -> dict[str, Any]:
    return {"name": name, "type": kind, "shape": list(shape)}


def graph(*heads: int, width: int = 8) -> tuple[Values, Values]:
    """Inputs and outputs of a decoder whose layers keep so many heads."""
    text = ("batch_size", "sequence_length")
    inputs = [described("input_ids", *text, kind="int64")]
    inputs.append(described("attention_mask", "batch_size", "total", kind="int64"))
    outputs = [described("logits", *text, 99)]
    for i, count in enumerate(heads):
        for part in ("key", "value"):
            inputs.append(
                described(f"past_key_values.{i}.{part}", "batch_size", count, "past", width)
            )
            outputs.append(described(f"present.{i}.{part}", "batch_size", count, "total", width))
    keep = {**described("num_logits_to_keep", kind="int64"), "optional": True}
    return [*inputs, keep], outputs


def config_of(*heads: int, config: Any = CONFIG, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        genai_config(config, *graph(*heads), **{"shared": False, **options})
    )
    return found


def test_heads_and_layers_are_those_of_the_graph() -> None:
    found = config_of(3, 3, 2)
    decoder = found["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 3
    assert decoder["num_key_value_heads"] == 3
    assert decoder["head_size"] == 8
    assert decoder["filename"] == "onnx/model.onnx"
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    assert found["model"]["vocab_size"] == 99
    assert found["model"]["context_length"] == found["search"]["max_length"] == 128


@pytest.mark.parametrize("shared", [False, True])
def test_the_buffer_is_shared_where_it_is_said(shared: bool) -> None:
    assert config_of(2, shared=shared)["search"]["past_present_share_buffer"] is shared


@pytest.mark.parametrize(
    ("known", "type_"),
    [("llama", "llama"), ("qwen2", "qwen2"), ("gpt2", "decoder"), ("opt", "decoder")],
)
def test_the_type_is_one_that_the_runtime_drives(known: str, type_: str) -> None:
    config = SimpleNamespace(**{**CONFIG, "model_type": known})
    assert config_of(2, config=config)["model"]["type"] == type_


def test_ids_of_the_generation_configuration_come_first() -> None:
    generation = SimpleNamespace(eos_token_id=[7, 8], pad_token_id=9, do_sample=True, top_p=0.9)
    model = (found := config_of(2, generation=generation))["model"]
    assert [model[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [7, 8], 9]
    assert found["search"]["do_sample"] is True
    assert found["search"]["top_p"] == 0.9
    # Without one for padding, it is what ends a text.
    assert config_of(2)["model"]["pad_token_id"] == 2


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    config = {**CONFIG, "bos_token_id": 50256, "eos_token_id": [50256, 3]}
    model = config_of(2, config=config)["model"]
    assert "bos_token_id" not in model
    assert model["eos_token_id"] == model["pad_token_id"] == 3


def test_the_language_model_of_a_larger_configuration() -> None:
    inner = {**CONFIG, "max_position_embeddings": 77}
    found = config_of(2, config={"model_type": "llava", "text_config": inner})
    assert found["model"]["context_length"] == 77


def without(name: str) -> Callable[[Values], Values]:
    return lambda values: [v for v in values if v["name"] != name]


def reshaped(name: str, *shape: int | str) -> Callable[[Values], Values]:
    return lambda values: [{**v, "shape": list(shape)} if v["name"] == name else v for v in values]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("attention_mask"), "feeds 'attention_mask', which the graph does not have"),
        (without("logits"), "only a language model generates text"),
        (without("past_key_values.0.key"), r"lacks \['past_key_values.0.key'\]"),
        (without("present.1.value"), "does not give back 'past_key_values.1.value'"),
        (reshaped("past_key_values.1.value", "b", 2, "p", 4), "layer 1 has .* prune the widths"),
        (reshaped("past_key_values.1.key", "b", "h", "p", 8), "numbers for heads and width"),
        (lambda v: [*v, described("token_type_ids")], r"does not feed \['token_type_ids'\]"),
        (lambda v: [*v, described("position_ids", kind="int32")], "inputs of one type"),
    ],
)
def test_what_the_runtime_cannot_drive_is_refused(
    change: Callable[[Values], Values], reason: str
) -> None:
    inputs, outputs = graph(2, 2)
    if "logits" in reason or "language" in reason or "give back" in reason:
        outputs = change(outputs)
    else:
        inputs = change(inputs)
    with pytest.raises(ExportError, match=reason):
        genai_config(CONFIG, inputs, outputs, shared=False)


def test_layers_with_a_gap_are_refused() -> None:
    inputs, outputs = graph(2, 2, 2)
    for part in ("key", "value"):
        inputs = without(f"past_key_values.1.{part}")(inputs)
    with pytest.raises(ExportError, match="without gaps"):
        genai_config(CONFIG, inputs, outputs, shared=False)


def test_a_graph_without_a_cache_is_refused() -> None:
    with pytest.raises(ExportError, match="cache=True"):
        genai_config(CONFIG, *graph(), shared=False)


def test_a_configuration_without_a_length_is_refused() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "max_position_embeddings"}
    with pytest.raises(ExportError, match="longest text: set the first"):
        config_of(2, config=config)
