"""The machine that a model is for, as passes see it: milliseconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from graphprune.ir.program import Program


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a program on a device.

    Attributes:
        ms: milliseconds of one run on the example inputs, the median of several rounds.
        bytes: of its ONNX file.
        low: lower quartile of the rounds, in milliseconds; `high` the upper.
    """

    ms: float
    bytes: int
    low: float
    high: float


Progress = Callable[[int, int, str], None]
"""Called with how many are done, of how many, of what."""


class Device(Protocol):
    """A machine that programs are timed on, or a file that says how long they took there."""

    @property
    def name(self) -> str:
        """The CPU's name."""

    @property
    def threads(self) -> int:
        """Threads within operators."""

    @property
    def can_measure(self) -> bool:
        """Whether it times what is new to it; else it knows only what its file holds."""

    def measure(
        self,
        models: Mapping[str, Program],
        *,
        inputs: Mapping[str, Sequence[Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[str, Cost]:
        """Measure programs, by the names given; those of one graph are timed once.

        The deployed entry is timed, on its example inputs, as it will be exported: quantized where
        the program is marked.

        Args:
            models: the programs.
            inputs: flat inputs of the deployed entry by the model's name, of those that are not to
                be timed on their example inputs.
            fresh: time all of them now, in one run, whatever was measured before.

        Raises:
            GraphPruneError: a program cannot be exported or run; or it is not among what was
                measured, where `can_measure` is False.
        """
