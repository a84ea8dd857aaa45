"""Sentences to token ids, from a folder with a tokenizer's files alone: no model, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError

Texts = Sequence[str] | Sequence[tuple[str, str]]
Tokenize = Callable[[Texts, int], dict[str, Tensor]]
Encode = Callable[[Sequence[str]], list[list[int]]]

TOKENS = 128  # of a text, at most, where nothing else is said


def tokenizer(folder: Path) -> Tokenize:
    """A function from sentences and a maximum length to padded tensors [n, tokens] by name.

    Pairs of sentences are joined as the tokenizer joins two segments; of those too long the longer
    one is cut. Nothing gets longer than the tokenizer's own model_max_length. How a folder is read:

    1. tokenizer.json: read by the `tokenizers` library.
    2. older formats: read by transformers.

    Returns:
        input_ids, attention_mask and token_type_ids; a model takes those that it has.

    Raises:
        GraphPruneError: the folder holds no tokenizer, or what reads it is not installed.
    """
    if (folder / "tokenizer.json").is_file():
        return _fast(folder)
    return _with_transformers(folder)


def encoder(folder: Path, *, special: bool) -> Encode:
    """A function from texts to their token ids, whole: neither padded nor cut to a length.

    Args:
        folder: where the tokenizer's files are; read as `tokenizer` reads them.
        special: add the tokens that the tokenizer adds by itself, such as one that begins a text.

    Raises:
        GraphPruneError: the folder holds no tokenizer, or what reads it is not installed.
    """
    if (folder / "tokenizer.json").is_file():
        fast = _read_fast(folder)
        # A file may ask for both.
        fast.no_truncation()
        fast.no_padding()
        return lambda texts: [
            e.ids for e in fast.encode_batch(list(texts), add_special_tokens=special)
        ]
    slow = _read_slow(folder)
    # verbose: a text longer than the model takes is cut into windows later.
    return lambda texts: slow(list(texts), add_special_tokens=special, verbose=False)["input_ids"]


def _read_fast(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise missing("tokenizers") from e
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the library raises nothing narrower
        raise unusable(folder) from e


def _fast(folder: Path) -> Tokenize:
    loaded = _read_fast(folder)
    config = _config(folder)
    number, text = _padding(config, loaded)
    loaded.enable_padding(pad_id=number, pad_token=text)
    own = config.get("model_max_length")

    def tokenize(sentences: Texts, length: int) -> dict[str, Tensor]:
        loaded.enable_truncation(_shorter(length, own))
        encoded = loaded.encode_batch(list(sentences))
        return {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            "token_type_ids": torch.tensor([e.type_ids for e in encoded]),
        }

    return tokenize


def _shorter(length: int, own: object) -> int:
    """The length, or a tokenizer's own limit when that is less; without one files hold 1e30."""
    return int(min(length, own)) if isinstance(own, int | float) and own > 0 else length


def _config(folder: Path) -> dict[str, Any]:
    """Read the files beside tokenizer.json."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as e:
            raise unusable(folder) from e
    return config


def _padding(config: dict[str, Any], loaded: Any) -> tuple[int, str]:
    """The token that pads, and its id: the configured one, else the one that ends a text."""
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        number = loaded.token_to_id(text) if isinstance(text, str) else None
        if number is not None:
            return int(number), str(text)
    found = loaded.padding or {}
    # Any id will do under the attention mask.
    return int(found.get("pad_id", 0)), str(found.get("pad_token", "[PAD]"))


def _read_slow(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise missing("transformers") from e
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as e:
        raise unusable(folder) from e


def _with_transformers(folder: Path) -> Tokenize:
    loaded = _read_slow(folder)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token

    def tokenize(sentences: Texts, length: int) -> dict[str, Tensor]:
        parts = zip(*((s,) if isinstance(s, str) else s for s in sentences), strict=True)
        made = loaded(
            *map(list, parts),
            padding=True,
            truncation=True,
            max_length=_shorter(length, loaded.model_max_length),
            return_tensors="pt",
        )
        types = made.get("token_type_ids", torch.zeros_like(made["input_ids"]))
        return {
            "input_ids": made["input_ids"],
            "attention_mask": made["attention_mask"],
            "token_type_ids": types,
        }

    return tokenize


def missing(package: str) -> GraphPruneError:
    """The error where a library that reads text is not installed."""
    return GraphPruneError(
        f"reading text needs {package}, which is not installed: pip install 'graphprune[hf]'"
    )


def unusable(folder: Path) -> GraphPruneError:
    """The error where a folder has no tokenizer, or a broken one."""
    return GraphPruneError(f"the folder {str(folder)!r} holds no usable tokenizer")
