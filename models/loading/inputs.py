"""Example inputs for a Hugging Face model, from its configuration alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError

# Different from each other, so that capture cannot take the batch for the sequence.
BATCH, SEQUENCE, DECODER_SEQUENCE = 2, 32, 20
_VISION_DEFAULTS = {"num_channels": 3, "image_size": 224}


def example_inputs(
    model: nn.Module, config: Any, tokenizer_inputs: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Keyword arguments that the model runs on: padded, two rows, random with a fixed seed.

    1. text: input_ids and attention_mask; token_type_ids when the tokenizer makes them.
    2. encoder-decoder: decoder_input_ids too.
    3. images: pixel_values; both text and images for models that compare them.
    4. audio: input_values (waveform) or input_features (spectrogram).

    Raises:
        GraphPruneError: the model takes something else.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    main = str(getattr(model, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if main == "input_ids" or (hasattr(model, "logit_scale") and "input_ids" in accepted):
        inputs |= _text(config, accepted, set(tokenizer_inputs), generator)
    if main == "pixel_values" or (hasattr(model, "logit_scale") and "pixel_values" in accepted):
        inputs["pixel_values"] = _images(config, generator)
    if main == "input_values":
        inputs["input_values"] = torch.randn(BATCH, 16000, generator=generator)
    if main == "input_features":
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        bands = int(getattr(config, "num_mel_bins", 80))
        inputs["input_features"] = torch.randn(BATCH, bands, frames, generator=generator)
    if not inputs:
        raise GraphPruneError(
            f"no example inputs can be derived for {type(model).__name__}, whose main input is "
            f"{main!r}: use the Python API, graphprune.compile(model, passes, example_inputs=...)"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        shape = (BATCH, _fit(config, DECODER_SEQUENCE))
        inputs["decoder_input_ids"] = _ids(config, shape, generator)
    return inputs


def text_batch(
    vocabulary: int, sequence: int, pad: int = 0, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Random token ids [2, sequence] and their mask; the second row ends in padding."""
    generator = generator or torch.Generator().manual_seed(0)
    # The lowest ids are special tokens in most vocabularies.
    low = min(5, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (BATCH, sequence), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, sequence - max(1, sequence // 4) :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def _text(
    config: Any, accepted: set[str], tokenizer_inputs: set[str], generator: torch.Generator
) -> dict[str, Tensor]:
    text = _part(config, "text_config")
    pad = getattr(text, "pad_token_id", None)
    inputs = text_batch(int(text.vocab_size), _fit(text, SEQUENCE), int(pad or 0), generator)
    if "attention_mask" not in accepted:
        del inputs["attention_mask"]
    if "token_type_ids" in accepted & tokenizer_inputs and getattr(text, "type_vocab_size", 0) > 1:
        inputs = with_segments(inputs)
    return inputs


def with_segments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with token_type_ids: the second half of each row is another sentence."""
    types = torch.zeros_like(inputs["input_ids"])
    types[:, types.shape[1] // 2 :] = 1
    return {**inputs, "token_type_ids": types}


def _images(config: Any, generator: torch.Generator) -> Tensor:
    vision = _part(config, "vision_config")
    channels, size = (getattr(vision, key, value) for key, value in _VISION_DEFAULTS.items())
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(BATCH, int(channels), int(height), int(width), generator=generator)


def _ids(config: Any, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    vocabulary = int(_part(config, "text_config").vocab_size)
    return torch.randint(min(5, vocabulary - 1), vocabulary, shape, generator=generator)


def _part(config: Any, name: str) -> Any:
    """The configuration of one tower of a model with several, else the whole."""
    return getattr(config, name, None) or config


def _fit(config: Any, length: int) -> int:
    """The length, or half the positions that the model has when that is less."""
    positions = getattr(config, "max_position_embeddings", None) or 10**6
    return max(4, min(length, int(positions) // 2))
