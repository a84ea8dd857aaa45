"""Convolutions as matrix products: patches times the matrix are the convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.axes import axis_groups, windows
from graphprune.axes.sites import LinearSite, linear_sites
from graphprune.axes.windows import Window
from graphprune.calibration.gram import Gram
from graphprune.calibration.stream import Stream
from graphprune.capture.capture import capture

PLAIN = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
TURNED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[int, bool, dict[str, Any], tuple[int, ...]]:
    """Rank, whether transposed, arguments, kernel; a value a side."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    turned = draw(st.booleans())

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation = sides(1, 3), sides(1, 3), sides(1, 2)
    arguments: dict[str, Any] = {"stride": stride, "dilation": dilation}
    if turned:
        arguments["padding"] = tuple(draw(st.integers(0, d * (k - 1)))
                                     for k, d in zip(kernel, dilation, strict=True))  # fmt: skip
        arguments["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif all(s == 1 for s in stride):
        arguments["padding"] = draw(st.sampled_from(["same", "valid"]))
    else:
        arguments["padding"] = sides(0, 2)
    return rank, turned, arguments, kernel


@pytest.mark.filterwarnings("ignore:Using padding=:UserWarning")
@given(drawn=convolutions(), lines=st.sampled_from([1, 3, 7, 4096]))
@settings(max_examples=80, deadline=None)
def test_patches_times_the_matrix_are_the_convolution(
    drawn: tuple[int, bool, dict[str, Any], tuple[int, ...]], lines: int
) -> None:
    rank, turned, arguments, kernel = drawn
    x = torch.randn(2, 3, *[6] * rank, dtype=torch.float64)
    shape = (3, 4) if turned else (4, 3)
    weight = torch.randn(*shape, *kernel, dtype=torch.float64)
    expected = (TURNED if turned else PLAIN)[rank](x, weight, **arguments)
    window = Window.of(arguments, kernel, turned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "ROWS", lines)
        pieces = list(window.patches(x))
    if lines < 4096 and rank == 2:
        assert max(map(len, pieces)) <= max(lines, expected.shape[-1])
    rows = torch.cat(pieces)
    product = (rows @ window.matrix(weight).T).view(2, *expected.shape[2:], 4).movedim(-1, 1)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(window.weight(window.matrix(weight), 3), weight)


class Several(nn.Module):
    """Convolutions of every kind, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, dilation=2, padding="same", groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ConvTranspose2d(8, 4, (2, 3), stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def unfolded(site: LinearSite, x: Tensor) -> Tensor:
    """The patches of a convolution that is not transposed, by torch's own unfold."""
    window = site.window
    assert window is not None
    (top, bottom), (left, right) = window.padding
    x = nn.functional.pad(site.channels(x), (left, right, top, bottom))
    columns = nn.functional.unfold(x, window.kernel, dilation=window.dilation, stride=window.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def test_streamed_moments_are_those_of_unfolded_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "ROWS", 10)
    model, data = Several(), [torch.randn(3, 3, 12, 12) for _ in range(2)]
    program = capture(model, (data[0],))
    sites = linear_sites(axis_groups(program))
    # The depthwise one sums over no channel.
    assert [s.name for s in sites] == [
        "layers.0.weight", "layers.2.weight[0]", "layers.2.weight[1]", "layers.5.weight",
        "layers.7.weight",
    ]  # fmt: skip
    grams = {site.name: Gram.empty(site.matrix(program).shape[1]) for site in sites}
    stream = Stream(program, data)
    stream.collect(program, sites, lambda site, rows: grams[site.name].add(rows))
    for site in sites:
        number = int(site.tensor.split(".")[1])
        with torch.no_grad():
            inputs = torch.cat([model.layers[:number](x) for x in data])
        window = site.window
        assert window is not None
        if window.transposed:
            rows = torch.cat(list(window.patches(inputs)))
        else:
            rows = unfolded(site, inputs)
        gram = grams[site.name]
        assert gram.count == len(rows)
        torch.testing.assert_close(gram.matrix, (rows.T @ rows).double(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gram.mean, rows.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_changed_matrix_is_the_only_change(
    groups: int, apart: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.axes.sites.WIDEST", 0 if apart else 10**6)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(nn.Conv2d(2, 4, 1), kind(4, 6, (3, 2), groups=groups))
    program = capture(model, (torch.randn(2, 2, 5, 5),))
    sites = [s for s in linear_sites(axis_groups(program)) if s.tensor == "1.weight"]
    assert len(sites) == groups
    changed = program
    for site in sites:
        bias = site.bias_column(changed)
        assert bias is not None
        changed = site.with_matrix(changed, 2 * site.matrix(changed), 2 * bias)
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(changed.tensors[name], 2 * program.tensors[name])
    with torch.no_grad():
        x = torch.randn(2, 2, 5, 5)
        torch.testing.assert_close(changed.run([x])[0], 2 * model(x))
