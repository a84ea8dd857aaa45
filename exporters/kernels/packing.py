"""Weights packed for the operator SparseLinear: only the blocks that hold a nonzero.

    y = act((x_q - z) s · Σ_blocks codes · scales + bias)

A block holds `height` outputs times `WIDTH` inputs, int8, output after output. Blocks lie in the
order of their outputs, then of their inputs, so that the kernel reads them once from front to back
while it holds `height` sums. Outputs are padded to whole blocks, inputs to whole groups of `WIDTH`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

WIDTH = 4  # inputs of a block: what one lane of an int8 product adds up
HEIGHTS = (16, 32)  # outputs of a block
# Without VNNI pairs of uint8 x int8 are added in 16 bits: 2 · 255 · 64 is the most that fits.
LARGEST = {7: 64, 8: 127}


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [outputs, inputs] as SparseLinear reads it.

    Attributes:
        outputs: of the matrix.
        inputs: of the matrix.
        bits: of the codes, 7 or 8.
        blocks: codes, int8 [blocks, height, WIDTH].
        columns: the first input of each block divided by WIDTH, int32 [blocks].
        starts: for each `height` outputs their first block, and in the end the number of blocks,
            int32 [ceil(outputs / height) + 1].
        scales: of each output, float32 [outputs padded].
    """

    outputs: int
    inputs: int
    bits: int
    blocks: npt.NDArray[np.int8]
    columns: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    scales: Floats

    @property
    def height(self) -> int:
        """Outputs of a block."""
        return self.blocks.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (self.blocks, self.columns, self.starts, self.scales))

    def unpacked(self) -> Floats:
        """The weight that the codes stand for, float32 [outputs, inputs]."""
        strips = len(self.starts) - 1
        groups = -(-self.inputs // WIDTH)
        tiles = np.zeros((strips, groups, self.height, WIDTH), np.float32)
        tiles[np.repeat(np.arange(strips), np.diff(self.starts)), self.columns] = self.blocks
        whole = tiles.transpose(0, 2, 1, 3).reshape(strips * self.height, groups * WIDTH)
        return (whole * self.scales[:, None])[: self.outputs, : self.inputs]


def pack(weight: Floats, height: int, bits: int) -> Packed:
    """Quantize a weight [outputs, inputs] with a scale an output, and keep its nonzero blocks.

    Raises:
        ValueError: no kernel has blocks of this height, or codes of so many bits.
    """
    if height not in HEIGHTS or bits not in LARGEST:
        raise ValueError(f"blocks are {HEIGHTS} outputs high, of {list(LARGEST)} bits")
    outputs, inputs = weight.shape
    largest = np.abs(weight).max(axis=1, initial=0.0)
    scales = np.where(largest > 0, largest / LARGEST[bits], 1.0).astype(np.float32)
    tiles = _tiles(np.rint(weight / scales[:, None]).astype(np.int8), height)
    alive = np.any(tiles, axis=(2, 3))
    strips, columns = np.nonzero(alive)
    starts = np.concatenate([[0], np.cumsum(alive.sum(axis=1))])
    padded = np.pad(scales, (0, len(tiles) * height - outputs), constant_values=1.0)
    blocks = np.ascontiguousarray(tiles[strips, columns])
    return Packed(
        outputs, inputs, bits, blocks, columns.astype(np.int32), starts.astype(np.int32), padded
    )


def density(weight: npt.NDArray[Any], height: int) -> float:
    """The fraction of blocks `height` x WIDTH that hold a nonzero."""
    return float(_tiles(weight != 0, height).any(axis=(2, 3)).mean())


def _tiles(array: npt.NDArray[Any], height: int) -> npt.NDArray[Any]:
    """[outputs, inputs] in blocks, [strips, groups, height, WIDTH], padded with zeros."""
    outputs, inputs = array.shape
    padded = np.pad(array, ((0, -outputs % height), (0, -inputs % WIDTH)))
    strips = padded.reshape(len(padded) // height, height, -1, WIDTH)
    return strips.transpose(0, 2, 1, 3)
