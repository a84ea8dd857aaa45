"""What keeps consumers from loading a folder: one thing broken, one problem named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from graphprune.errors import GraphPruneError
from graphprune.models.hub import check, consumer_names
from graphprune.models.hub.consumers import CONSUMERS
from graphprune.models.hub.consumers.base import Consumer
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.rules import ALWAYS as SHARED_RULES

Break = Callable[[Path], None]
Change = Callable[[onnx.ModelProto], None]

MODEL = "onnx/model.onnx"
ENCODERS = (
    "transformers.js", "fastembed", "fastembed-rs", "light-embed", "tei", "infinity", "optimum",
    "sentence-transformers", "chromadb", "langchain4j", "spring-ai", "vespa", "exported-model",
    "openvino", "onnxruntime",
)  # fmt: skip
DECODERS = ("transformers.js", "genai", "openvino", "onnxruntime")


def without(name: str) -> Break:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Break:
    """Write a file."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return write


def keys(name: str, **changes: Any) -> Break:
    """Set keys of a JSON file, "a__b" those of an object inside; None removes one."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *sections, last = path.split("__")
            inside = found
            for section in sections:
                inside = inside.setdefault(section, {})
            if value is None:
                del inside[last]
            else:
                inside[last] = value
        (folder / name).write_text(json.dumps(found))

    return change


def graph(change: Change, name: str = MODEL) -> Break:
    """Change the ONNX file."""

    def write(folder: Path) -> None:
        model = onnx.load(str(folder / name), load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())

    return write


def values(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Inputs and outputs by name."""
    return {v.name: v for v in (*model.graph.input, *model.graph.output)}


def drop(*names: str) -> Break:
    """Take inputs or outputs away."""

    def change(model: onnx.ModelProto) -> None:
        for kept in (model.graph.input, model.graph.output):
            left = [v for v in kept if v.name not in names]
            del kept[:]
            kept.extend(left)

    return graph(change)


