"""Hidden units of a recurrent layer by first-order scores, and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import UnsupportedError
from graphprune.passes import PruneNeurons


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(20, 6), nn.LSTM(6, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.out(self.layer(self.embed(ids))[0])
        return result


def tagger() -> Any:
    """Units 1, 4 and 6 are hardly read; unit 2 by the recurrence alone."""
    torch.manual_seed(0)
    model: Any = Tagger().eval()
    with torch.no_grad():
        model.layer.weight_hh_l0[:, [1, 4, 6]] *= 1e-3
        model.out.weight[:, [1, 4, 6]] *= 1e-3
        model.layer.weight_hh_l0[:, 2] *= 5
        model.out.weight[:, 2] *= 1e-4
        # Large rows: by magnitude they would stay.
        for gate in range(4):
            model.layer.weight_ih_l0[[8 * gate + unit for unit in (1, 4, 6)]] *= 5
    return model


BATCHES = [{"ids": torch.randint(0, 20, (4, 9))} for _ in range(3)]


def test_units_that_nothing_reads_go_first() -> None:
    cut = PruneNeurons(0.375, score="taylor", compensate="none")
    compiled = gp.compile(tagger(), [cut], example_inputs=BATCHES[0], calibration=BATCHES)
    (kept,) = compiled.report.passes[0].details["kept"].values()
    assert kept == [0, 2, 3, 5, 7]
    assert compiled.program.tensors["layer.weight_hh_l0"].shape == (20, 5)
    ids = torch.randint(0, 20, (2, 6))
    torch.testing.assert_close(compiled.program.run([ids])[0], tagger()(ids), rtol=0, atol=0.02)


def test_statistics_do_not_reach_a_recurrence() -> None:
    with pytest.raises(UnsupportedError, match="score='magnitude' or 'taylor', and compensate"):
        gp.compile(
            tagger(),
            [PruneNeurons(0.5, score="obs")],
            example_inputs=BATCHES[0],
            calibration=BATCHES,
        )
