"""What must hold for every model family: groups, verified cuts, ONNX that agrees with torch."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch

from graphprune.api import compile
from graphprune.axes import AxisGroup, axis_groups
from graphprune.ir.batches import batches
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny_names
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import TOLERANCE, verify_rewrite
from graphprune.verify.error import relative_error

Key = tuple[str, int, bool]

_ATTENTION: dict[Key, int] = {("head", 4, True): 2, ("qk_dim", 8, True): 2, ("v_dim", 8, True): 2}
# Two groups of keys and values, two queries each; RoPE ties dimension j to j + 4, and its
# frequencies, which all layers share, tie the layers.
_GROUPED: dict[Key, int] = {
    ("kv_group", 2, True): 2,
    ("queries_per_group", 2, True): 2,
    ("qk_dim", 4, True): 1,
    ("v_dim", 8, True): 2,
}
_NEURONS: dict[Key, int] = {("neuron", 64, True): 2}
# q, k and v leave one reshape together, so their head dimensions are one axis.
_STACKED: dict[Key, int] = {
    ("head", 4, True): 2,
    ("qk_dim", 8, True): 2,
    **_NEURONS,
    ("residual", 32, True): 1,
}
_DECODER = {**_GROUPED, **_NEURONS, ("vocab", 99, False): 1, ("residual", 32, True): 1}

EXPECTED: Mapping[str, Mapping[Key, int]] = {
    # The residual stream and the pooler are outputs of the bare encoder.
    "tiny-bert": {**_ATTENTION, **_NEURONS, ("residual", 32, False): 1},
    "tiny-roberta": {
        **_ATTENTION,
        **_NEURONS,
        ("residual", 32, True): 1,
        ("pooled", 32, True): 1,
    },
    "tiny-distilbert": {
        **_ATTENTION,
        **_NEURONS,
        ("residual", 32, True): 1,
        ("pooled", 32, True): 1,
    },
    "tiny-electra": {
        **_ATTENTION,
        **_NEURONS,
        ("residual", 32, True): 1,
        ("pooled", 32, True): 1,
    },
    # One set of weights, used by every layer.
    "tiny-albert": {
        ("head", 4, True): 1,
        ("qk_dim", 8, True): 1,
        ("v_dim", 8, True): 1,
        ("neuron", 64, True): 1,
    },
    "tiny-gpt2": {**_ATTENTION, ("neuron", 128, True): 2, ("residual", 32, True): 1},
    "tiny-opt": {**_ATTENTION, **_NEURONS, ("residual", 32, True): 1},
    "tiny-llama": _DECODER,
    "tiny-mistral": _DECODER,
    "tiny-qwen2": _DECODER,
    # Heads: one group a stack, tied by the relative bias, and one for the cross-attention, tied by
    # the position bias of zeros that its layers share. Dimensions: encoder 2, decoder 2, cross 2.
    "tiny-t5": {
        ("head", 4, True): 3,
        ("qk_dim", 8, True): 6,
        ("v_dim", 8, True): 6,
        ("neuron", 64, True): 4,
        ("residual", 32, False): 1,
        ("vocab", 99, False): 1,
    },
    "tiny-vit": {**_ATTENTION, **_NEURONS, ("residual", 32, True): 1},
    "tiny-deit": {**_ATTENTION, **_NEURONS, ("residual", 32, True): 1},
    "tiny-mixtral": {**_DECODER, ("expert", 4, False): 2},
    "tiny-encoder": _STACKED,
    "tiny-fused-vit": _STACKED,
    "tiny-mlp": {("neuron", 32, True): 1, ("neuron", 24, True): 1},
    "tiny-cnn": {("neuron", 32, True): 1, ("residual", 16, True): 1},
}

HEADS = ("head", "kv_group")
Captured = Callable[[str], Program]


def test_every_tiny_model_has_an_expectation() -> None:
    assert sorted(EXPECTED) == tiny_names()


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_what_a_person_finds(name: str, captured: Captured) -> None:
    groups = axis_groups(captured(name))
    found = Counter((g.role, g.size, not g.frozen) for g in groups)
    for key, count in EXPECTED[name].items():
        assert found[key] == count, f"{key}: {found[key]}, expected {count}\n{groups}"
    wanted = {role for role, _, _ in EXPECTED[name]}
    extra = {k: n for k, n in found.items() if k[0] in wanted and k not in EXPECTED[name]}
    assert not {k: n for k, n in extra.items() if k[2]}, f"unexpected free groups\n{groups}"


@functools.cache
def _half(groups: tuple[AxisGroup, ...]) -> dict[str, list[int]]:
    """Every second unit of each group, shuffled by a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return {
        g.id: torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)].sort()[0].tolist()
        for g in groups
    }


@pytest.mark.parametrize("roles", [HEADS, ("neuron",)], ids=["heads", "neurons"])
@pytest.mark.parametrize("name", EXPECTED)
def test_half_removed_equals_half_masked(
    name: str, roles: tuple[str, ...], captured: Captured
) -> None:
    program = captured(name)
    groups = axis_groups(program)
    chosen = tuple(g for g in groups.with_role(*roles) if not g.frozen)
    if not chosen:
        assert name in {"tiny-mlp", "tiny-cnn"}
        assert roles == HEADS
        return
    kept = _half(chosen)
    masked, shrunk = mask(program, kept), shrink(program, kept)
    verify_rewrite(masked, shrunk)
    # A verifier that cannot see the cut verifies nothing.
    moved = max(
        relative_error(a, b)
        for inputs in batches(program.forward)
        for a, b in zip(program.run(inputs), masked.run(inputs), strict=True)
    )
    assert moved >= 100 * TOLERANCE
    assert shrunk.num_parameters() == groups.num_parameters(kept) < program.num_parameters()


@pytest.mark.parametrize("name", EXPECTED)
def test_every_free_axis_can_be_cut(name: str, captured: Captured) -> None:
    """All free axes at once, whatever their role; where one is normalized, shapes are the check."""
    program = captured(name)
    groups = axis_groups(program)
    for normalized in (False, True):
        chosen = tuple(g for g in groups if not g.frozen and g.cost and g.normalized == normalized)
        if chosen:
            kept = _half(chosen)
            verify_rewrite(mask(program, kept), shrink(program, kept), exact=not normalized)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_exported_half_agrees_with_torch(name: str, captured: Captured, tmp_path: Path) -> None:
    heads = [] if name in {"tiny-mlp", "tiny-cnn"} else [PruneHeads(0.5)]
    compiled = compile(captured(name), [*heads, PruneNeurons(0.5)])
    artifact = compiled.export(tmp_path / "out", baseline=False)
    session = artifact.session(threads=1)
    assert isinstance(session, onnxruntime.InferenceSession)
    program = compiled.program
    for inputs in batches(program.forward):
        feeds = dict(zip(program.forward.input_names, (t.numpy() for t in inputs), strict=True))
        expected = program.run(inputs)
        given = {i.name for i in session.get_inputs()}
        actual = session.run(None, {k: v for k, v in feeds.items() if k in given})
        for a, b in zip(expected, actual, strict=True):
            assert relative_error(a, torch.from_numpy(b)) <= 1e-4