def rename(old: str, new: str) -> Break:
    """Rename an input or output."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = [new if n == old else n for n in node.input]
            node.output[:] = [new if n == old else n for n in node.output]
        values(model)[old].name = new

    return graph(change)


def size(name: str, dimension: int, to: int | str) -> Break:
    """Write another size, or symbol, into a dimension of an input or output."""

    def change(model: onnx.ModelProto) -> None:
        entry = values(model)[name].type.tensor_type.shape.dim[dimension]
        entry.Clear()
        if isinstance(to, int):
            entry.dim_value = to
        else:
            entry.dim_param = to

    return graph(change)


def flat(name: str) -> Break:
    """Leave an output its first dimension alone."""

    def change(model: onnx.ModelProto) -> None:
        del values(model)[name].type.tensor_type.shape.dim[1:]

    return graph(change)


def dtype(name: str, to: int) -> Break:
    """Give an input or output another type."""

    def change(model: onnx.ModelProto) -> None:
        values(model)[name].type.tensor_type.elem_type = to

    return graph(change)


def extra_input(name: str) -> Break:
    """One more input, which is read."""
    value = helper.make_tensor_value_info(name, TensorProto.INT64, ("batch_size", "n"))

    def change(model: onnx.ModelProto) -> None:
        model.graph.input.append(value)
        model.graph.node.append(helper.make_node("Identity", [name], [f"{name}_copied"]))
        model.graph.output.append(value)
        model.graph.output[-1].name = f"{name}_copied"

    return graph(change)


def pooled_only(model: onnx.ModelProto) -> None:
    """The sentence embedding alone."""
    kept = model.graph.output[1]
    del model.graph.output[:]
    model.graph.output.append(kept)


def opset(number: int) -> Break:
    """Another opset."""
    return graph(lambda model: setattr(model.opset_import[0], "version", number))


def operator(name: str, domain: str = "") -> Break:
    """One more node, which nothing reads."""
    node = helper.make_node(name, ["attention_mask"], ["unread"], domain=domain)
    return graph(lambda model: model.graph.node.append(node))


def in_branch(name: str, domain: str) -> Break:
    """A node inside the branch of an If."""
    node = helper.make_node(name, ["attention_mask"], ["unread"], domain=domain)
    body = helper.make_graph([node], "branch", [], [])
    both = {"then_branch": body, "else_branch": body}
    node = helper.make_node("If", ["attention_mask"], ["unread"], **both)
    return graph(lambda model: model.graph.node.append(node))


def beside(location: str, cut: int = 0, missing: bool = False) -> Break:
    """The first weight in another file, `cut` bytes short, or missing."""

    def change(folder: Path) -> None:
        model = onnx.load(str(folder / MODEL))
        tensor = model.graph.initializer[0]
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(len(raw)))):
            tensor.external_data.add(key=key, value=value)
        (folder / MODEL).write_bytes(model.SerializeToString())
        if not missing:
            (folder / "onnx" / location).write_bytes(raw[: len(raw) - cut])

    return change


def all_of(*breaks: Break) -> Break:
    """One after the other."""

    def change(folder: Path) -> None:
        for each in breaks:
            each(folder)

    return change


def copied(old: str, new: str) -> Break:
    """A second file."""

    def change(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / new).write_bytes((folder / old).read_bytes())

    return change


def moved(old: str, new: str) -> Break:
    """Rename a file."""

    def change(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)

    return change


CLASSIFIER = all_of(
    keys("config.json", architectures=["BertForSequenceClassification"]),
    rename("sentence_embedding", "logits"),
    without("1_Pooling/config.json"),
)
LABELS = keys("config.json", id2label={"0": "no"}, label2id={"no": 0})
FETCHED = keys(
    "config.json", **{"transformers.js_config": {"use_external_data_format": {"model.onnx": 1}}}
)
SEQ2SEQ = keys("config.json", model_type="t5", is_encoder_decoder=True)
NO_FILE = all_of(moved(MODEL, "onnx/a.onnx"), text("onnx/b.onnx", ""))
MULTI_HEAD = ("MultiHeadAttention", "com.microsoft")
BROKEN_WEIGHTS = [
    (beside("model.onnx_data", missing=True), "which is not beside it"),
    (beside("model.onnx_data", cut=4), "is cut short ("),
]
SIZES = [
    (dtype("input_ids", TensorProto.INT32), "takes input_ids as int32"),
    (size("input_ids", 0, 1), "fixes the size of input_ids [1, 'sequence_length']"),
    (size("attention_mask", 1, 8), "fixes the size of attention_mask"),
]
FOREIGN = (operator("Own", "mine"), "calls mine.Own")
SHARED = (
    all_of(size("token_type_ids", 0, "batch_size"), size("token_type_ids", 1, "sequence_length")),
    "as large as other inputs, and its own value is [1, 1]",
)
ALWAYS = [*BROKEN_WEIGHTS, FOREIGN, SHARED]
FED = [
    (drop("attention_mask"), "has no input attention_mask, which is always fed"),
    (extra_input("positions"), "needs positions, and only"),
    *SIZES,
]
TOKENIZER = [
    (without("tokenizer.json"), "tokenizer.json is missing"),
    (text("tokenizer.json", "{"), "tokenizer.json is no JSON"),
    (without("tokenizer_config.json"), "tokenizer_config.json is missing"),
]
CONFIG = [
    (without("config.json"), "config.json is missing"),
    (text("config.json", "{"), "config.json is no JSON"),
    (keys("config.json", model_type=None), "config.json has no model_type that is a text"),
]
USUAL = [(NO_FILE, "there is no model.onnx or onnx/model.onnx, which it opens")]
THREE = (graph(pooled_only), "gives sentence_embedding ['batch_size', 4], and 3 dimensions")
NO_STATES = (drop("last_hidden_state"), "has no output last_hidden_state")
HALF = (dtype("last_hidden_state", TensorProto.FLOAT16), "gives last_hidden_state as float16")

BROKEN_ENCODERS: dict[str, list[tuple[Break, str]]] = {
    "transformers.js": [
        *CONFIG[:2],
        *TOKENIZER,
        (all_of(BROKEN_WEIGHTS[0][0], FETCHED), BROKEN_WEIGHTS[0][1]),
        (all_of(BROKEN_WEIGHTS[1][0], FETCHED), BROKEN_WEIGHTS[1][1]),
        FOREIGN,
        SHARED,
        (moved(MODEL, "model.onnx"), "there is no onnx/model.onnx or onnx/model_quantized.onnx"),
        (
            SEQ2SEQ,
            "there is no onnx/model.onnx or onnx/model_quantized.onnx (onnx/encoder_model.onnx",
        ),
        (
            all_of(CLASSIFIER, drop("last_hidden_state"), keys("config.json", model_type=None)),
            "no model_type that is a text",
        ),
        (text(MODEL, ""), "onnx/model.onnx is no ONNX model that can be read"),
        (extra_input("position_ids"), "needs position_ids, and only"),
        SIZES[0],
        (graph(pooled_only), "no output last_hidden_state or logits or token_embeddings"),
        (keys("config.json", architectures=["XForMaskedLM"]), "has no output logits"),
        (beside("model.onnx_data"), 'write {"transformers.js_config"'),
        (all_of(beside("w.bin"), FETCHED), "model.onnx_data is what is"),
        (rename("input_ids", "pixel_values"), "preprocessor_config.json is missing"),
        (opset(99), "newer than any ONNX Runtime known here"),
    ],
    "fastembed": [
        *TOKENIZER,
        *ALWAYS,
        *USUAL,
        (keys("tokenizer_config.json", model_max_length=10**30), "no model_max_length that is a"),
        (keys("tokenizer_config.json", pad_token=None), "has no pad_token that is a text"),
        (
            all_of(
                keys("tokenizer_config.json", pad_token="<pad>"),
                keys("config.json", pad_token_id=None),
            ),
            "no file says which number '<pad>' has",
        ),
        (drop("input_ids"), "has no input input_ids, which is always fed"),
        (extra_input("positions"), "needs positions, and only"),
        *SIZES,
        (flat("last_hidden_state"), "gives last_hidden_state ['batch_size'], and 2 or 3 dim"),
    ],
    "fastembed-rs": [
        *CONFIG[:2],
        *TOKENIZER,
        *ALWAYS,
        *USUAL,
        *FED,
        (without("special_tokens_map.json"), "special_tokens_map.json is missing"),
        (keys("special_tokens_map.json", pad_token={"content": "[PAD]"}), "without single_word"),
        (keys("tokenizer_config.json", pad_token={"content": "x"}), "has no pad_token that is a"),
        (keys("tokenizer_config.json", model_max_length=None), "model_max_length that is a number"),
        (opset(26), "it brings 1.24"),
        (
            all_of(rename("last_hidden_state", "x"), rename("sentence_embedding", "y")),
            "has no output text_embeds or last_hidden_state or sentence_embedding",
        ),
        HALF,
    ],
    "light-embed": [
        *CONFIG[:2],
        *TOKENIZER,
        *ALWAYS,
        *USUAL,
        (without("special_tokens_map.json"), "special_tokens_map.json is missing"),
        (keys("tokenizer_config.json", pad_token=None), "has no pad_token that is a text"),
        (keys("tokenizer_config.json", model_max_length=None), "no model_max_length that is a"),
        (keys("1_Pooling/config.json", embedding_dimension=4), "has embedding_dimension, which"),
        (keys("1_Pooling/config.json", pooling_mode="none"), "has pooling_mode 'none'"),
        (drop("attention_mask"), "has no input attention_mask, which is read back"),
        (
            all_of(rename("last_hidden_state", "x"), rename("sentence_embedding", "y")),
            "has no output sentence_embedding or token_embeddings",
        ),
        (extra_input("positions"), "needs positions, and only"),
        *SIZES,
    ],
    "tei": [
        *CONFIG,
        *TOKENIZER[:2],
        *ALWAYS,
        *USUAL,
        *FED,
        (keys("config.json", architectures=None), "has no list of architectures"),
        (keys("config.json", max_position_embeddings=None), "no max_position_embeddings or n_pos"),
        (keys("config.json", hidden_size="4"), "no hidden_size or n_embd that is a whole number"),
        (keys("config.json", num_hidden_layers=None), "no num_hidden_layers or n_layer"),
        (keys("tokenizer_config.json", padding_side="up"), "padding_side 'up'"),
        (without("1_Pooling/config.json"), "1_Pooling/config.json is missing"),
        (keys("1_Pooling/config.json", pooling_mode_cls_token=None), "no pooling_mode_cls_token"),
        (keys("1_Pooling/config.json", pooling_mode_mean_tokens=None), "no pooling_mode_mean_tok"),
        (keys("1_Pooling/config.json", pooling_mode_mean_tokens=False), "chooses none of cls"),
        (keys("sentence_bert_config.json", max_seq_length=None), "no max_seq_length"),
        (opset(23), "needs ONNX Runtime 1.23 or newer (opset 23) and it brings 1.22"),
        (
            all_of(drop("sentence_embedding"), rename("last_hidden_state", "states")),
            "has no output last_hidden_state or token_embeddings",
        ),
        (flat("sentence_embedding"), "gives sentence_embedding ['batch_size'], and 2 dim"),
        (all_of(drop("sentence_embedding"), HALF[0]), HALF[1]),
        (all_of(CLASSIFIER, keys("config.json", label2id={})), "has no id2label"),
        (all_of(CLASSIFIER, keys("config.json", id2label={})), "has no label2id"),
        (all_of(CLASSIFIER, LABELS, rename("logits", "scores")), "has no output logits"),
    ],
    "infinity": [
        *CONFIG,
        TOKENIZER[2],
        *ALWAYS,
        (keys("config.json", max_position_embeddings=None), "no max_position_embeddings"),
        (copied(MODEL, "graphprune/baseline.onnx"), "whichever the disk lists last"),
        (extra_input("positions"), "needs positions, and only"),
        *SIZES,
        NO_STATES,
    ],
    "optimum": [
        *CONFIG,
        *ALWAYS,
        (extra_input("positions"), "needs positions, and only"),
        SIZES[0],
        NO_STATES,
        (keys("config.json", architectures=["XForQuestionAnswering"]), "no output start_logits"),
    ],
    "sentence-transformers": [
        *CONFIG,
        TOKENIZER[2],
        *ALWAYS,
        *USUAL,
        (without("1_Pooling/config.json"), "modules.json lists Pooling, and 1_Pooling/config.json"),
        (extra_input("positions"), "needs positions, and only"),
        *SIZES,
        NO_STATES,
    ],
    "chromadb": [
        CONFIG[0],
        *TOKENIZER,
        *BROKEN_WEIGHTS,
        FOREIGN,
        *USUAL,
        (without("special_tokens_map.json"), "special_tokens_map.json is missing"),
        (without("vocab.txt"), "vocab.txt is missing"),
        *FED,
        (drop("token_type_ids"), "has no input token_type_ids, which is always fed"),
        THREE,
    ],
    "langchain4j": [*TOKENIZER[:2], *ALWAYS, *USUAL, *FED, THREE, HALF],
    "spring-ai": [
        *TOKENIZER[:2],
        *ALWAYS[2:],
        *USUAL,
        (extra_input("positions"), "needs positions, and only"),
        *SIZES,
        NO_STATES,
        HALF,
        (beside("model.onnx_data"), "and only one file is read"),
    ],
    "vespa": [
        *TOKENIZER[:2],
        *ALWAYS,
        *USUAL,
        (all_of(extra_input("a"), extra_input("b")), "needs a and b, and only"),
        (rename("attention_mask", "mask"), "has 2 inputs and none is called attention_mask"),
        *SIZES[1:],
        NO_STATES,
    ],
    "exported-model": [
        *ALWAYS,
        (without("export.json"), "export.json is missing"),
        (keys("export.json", export_format="openvino"), "has export_format 'openvino'"),
        (without("onnx/model.onnx.data"), "needs onnx/model.onnx.data for component 'model'"),
        (keys("export.json", components__model__metadata__out_spec=None), "no metadata.out_spec"),
        (keys("export.json", components__model__metadata__kwargs=None), "no metadata.kwargs"),
        (extra_input("positions"), "takes positions, which export.json does not list"),
    ],
    "openvino": [*BROKEN_WEIGHTS, FOREIGN, *USUAL],
    "onnxruntime": [
        *ALWAYS,
        (in_branch("Own", "mine"), "calls mine.Own"),
        (opset(99), "opset 99"),
        (graph(lambda model: setattr(model, "ir_version", 99)), "format 99"),
    ],
}


PAST = "past_key_values.2.key"
GENAI = "genai_config.json"
GROUP_QUERY = operator("GroupQueryAttention", "com.microsoft")

NARROW = (
    all_of(
        GROUP_QUERY,
        size("past_key_values.0.key", 3, 12),
        size("past_key_values.0.value", 3, 12),
    ),
    "needs heads of a multiple of 8",
)

BROKEN_DECODERS: dict[str, list[tuple[Break, str]]] = {
    "transformers.js": [
        (keys("config.json", model_type=None), "config.json has no model_type"),
        (keys("config.json", num_hidden_layers=None), "config.json has no num_hidden_layers"),
        (keys("config.json", num_hidden_layers=2), "has past_key_values.2.key and config.json 2"),
        (
            all_of(rename(PAST, "past_key_values.2.k"), rename("present.2.key", "present.2.k")),
            "calls an input past_key_values.2.k",
        ),
        (size(PAST, 0, "batch"), "whose batch becomes 0 unless it is called batch_size"),
        (size(PAST, 1, "heads"), "whose heads or width become 0"),
        (rename("present.2.key", "present_2_key"), "no output present.2.key"),
        (rename("logits", "scores"), "has no output logits"),
        NARROW,
    ],
    "onnxruntime": [NARROW],
    "genai": [
        (without(GENAI), "genai_config.json is missing"),
        (text(GENAI, "{"), "genai_config.json is no JSON"),
        (keys(GENAI, model__type="bert"), "has model.type 'bert', which it does not know"),
        (keys(GENAI, model__vocab_size=None), "has no model.vocab_size"),
        (keys(GENAI, model__context_length=None), "has no model.context_length"),
        (keys(GENAI, model__decoder__filename="a.onnx"), "names 'a.onnx' in model.decoder"),
        *TOKENIZER,
        (
            keys("tokenizer_config.json", tokenizer_class="BertTokenizerFast"),
            "has tokenizer_class 'BertTokenizerFast'",
        ),
        *BROKEN_WEIGHTS,
        FOREIGN,
        (extra_input("positions"), "needs positions, and only"),
        (rename("logits", "scores"), "has no output logits"),
        (rename("present.2.value", "present_2_value"), "has no output present.2.value"),
        (
            drop(*(f"past_key_values.{i}.{which}" for i in range(3) for which in ("key", "value"))),
            "has no input past_key_values.0.key",
        ),
        (size(PAST, 1, "heads"), "dimensions 1 and 3 must be numbers"),
        (size("past_key_values.2.value", 1, 3), "values must have the shape of keys"),
        (dtype("attention_mask", TensorProto.INT32), "position_ids as int32 and int64"),
        (keys(GENAI, search__past_present_share_buffer=True), "past_present_share_buffer true"),
        NARROW,
    ],
}


def cases(broken: dict[str, list[tuple[Break, str]]]) -> list[Any]:
    """One a break, named after the consumer and what is said."""
    return [
        pytest.param(consumer, broke, says, id=f"{consumer}: {says}")
        for consumer, all_breaks in broken.items()
        for broke, says in all_breaks
    ]


@pytest.mark.parametrize("consumer", ENCODERS)
def test_a_good_encoder_loads(encoder: Path, consumer: str) -> None:
    (found,) = check(encoder, [consumer])
    assert found.problems == ()
    assert found.loads


@pytest.mark.parametrize("consumer", DECODERS)
def test_a_good_decoder_loads(decoder: Path, consumer: str) -> None:
    (found,) = check(decoder, [consumer])
    assert found.problems == ()


@pytest.mark.parametrize(("consumer", "broke", "says"), cases(BROKEN_ENCODERS))
def test_what_is_broken_in_an_encoder_is_the_only_problem(
    encoder: Path, consumer: str, broke: Break, says: str
) -> None:
    broke(encoder)
    (found,) = check(encoder, [consumer])
    assert len(found.problems) == 1, found.problems
    assert says in found.problems[0]
    assert ": " in found.problems[0]  # the way out


@pytest.mark.parametrize(("consumer", "broke", "says"), cases(BROKEN_DECODERS))
def test_what_is_broken_in_a_decoder_is_the_only_problem(
    decoder: Path, consumer: str, broke: Break, says: str
) -> None:
    broke(decoder)
    (found,) = check(decoder, [consumer])
    assert len(found.problems) == 1, found.problems
    assert says in found.problems[0]
    assert ": " in found.problems[0]


def alike(folder: Path) -> None:
    """As many heads in the last layer as in the others."""
    for which in ("key", "value"):
        size(f"past_key_values.2.{which}", 1, 3)(folder)


def test_caches_of_one_shape(decoder: Path) -> None:
    """optimum and text-embeddings-inference make the same cache for all layers."""
    for consumer, of in (("optimum", "num_attention_heads"), ("tei", "num_key_value_heads")):
        said = [p for p in check(decoder, [consumer])[0].problems if "fed to every layer" in p]
        assert len(said) == 1
        assert "past_key_values.2.key ['batch_size', 2, " in said[0]
        assert f"hidden_size / {of}" in said[0]
    alike(decoder)
    assert check(decoder, ["optimum"])[0].loads
    assert not any("every layer" in p for p in check(decoder, ["tei"])[0].problems)
    keys("config.json", head_dim=16)(decoder)
    assert check(decoder, ["optimum"])[0].loads  # not read for this model type
    keys("config.json", model_type="gemma2")(decoder)
    assert "3 heads of 16 are fed" in check(decoder, ["optimum"])[0].problems[0]


def test_every_consumer_has_a_good_folder_and_broken_ones() -> None:
    assert {*ENCODERS, *DECODERS} == set(consumer_names())
    assert {*BROKEN_ENCODERS, *BROKEN_DECODERS} == set(consumer_names())


@pytest.mark.slow
def test_every_rule_is_broken_by_some_folder(tmp_path: Path, encoder: Path, decoder: Path) -> None:
    """Rules that all consumers share are broken for some of them."""
    silent = {(c.name, rule) for c in CONSUMERS.values() for rule in (*c.files, *c.graph)}
    for good, table in ((encoder, BROKEN_ENCODERS), (decoder, BROKEN_DECODERS)):
        for name, all_breaks in table.items():
            for broke, _ in all_breaks:
                folder = tmp_path / "broken"
                shutil.copytree(good, folder)
                broke(folder)
                silent -= _speaking(CONSUMERS[name], HubFolder(folder))
                shutil.rmtree(folder)
    assert {(c, r.__qualname__) for c, r in silent if r not in SHARED_RULES} == {
        ("tei", "_tei_cache"),  # test_caches_of_one_shape
        ("optimum", "_optimum_cache"),
    }


def _speaking(consumer: Consumer, folder: HubFolder) -> set[tuple[str, Any]]:
    graphs = [g for name in consumer.opens(folder) if (g := folder.graph(name))]
    found: set[Any] = {rule for rule in consumer.files if rule(folder)}
    found |= {rule for rule in consumer.graph for g in graphs if rule(folder, g)}
    return {(consumer.name, rule) for rule in found}


def notes(folder: Path, consumer: str) -> str:
    """What is said of a folder that loads."""
    (found,) = check(folder, [consumer])
    assert found.loads, found.problems
    return " / ".join(found.notes)


def test_the_oldest_runtime_is_named(encoder: Path) -> None:
    assert "runs on ONNX Runtime 1.17 or newer (opset 20)" in notes(encoder, "onnxruntime")
    operator("MultiHeadAttention", "com.microsoft")(encoder)
    wrong = "1.21 or newer (MultiHeadAttention; 1.20 and older give wrong numbers without an error)"
    assert wrong in notes(encoder, "onnxruntime")
    assert f"needs ONNX Runtime {wrong}" in notes(encoder, "fastembed")
    assert wrong in notes(encoder, "spring-ai")
    assert notes(encoder, "tei")  # brings 1.22
    opset(23)(encoder)
    assert "1.23 or newer (opset 23)" in notes(encoder, "onnxruntime")
    graph(lambda model: setattr(model, "ir_version", 12))(encoder)
    assert "1.24 or newer (format 12)" in notes(encoder, "onnxruntime")


def test_operators_in_branches_count(encoder: Path) -> None:
    in_branch("MultiHeadAttention", "com.microsoft")(encoder)
    assert "1.21" in notes(encoder, "onnxruntime")


def test_a_function_of_the_file_is_no_foreign_operator(encoder: Path) -> None:
    operator("Own", "mine")(encoder)
    body = helper.make_node("Identity", ["x"], ["y"])
    own = helper.make_function("mine", "Own", ["x"], ["y"], [body], [helper.make_opsetid("", 20)])
    graph(lambda model: model.functions.append(own))(encoder)
    assert check(encoder, ["onnxruntime"])[0].loads


@pytest.mark.parametrize(
    ("said", "loads"),
    [
        (1, True),
        (True, True),
        ({"model": 1}, True),
        ({"model.onnx": True}, True),
        (None, False),
        (2, False),
        ({"model_quantized.onnx": 1}, False),
        ("1", False),
    ],
)
def test_how_many_files_of_weights_transformers_js_fetches(
    encoder: Path, said: Any, loads: bool
) -> None:
    beside("model.onnx_data")(encoder)
    settings = {} if said is None else {"use_external_data_format": said}
    keys("config.json", **{"transformers.js_config": settings})(encoder)
    assert check(encoder, ["transformers.js"])[0].loads == loads


def test_a_value_that_is_expanded_may_have_the_symbols_of_others(encoder: Path) -> None:
    def expand(model: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Shape", ["input_ids"], ["size"]),
            helper.make_node("Expand", ["token_type_ids", "size"], ["all_types"]),
        ]
        model.graph.node[1].input[1] = "all_types"
        for node in reversed(nodes):
            model.graph.node.insert(0, node)

    SHARED[0](encoder)
    assert not check(encoder, ["fastembed"])[0].loads
    graph(expand)(encoder)
    assert check(encoder, ["fastembed"])[0].loads


def test_what_to_say_to_fastembed_and_light_embed(encoder: Path) -> None:
    assert "(model_file='onnx/model.onnx', pooling=PoolingType.MEAN, ...)" in notes(
        encoder, "fastembed"
    )
    assert "'pooling_config_path': '1_Pooling'" in notes(encoder, "light-embed")
    beside("model.onnx_data")(encoder)
    assert "additional_files=['onnx/model.onnx_data']" in notes(encoder, "fastembed")
    assert "model.onnx_data by with_external_initializer" in notes(encoder, "fastembed-rs")
    assert "and model.onnx_data" not in notes(encoder, "chromadb")
    assert "the six files, model.onnx_data into" in notes(encoder, "chromadb")
    assert "give the model's path, no stream" in notes(encoder, "langchain4j")
    graph(pooled_only)(encoder)
    assert "PoolingType.DISABLED" in notes(encoder, "fastembed")
    assert "pooling_config_path" not in notes(encoder, "light-embed")
    keys("1_Pooling/config.json", pooling_mode_cls_token=True)(encoder)
    drop("sentence_embedding")(encoder)


def test_which_file_is_opened(encoder: Path) -> None:
    assert "in a browser say dtype: 'fp32'" in notes(encoder, "transformers.js")
    copied(MODEL, "onnx/model_quantized.onnx")(encoder)
    assert notes(encoder, "transformers.js") == ""
    (found,) = check(encoder, ["infinity"])
    assert found.opens == ("onnx/model_quantized.onnx",)
    copied(MODEL, "model.onnx")(encoder)
    assert check(encoder, ["tei"])[0].opens == ("model.onnx",)
    assert "pass file_name= and subfolder=" in notes(encoder, "optimum")
    without(MODEL)(encoder)
    assert "in Node say dtype: 'q8'" in notes(encoder, "transformers.js")


def test_both_files_of_transformers_js_are_looked_at(encoder: Path) -> None:
    copied(MODEL, "onnx/model_quantized.onnx")(encoder)
    change = extra_input("position_ids")
    change(encoder)
    assert len(check(encoder, ["transformers.js"])[0].problems) == 1
    without(MODEL)(encoder)
    assert check(encoder, ["transformers.js"])[0].loads


def test_notes_on_other_consumers(encoder: Path, decoder: Path) -> None:
    assert "does not pool itself" in notes(encoder, "tei")
    assert "cannot be installed" in notes(encoder, "sentence-transformers")
    without("modules.json")(encoder)
    assert "it pools by the mean" in notes(encoder, "sentence-transformers")
    beside("w.bin")(encoder)
    assert "fetches model.onnx_data alone, and not w.bin" in notes(encoder, "optimum")
    assert "versions before 4" in notes(decoder, "transformers.js")
    GROUP_QUERY(decoder)
    assert "would save a copy of the cache" in notes(decoder, "genai")


def test_a_classifier_for_text_embeddings_inference(encoder: Path) -> None:
    all_of(CLASSIFIER, LABELS)(encoder)
    assert notes(encoder, "tei") == ""


def test_a_file_named_otherwise_is_found_where_it_is_the_only_one(encoder: Path) -> None:
    moved(MODEL, "encoder.onnx")(encoder)
    (found,) = check(encoder, ["fastembed"])
    assert found.opens == ("encoder.onnx",)
    copied("encoder.onnx", "graphprune/baseline.onnx")(encoder)
    assert check(encoder, ["fastembed"])[0].opens == ("encoder.onnx",)


def test_all_consumers_are_asked_by_default(encoder: Path) -> None:
    assert [f.consumer for f in check(encoder)] == consumer_names()
    assert [f.consumer for f in check(str(encoder), ["vespa", "tei"])] == ["vespa", "tei"]
    said = json.dumps([f.to_json() for f in check(encoder)])
    assert json.loads(said)[0]["loads"] is True


@pytest.mark.parametrize("content", ["", "no protobuf", "\x08\x09"])
def test_what_is_no_onnx_file(encoder: Path, content: str) -> None:
    text(MODEL, content)(encoder)
    for finding in check(encoder):
        if finding.opens:
            assert any("is no ONNX model that can be read" in p for p in finding.problems)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_odd_json_is_a_problem_and_no_crash(request: pytest.FixtureRequest, kind: str) -> None:
    folder: Path = request.getfixturevalue(kind)
    for file in sorted(folder.rglob("*.json")):
        good = json.loads(file.read_text())
        for odd in (None, 1, "x", [None], {"a": 1}):
            tops = [{**good, key: odd} for key in good] if isinstance(good, dict) else []
            for content in (odd, *tops):
                file.write_text(json.dumps(content))
                assert len(check(folder)) == len(consumer_names())
        file.write_text(json.dumps(good))
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert any("config.json is no JSON" in p for p in check(folder, ["tei"])[0].problems)
    keys("tokenizer.json", model={"vocab": [["[PAD]", 0.0], [], 1]})(folder)
    check(folder)


def test_odd_graphs_are_a_problem_and_no_crash(encoder: Path) -> None:
    beside("w.bin")(encoder)

    def odd(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].external_data[2].value = "many"

    graph(odd)(encoder)
    (found,) = check(encoder, ["onnxruntime"])
    assert "is no ONNX model that can be read" in found.problems[0]
    keys("export.json", components__model__file="x" * 5000)(encoder)
    assert not check(encoder, ["exported-model"])[0].loads


def test_what_cannot_be_checked_is_refused(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(GraphPruneError, match="no consumer 'fastembd' is known; did you mean"):
        check(encoder, ["fastembd"])
    with pytest.raises(GraphPruneError, match="is no folder; give the folder of an ONNX model"):
        check(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraphPruneError, match=r"holds no \.onnx file"):
        check(tmp_path / "empty")


def test_checking_needs_no_torch(encoder: Path) -> None:
    """It is quick, and nothing of the folder runs."""
    code = (
        "import sys; from graphprune.models.hub import check; "
        f"check({str(encoder)!r}); "
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
