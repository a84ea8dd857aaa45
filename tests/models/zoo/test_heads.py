"""Heads: which are kept, what a fresh one computes, and that a seed gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.models import LoadedModel, load_model
from graphprune.models.data.tables import Schema
from graphprune.models.zoo.heads import TextHead, head_classes, with_head
from graphprune.models.zoo.sentence import SentenceEncoder
from graphprune.models.zoo.tiny import tiny

BINARY = Schema("classification", ("text",), "label", ("0", "1"))


def _encoder(pooling: str = "mean") -> LoadedModel:
    model, inputs = tiny("tiny-bert")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return LoadedModel(SentenceEncoder(model, pooling).eval(), inputs, "mine", task="neighbors")


def _classifier(names: dict[int, str] | None = None, outputs: int = 2) -> LoadedModel:
    loaded = load_model("tiny-roberta")
    module: Any = loaded.module
    module.classifier.out_proj = nn.Linear(module.classifier.out_proj.in_features, outputs)
    module.config.id2label = names or {i: f"LABEL_{i}" for i in range(outputs)}
    return loaded


def _fresh(loaded: LoadedModel, schema: Schema, **options: Any) -> tuple[LoadedModel, TextHead]:
    made = with_head(loaded, schema, **options)
    assert isinstance(made.module, TextHead)
    assert not made.trained
    return made, made.module


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fresh_head_is_linear_in_the_pooled_sentence(pooling: str) -> None:
    loaded = _encoder(pooling)
    made, head = _fresh(loaded, BINARY)
    assert (made.task, made.schema) == (None, BINARY)
    encoder: Any = loaded.module
    pooled = SentenceEncoder(encoder.encoder, pooling, normalize=False).eval()
    with torch.no_grad():
        wanted = pooled(**loaded.example_inputs)["sentence_embedding"] @ head.head.weight.T
        found = head(**made.example_inputs)["logits"]
    torch.testing.assert_close(found, wanted)
    assert found.std() > 1e-3


def test_padding_does_not_reach_the_scores() -> None:
    made, head = _fresh(_encoder(), BINARY)
    ids, mask = made.example_inputs["input_ids"], made.example_inputs["attention_mask"]
    length = int(mask[1].sum())
    assert length < mask.shape[1]
    with torch.no_grad():
        alone = head(ids[1:, :length], mask[1:, :length])["logits"]
        together = head(ids, mask)["logits"][1:]
    torch.testing.assert_close(alone, together)


def test_a_fresh_head_comes_from_the_seed_and_leaves_the_generator_alone() -> None:
    loaded, before = _encoder(), torch.random.get_rng_state()
    first, same, other = (_fresh(loaded, BINARY, seed=s)[1].head.weight for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_regression_begins_about_its_center() -> None:
    schema = Schema("regression", ("text",), "score")
    made, head = _fresh(_encoder(), schema, center=2.5)
    with torch.no_grad():
        scores = head(**made.example_inputs)["logits"]
    assert scores.shape == (2, 1)
    assert head.head.bias.tolist() == [2.5]


def test_pairs_are_read_in_segments() -> None:
    pairs = replace(BINARY, text=("sentence1", "sentence2"))
    made, head = _fresh(_encoder(), pairs)
    inputs = dict(made.example_inputs)
    types = inputs.pop("token_type_ids")
    assert set(types.flatten().tolist()) == {0, 1}
    assert "token_type_ids" not in _fresh(_encoder(), BINARY)[0].example_inputs
    with torch.no_grad():
        with_segments = head(**inputs, token_type_ids=types)["logits"]
        without = head(**inputs)["logits"]
    assert (with_segments - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("names", "classes", "order"),
    [
        (None, ("0", "1"), ("0", "1")),
        ({0: "yes", 1: "no"}, ("no", "yes"), ("yes", "no")),
        ({0: "yes", 1: "no"}, ("0", "1"), ("yes", "no")),
        ({0: "yes", 1: "no"}, (), ("yes", "no")),
        (None, (), ("0", "1")),
        # The training file lacks a class.
        (None, ("0", "2"), ("0", "1", "2")),
        (None, ("1", "2"), ("0", "1", "2")),
        ({0: "no", 1: "maybe", 2: "yes"}, ("1", "2"), ("no", "maybe", "yes")),
        ({0: "no", 1: "maybe", 2: "yes"}, ("no", "yes"), ("no", "maybe", "yes")),
    ],
)
def test_a_head_that_knows_all_labels_is_kept(
    names: dict[int, str] | None, classes: tuple[str, ...], order: tuple[str, ...]
) -> None:
    loaded = _classifier(names, len(order))
    kept = with_head(loaded, replace(BINARY, classes=classes))
    assert kept.module is loaded.module
    assert kept.trained
    assert kept.schema == replace(BINARY, classes=order)
    assert head_classes(loaded) == order


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (None, ("no", "yes")),
        (None, ("0", "1", "2")),
        (None, ("1", "2")),
        ({0: "yes", 1: "no"}, ("good", "bad")),
    ],
)
def test_any_other_head_is_replaced_on_the_same_encoder(
    names: dict[int, str] | None, classes: tuple[str, ...]
) -> None:
    loaded = _classifier(names)
    module: Any = loaded.module
    made, head = _fresh(loaded, replace(BINARY, classes=classes))
    assert head.encoder is module.base_model
    assert head.head.out_features == len(classes)
    with torch.no_grad():
        assert head(**made.example_inputs)["logits"].isfinite().all()


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-encoder"])
def test_models_without_segments_take_pairs_too(name: str) -> None:
    loaded = load_model(name)
    made, head = _fresh(loaded, replace(BINARY, text=("a", "b")))
    assert set(made.example_inputs) == {"input_ids", "attention_mask"}
    encoder: Any = getattr(loaded.module, "base_model", loaded.module)
    mask = made.example_inputs["attention_mask"]
    with torch.no_grad():
        hidden = encoder(**made.example_inputs)[0] * mask[..., None]
        wanted = hidden.sum(1) / mask.sum(1, keepdim=True) @ head.head.weight.T
        torch.testing.assert_close(head(**made.example_inputs)["logits"], wanted)


def test_models_of_something_else_than_text_are_refused() -> None:
    for name in ("tiny-vit", "tiny-t5"):
        with pytest.raises(GraphPruneError, match="goes on a text encoder"):
            with_head(load_model(name), BINARY)
