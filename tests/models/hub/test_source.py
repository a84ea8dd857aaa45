"""What travels with a model: configuration, tokenizer and pooling, as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.hub.source import saved_tokenizer, source_files, tokenizer_dir
from graphprune.models.zoo.heads import TextHead
from graphprune.models.zoo.sentence import SentenceEncoder
from graphprune.models.zoo.tiny import tiny

pytest.importorskip("transformers")


@pytest.fixture
def bert() -> Any:
    return tiny("tiny-bert")[0]


def read(files: Any, name: str) -> Any:
    content = files[name]
    return json.loads(content if isinstance(content, bytes) else content.read_text())


def test_a_configuration_is_whole_and_reads_back(bert: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    files = source_files(bert, name="me/mine", license="mit")
    config = read(files, "config.json")
    assert config["architectures"] == ["BertModel"]
    assert config["graphprune"] == {"source": {"name": "me/mine", "license": "mit"}}
    assert "_name_or_path" not in config
    assert "use_cache" not in config  # capture switched it off, which says nothing of the model
    # Some runtimes know no defaults.
    assert {"hidden_size", "num_hidden_layers", "max_position_embeddings"} <= config.keys()
    (tmp_path / "config.json").write_bytes(files["config.json"])  # type: ignore[arg-type]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == bert.config.hidden_size


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_pooling_is_told_in_old_and_new_words(bert: Any, pooling: str, normalize: bool) -> None:
    files = source_files(SentenceEncoder(bert, pooling, normalize))
    settings = read(files, "1_Pooling/config.json")
    assert settings["pooling_mode"] == pooling
    assert settings["pooling_mode_mean_tokens"] is (pooling == "mean")
    assert settings["pooling_mode_cls_token"] is (pooling == "cls")
    assert settings["word_embedding_dimension"] == 32
    assert "embedding_dimension" not in settings  # a runtime refuses keys that it does not know
    kinds = [m["type"].rsplit(".", 1)[-1] for m in read(files, "modules.json")]
    assert kinds == ["Transformer", "Pooling", "Normalize"][: 2 + normalize]
    assert read(files, "sentence_bert_config.json")["max_seq_length"] == 64
    assert read(files, "config.json")["architectures"] == ["BertModel"]


def test_a_head_of_ours_is_in_the_configuration(bert: Any) -> None:
    schema = Schema("classification", classes=("no", "yes"))
    config = read(source_files(TextHead(bert, 32, 2, "mean"), schema=schema), "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["label2id"] == {"no": 0, "yes": 1}


def test_what_the_folder_says_is_kept(bert: Any, tmp_path: Path) -> None:
    card = "---\nlicense: apache-2.0\ntags: [x]\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text('{"use_cache": true}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "secret.txt").write_text("x")
    files = source_files(SentenceEncoder(bert), tmp_path)
    config = read(files, "config.json")
    assert config["use_cache"] is True
    assert config["graphprune"]["source"]["license"] == "apache-2.0"
    assert read(files, "generation_config.json") == {"eos_token_id": 3}
    assert read(files, "sentence_bert_config.json")["max_seq_length"] == 20
    assert "secret.txt" not in files


def test_a_plain_module_brings_nothing() -> None:
    assert source_files(tiny("tiny-mlp")[0]) == {}


def test_tokenizers_come_as_folder_or_object(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers: Any = pytest.importorskip("transformers")

    words = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    assert saved_tokenizer(made).keys() == {"tokenizer.json"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    assert {"tokenizer.json", "tokenizer_config.json"} <= saved_tokenizer(fast).keys()
    assert tokenizer_dir(tmp_path) is None
    fast.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer_dir(tmp_path) == tmp_path / "tokenizer"  # as older artifacts have it
    assert saved_tokenizer(str(tmp_path / "tokenizer")).keys() >= {"tokenizer.json"}
    fast.save_pretrained(tmp_path)
    assert tokenizer_dir(tmp_path) == tmp_path
    with pytest.raises(GraphPruneError, match="got a int"):
        saved_tokenizer(3)


def test_metadata_of_an_onnx_file_in_the_folder_is_kept(bert: Any, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(graph)
    for key, value in {"stride": "32", "graphprune.bounds": "{}"}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    (tmp_path / "onnx").mkdir()
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    source = read(source_files(bert, tmp_path), "config.json")["graphprune"]["source"]
    assert source["metadata"] == {"stride": "32"}
