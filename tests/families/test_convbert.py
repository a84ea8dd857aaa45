"""ConvBERT: heads of attention, and heads of a convolution whose kernels depend on the input."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.api import compile
from graphprune.axes import axis_groups
from graphprune.models.zoo.tiny import randomize
from graphprune.passes import PruneHeads


@pytest.mark.slow
def test_both_kinds_of_heads_are_cut_verified_and_exported(tmp_path: Path) -> None:
    from transformers import ConvBertConfig, ConvBertModel

    config = ConvBertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_ratio=2,
        intermediate_size=64,
        embedding_size=32,
        conv_kernel_size=3,
        max_position_embeddings=32,
    )
    model: Any = ConvBertModel(config)
    model.eval()
    randomize(model)
    ids = torch.randint(1, 60, (2, 10))
    padding = torch.ones_like(ids)
    padding[0, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": padding}
    compiled = compile(model, [PruneHeads(0.5)], example_inputs=inputs)
    heads = Counter(
        (g.size, bool(g.frozen)) for g in axis_groups(compiled.program).with_role("head")
    )
    assert heads == {(2, False): 4}
    artifact = compiled.export(tmp_path / "artifact")
    session = artifact.session()
    (got,) = session.run(
        ["last_hidden_state"], {name: value.numpy() for name, value in inputs.items()}
    )
    with torch.no_grad():
        want = compiled.module(**inputs).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)
