"""Text to token ids and back for generation, from a tokenizer's folder alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, final

from graphprune.errors import GraphPruneError
from graphprune.models.data.tokenize import missing, unusable


@final
class Text:
    """A tokenizer for prompts and answers.

    Attributes:
        stop: ids that end a text: the tokenizer's, and those of generation_config.json beside it.
    """

    def __init__(self, folder: Path) -> None:
        """Read a folder's tokenizer.

        Raises:
            GraphPruneError: the folder holds no tokenizer, or nothing can read it.
        """
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError as e:
            raise missing("transformers") from e
        file = folder / "tokenizer.json"
        if not folder.is_dir() or not any(folder.iterdir()):
            raise unusable(folder)
        try:
            if file.is_file() and not (folder / "tokenizer_config.json").is_file():
                self._tokenizer = cast(Any, PreTrainedTokenizerFast)(tokenizer_file=str(file))
            else:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as e:  # the libraries below raise nothing narrower
            raise unusable(folder) from e
        self.stop = _stops(folder, self._tokenizer.eos_token_id)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt.

        Raises:
            GraphPruneError: it is empty.
        """
        return self._filled(list(self._tokenizer(prompt)["input_ids"]), prompt)

    def chat(self, prompt: str) -> list[int]:
        """Ids of a prompt as a user's turn of a conversation.

        Raises:
            GraphPruneError: it is empty, or the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise GraphPruneError(
                "the tokenizer has no chat template, so the model was not trained on conversations "
                "in a known form; omit --chat"
            )
        turn = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._filled(list(ids), prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; an unfinished character at the end is dropped."""
        # Cleaning up spaces would change characters that are on the screen already.
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.rstrip("\ufffd")

    def _filled(self, ids: list[int], prompt: str) -> list[int]:
        if not prompt.strip() or not ids:
            raise GraphPruneError("the prompt is empty: give --prompt some text to go on from")
        return ids


def _stops(folder: Path, own: int | None) -> frozenset[int]:
    found = set() if own is None else {own}
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return frozenset(found)
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(found | {i for i in listed if isinstance(i, int)})
