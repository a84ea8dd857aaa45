"""load_model: what it loads, and what it says about what it cannot load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from graphprune.errors import GraphPruneError
from graphprune.models import builtin_names, load_model
from graphprune.models.zoo.sentence import SentenceEncoder, masked_mean
from graphprune.models.zoo.tiny import tiny, tiny_names


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub as it is without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model, as a user would have one."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", tiny_names())
def test_tiny_models_run_on_their_inputs_with_finite_outputs(name: str) -> None:
    model = load_model(name)
    with torch.no_grad():
        outputs = pytree.tree_leaves(model.module(**model.example_inputs))
    assert all(torch.isfinite(t).all() for t in outputs if isinstance(t, torch.Tensor))
    assert all(t.shape[0] >= 2 for t in model.example_inputs.values())


def test_tiny_models_are_the_same_every_time_and_differ_by_seed() -> None:
    first, second = (tiny("tiny-bert")[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = tiny("tiny-bert", seed=1)[0].state_dict()
    assert not torch.equal(
        first["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"]
    )


def test_tiny_models_have_no_zero_biases_and_no_unit_norms() -> None:
    for parameter in tiny("tiny-bert")[0].parameters():
        assert parameter.std() > 0


def test_loading_does_not_touch_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    load_model("tiny-llama")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_local_folder_loads_as_the_class_that_its_config_names(folder: Path) -> None:
    model = load_model(str(folder))
    assert type(model.module).__name__ == "BertForSequenceClassification"
    assert not model.module.training
    ids, mask = model.example_inputs["input_ids"], model.example_inputs["attention_mask"]
    assert ids.shape == mask.shape == (2, 20)  # half of its 40 positions
    assert mask[0].all()
    assert not mask[1].all()


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True},
        {"embedding_dimension": 32, "pooling_mode": "cls"},
        {"word_embedding_dimension": 32, "pooling_mode": ["cls"], "pooling_mode_cls_token": True},
    ],
    ids=["old", "new", "both"],
)
def test_a_sentence_transformers_folder_becomes_one_module_with_its_pooling(
    folder: Path, pooling: dict[str, Any]
) -> None:
    stages = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(stages))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model = load_model(str(folder))
    assert isinstance(model.module, SentenceEncoder)
    assert model.module.pooling == "cls"
    assert model.task == "neighbors"


def test_masked_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).item() == 2.0


def test_sentence_encoder_refuses_an_unknown_pooling() -> None:
    with pytest.raises(ValueError, match="'mean' or 'cls'"):
        SentenceEncoder(torch.nn.Identity(), "max")


def test_pickled_weights_are_refused_unless_allowed(folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(GraphPruneError, match="reading a pickle can run code"):
        load_model(str(folder))
    assert load_model(str(folder), allow_pickle=True).name == str(folder)


def test_a_pickle_beside_safetensors_is_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(str(folder))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "cannot be loaded"),
    ],
)
def test_a_broken_folder_is_named_in_one_sentence(folder: Path, break_it, says: str) -> None:  # type: ignore[no-untyped-def]
    break_it(folder)
    with pytest.raises(GraphPruneError, match=says) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["minilmm", "someone/no-such-model"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(name: str) -> None:
    with pytest.raises(GraphPruneError, match="hub cannot be reached") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert ("'minilm'" in str(caught.value)) == (name == "minilmm")


@pytest.mark.parametrize("name", ["./no/such/folder", "a b c", "x/y/z"])
def test_what_is_neither_folder_nor_hub_id_is_refused_at_once(name: str) -> None:
    with pytest.raises(GraphPruneError, match="there is no folder"):
        load_model(name)


@pytest.mark.parametrize("model_type", ["bert", "homemade"])
def test_code_that_comes_with_a_model_is_never_run(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "architectures": ["HomemadeModel"],
        "auto_map": {"AutoConfig": "code.HomemadeConfig", "AutoModel": "code.HomemadeModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(GraphPruneError, match="code of its own") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(GraphPruneError, match="is a file"):
        load_model(str(tmp_path / "model.onnx"))


def test_builtin_names_hold_the_real_models_first() -> None:
    assert builtin_names()[:3] == ["minilm", "smollm2", "digits-vit"]
