"""One step of decoding: names of its inputs and outputs, the cache before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from graphprune.ir.program import Entry, Program

IDS, MASK, PAST, PRESENT = "input_ids", "attention_mask", "past_key_values", "present"
LOGITS = "logits"
KEEP = "num_logits_to_keep"  # of an ONNX file: how many of the last positions have logits, 0 all


def empty_cache(entry: Entry, batch: int) -> dict[str, Tensor]:
    """A cache without tokens, by placeholder: [batch, heads, 0, width]."""
    return past_of_zeros(entry, batch, 0)


def past_of_zeros(entry: Entry, batch: int, past: int) -> dict[str, Tensor]:
    """A cache of so many tokens, all zero, by placeholder: [batch, heads, past, width]."""
    return {
        name: example.new_zeros(batch, example.shape[1], past, example.shape[3])
        for name, example in zip(entry.input_names, entry.example, strict=True)
        if name in entry.cache
    }


def zero_pasts(
    shapes: Mapping[str, Sequence[int | str]], batch: int, past: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """A cache of zeros for those inputs of an ONNX file that hold one, by name."""
    return {
        name: np.zeros((batch, int(shape[1]), past, int(shape[3])), np.float32)
        for name, shape in shapes.items()
        if is_past(name)
    }


def is_past(name: str) -> bool:
    """Whether an input of an ONNX file holds keys or values of past tokens."""
    return name.startswith(f"{PAST}.")


def continued(entry: Entry, outputs: Sequence[Any]) -> dict[str, Tensor]:
    """The cache after a step: what goes in next, by placeholder, from a step's flat outputs."""
    return {name: outputs[number] for name, number in entry.cache.items()}


def step(
    program: Program, ids: Tensor, mask: Tensor, cache: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run `decode` in torch.

    Args:
        program: with that entry.
        ids: new tokens [batch, sequence].
        mask: [batch, past + sequence], over what is cached and what is new.
        cache: by placeholder, as `empty_cache` or the step before gives it.

    Returns:
        The first output, [batch, sequence, vocabulary] of a language model; the cache after it.
    """
    entry = program.entries["decode"]
    given = {IDS: ids, MASK: mask, **cache}
    outputs = program.run([given[name] for name in entry.input_names], "decode")
    return outputs[0], continued(entry, outputs)
