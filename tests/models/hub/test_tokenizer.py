"""What a tokenizer's own library leaves out of its files is made from the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphprune.models.hub.tokenizer import completed

VOCABULARY = {"b": 3, "[PAD]": 0, "[UNK]": 1, "a": 2}
TOKENIZER: dict[str, Any] = {
    "model": {"type": "WordPiece", "vocab": VOCABULARY, "unk_token": "[UNK]"},
    "padding": None,
    "added_tokens": [],
}


def made(config: Any, pad: int | None = 0, longest: int | None = 64, **changed: Any) -> Any:
    files = completed({**TOKENIZER, **changed}, config, pad, longest)
    return {n: json.loads(f) if n.endswith(".json") else f.decode() for n, f in files.items()}


def test_a_bare_tokenizer_gets_all_three() -> None:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert made(None) == {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": 64,
        },
        "special_tokens_map.json": special,
        "vocab.txt": "[PAD]\n[UNK]\na\nb\n",
    }


def test_what_it_pads_with_holds_over_the_models_id() -> None:
    padding = {"pad_token": "[UNK]"}
    assert made(None, padding=padding)["special_tokens_map.json"]["pad_token"] == "[UNK]"
    assert "pad_token" not in made(None, pad=None)["special_tokens_map.json"]


def test_special_tokens_are_strings_and_switches_are_none_of_them() -> None:
    config = {
        "cls_token": {"content": "[CLS]", "lstrip": False, "__type": "AddedToken"},
        "sep_token": None,
        "add_bos_token": True,
    }
    assert made(config)["special_tokens_map.json"] == {"cls_token": "[CLS]"}


@pytest.mark.parametrize(
    ("given", "longest", "written"),
    [(10**30, 64, 64), (1e30, 64, 64), (None, 64, 64), (512, 64, 64), (32, 64, 32), (32, None, 32)],
)
def test_the_length_is_a_number_of_tokens(given: Any, longest: int | None, written: int) -> None:
    found = made({"model_max_length": given}, longest=longest)["tokenizer_config.json"]
    assert found["model_max_length"] == written


def test_other_models_have_no_list_of_words() -> None:
    model = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}
    assert "vocab.txt" not in made({}, model=model)
    assert "unk_token" not in made(None, model=model)["special_tokens_map.json"]
