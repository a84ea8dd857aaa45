"""A decoder's artifact: one file for prompts and tokens, and what it generates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.api import Compiled
from graphprune.errors import GraphPruneError
from graphprune.exporters import Artifact, open_artifact
from graphprune.exporters.runtime.generate import Decoder, choose, generate
from graphprune.ir.decoding import empty_cache, step
from graphprune.ir.program import Program
from graphprune.models.tasks.base import runner
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneHeads, PruneNeurons, Quantize
from graphprune.verify.error import relative_error

NEW = 12


@functools.cache
def decoder_model(name: str) -> tuple[Any, dict[str, Tensor]]:
    model: Any
    model, inputs = tiny(name)
    # Large biases, and an embedding that is the output too, say the same token for ever.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.3)
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.sub_(1)
    return model, inputs


@functools.cache
def compiled(name: str, ratio: float) -> Compiled:
    model, inputs = decoder_model(name)
    # One layer keeps its heads: the two have caches of different sizes.
    passes = [PruneHeads(ratio, ignore=("*h.0.*",)), PruneNeurons(ratio)] if ratio else []
    return gp.compile(model, passes, example_inputs=inputs, cache=True)


class Artifacts(dict[tuple[str, float], Artifact]):
    """Exported decoders by name and ratio, each made when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, case: tuple[str, float]) -> Artifact:
        self[case] = compiled(*case).export(self.folder / str(len(self)))
        return self[case]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("made"))


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of seven and four tokens."""
    ids = torch.randint(5, 99, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def written(decoder: Decoder, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    tokens = generate(decoder, ids.numpy(), mask.numpy(), max_new_tokens=NEW, **options)
    return np.stack(list(tokens), 1).tolist()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.slow
def test_greedy_generation_is_that_of_the_library(name: str, artifacts: Artifacts) -> None:
    model, _ = decoder_model(name)
    ids, mask = padded()
    expected = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )[:, ids.shape[1] :].tolist()
    decoder = Decoder(artifacts[name, 0.0].session(1))
    assert written(decoder, ids, mask) == expected
    assert decoder.mask.shape == (2, ids.shape[1] + NEW - 1)
    # Both samples, and not one token over and over.
    assert expected[0] != expected[1]
    assert len(set(expected[0])) >= 3


@pytest.mark.slow
def test_pruned_generation_is_that_of_the_program(
    artifacts: Artifacts,
) -> None:
    program = compiled("tiny-gpt2", 0.5).program
    heads = [t.shape[1] for t in program.entries["decode"].example[2:]]
    assert heads == [4, 4, 2, 2]
    ids, mask = padded()
    decoder = Decoder(artifacts["tiny-gpt2", 0.5].session(1))
    found = written(decoder, ids, mask)
    assert found == _stepped(program, ids, mask)
    assert found != _stepped(compiled("tiny-gpt2", 0.0).program, ids, mask)


def _stepped(program: Program, ids: Tensor, mask: Tensor) -> list[list[int]]:
    logits, cache = step(program, ids, mask, empty_cache(program.entries["decode"], len(ids)))
    tokens = [logits[:, -1].argmax(-1)]
    for _ in range(NEW - 1):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        logits, cache = step(program, tokens[-1][:, None], mask, cache)
        tokens.append(logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1).tolist()


@pytest.mark.slow
def test_one_prompt_in_two_parts(artifacts: Artifacts) -> None:
    """Several tokens on top of a past, in a batch above one."""
    ids, mask = padded()
    decoder = Decoder(artifacts["tiny-llama", 0.0].session(1))
    whole = decoder.prefill(ids.numpy(), mask.numpy())
    decoder.prefill(ids[:, :4].numpy(), mask[:, :4].numpy())
    rest = decoder._read(ids[:, 4:].numpy(), mask[:, 4:].numpy())
    assert relative_error(torch.from_numpy(whole), torch.from_numpy(rest)) < 1e-5


def test_the_file_holds_a_tied_weight_once(
    artifacts: Artifacts,
) -> None:
    artifact = artifacts["tiny-gpt2", 0.5]
    model = onnx.load(artifact.model_path)
    large = [i.name for i in model.graph.initializer if 99 in i.dims]
    assert len(large) == 1
    operators = {node.op_type for node in model.graph.node}
    assert "Softmax" not in operators  # the operator Attention does it all
    pasts = [n for n in model.graph.node if n.op_type == "Attention" and "past" in "".join(n.input)]
    assert len(pasts) == 2


def test_names_and_sizes_are_those_of_the_convention(
    artifacts: Artifacts,
) -> None:
    artifact = artifacts["tiny-gpt2", 0.5]
    assert artifact.manifest["entry"] == "decode"
    assert artifact.has_cache
    for session in (artifact.session(1), artifact.baseline_session(1)):
        inputs = {i.name: i.shape for i in session.get_inputs()}
        outputs = {o.name: o.shape for o in session.get_outputs()}
        assert inputs.pop("input_ids") == ["batch_size", "sequence_length"]
        assert inputs.pop("attention_mask") == [
            "batch_size",
            "past_sequence_length + sequence_length",
        ]
        assert outputs.pop("logits") == ["batch_size", "sequence_length", 99]
        names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
        assert list(inputs) == [f"past_key_values.{name}" for name in names]
        assert list(outputs) == [f"present.{name}" for name in names]
        assert {(s[0], s[2], s[3]) for s in inputs.values()} == {
            ("batch_size", "past_sequence_length", 8)
        }
        assert [s[1] for s in inputs.values()] == [s[1] for s in outputs.values()]


@pytest.mark.slow
def test_loaded_compiled_again_and_exported(artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = artifacts["tiny-gpt2", 0.5]
    loaded = gp.load(artifact.path)
    again = gp.compile(loaded, [PruneNeurons(0.5)]).export(tmp_path / "again")
    ids, mask = padded()
    assert written(Decoder(gp_session(artifact)), ids, mask) == _stepped(loaded.program, ids, mask)
    assert again.has_cache
    assert again.has_baseline
    assert (
        open_artifact(tmp_path / "again").manifest["sizes"]["model.onnx"]
        < (artifact.manifest["sizes"]["model.onnx"])
    )


def gp_session(artifact: Artifact) -> Any:
    return artifact.session(1)


@pytest.mark.slow
def test_a_quantized_artifact_keeps_the_cache(tmp_path: Path) -> None:
    model, inputs = decoder_model("tiny-gpt2")
    made = gp.compile(
        model,
        [PruneHeads(0.5), Quantize("int8-static")],
        example_inputs=inputs,
        calibration=[inputs],
        cache=True,
    ).export(tmp_path / "out")
    # Its baseline was quantized too, with a cache of more heads.
    batch = {name: tensor[:, :5] for name, tensor in inputs.items()}
    result = made.benchmark(batch, "dense,int8-static", repeats=1)
    assert result.shapes["past_key_values.0.key"] == (2, 2, 0, 8)
    assert len(written(Decoder(made.session(1)), *padded())[0]) == NEW


def test_benchmarks_fill_each_models_own_cache(
    artifacts: Artifacts,
) -> None:
    artifact = artifacts["tiny-gpt2", 0.5]
    batch = {"input_ids": torch.ones(2, 1).long(), "attention_mask": torch.ones(2, 9).long()}
    result = artifact.benchmark(batch, repeats=1)
    assert result.shapes["past_key_values.1.key"] == (2, 2, 8, 8)
    assert artifact.footprint(batch, dense=True).load_ms > 0
    given = {**batch, "past_key_values": {0: {"key": torch.ones(2, 4, 8, 8)}}}
    with pytest.raises(GraphPruneError, match=r"past_key_values.0.value"):
        artifact.feeds(given)


def test_tasks_read_whole_sequences(artifacts: Artifacts) -> None:
    ids, mask = padded()
    program = compiled("tiny-gpt2", 0.5).program
    session = artifacts["tiny-gpt2", 0.5].session(1)
    found = runner(session)({"input_ids": ids, "attention_mask": torch.ones_like(mask)})
    expected = program.run([ids, torch.ones_like(mask)])[0]
    assert relative_error(expected, found) < 1e-5


@pytest.mark.slow
def test_a_token_that_stops(artifacts: Artifacts) -> None:
    ids, mask = padded()
    decoder = Decoder(artifacts["tiny-llama", 0.0].session(1))
    free = written(decoder, ids, mask)
    stop = next(t for t in free[0] if t not in free[1])
    ended = written(decoder, ids, mask, stop=[stop])
    first = free[0].index(stop)
    assert ended[0] == free[0][: first + 1] + [stop] * (NEW - first - 1)
    assert ended[1] == free[1]
    alone = written(decoder, ids[:1], mask[:1], stop=[stop])
    assert len(alone[0]) == first + 1


def test_drawing() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1, 0.0001]], np.float32))
    many = np.repeat(logits, 4000, 0)
    random = np.random.default_rng(0)

    def shares(temperature: float, top_k: int) -> np.ndarray[Any, Any]:
        return np.bincount(choose(many, temperature, top_k, random), minlength=4) / len(many)

    assert shares(0.0, 0).tolist() == [1, 0, 0, 0]
    assert np.allclose(shares(1.0, 0), [0.6, 0.3, 0.1, 0.0], atol=0.03)
    assert np.allclose(shares(1.0, 2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    assert shares(1.0, 2)[2:].tolist() == [0, 0]
    assert shares(0.5, 0)[0] > 0.75


@pytest.mark.parametrize(
    ("ids", "options", "reason"),
    [
        (np.zeros((1, 0), np.int64), {}, "the prompt is empty"),
        (np.array([[99]]), {}, "the tokenizer is not the model's"),
        (np.array([[5]]), {"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        (np.array([[5]]), {"temperature": -1.0}, "temperature"),
        (np.array([[5]]), {"max_new_tokens": 99}, "more than the model has positions for"),
    ],
)
def test_what_cannot_be_generated(
    ids: Any,
    options: dict[str, Any],
    reason: str,
    artifacts: Artifacts,
) -> None:
    decoder = Decoder(artifacts["tiny-gpt2", 0.5].session(1))
    with pytest.raises(GraphPruneError, match=reason):
        list(generate(decoder, ids, **options))


def test_a_model_without_a_cache_does_not_generate(tmp_path: Path) -> None:
    model, inputs = tiny("tiny-mlp")
    artifact = gp.compile(model, [], example_inputs=inputs).export(tmp_path / "out")
    with pytest.raises(GraphPruneError, match="--cache"):
        Decoder(artifact.session(1))


def test_a_cache_that_does_not_fit_is_refused(
    artifacts: Artifacts,
) -> None:
    artifact = artifacts["tiny-gpt2", 0.5]
    batch = {
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.ones((1, 5), np.int64),
        "past_key_values.0.key": np.ones((1, 99, 3, 8), np.float32),
    }
    names = [i["name"] for i in artifact.manifest["inputs"]]
    for name in names[3:]:
        batch[name] = np.ones((1, 99, 3, 8), np.float32)
    with pytest.raises(GraphPruneError, match=r"'past_key_values.0.key' has shape \[1, 99, 3, 8\]"):
        artifact.feeds(batch)
    with pytest.raises(GraphPruneError, match="'attention_mask' is 1 long for 2 new tokens"):
        artifact.feeds({**batch, "attention_mask": np.ones((1, 1), np.int64)})


def test_options_without_meaning_are_refused_at_once(
    artifacts: Artifacts,
) -> None:
    decoder = Decoder(artifacts["tiny-gpt2", 0.5].session())
    with pytest.raises(GraphPruneError, match="max_new_tokens is at least 1"):
        generate(decoder, np.array([[1]]), max_new_tokens=0)
