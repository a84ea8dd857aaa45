"""Inputs of the sizes that are timed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphprune.errors import GraphPruneError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.ir.program import Program

_SEQUENCE = 128


def parse_batch(text: str) -> tuple[int, ...]:
    """Sizes from "8" (batch) or "8x128" (batch x sequence); empty text gives none.

    Raises:
        GraphPruneError: it reads otherwise.
    """
    if not text:
        return ()
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise GraphPruneError(f"--batch is a number or two, such as 8 or 8x128, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def sized_inputs(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The program's example inputs, repeated or cropped to batch and sequence, without padding.

    Without sizes: one sample; without a length: 128 tokens where the program takes as many.

    Returns:
        Keyword arguments of the program.

    Raises:
        GraphPruneError: the program does not run at these sizes.
    """
    if sizes:
        symbols = {s for dims in program.forward.dynamic.values() for s in dims.values()}
        if len(sizes) == 2 and "sequence" not in symbols:
            raise GraphPruneError(
                f"the model takes no sequence: give --batch {sizes[0]}, not "
                f"{'x'.join(map(str, sizes))}"
            )
        if len(sizes) == 1 and not problem_of(program, resized(program, (sizes[0], _SEQUENCE))):
            sizes = (sizes[0], _SEQUENCE)
        inputs = resized(program, sizes)
        problem = problem_of(program, inputs)
        if problem:
            raise GraphPruneError(
                f"the model does not run at {'x'.join(map(str, sizes))} ({problem}); "
                "give --batch that it takes"
            )
        return inputs
    inputs = resized(program, (1, _SEQUENCE))
    return resized(program, (1,)) if problem_of(program, inputs) else inputs


def timed_inputs(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What is timed: `sized_inputs`, or for a decoder with a cache one token after 128 others.

    Args:
        program: its exported form is what is timed.
        sizes: batch, and sequence; with a cache, batch and past.

    Returns:
        Keyword arguments; with a cache ids [batch, 1] and mask [batch, past + 1] are all.

    Raises:
        GraphPruneError: the program does not run at these sizes.
    """
    if program.deployed == "forward":
        return sized_inputs(program, sizes)
    import torch

    from graphprune.ir.decoding import IDS, MASK, past_of_zeros, step

    problem = ""
    for past in sizes[1:2] or (_SEQUENCE, _SEQUENCE // 4):
        batch = sizes[0] if sizes else 1
        ids = torch.zeros(batch, 1, dtype=torch.int64)
        mask = torch.ones(batch, past + 1, dtype=torch.int64)
        try:
            step(program, ids, mask, past_of_zeros(program.entries["decode"], batch, past))
        except Exception as e:
            problem = first_line(e)
        else:
            return {IDS: ids, MASK: mask}
    raise GraphPruneError(
        f"the model cannot take one more token after {past} ({problem}); give --batch BxP with P "
        "tokens of past that it takes"
    )


def timed_sizes(program: Program, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of `timed_inputs`: batch and, where there is one, sequence or past."""
    inputs = timed_inputs(program, sizes)
    text = batch_text(program, inputs).replace("x1 after ", "x")
    return tuple(int(part) for part in text.split("x")) if text != "as captured" else ()


def resized(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The program's example inputs at batch and sequence, without padding, as keyword arguments."""
    from graphprune.ir.batches import resized as flat_inputs

    entry = program.forward
    tensors = flat_inputs(entry, dict(zip(("batch", "sequence"), sizes, strict=False)))
    flat: dict[str, Tensor] = {}
    for name, tensor in zip(entry.input_names, tensors, strict=True):
        is_mask = not tensor.is_floating_point() and bool(((tensor == 0) | (tensor == 1)).all())
        flat[name] = tensor.new_ones(tensor.shape) if is_mask else tensor
    return arguments_of(program, flat)


def arguments_of(program: Program, flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Flat inputs by name as keyword arguments of the program."""
    import torch.utils._pytree as pytree

    from graphprune.ir.program import Constant

    return {
        argument.name: pytree.tree_unflatten(
            [leaf.value if isinstance(leaf, Constant) else flat[leaf] for leaf in argument.leaves],
            argument.spec,
        )
        for argument in program.forward.arguments
    }


def problem_of(program: Program, inputs: Mapping[str, Any]) -> str:
    """Why the program does not run on inputs, in one line; empty where it does."""
    try:
        program(**inputs)
    except Exception as e:
        return first_line(e)
    return ""


def batch_text(program: Program, inputs: Mapping[str, Any]) -> str:
    """The sizes of inputs as "1x128", or "1" where there is no sequence.

    For a decoder with a cache "1x1 after 128": one token each, after so many.
    """
    if program.deployed != "forward":
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return f"{len(ids)}x{ids.shape[1]} after {mask.shape[1] - ids.shape[1]}"
    entry = program.forward
    found: dict[str, int] = {}
    for name, tensor in zip(entry.input_names, entry.flatten((), inputs), strict=True):
        for dim, symbol in entry.dynamic.get(name, {}).items():
            found[symbol] = tensor.shape[dim]
    return "x".join(str(found[s]) for s in ("batch", "sequence") if s in found) or "as captured"


def input_names(program: Program) -> list[str]:
    """The names of what a program takes as tensors."""
    return [
        argument.name
        for argument in program.forward.arguments
        # What capture baked in (a flag, a None) is no input.
        if any(isinstance(leaf, str) for leaf in argument.leaves)
    ]
