"""Models whose heads meet constants, constant numbers or a relative shift: half of them go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from graphprune.api import compile
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.batches import batches
from graphprune.passes import PruneHeads
from graphprune.verify.equivalence import TOLERANCE
from graphprune.verify.error import relative_error

_SMALL: dict[str, Any] = {"vocab_size": 97}
_DEEP: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _slopes() -> nn.Module:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_SMALL)
    return transformers.BloomModel(config)


def _constant_numbers() -> nn.Module:
    config = transformers.FalconConfig(multi_query=True, alibi=False, **_DEEP, **_SMALL)
    return transformers.FalconModel(config)


def _constant_numbers_in_groups() -> nn.Module:
    config = transformers.FalconConfig(
        new_decoder_architecture=True, num_kv_heads=2, alibi=False, **_DEEP, **_SMALL
    )
    return transformers.FalconModel(config)


def _shift_and_pooling() -> nn.Module:
    config = transformers.FunnelConfig(
        d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1,
        **_SMALL,
    )  # fmt: skip
    return transformers.FunnelModel(config)


def _shift() -> nn.Module:
    config = transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, **_SMALL)
    return transformers.XLNetModel(config)


MODELS = (_slopes, _constant_numbers, _constant_numbers_in_groups, _shift_and_pooling, _shift)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
@pytest.mark.parametrize("build", MODELS)
def test_half_of_the_heads_go(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 97, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.float32 if build is _shift else torch.int64)
    program = capture(model, {"input_ids": ids, "attention_mask": mask})
    compiled = compile(program, [PruneHeads(0.5)])
    before, after = axis_groups(program), axis_groups(compiled.program)
    heads = [g for g in before if g.role in ("head", "kv_group") and not g.frozen]
    assert heads
    left = {g.id: g.size for g in after}
    # One that is left alone is no axis any more.
    assert all(left.get(g.id, 1) == g.size // 2 for g in heads)
    example = program.forward.example
    (dense, *_), (pruned, *_) = program.run(example), compiled.program.run(example)
    assert relative_error(dense, pruned) >= 100 * TOLERANCE
    session = compiled.export(tmp_path / "out", baseline=False).session(threads=1)
    assert isinstance(session, onnxruntime.InferenceSession)
    given = {i.name for i in session.get_inputs()}
    for inputs in batches(compiled.program.forward):
        pairs = zip(compiled.program.forward.input_names, inputs, strict=True)
        feeds = {name: tensor.numpy() for name, tensor in pairs if name in given}
        for a, b in zip(compiled.program.run(inputs), session.run(None, feeds), strict=True):
            assert relative_error(a, torch.from_numpy(b)) <= 1e-4
