"""`graphprune generate`: text, speed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder compiled with a cache, and a tokenizer put beside it as a user's model has one."""
    import graphprune as gp
    from graphprune.models.zoo.tiny import tiny
    from graphprune.passes import PruneNeurons

    model, inputs = tiny("tiny-gpt2")
    compiled = gp.compile(model, [PruneNeurons(0.5)], example_inputs=inputs, cache=True)
    compiled.files = {
        "tokenizer.json": tokenizer_json(99),
        "generation_config.json": b'{"eos_token_id": [98]}',
    }
    return compiled.export(tmp_path_factory.mktemp("cached") / "out").path


def tokenizer_json(count: int) -> bytes:
    """A tokenizer of so many words, w0, w1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return bytes(tokenizer.to_str(), "utf-8")


@pytest.mark.slow
def test_generate_streams_text_and_says_how_fast(run: Run, cached: Path) -> None:
    options = ("--prompt", "w7 w8 w9", "--max-new-tokens", "6")
    plain = run("generate", str(cached), *options)
    assert plain.exit_code == 0, plain.stderr
    words = plain.stdout.split()
    assert len(words) == 6
    assert all(0 <= int(word[1:]) < 99 for word in words)
    assert "prompt 3 tokens" in plain.stderr
    assert "6 new" in plain.stderr
    found = json.loads(run("generate", str(cached), *options, "--json").stdout)
    assert found["text"].split() == words
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 6)
    assert found["decode_tokens_per_second"] > 0
    drawn = [
        run("generate", str(cached), *options, "--temperature", "5", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_what_generate_refuses(
    run: Run, sentence: Sentence, cached: Path, artifact: Path, tmp_path: Path
) -> None:
    import graphprune as gp

    assert "prompt is empty" in sentence(run("generate", str(cached), "--prompt", " "))
    assert "chat template" in sentence(run("generate", str(cached), "--prompt", "w1", "--chat"))
    assert "positions" in sentence(run("generate", str(cached), "--prompt", "w1 " * 70))
    loaded = gp.load(cached)
    cases: list[tuple[dict[str, Path | bytes], str]] = [
        ({}, "without a tokenizer"),
        ({"tokenizer.json": tokenizer_json(200)}, "tokenizer is not the model's"),
        ({"tokenizer.json": b"{}"}, "no usable tokenizer"),
    ]
    for files, reason in cases:
        loaded.files = files
        other = loaded.export(tmp_path / "other", baseline=False)
        refused = run("generate", str(other.path), "--prompt", "w150")
        assert refused.exit_code == 2
        assert reason in sentence(refused)
    bare = gp.load(artifact)
    bare.files = {"tokenizer.json": tokenizer_json(99)}
    bare.export(tmp_path / "bare", baseline=False)
    assert "--cache" in sentence(run("generate", str(tmp_path / "bare"), "--prompt", "w1"))
    assert "no key/value cache" in sentence(run("compile", "tiny-bert", "--cache", "-o", "out"))
