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

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Embeddings [batch, width] of token ids [batch, sequence] under a 0/1 mask.

        In a dict, because its key becomes the name of the ONNX output.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        pooled = hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)
        embedding = F.normalize(pooled, dim=-1) if self.normalize else pooled
        return {"sentence_embedding": embedding}


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of [batch, sequence, width] over the positions where [batch, sequence] is 1."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return torch.sum(hidden * mask, dim=1) / torch.clamp(mask.sum(dim=1), min=1e-9)
