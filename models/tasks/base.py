"""What all tasks share: running any kind of model, and embedding sentences with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.sentence import masked_mean

Runner = Callable[[Mapping[str, Tensor]], Tensor]


@final
@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task's figure: higher is better, one is perfect."""

    task: str
    metric: str
    value: float
    count: int


def runner(model: Any) -> Runner:
    """The model's first output as a function of its named inputs.

    1. an onnxruntime session: fed with those inputs that it has.
    2. anything else: called with those keyword arguments, without gradients.
    """
    if hasattr(model, "get_inputs") and hasattr(model, "run"):
        names = {i.name for i in model.get_inputs()}

        def run_session(inputs: Mapping[str, Tensor]) -> Tensor:
            feeds = {name: value.numpy() for name, value in inputs.items() if name in names}
            return torch.from_numpy(np.asarray(model.run(None, feeds)[0]))

        return run_session

    def run_torch(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            leaves = pytree.tree_leaves(model(**inputs))
        first: Tensor = leaves[0]
        return first

    return run_torch


def embed(
    model: Any,
    tokenizer_dir: Path,
    sentences: Sequence[str],
    *,
    batch: int = 32,
    length: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Unit-length embeddings [n, width] of sentences.

    A model that returns one vector a token has them averaged over the attention mask.

    Raises:
        GraphPruneError: transformers is missing, or the model's output is no embedding.
    """
    run = runner(model)
    tokenize = tokenizer(tokenizer_dir)
    # Sentences of like length share a batch: less padding, the same result.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    starts = range(0, len(order), batch)
    for done, start in enumerate(starts, 1):
        inputs = tokenize([sentences[i] for i in order[start : start + batch]], length)
        output = run(inputs)
        if output.dim() == 3:
            output = masked_mean(output, inputs["attention_mask"])
        if output.dim() != 2:
            raise GraphPruneError(
                f"the model's first output has shape {tuple(output.shape)}; an embedding has two "
                "or three dimensions"
            )
        parts.append(torch.nn.functional.normalize(output.float(), dim=-1))
        progress(done, len(starts))
    embeddings = torch.cat(parts)
    return embeddings[torch.argsort(torch.tensor(order))]


def tokenizer(folder: Path) -> Callable[[Sequence[str], int], dict[str, Tensor]]:
    """A function from sentences and a maximum length to padded input_ids and attention_mask.

    Raises:
        GraphPruneError: transformers is missing, or the folder holds no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise GraphPruneError(
            "text tasks need transformers, which is not installed: pip install 'graphprune[hf]'"
        ) from e
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as e:
        raise GraphPruneError(f"the folder {str(folder)!r} holds no usable tokenizer") from e
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token

    def tokenize(sentences: Sequence[str], length: int) -> dict[str, Tensor]:
        made = loaded(
            list(sentences), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return {key: made[key] for key in ("input_ids", "attention_mask")}

    return tokenize
