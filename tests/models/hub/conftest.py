"""Folders that consumers load, made of tiny graphs and JSON files: tests break them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c")
WIDTH = 4
TOKENS: Shape = ("batch_size", "sequence_length")


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    """JSON files, and empty ones for None."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if value is None else json.dumps(value), encoding="utf-8")


def _encoder_model() -> onnx.ModelProto:
    """Embeds tokens of WORDS; token types may be fed; pools by the mean over the mask."""
    table = np.arange(len(WORDS) * WIDTH, dtype=np.float32).reshape(len(WORDS), WIDTH)
    stored: dict[str, Any] = {
        "table": table,
        "types": np.zeros((2, WIDTH), np.float32),
        "token_type_ids": np.zeros((1, 1), np.int64),
        "last": np.array([-1], np.int64),
        "second": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["kinds"]),
        helper.make_node("Add", ["words", "kinds"], ["last_hidden_state"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["last_hidden_state", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["column", "second"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["sentence_embedding"]),
    ]
    sizes = {"input_ids": TOKENS, "attention_mask": TOKENS, "token_type_ids": ("types", "each")}
    tokens = [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name, shape in sizes.items()
    ]
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, (*TOKENS, WIDTH)),
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, (TOKENS[0], WIDTH)),
    ]
    return _model(nodes, tokens, outputs, stored)


def _decoder_model(layers: tuple[int, ...], width: int = 8) -> onnx.ModelProto:
    """Says the next word of WORDS; each layer keeps the heads named here."""
    words = len(WORDS)
    stored = {"next": 8 * np.roll(np.eye(words, dtype=np.float32), 1, axis=1)}
    nodes = [helper.make_node("Gather", ["next", "input_ids"], ["logits"])]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, TOKENS),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ("batch_size", "all")),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, TOKENS),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (*TOKENS, words))]
    for layer, heads in enumerate(layers):
        stored[f"table{layer}"] = np.ones((words, heads * width), np.float32)
        stored[f"split{layer}"] = np.array([0, 0, heads, width], np.int64)
        past: Shape = ("batch_size", heads, "past_sequence_length", width)
        for which in ("key", "value"):
            old, new = f"past_key_values.{layer}.{which}", f"present.{layer}.{which}"
            rows, split, turned = (f"{s}{layer}{which}" for s in ("rows", "parts", "turned"))
            nodes += [
                helper.make_node("Gather", [f"table{layer}", "input_ids"], [rows]),
                helper.make_node("Reshape", [rows, f"split{layer}"], [split]),
                helper.make_node("Transpose", [split], [turned], perm=[0, 2, 1, 3]),
                helper.make_node("Concat", [old, turned], [new], axis=2),
            ]
            inputs.append(helper.make_tensor_value_info(old, TensorProto.FLOAT, past))
            present: Shape = ("batch_size", heads, "all", width)
            outputs.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, present))
    return _model(nodes, inputs, outputs, stored)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    stored: Mapping[str, np.ndarray],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(a, name) for name, a in stored.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for i, word in enumerate(WORDS[:5])
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {word: i for i, word in enumerate(WORDS)},
        "unk_token": "[UNK]",
    },
}  # fmt: skip
# onnxruntime-genai knows no list of whole words.
PAIRS = {"type": "BPE", "vocab": {word: i for i, word in enumerate(WORDS)}, "merges": []}
SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}  # fmt: skip


# As torch.utils._pytree.treespec_dumps writes.
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def _branch(kind: str, context: Any, *children: Any) -> dict[str, Any]:
    spec = {"type": f"builtins.{kind}", "context": json.dumps(context)}
    return spec | {"children_spec": list(children)}


def _tree(spec: dict[str, Any]) -> str:
    return json.dumps([1, spec])


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A sentence encoder's folder, for every consumer of encoders."""
    folder = tmp_path / "encoder"
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4,
        "max_position_embeddings": 16, "pad_token_id": 0, "vocab_size": len(WORDS),
    }  # fmt: skip
    pooling = {
        "word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True, "pooling_mode": "mean", "include_prompt": True,
    }  # fmt: skip
    traced = {"rank": 2, "shape": [1, 2], "dtype": "int64"}
    modules = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    _write(
        folder,
        {
            "config.json": config,
            "tokenizer.json": TOKENIZER,
            "tokenizer_config.json": {
                "tokenizer_class": "BertTokenizer", "model_max_length": 16, **SPECIAL,
            },
            "special_tokens_map.json": SPECIAL,
            "vocab.txt": None,
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": kind}
                for i, (path, kind) in enumerate(modules)
            ],
            "1_Pooling/config.json": pooling,
            "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
            "onnx/model.onnx": None,
            "onnx/model.onnx.data": None,
            "export.json": {
                "schema_version": 1,
                "export_format": "onnx",
                "components": {
                    "model": {
                        "file": "onnx/model.onnx",
                        "metadata": {
                            "export_dtype": "float32",
                            "kwargs": {"input_ids": traced, "attention_mask": traced},
                            "in_spec": _tree(
                                _branch("tuple", None, _branch("tuple", None), _branch(
                                    "dict", ["input_ids", "attention_mask"], LEAF, LEAF))
                            ),
                            "out_spec": _tree(
                                _branch("dict", ["last_hidden_state", "sentence_embedding"],
                                        LEAF, LEAF)
                            ),
                        },
                    }
                },
            },
        },
    )  # fmt: skip
    (folder / "onnx/model.onnx").write_bytes(_encoder_model().SerializeToString())
    return folder


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A decoder's folder, its last layer with fewer heads, for genai and transformers.js."""
    folder, layers = tmp_path / "decoder", (3, 3, 2)
    size = len(WORDS)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24,
        "num_hidden_layers": len(layers), "num_attention_heads": 3, "num_key_value_heads": 3,
        "intermediate_size": 4, "max_position_embeddings": 16, "vocab_size": size,
    }  # fmt: skip
    names = {
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }  # fmt: skip
    genai = {
        "model": {
            "type": "decoder", "vocab_size": size, "context_length": 16, "eos_token_id": 3,
            "bos_token_id": 2, "pad_token_id": 0,
            "decoder": {
                "filename": "onnx/model.onnx", "num_hidden_layers": len(layers), "head_size": 8,
                "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24, **names,
            },
        },
        "search": {"max_length": 16, "past_present_share_buffer": False, "do_sample": False},
    }  # fmt: skip
    _write(
        folder,
        {
            "config.json": config,
            "tokenizer.json": TOKENIZER | {"model": PAIRS},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, **SPECIAL,
            },
            "special_tokens_map.json": SPECIAL,
            "genai_config.json": genai,
            "onnx/model.onnx": None,
        },
    )  # fmt: skip
    model = _decoder_model(layers)
    (folder / "onnx/model.onnx").write_bytes(model.SerializeToString())
    return folder
