"""SentenceEncoder: a text encoder whose output is the sentence's embedding."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@final
class SentenceEncoder(nn.Module):
    """encoder -> pooling over the attention mask -> L2 norm, in one module, so in one ONNX file.

    1. pooling "mean": the mean over the tokens that the mask keeps.
    2. pooling "cls": the first token.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Vectors of tokens [batch, sequence, width], and of sentences [batch, width].

        In a dict, because its keys become the names of the ONNX outputs; in the order in which
        runtimes that take the first output, or one by name, expect them.

        Args:
            input_ids: [batch, sequence].
            attention_mask: the same, 1 or 0.
            token_type_ids: the same, for encoders that have segments.
        """
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments)[0]
        pooled = hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)
        embedding = F.normalize(pooled, dim=-1) if self.normalize else pooled
        return {"last_hidden_state": hidden, "sentence_embedding": embedding}


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of [batch, sequence, width] over the positions where [batch, sequence] is 1."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return torch.sum(hidden * mask, dim=1) / torch.clamp(mask.sum(dim=1), min=1e-9)
