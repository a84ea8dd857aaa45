"""The mark that Quantize leaves on a program, and that exporters read.

A marked program still holds its float weights and computes what it did: quantized operators exist
only in the exported file. So a mark survives saving, and nothing in the core knows int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from graphprune.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from graphprune.ir.program import Program

KEY = "quantize"  # the pass, and its mark in a saved program
PATTERNS = ("32x4", "16x4")
"""Zero blocks that sparse kernels skip, OUTxIN."""

SCHEMES: Mapping[str, str] = {
    "int8-dynamic": "int8 weights with a scale a channel, activations to uint8 as they come",
    "int8-static": "the same with the activations' ranges fixed by calibration",
    "int8-weights": "int8 weights in blocks, dequantized inside the product",
    "int4-weights": "int4 weights in blocks, dequantized inside the product",
}
OVERFLOWING = ("int8-dynamic", "int8-static")
"""Schemes whose eight-bit products overflow on x86 CPUs without VNNI; seven bits do not."""


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """How to quantize at export.

    Attributes:
        scheme: a key of `SCHEMES`.
        ignored: names of tensors that stay float.
        embeddings: whether lookup tables become int8, with a scale a row.
        keep_error: largest relative error of the outputs, ||quantized - float|| / ||float||; the
            layers that cost most stay float until it holds. None keeps none.
        block_size: weights that share a scale, in the schemes with blocks.
        reduce_range: int8 weights of seven bits.
        blocks: a pattern ("32x4") whose zero blocks a budget counts as skipped: what it measures is
            written with sparse products. Export chooses them by its target.
    """

    scheme: str
    ignored: tuple[str, ...] = ()
    embeddings: bool = True
    keep_error: float | None = None
    block_size: int = 32
    reduce_range: bool = False
    blocks: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {**asdict(self), "ignored": list(self.ignored)}
        if not self.blocks:  # only what a budget measures has them
            del found["blocks"]
        return found

    @classmethod
    def from_json(cls, data: Any) -> Mark:
        """Read what `to_json` gave.

        Raises:
            ArtifactError: the data are no mark, or of a scheme that is not known.
        """
        try:
            mark = cls(**{**data, "ignored": tuple(data["ignored"])})
        except (TypeError, KeyError) as e:
            raise ArtifactError(
                f"the program's metadata[{KEY!r}] is not what graphprune wrote ({e!r}); "
                "quantize again"
            ) from e
        if mark.scheme not in SCHEMES:
            raise ArtifactError(
                f"the program is marked for scheme {mark.scheme!r}; this graphprune knows "
                f"{sorted(SCHEMES)}"
            )
        return mark

    def takes(self, weight: str) -> bool:
        """Whether this weight is to be quantized."""
        return weight not in self.ignored

    @property
    def needs_calibration(self) -> bool:
        """Whether export has to see activations."""
        return self.scheme == "int8-static"


def refuse_quantized(program: Program, name: str) -> None:
    """Refuse to change shapes or weights after a mark; every pass that does so calls this first.

    Raises:
        UnsupportedError: the program is marked.
    """
    if program.quantization is not None:
        raise UnsupportedError(too_late(name, program.quantization.scheme))


def too_late(name: str, scheme: str) -> str:
    """Why a pass that changes weights or shapes cannot come after quantize."""
    return (
        f"pass {name!r} comes after 'quantize' ({scheme}): scales and the layers kept in float are "
        "chosen for the weights as they are then, so prune first and quantize last"
    )
