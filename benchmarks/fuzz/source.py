"""Random models as Python source: a graph is a list of steps, and steps write lines of a module.

A step is data (a kind, a number, an activation, a seed for its choices), so that a graph can be
stored as JSON and a failure made smaller by taking steps out. What is tried is the very source that
is printed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Builder = Callable[["Source", "Choices"], None]

SEQUENCE, IMAGE = "sequence", "image"
HEADER = """\
import torch
from torch import nn
from torch.nn import functional as F

import graphprune.ir.operators


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a model.

    Attributes:
        kind: name of the function in the table of steps.
        n: a small number that its widths are made of.
        act: an activation, as an expression with `{}` for its input.
        variant: seeds the step's other choices; 0 always takes the first, simplest one.
    """

    kind: str
    n: int
    act: str
    variant: int


@dataclass(frozen=True, slots=True)
class Graph:
    """A model to be written: steps over a sequence or an image, and the sizes of the examples.

    Attributes:
        domain: "sequence" ([batch, length, width]) or "image" ([batch, channels, side, side]).
        width: of the stream that the steps work on.
        batch: number of samples at capture.
        length: of a sequence, or side of an image, at capture.
        dynamic: whether batch and length are symbols; else the graph runs at one shape only.
        steps: in order.
        seed: of parameters, inputs and cuts.
    """

    domain: str
    width: int
    batch: int
    length: int
    dynamic: bool
    steps: tuple[Step, ...]
    seed: int

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Graph:
        """The graph of a line of JSON."""
        data = json.loads(text)
        return replace(Graph(**data), steps=tuple(Step(**s) for s in data["steps"]))


class Choices:
    """The choices of one step, in order; all first ones when its variant is 0."""

    def __init__(self, step: Step) -> None:
        self.n, self.act, self.kind = step.n, step.act, step.kind
        self._random = random.Random(step.variant) if step.variant else None

    def of(self, *options: T) -> T:
        """One of the options; the first is the simplest."""
        return self._random.choice(options) if self._random else options[0]

    def odds(self, share: float) -> bool:
        """Whether something happens that happens this often; never in the simplest variant."""
        return self._random.random() < share if self._random else False

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in another order; as they are in the simplest variant."""
        result = list(items)
        if self._random:
            self._random.shuffle(result)
        return result


@dataclass(slots=True)
class Source:
    """A module being written.

    Attributes:
        domain: what the stream `x` is now, a sequence or an image.
        width: units of the stream.
        side: of the image, when it is one; a number.
        zero: whether a unit of the stream is zero once every parameter slice of it is zero.
        exact: whether zeroing the parameter slices of any units removes them: no unit that may be
            anything but zero is summed without a weight of its own.
        inputs: argument -> (kind, sizes): "float", or "ids" with their number first; sizes may be
            "b" and "l".
        outputs: expressions returned after the main one.
        cache: argument -> number of the output that continues it.
        layers: submodules by their text, to be shared.
        saved: earlier values of the stream, with width and `zero`.
    """

    domain: str
    width: int
    side: int = 0
    zero: bool = True
    exact: bool = True
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    cache: dict[str, int] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)
    saved: list[tuple[str, int, bool]] = field(default_factory=list)
    count: int = 0

    def name(self, prefix: str) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"{prefix}{self.count}"

    def layer(self, text: str, share: bool = False) -> str:
        """A submodule, or when `share` one of the same form that is there already."""
        known = self.layers.setdefault(text, [])
        if share and known:
            return known[-1]
        made = f"self.{self.name('m')}"
        self.init.append(f"{made} = {text}")
        known.append(made)
        return made

    def linear(self, inner: int, outer: int, bias: bool = True, share: bool = False) -> str:
        """A linear layer."""
        return self.layer(f"nn.Linear({inner}, {outer}{'' if bias else ', bias=False'})", share)

    def parameter(self, *sizes: int) -> str:
        """A parameter of these sizes."""
        made = f"self.{self.name('p')}"
        self.init.append(f"{made} = nn.Parameter(torch.randn({', '.join(map(str, sizes))}))")
        return made

    def buffer(self, text: str) -> str:
        """A buffer with this value."""
        made = self.name("t")
        self.init.append(f'self.register_buffer("{made}", {text})')
        return f"self.{made}"

    def let(self, expression: str) -> str:
        """A local variable."""
        made = self.name("h")
        self.body.append(f"{made} = {expression}")
        return made

    def line(self, text: str) -> None:
        """A statement."""
        self.body.append(text)

    def stream(self, expression: str, width: int | None = None, zero: bool | None = None) -> None:
        """Replace the stream."""
        self.saved.append((self.let("x"), self.width, self.zero))
        self.body.append(f"x = {expression}")
        self.width = self.width if width is None else width
        self.zero = self.zero if zero is None else zero

    def argument(self, prefix: str, kind: str, *sizes: int | str) -> str:
        """Another input of the model."""
        made = self.name(prefix)
        self.inputs[made] = (kind, sizes)
        return made

    def summed(self, zero: bool) -> None:
        """Note that units are summed without weights of their own."""
        self.exact &= zero

    def tidy(self) -> None:
        """Leave out variables, layers and tensors of options that were not taken."""
        for i in reversed(range(len(self.body))):
            name = re.match(r"(h\d+) = ", self.body[i])
            later = "\n".join([*self.body[i + 1 :], *self.outputs])
            if name and not re.search(rf"\b{name[1]}\b", later):
                del self.body[i]
        read = set(re.findall(r"self\.(\w+)", "\n".join([*self.body, *self.outputs])))
        self.init = [t for t in self.init if set(re.findall(r"\b[mpt]\d+\b", t)) & read]

    def text(self) -> str:
        """The module."""
        arguments = "".join(f", {name}: torch.Tensor" for name in self.inputs)
        lines = [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self{arguments}) -> object:"]
        lines += [f"        {line}" for line in self.body]
        returned = "x" if not self.outputs else f"(x, {', '.join(self.outputs)})"
        return HEADER + "\n".join([*lines, f"        return {returned}", ""])


def module_of(text: str) -> nn.Module:
    """The module that a source text defines, in eval mode, as it initializes itself."""
    names: dict[str, Any] = {}
    exec(compile(text, "<fuzz>", "exec"), names)
    made: nn.Module = names["Net"]()
    return made.eval()


def randomize(model: nn.Module, seed: int) -> None:
    """Make every parameter and float buffer random: zeros and ones hide wrong rewrites."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, dtype=torch.float64) + 0.5)


def inputs_of(
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]],
    sizes: Mapping[str, int],
    scale: float,
    seed: int,
) -> tuple[Tensor, ...]:
    """Random inputs of these sizes, floats in float64 and of this scale.

    Args:
        inputs: see `Source.inputs`.
        sizes: what "b" and "l" are.
        scale: of floats.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for kind, given in inputs.values():
        shape = [sizes[s] if isinstance(s, str) else s for s in given]
        if kind == "ids":
            number, *shape = shape
            made.append(torch.randint(number, shape, generator=generator))
        else:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64) * scale)
    return tuple(made)
