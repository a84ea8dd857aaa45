"""A head with scores on a text encoder: the trained one that it has, or a fresh one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.loading.inputs import with_segments
from graphprune.models.loading.loaded import LoadedModel
from graphprune.models.zoo.sentence import SentenceEncoder, masked_mean

_STD = 0.02


@final
class TextHead(nn.Module):
    """encoder -> pooling over the attention mask -> dropout -> linear, in one module.

    A pair of sentences is read as one text of two segments, so the encoder compares them word by
    word; there is one pass and one score. (An encoder that was trained for the cosine of two
    embeddings is evaluated as that by the task "sts".)

    1. pooling "mean": the mean over the tokens that the mask keeps.
    2. pooling "cls": the first token.
    """

    def __init__(
        self, encoder: nn.Module, width: int, outputs: int, pooling: str, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scores [batch, outputs] of token ids [batch, sequence] under a 0/1 mask.

        In a dict, because its key becomes the name of the ONNX output.
        """
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments)[0]
        pooled = hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)
        return {"logits": self.head(self.dropout(pooled))}


def with_head(
    loaded: LoadedModel, schema: Schema, *, seed: int = 0, center: float = 0.0
) -> LoadedModel:
    """The model with a head for a task, and the schema that goes with it.

    1. A head that knows all labels is kept, with the order of its classes: the labels are some of
       its names, or of their numbers from 0. So is a head of one score for a regression.
    2. Any other text model gets a fresh head on its encoder, drawn from the seed; `trained` is
       False then.

    Args:
        loaded: the model.
        schema: the task, its columns and the training file's classes; without classes any head of
            two scores or more fits.
        seed: for the fresh weights.
        center: what a fresh head answers at first, about; a regression's mean score.

    Raises:
        GraphPruneError: the model reads no text.
    """
    if "input_ids" not in loaded.example_inputs or "decoder_input_ids" in loaded.example_inputs:
        raise GraphPruneError(
            f"{loaded.name!r} takes {', '.join(loaded.example_inputs)}; a head for "
            f"{schema.task} goes on a text encoder, which takes input_ids"
        )
    own = head_classes(loaded) if schema.task == "classification" else None
    if own is not None and _fits(own, schema.classes):
        return replace(loaded, schema=replace(schema, classes=own), task=None)
    if schema.task == "regression" and head_width(loaded) == 1:
        return replace(loaded, schema=schema, task=None)
    encoder, pooling = _encoder(loaded.module)
    inputs = _inputs(loaded, encoder, pairs=len(schema.text) == 2)
    with torch.no_grad():
        width = encoder(**inputs)[0].shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = TextHead(encoder, width, len(schema.classes) or 1, pooling).eval()
        nn.init.normal_(made.head.weight, std=_STD)
        nn.init.constant_(made.head.bias, center)
    return replace(
        loaded, module=made, example_inputs=inputs, task=None, schema=schema, trained=False
    )


def _fits(own: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    """Whether a head knows all classes of a file, or there is no file to say them."""
    numbers = set(map(str, range(len(own))))
    return set(classes) <= set(named_classes(own)) or set(classes) <= numbers


def _encoder(module: Any) -> tuple[Any, str]:
    """Return the module with one vector a token, and how a sentence is pooled from them."""
    if isinstance(module, SentenceEncoder):
        return module.encoder, module.pooling
    return getattr(module, "base_model", module), "mean"


def _inputs(loaded: LoadedModel, encoder: Any, pairs: bool) -> dict[str, Tensor]:
    """Example inputs of the model with a fresh head; with segments for pairs, where it has them."""
    ids = loaded.example_inputs["input_ids"]
    mask = loaded.example_inputs.get("attention_mask", torch.ones_like(ids))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pairs and getattr(getattr(encoder, "config", None), "type_vocab_size", 0) > 1:
        inputs = with_segments(inputs)
    return inputs


def head_width(loaded: LoadedModel) -> int | None:
    """How many scores a model gives a text; None where its outputs are something else."""
    with torch.no_grad():
        outputs = loaded.module(**loaded.example_inputs)
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return None
    return int(logits.shape[1])


def head_classes(loaded: LoadedModel) -> tuple[str, ...] | None:
    """The names of a model's classes in the order of its scores; None where it gives no scores.

    Where nobody named them: "0", "1" and so on.
    """
    width = head_width(loaded)
    if width is None or width < 2:
        return None
    names = getattr(getattr(loaded.module, "config", None), "id2label", None) or {}
    found = tuple(str(names.get(i, i)) for i in range(width))
    return found if named_classes(found) else tuple(map(str, range(width)))


def named_classes(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes where somebody named them; nothing where they are LABEL_0 or numbers."""
    return () if all(c.startswith("LABEL_") or c.isdecimal() for c in classes) else classes
