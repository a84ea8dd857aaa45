"""Program: one set of named tensors, and one or more entry graphs over them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.errors import GraphPruneError
from graphprune.ir.graph import (
    copy_graph,
    tensor_nodes,
    terms,
)
from graphprune.ir.propagate import propagate
from graphprune.ir.quantization import Mark
from graphprune.ir.sizes import Relation, Shape, check_sizes, limit_lines

JSON = Any  # what json.dumps takes

LABELS = "labels"  # of a batch: what its loss compares with


@dataclass(frozen=True, slots=True)
class Constant:
    """A non-tensor argument (a flag, a number, None) that capture baked into the graph."""

    value: Any


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of the model's forward: its name, its nesting, and one leaf a tensor.

    Attributes:
        leaves: the name of a placeholder, or a `Constant`.
        default: forward's own default where the leaves are constants of another value, else None.
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[str | Constant, ...]
    default: Constant | None = None

    def check_default(self) -> None:
        """Refuse a call without this argument where its default is not what was captured.

        Raises:
            GraphPruneError: it is another value; both are named.
        """
        if self.default is not None:
            values = [leaf.value for leaf in self.leaves if isinstance(leaf, Constant)]
            captured = pytree.tree_unflatten(values, self.spec)
            raise GraphPruneError(
                f"a call without input {self.name!r} means {self.default.value!r}, forward's "
                f"default, and the model was captured with {captured!r}; pass {self.name}="
                f"{captured!r}, or compile again without it"
            )


@dataclass(frozen=True, slots=True)
class Entry:
    """One graph over the program's tensors, with how to call it.

    Attributes:
        graph: ATen calls; flat placeholders, one flat output tuple; `get_attr` targets are tensor
            names of the program. `node.meta["val"]` holds symbolic fake values, always fresh.
        arguments: the arguments of the original forward, in order.
        out_spec: the nesting of the outputs.
        example: one tensor a placeholder, in order.
        dynamic: placeholder name -> {dimension: symbol name}, for instance {0: "batch"}.
        second: symbol name -> its size in the second batch that everything is compared on.
        cache: placeholder that holds keys or values of past tokens, [batch, heads, past, width] ->
            number of the flat output that continues it.
        bounds: symbol name -> smallest and largest size that the graph is right for; None where
            there is none. A symbol that is not named has no bounds.
        fixed: placeholder name -> {dimension: why it has the example's size alone}, for dimensions
            that could be dynamic by what they are (batch, length).
        relations: what else must hold between sizes for the graph to be right.
    """

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    out_spec: pytree.TreeSpec
    example: tuple[Tensor, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    second: Mapping[str, int]
    cache: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    fixed: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the placeholders: the inputs of the ONNX file, in order."""
        return tuple(n.name for n in self.graph.nodes if n.op == "placeholder")

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every placeholder, with the names of dynamic sizes."""
        return {
            name: [self.dynamic.get(name, {}).get(d, size) for d, size in enumerate(tensor.shape)]
            for name, tensor in zip(self.input_names, self.example, strict=True)
        }

    @property
    def limits(self) -> dict[str, Any]:
        """Bounds, relations and fixed dimensions, as `check_sizes` and its kin take them."""
        return {"bounds": self.bounds, "relations": self.relations, "fixed": self.fixed}

    def limit_lines(self) -> list[str]:
        """Describe the limits of the sizes of inputs, a line each."""
        said = [r for r in self.relations if not self._named(r)]
        lines = [f"{symbol}: verified at the example's size only" for symbol in self.unvaried()]
        return [*limit_lines(self.bounds, said, self.fixed), *lines]

    def _named(self, relation: Relation) -> bool:
        """Whether an equation only says that sizes of one name are equal."""
        if not re.fullmatch(r"[a-z ()+=]+", relation.text):
            return False
        # Sizes at which it does not hold by chance.
        sizes = {symbol: 1009 + 2 * i**2 for i, symbol in enumerate(self.second)}
        shapes = {
            name: [
                s if isinstance(s, int) else sum(map(sizes.__getitem__, terms(s))) for s in shape
            ]
            for name, shape in self.shapes.items()
        }
        return relation.holds(shapes)

    def unvaried(self) -> list[str]:
        """Dynamic sizes that are the same in both batches, although their bounds allow others."""
        own = {
            symbol: int(tensor.shape[dim])
            for name, tensor in zip(self.input_names, self.example, strict=True)
            for dim, symbol in self.dynamic.get(name, {}).items()
        }
        return [
            symbol
            for symbol, size in self.second.items()
            if size == own.get(symbol) and self.bounds.get(symbol) != (size, size)
        ]

    def check_sizes(self, flat: Iterable[Tensor]) -> None:
        """Refuse flat inputs of sizes that the graph was not captured for.

        Raises:
            GraphPruneError: the input, its dimension, what it may be and the way out.
        """
        given = {name: tensor.shape for name, tensor in zip(self.input_names, flat, strict=True)}
        check_sizes(self.shapes, given, **self.limits)

    def signature(self) -> inspect.Signature:
        """The arguments by name, as the original forward has them; constants are defaults."""
        parameters: list[inspect.Parameter] = []
        default: Any = inspect.Parameter.empty
        for argument in self.arguments:
            constants = [leaf.value for leaf in argument.leaves if isinstance(leaf, Constant)]
            if len(constants) == len(argument.leaves) and argument.default is None:
                default = pytree.tree_unflatten(constants, argument.spec)
            elif default is not inspect.Parameter.empty:
                default = None  # after one with a default all need one
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(argument.name, kind, default=default))
        return inspect.Signature(parameters)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Turn a call of the model into the flat list of tensors that the graph takes.

        A batch's `labels` are left out where capture had none: one loader serves training, which
        reads them, and everything else.

        Raises:
            GraphPruneError: an argument is missing, unknown, not what capture saw, or of a size
                that the graph was not captured for.
        """
        names = [a.name for a in self.arguments]
        tensors = [a.name for a in self.arguments if any(isinstance(x, str) for x in a.leaves)]
        if len(args) > len(names):
            raise GraphPruneError(f"the captured model takes {len(names)} inputs, got {len(args)}")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if LABELS not in tensors:
            given.pop(LABELS, None)
        values: dict[str, Tensor] = {}
        for argument in self.arguments:
            constant = all(isinstance(leaf, Constant) for leaf in argument.leaves)
            if argument.name not in given:
                if constant:
                    argument.check_default()
                    continue
                raise GraphPruneError(
                    f"input {argument.name!r} is missing; the model was captured with {tensors}"
                )
            leaves, spec = pytree.tree_flatten(given.pop(argument.name))
            if len(leaves) != len(argument.leaves):
                raise GraphPruneError(
                    f"input {argument.name!r} has another structure ({spec}) than at capture "
                    f"({argument.spec})"
                )
            for leaf, value in zip(argument.leaves, leaves, strict=True):
                if isinstance(leaf, Constant):
                    if isinstance(value, Tensor) or value != leaf.value:
                        raise GraphPruneError(
                            f"input {argument.name!r} was captured as {leaf.value!r} and cannot "
                            f"be {value!r} now; compile again with that value"
                        )
                elif not isinstance(value, Tensor):
                    raise GraphPruneError(
                        f"input {argument.name!r} must be a tensor, got {type(value).__name__}"
                    )
                else:
                    values[leaf] = value
        unknown = sorted(k for k, v in given.items() if v is not None)
        if unknown:
            raise GraphPruneError(
                f"unknown inputs {unknown}; the model was captured with {tensors}"
            )
        flat = [values[name] for name in self.input_names]
        self.check_sizes(flat)
        return flat

    def unflatten(self, flat: Iterable[Any]) -> Any:
        """Give flat outputs the structure that the original model returns."""
        return pytree.tree_unflatten(list(flat), self.out_spec)


@dataclass(frozen=True)
class Program:
    """A model as a value: tensors by name, entry graphs over them, and what was done so far.

    Nothing in a Program is ever written to; a change is a new Program that shares what it kept.

    Attributes:
        tensors: every parameter, buffer and constant, once, under its dotted name.
        parameters: the names in `tensors` that are trainable parameters.
        aliases: tied names -> the name in `tensors` that holds their storage.
        entries: "forward" and, for decoders captured with a cache, "decode".
        history: one JSON record for everything that was done, in order.
        model: the name of the captured module's class; empty where it was not captured.
        frozen: parameters that had no `requires_grad` at capture: no training moves them.
        overlapping: tensors that share some of their memory with another at capture.
        zeroed: tensors, or aliases of them, whose zeros passes have set and training keeps.
        axis_names: id of an axis group by its position -> the id that it goes by, where axes of
            one unit beside it are no groups any more.
        quantization: how to quantize at export; None for a float model.
        report: what `Report.to_json` gave for the compiles so far; None for a dense program.
    """

    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    aliases: Mapping[str, str]
    entries: Mapping[str, Entry]
    history: tuple[JSON, ...] = ()
    model: str = ""
    frozen: frozenset[str] = frozenset()
    overlapping: frozenset[str] = frozenset()
    zeroed: frozenset[str] = frozenset()
    axis_names: Mapping[str, str] = field(default_factory=dict)
    quantization: Mark | None = None
    report: Mapping[str, JSON] | None = None

    @property
    def forward(self) -> Entry:
        return self.entries["forward"]

    @property
    def deployed(self) -> str:
        """The entry that is exported: "decode" where there is one, else "forward"."""
        return "decode" if "decode" in self.entries else "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward entry as the model would run, without gradients."""
        from graphprune.ir.module import ProgramModule

        with torch.no_grad():
            return ProgramModule(self)(*args, **kwargs)

    def run(self, flat: Iterable[Tensor], entry: str = "forward") -> list[Any]:
        """Run an entry on flat inputs, without gradients, to flat outputs."""
        from graphprune.ir.module import graph_module

        with torch.no_grad():
            return list(graph_module(self, entry)(*flat))

    def limit_lines(self) -> list[str]:
        """Describe the limits of the sizes of inputs, of all entries, a line each."""
        return list(
            dict.fromkeys(x for entry in self.entries.values() for x in entry.limit_lines())
        )

    def num_parameters(self) -> int:
        """Number of trainable parameters, tied ones counted once."""
        return sum(self.tensors[name].numel() for name in self.parameters)

    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Program:
        """The same graphs over some other tensors; shapes may change only with a rewrite."""
        return replace(self, tensors={**self.tensors, **changed})

    def read(self) -> set[str]:
        """Names of the tensors that some entry reads."""
        graphs = (entry.graph for entry in self.entries.values())
        return {str(node.target) for graph in graphs for node in tensor_nodes(graph)}

    def without_tensors(self, names: Collection[str]) -> Program:
        """The program without these tensors, which no entry reads, and without their tied names."""
        gone = {*names, *(alias for alias, name in self.aliases.items() if name in names)}
        return replace(
            self,
            tensors={name: t for name, t in self.tensors.items() if name not in gone},
            parameters=self.parameters - gone,
            aliases={alias: name for alias, name in self.aliases.items() if alias not in gone},
            frozen=self.frozen - gone,
            overlapping=self.overlapping - gone,
            zeroed=self.zeroed - gone,
        )

    def with_graphs(
        self, graphs: Mapping[str, fx.Graph], tensors: Mapping[str, Tensor] | None = None
    ) -> Program:
        """A Program with these graphs (and tensors), metadata refreshed.

        Raises:
            VerificationError: graphs and tensors do not fit each other; the node is named.
        """
        entries = {
            name: replace(entry, graph=graphs.get(name, entry.graph))
            for name, entry in self.entries.items()
        }
        program = replace(
            self, entries=entries, tensors=self.tensors if tensors is None else tensors
        )
        for entry in program.entries.values():
            propagate(entry.graph, program.tensors, entry.example, entry.dynamic)
        return program

    def fork_graphs(self) -> dict[str, fx.Graph]:
        """Copies of all entry graphs, node names and metadata kept, free to edit."""
        return {name: copy_graph(entry.graph) for name, entry in self.entries.items()}

    def fork(self) -> Program:
        """The same program over copies of its graphs, free to edit; tensors are shared."""
        graphs = self.fork_graphs()
        entries = {n: replace(entry, graph=graphs[n]) for n, entry in self.entries.items()}
        return replace(self, entries=entries)

    def record(self, event: JSON) -> Program:
        """The same program with one more line of history."""
        return replace(self, history=(*self.history, event))

    def cast(self, source: torch.dtype, target: torch.dtype, *, refresh: bool = True) -> Program:
        """The same program with `source` floats, and casts to them, turned into `target`.

        With refresh=False the graphs' metadata stays stale: enough to run it, and much faster.
        """
        graphs = self.fork_graphs()

        def swap(value: Any) -> Any:
            return target if value is source else value

        for graph in graphs.values():
            for node in graph.nodes:
                if node.op == "call_function":
                    node.args = pytree.tree_map(swap, node.args)
                    node.kwargs = pytree.tree_map(swap, node.kwargs)
        tensors = {k: t.to(target) if t.dtype is source else t for k, t in self.tensors.items()}
        entries = {
            name: replace(
                entry,
                example=tuple(t.to(target) if t.dtype is source else t for t in entry.example),
            )
            for name, entry in self.entries.items()
        }
        if refresh:
            return replace(self, entries=entries).with_graphs(graphs, tensors)
        stale = {n: replace(entry, graph=graphs[n]) for n, entry in entries.items()}
        return replace(self, entries=stale, tensors=tensors)

    def on(self, device: torch.device) -> Program:
        """The same program with its tensors, examples and every device in its graphs elsewhere."""
        if all(t.device == device for t in self.tensors.values()):
            return self
        graphs = self.fork_graphs()

        def swap(value: Any) -> Any:
            return device if isinstance(value, torch.device) else value

        for graph in graphs.values():
            for node in graph.nodes:
                if node.op == "call_function":
                    node.args = pytree.tree_map(swap, node.args)
                    node.kwargs = pytree.tree_map(swap, node.kwargs)
        entries = {
            name: replace(entry, example=tuple(t.to(device) for t in entry.example))
            for name, entry in self.entries.items()
        }
        tensors = {name: t.to(device) for name, t in self.tensors.items()}
        return replace(self, entries=entries).with_graphs(graphs, tensors)

    def in_float32(self) -> Program:
        """The program with every bfloat16 and float16 value widened to float32."""
        program = self
        for dtype in (torch.bfloat16, torch.float16):
            if self._mentions(dtype):
                program = program.cast(dtype, torch.float32)
        return program

    def _mentions(self, dtype: torch.dtype) -> bool:
        """Whether a tensor has this type, or a graph casts to it."""
        if any(t.dtype is dtype for t in self.tensors.values()):
            return True
        return any(
            dtype in pytree.tree_leaves((node.args, node.kwargs))
            for entry in self.entries.values()
            for node in entry.graph.nodes
        )
