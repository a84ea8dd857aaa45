"""A small sentence encoder with uneven layers, exported as a user exports it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import graphprune
from graphprune.exporters import Artifact
from graphprune.models.loading.inputs import text_batch
from graphprune.models.zoo.sentence import SentenceEncoder
from graphprune.models.zoo.tiny import randomize
from graphprune.passes import PruneHeads, PruneNeurons

WORDS = ("a man is eating some food the girl carries her baby to school in rain", "##s", "eat")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Three lengths, so that two of them are padded; a word that is cut in pieces, and an unknown one.
TEXTS = ["A man is eating some food in the rain", "The girls", "her baby eats 7 apples"]

Vectors = NDArray[np.float32]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these are slow: they export and load models in other libraries."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tokenizer() -> object:
    """A WordPiece tokenizer with all that a released one says of itself."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the model")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS[0].split(), *WORDS[1:]))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


@pytest.fixture(scope="session")
def artifact(tokenizer: object, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two layers of three heads and of one, and of different widths."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=256,
        )
        model = SentenceEncoder(transformers.BertModel(config, add_pooling_layer=False)).eval()
        randomize(model)
        inputs = text_batch(config.vocab_size, 12)
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        passes = [
            PruneHeads(0.25, targets=("*.layer.0.*",)),
            PruneHeads(0.75, targets=("*.layer.1.*",)),
            PruneNeurons(0.5, targets=("*.layer.0.*",)),
        ]
        compiled = graphprune.compile(model, passes, example_inputs=inputs)
    folder = tmp_path_factory.mktemp("consumers") / "encoder"
    return compiled.export(folder, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def batch(tokenizer: object) -> dict[str, NDArray[np.int64]]:
    """The texts as transformers' tokenizer makes them, padded to the longest."""
    made = tokenizer(TEXTS, padding=True, return_tensors="np")  # type: ignore[operator]
    assert not made["attention_mask"].all()
    return dict(made)


@pytest.fixture(scope="session")
def expected(artifact: Artifact, batch: dict[str, NDArray[np.int64]]) -> dict[str, Vectors]:
    """What the artifact's own session computes, by output name."""
    names = [output["name"] for output in artifact.manifest["outputs"]]
    return dict(zip(names, artifact.session(1).run(names, artifact.feeds(batch)), strict=True))
