"""The entry `decode`: what it computes, what it shares with `forward`, and cuts that reach both."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.capture.decoder import with_decode
from graphprune.errors import ArtifactError, CaptureError, UnsupportedError, VerificationError
from graphprune.ir.batches import batches
from graphprune.ir.decoding import empty_cache, step
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.models.loading.inputs import text_batch
from graphprune.models.zoo.tiny import randomize, tiny
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.storage.program import load, save
from graphprune.verify.equivalence import TOLERANCE, verify_rewrite
from graphprune.verify.error import relative_error

# What has no builtin: how their queries, keys and positions are made differs from all others.
_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OTHERS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_SMALL, "head_dim": 8}),
    # Windows of four tokens, fewer than there are: the mask must do what the cache does not.
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_SMALL,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _SMALL),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _SMALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_SMALL, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL),
}
BUILTIN = ("tiny-llama", "tiny-gpt2", "tiny-opt", "tiny-mistral", "tiny-qwen2", "tiny-mixtral")


def decoder(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name in BUILTIN:
        return tiny(name)
    import transformers

    model_class, config_class, options = _OTHERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    randomize(model)
    return model.eval(), text_batch(99, 12)


@functools.cache
def cached(name: str) -> Program:
    model, inputs = decoder(name)
    return with_decode(model, capture(model, inputs))


def stepped(program: Program, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt at once and then token by token."""
    cache = empty_cache(program.entries["decode"], len(ids))
    logits, cache = step(program, ids[:, :prompt], mask[:, :prompt], cache)
    parts = [logits]
    for i in range(prompt, ids.shape[1]):
        logits, cache = step(program, ids[:, i : i + 1], mask[:, : i + 1], cache)
        parts.append(logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", [*BUILTIN, *_OTHERS])
@pytest.mark.slow
def test_decoding_equals_reading_at_once(name: str) -> None:
    program = cached(name)
    ids = torch.randint(5, 99, (3, 11))
    ones = torch.ones_like(ids)
    whole = program.run([ids, ones])[0]
    for prompt in (1, 6):
        assert relative_error(whole, stepped(program, ids, ones, prompt)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-opt"])
def test_padding_on_the_left_does_not_matter(name: str) -> None:
    program = cached(name)
    ids = torch.randint(5, 99, (2, 9))
    ones = torch.ones_like(ids)
    ones[1, :3] = 0
    padded = stepped(program, ids, ones, 5)[1, 3:]
    alone = stepped(program, ids[1:, 3:], ones[1:, 3:], 2)[0]
    assert relative_error(alone, padded) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTIN)
def test_both_entries_share_the_tensors_and_the_groups(
    name: str, captured: Callable[[str], Program]
) -> None:
    program, with_cache = captured(name), cached(name)
    assert with_cache.tensors.keys() == program.tensors.keys()
    found = [
        Counter((g.role, g.size, bool(g.frozen), g.id) for g in axis_groups(p))
        for p in (program, with_cache)
    ]
    assert found[0] == found[1]


def test_the_model_is_as_it_was() -> None:
    model, inputs = tiny("tiny-llama")
    before = dict(model.__dict__)
    with_decode(model, capture(model, inputs))
    assert model.__dict__.keys() == before.keys()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("role", ["heads", "queries_per_group", "qk_dim", "v_dim", "neuron"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_masked_equals_shrunk_on_both_entries(name: str, role: str) -> None:
    program = cached(name)
    wanted = ("head", "kv_group") if role == "heads" else (role,)
    chosen = [g for g in axis_groups(program).with_role(*wanted) if not g.frozen]
    if not chosen:  # no grouped queries
        assert (name, role) == ("tiny-gpt2", "queries_per_group")
        return
    # Another number in every layer.
    kept = {
        g.id: torch.randperm(g.size)[: max(1, g.size // 2 - i)].tolist()
        for i, g in enumerate(chosen)
    }
    masked, shrunk = mask(program, kept), shrink(program, kept)
    verify_rewrite(masked, shrunk)
    for entry in ("forward", "decode"):
        moved = max(
            relative_error(program.run(inputs, entry)[0], masked.run(inputs, entry)[0])
            for inputs in batches(program.entries[entry])
        )
        assert moved >= 100 * TOLERANCE
    widths = [tuple(t.shape) for t in shrunk.entries["decode"].example[2:]]
    assert widths == [(*tuple(o.shape[:2]), 7, o.shape[3]) for o in _present(shrunk)]
    if role == "heads" and name == "tiny-gpt2":
        assert [shape[1] for shape in widths] == [2, 2, 1, 1]
    ids = torch.randint(5, 99, (2, 9))
    ones = torch.ones_like(ids)
    whole = shrunk.run([ids, ones])[0]
    assert relative_error(whole, stepped(shrunk, ids, ones, 4)) < 1e-5


def _present(program: Program) -> list[Tensor]:
    entry = program.entries["decode"]
    outputs = program.run(entry.example, "decode")
    return [outputs[number] for number in entry.cache.values()]


def test_a_wrong_cache_is_seen() -> None:
    """The comparison looks at what goes out into the cache, not at logits alone."""
    program = cached("tiny-gpt2")
    group = next(g for g in axis_groups(program).with_role("head"))
    right, wrong = shrink(program, {group.id: [0, 1]}), shrink(program, {group.id: [0, 2]})
    verify_rewrite(mask(program, {group.id: [0, 1]}), right)
    for number in range(3):  # logits, keys, values
        flat = [p.run(p.entries["decode"].example, "decode")[number] for p in (right, wrong)]
        assert relative_error(*flat) > 1e-3
    with pytest.raises(VerificationError):
        verify_rewrite(mask(program, {group.id: [0, 1]}), wrong)


def test_passes_prune_a_cached_program() -> None:
    model, inputs = tiny("tiny-gpt2")
    compiled = gp.compile(
        model,
        [PruneHeads(0.5, allocation="global"), PruneNeurons(0.5)],
        example_inputs=inputs,
        cache=True,
    )
    ids = torch.randint(5, 99, (2, 9))
    ones = torch.ones_like(ids)
    whole = compiled.program.run([ids, ones])[0]
    assert relative_error(whole, stepped(compiled.program, ids, ones, 4)) < 1e-5
    assert compiled.report.after.parameters < compiled.report.before.parameters


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = cached("tiny-llama")
    save(program, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.entries["decode"].cache == program.entries["decode"].cache
    for inputs in batches(program.entries["decode"]):
        for a, b in zip(program.run(inputs, "decode"), loaded.run(inputs, "decode"), strict=True):
            assert torch.equal(a, b)
    chosen = next(g for g in axis_groups(loaded).with_role("kv_group"))
    verify_rewrite(mask(loaded, {chosen.id: [1]}), shrink(loaded, {chosen.id: [1]}))


def test_a_cache_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    import json

    save(cached("tiny-llama"), tmp_path / "saved")
    file = tmp_path / "saved" / "program.json"
    data = json.loads(file.read_text())
    data["entries"]["decode"]["cache"] = {"input_ids": 99}
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="cache"):
        load(tmp_path / "saved")


class _Stateful(nn.Module):
    """A decoder whose cache is no keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(9, 4)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Tensor:
        return self.inner(input_ids)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny-mlp", "decoders of text"),
        ("tiny-t5", "decoders of text"),
        ("tiny-bert", "no key/value cache"),
        ("tiny-encoder", "no key/value cache"),
    ],
)
def test_a_model_without_a_cache_is_refused(name: str, reason: str) -> None:
    model, inputs = tiny(name)
    with pytest.raises(CaptureError, match=reason):
        gp.compile(model, [], example_inputs=inputs, cache=True)


def test_a_recurrent_state_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    program = cached("tiny-llama")
    with pytest.raises(CaptureError, match="without cache"):
        with_decode(model, program)


def test_an_unreadable_cache_is_refused() -> None:
    inputs = {"input_ids": torch.randint(0, 9, (2, 8))}
    with pytest.raises(CaptureError, match="gives no key/value cache"):
        gp.compile(_Stateful(), [], example_inputs=inputs, cache=True)


def test_too_few_tokens_are_refused() -> None:
    model, inputs = tiny("tiny-llama")
    short = {name: tensor[:, :4] for name, tensor in inputs.items()}
    with pytest.raises(CaptureError, match="too few"):
        gp.compile(model, [], example_inputs=short, cache=True)


def test_a_cache_that_says_otherwise_is_refused() -> None:
    """A model that ignores its past decodes otherwise than it reads."""
    model, inputs = tiny("tiny-llama")
    attention: Any = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    inner = attention.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.layers and cache.layers[0].keys is not None:
            layer = cache.layers[0]
            layer.keys = torch.zeros_like(layer.keys)
        return inner(*args, **kwargs)

    attention.forward = forgetful
    with pytest.raises(CaptureError, match="something else with a cache"):
        with_decode(model, capture(model, inputs))


def test_a_program_without_the_entry_gets_none() -> None:
    model, inputs = tiny("tiny-llama")
    program = capture(model, inputs)
    for given in (program, gp.compile(program, []), ProgramModule(program)):
        with pytest.raises(UnsupportedError, match="cache=True needs the model itself"):
            gp.compile(given, [], cache=True)
    assert "decode" in gp.compile(cached("tiny-llama"), [], cache=True).program.entries
