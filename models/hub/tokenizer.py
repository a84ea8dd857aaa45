"""The files of a tokenizer that its own library left out and others read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
VOCABULARY = "vocab.txt"


def completed(
    tokenizer: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    pad: int | None,
    longest: int | None,
) -> dict[str, bytes]:
    """tokenizer_config.json, special_tokens_map.json, and vocab.txt of WordPiece.

    A tokenizer of `tokenizers` has none of them, one of transformers 5 the first alone, and there a
    length of 10³⁰ where nobody gave one, which other readers refuse.

    Args:
        tokenizer: tokenizer.json.
        config: tokenizer_config.json; None where there is none.
        pad: the model's id of padding, if it has one.
        longest: how many tokens the model takes; None for no limit.
    """
    config = dict(_described(tokenizer, pad) if config is None else config)
    length = config.get("model_max_length")
    if longest is not None and not (isinstance(length, int) and 0 < length <= longest):
        config["model_max_length"] = longest
    special = {name: _text(token) for name, token in config.items() if name.endswith("_token")}
    found = {
        CONFIG: _json(config),
        SPECIAL: _json({name: token for name, token in special.items() if token is not None}),
    }
    if (model := tokenizer["model"]).get("type") == "WordPiece":
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        found[VOCABULARY] = "".join(f"{token}\n" for token in tokens).encode()
    return found


def _described(tokenizer: Mapping[str, Any], pad: int | None) -> dict[str, Any]:
    """The configuration that follows from a bare tokenizer.json."""
    padding, model = tokenizer.get("padding") or {}, tokenizer["model"]
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    vocabulary = model.get("vocab")
    ids = {i: t for t, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    tokens = {
        "pad_token": padding.get("pad_token") or (ids | added).get(pad),
        "unk_token": model.get("unk_token"),
    }
    named = {name: token for name, token in tokens.items() if token is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def _text(token: Any) -> str | None:
    """A token, which may come with how it is matched; None for switches such as add_bos_token."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
