"""Which of several outputs a model is used by."""

from __future__ import annotations

from collections.abc import Iterable

# Before others that a model has, such as one vector a token.
ANSWERS = ("logits", "sentence_embedding")


def answer_of(names: Iterable[str]) -> str | None:
    """The output that losses, tasks and the drift of quantization go by; None: no name says it."""
    named = set(names)
    return next((name for name in ANSWERS if name in named), None)
