"""Packed sequences are refused in one sentence, and the way out that it names works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from graphprune.capture.capture import capture
from graphprune.errors import CaptureError

EXAMPLE = (torch.randn(2, 7, 8), torch.tensor([7, 5]))


class Packed(nn.Module):
    def __init__(self, kind: str = "LSTM", whole: bool = True) -> None:
        super().__init__()
        self.rnn: Any = getattr(nn, kind)(8, 16, batch_first=True)
        self.head, self.whole = nn.Linear(16, 3), whole

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        steps, last = self.rnn(packed)
        if self.whole:
            return self.head(pad_packed_sequence(steps, batch_first=True)[0])
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class Padded(Packed):
    """The same without packing: what a row's state is after its last step."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps, _ = self.rnn(x)
        place = (lengths - 1)[:, None, None].expand(-1, 1, steps.shape[-1])
        return self.head(steps.gather(1, place).squeeze(1))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_packed_sequence_is_refused_with_the_way_out(kind: str, whole: bool) -> None:
    with pytest.raises(CaptureError, match=r"packed sequence.*give the layer the padded batch"):
        capture(Packed(kind, whole).eval(), EXAMPLE)


def test_the_way_out_computes_the_same() -> None:
    packed = Packed(whole=False).eval()
    padded = Padded().eval()
    padded.load_state_dict(packed.state_dict())
    got = capture(padded, EXAMPLE).run(list(EXAMPLE))[0]
    torch.testing.assert_close(got, packed(*EXAMPLE))
