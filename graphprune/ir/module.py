"""ProgramModule: a Program as an nn.Module that runs and trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, fx, nn

from graphprune.errors import GraphPruneError
from graphprune.ir.graph import bound_arguments, copy_graph, op_name, output_node, set_bound
from graphprune.ir.program import Program


def _root(program: Program) -> nn.Module:
    """A bare module tree that holds the program's tensors, not copied, under their dotted names."""
    root = nn.Module()
    held: dict[str, Tensor] = {}
    for name, tensor in program.tensors.items():
        if name in program.parameters:
            held[name] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            held[name] = tensor
    for alias, name in program.aliases.items():
        held[alias] = held[name]
    for name, tensor in held.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            child = module._modules[part]
            assert child is not None
            module = child
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)
    return root


def graph_module(program: Program, entry: str = "forward") -> fx.GraphModule:
    """One entry as a flat torch.fx GraphModule: tensors in, tuple of tensors out."""
    return fx.GraphModule(_root(program), copy_graph(program.entries[entry].graph))


# Operators with a mode, and the argument that holds it.
_MODES = {
    "dropout": "train",
    "feature_dropout": "train",
    "alpha_dropout": "train",
    "feature_alpha_dropout": "train",
    "rrelu": "training",
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
}


class ProgramModule(nn.Module):
    """A Program's entry as a module with the inputs and outputs of the original model.

    Parameters share memory with the program that it was made from, tied ones are one Parameter.
    `train()` and `eval()` switch dropout and normalization inside the graph.

    Args:
        record: names of nodes; after a call, `recorded` holds what they computed.
    """

    def __init__(
        self, program: Program, entry: str = "forward", record: Iterable[str] = ()
    ) -> None:
        super().__init__()
        # The graph runs over this tree: on it no method of this class shadows a submodule's name.
        root = _root(program)
        self.__dict__["_tree"] = root
        self._modules, self._parameters = root._modules, root._parameters
        self._buffers = root._buffers
        self._source = program
        self._entry = program.entries[entry]
        self._graph = copy_graph(self._entry.graph)
        self._record = tuple(record)
        self.recorded: dict[str, Any] = {}
        if self._record:
            by_name = {node.name: node for node in self._graph.nodes}
            output = output_node(self._graph)
            values: Any = output.args[0]
            output.args = ((*values, *(by_name[name] for name in self._record)),)
        self._function: Callable[..., Any] | None = None
        self.training = False
        self.__dict__["forward"] = _signed(self, self._entry.signature())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._entry.flatten(args, kwargs)
        if self._function is None:
            # fx writes the graph as a Python function of the module that holds its tensors.
            code = self._graph.python_code("self")
            namespace = dict(code.globals)
            exec(compile(code.src, "<graphprune program>", "exec"), namespace)
            self._function = namespace["forward"]
        results = self._function(self.__dict__["_tree"], *flat)
        if self._record:
            count = len(results) - len(self._record)
            self.recorded = dict(zip(self._record, results[count:], strict=True))
            results = results[:count]
        return self._entry.unflatten(results)

    def train(self, mode: bool = True) -> ProgramModule:
        # A captured graph has the mode as an argument; nn.Module's flag alone would do nothing.
        super().train(mode)
        for node in self._graph.nodes:
            argument = _MODES.get(op_name(node)) if node.op == "call_function" else None
            # Without running statistics there is nothing that eval mode could use.
            if argument and bound_arguments(node).get("running_mean", node) is not None:
                set_bound(node, {argument: mode})
        self._function = None
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle (torch.save, multiprocessing) as the bytes of the saved form, no code in them.

        The receiver reads it as `graphprune.load` reads a folder.
        """
        from graphprune.storage.program import to_bytes

        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        name = next(n for n, e in self._source.entries.items() if e is self._entry)
        state = (to_bytes(self.program()), name, self._record, self.training, frozen)
        return _module_from_bytes, state

    def program(self) -> Program:
        """The Program over this module's current parameters and buffers.

        Raises:
            GraphPruneError: a tensor has another type than when the module was made.
        """
        state = dict(self.named_parameters(remove_duplicate=False)) | dict(
            self.named_buffers(remove_duplicate=False)
        )
        for name, old in self._source.tensors.items():
            if state[name].dtype is not old.dtype:
                raise GraphPruneError(
                    f"the module's {name!r} is {state[name].dtype} now, the program's graph is for "
                    f"{old.dtype}; cast the model before compiling it"
                )
        return self._source.with_tensors(
            {name: state[name].detach() for name in self._source.tensors}
        )


def _signed(module: ProgramModule, signature: inspect.Signature) -> Callable[..., Any]:
    """A module's forward with a signature, which torch.export and transformers' Trainer read."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ProgramModule.forward(module, *args, **kwargs)

    cast(Any, forward).__signature__ = signature
    return forward


def _module_from_bytes(
    data: bytes, entry: str, record: tuple[str, ...], training: bool, frozen: list[str]
) -> ProgramModule:
    from graphprune.storage.program import from_bytes

    module = ProgramModule(from_bytes(data), entry, record).train(training)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return module
