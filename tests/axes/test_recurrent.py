"""Hidden units of recurrent layers: cut gate by gate, through the recurrence and the states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.storage.program import load, save
from graphprune.verify.equivalence import verify_rewrite

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "stacked": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "projected": (nn.LSTM, {"proj_size": 5, "num_layers": 2}),
    "unbiased": (nn.LSTM, {"bias": False, "bidirectional": True}),
    "gru": (nn.GRU, {"num_layers": 2}),
    "both ways": (nn.GRU, {"bidirectional": True, "bias": False}),
    "tanh": (nn.RNN, {"num_layers": 2, "bidirectional": True}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Tagger(nn.Module):
    """Tokens to a label each, by a recurrent layer whose first state is learned or zero."""

    def __init__(self, kind: str, state: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        layer, options = KINDS[kind]
        self.batch_first = batch_first
        self.embed = nn.Embedding(20, 8)
        self.layer: Any = layer(8, 12, batch_first=batch_first, **options)
        directions = 2 if options.get("bidirectional") else 1
        width = (options.get("proj_size") or 12) * directions
        self.out = nn.Linear(width, 3)
        layers = int(options.get("num_layers", 1)) * directions
        self.states = nn.ParameterList()
        if state:
            sizes = [options.get("proj_size") or 12, 12][: 2 if layer is nn.LSTM else 1]
            self.states.extend(nn.Parameter(torch.randn(layers, 1, size)) for size in sizes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(ids)
        if not self.batch_first:
            h = h.transpose(0, 1)
        first = [s.expand(-1, ids.shape[0], -1).contiguous() for s in self.states]
        given = tuple(first) if len(first) > 1 else (first[0] if first else None)
        y, last = self.layer(h, given)
        state = last[0] if isinstance(last, tuple) else last
        return self.out(y), state.square().sum(-1)


def tagged(kind: str, state: bool = False, batch_first: bool = True) -> Program:
    torch.manual_seed(1)
    model = Tagger(kind, state, batch_first).eval()
    return capture(model, (torch.randint(0, 20, (2, 7)),))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units_can_go(kind: str, state: bool) -> None:
    program = tagged(kind, state, batch_first=not state)
    groups = axis_groups(program)
    hidden = [g for g in groups.of("layer.weight_hh_l0", 0) if g.size == 12]
    assert [(g.role, g.frozen, g.normalized) for g in hidden] == [("neuron", (), False)]
    free = [g for g in groups if not g.frozen and not g.normalized]
    for chosen in (hidden, free):
        kept = {g.id: sorted(torch.randperm(g.size)[: g.size // 2].tolist()) for g in chosen}
        small = shrink(program, kept)
        verify_rewrite(
            mask(program, kept), small, also=[mask(program, kept, everywhere=True)], dense=program
        )
        assert small.num_parameters() == groups.num_parameters(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_is_dynamic(kind: str) -> None:
    program = tagged(kind)
    assert program.forward.dynamic == {"ids": {0: "batch", 1: "sequence"}}
    torch.manual_seed(1)
    model = Tagger(kind).eval()
    for ids in (torch.randint(0, 20, (3, 11)), torch.randint(0, 20, (1, 1))):
        with torch.no_grad():
            torch.testing.assert_close(program.run([ids]), list(model(ids)))


def test_as_many_units_as_a_projection_gives_out_are_refused() -> None:
    program = tagged("projected")
    (hidden,) = (g for g in axis_groups(program).of("layer.weight_hh_l0", 0) if g.size == 12)
    with pytest.raises(UnsupportedError, match=r"would keep 5 hidden units.*another number"):
        shrink(program, {hidden.id: list(range(5))})


def test_a_state_that_the_user_gives_or_reads_stays() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 6, batch_first=True)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            y, state = self.layer(x, state)
            return self.out(y), state

    groups = axis_groups(capture(Streaming(), (torch.randn(2, 5, 4), torch.randn(1, 2, 6))))
    (hidden,) = (g for g in groups.of("layer.weight_hh_l0", 0) if g.size == 6)
    assert "input 'state' of the model" in hidden.frozen
    assert "output of the model" in hidden.frozen


def test_torch_is_as_it_was() -> None:
    """The shapes of a capture are for a capture alone."""
    overload = torch.ops.aten.lstm.input
    before = dict(overload.py_kernels)
    tagged("lstm")
    assert overload.py_kernels == before


def test_saved_and_loaded(tmp_path: Any) -> None:
    program = tagged("stacked")
    save(program, tmp_path / "p")
    ids = torch.randint(0, 20, (4, 9))
    torch.testing.assert_close(load(tmp_path / "p").run([ids]), program.run([ids]))
