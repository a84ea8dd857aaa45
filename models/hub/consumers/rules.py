"""Rules that several consumers share.

Each function makes a rule: it returns one that says nothing, or one problem with the way out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from graphprune.models.hub.consumers.base import FileRule, GraphRule
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.graph import GROUP_QUERY, Graph, Value, Version, floor

TEXT = ("input_ids", "attention_mask", "token_type_ids")

USUAL = "model.onnx or onnx/model.onnx"

_KINDS: Mapping[type, str] = {int: "a whole number", str: "a text", bool: "true or false"}


def usual(folder: HubFolder) -> tuple[str, ...]:
    """The model where the user names the file: model.onnx, at the root or in onnx/, or the only."""
    for name in ("model.onnx", "onnx/model.onnx"):
        if folder.has(name):
            return (name,)
    return folder.models if len(folder.models) == 1 else ()


def json_file(name: str, way_out: str = "copy it from the source model") -> FileRule:
    """The file is there and holds JSON."""

    def rule(folder: HubFolder) -> str:
        problem = folder.unreadable(name)
        return f"{problem}: {way_out}" if problem else ""

    return rule


def present(name: str, way_out: str = "copy it from the source model") -> FileRule:
    """The file is there, whatever it holds."""
    return lambda folder: "" if folder.has(name) else f"{name} is missing: {way_out}"


def key(file: str, kind: type, *names: str) -> FileRule:
    """A JSON file, where it can be read, has one of these keys with a value of this type."""

    def rule(folder: HubFolder) -> str:
        if folder.unreadable(file):
            return ""  # its own rule reports it
        found = folder.json(file)
        if any(_is(found.get(name), kind) for name in names):
            return ""
        return (
            f"{file} has no {' or '.join(names)} that is {_KINDS[kind]}: copy it from the source "
            "model's"
        )

    return rule


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def feeds(*names: str) -> GraphRule:
    """Nothing else must be fed than these inputs."""

    def rule(folder: HubFolder, graph: Graph) -> str:
        return unfed(graph, [n for n in graph.inputs if n not in names], names)

    return rule


def unfed(graph: Graph, others: Sequence[str], names: Sequence[str]) -> str:
    """Describe inputs that nobody feeds."""
    if not others:
        return ""
    return (
        f"{graph.file} needs {_and(others)}, and only {_and(names)} are fed: export it without, "
        "or with an initializer of that name"
    )


def accepts(*names: str) -> GraphRule:
    """These inputs, which are always fed, exist."""

    def rule(folder: HubFolder, graph: Graph) -> str:
        lacking = [n for n in names if n not in graph.inputs and n not in graph.optional]
        if not lacking:
            return ""
        return (
            f"{graph.file} has no input {_and(lacking)}, which is always fed: export it as an "
            "input; where it may stay unfed, with an initializer of that name"
        )

    return rule


def integers(folder: HubFolder, graph: Graph) -> str:
    """Token ids, masks and positions are int64."""
    for name in (*TEXT, "position_ids"):
        value = graph.inputs.get(name) or graph.optional.get(name)
        if value and value.dtype != "int64":
            return f"{graph.file} takes {name} as {value.dtype}, and int64 is fed: cast it inside"
    return ""


def any_size(folder: HubFolder, graph: Graph) -> str:
    """Batch and sequence are dynamic."""
    for name in TEXT:
        value = graph.inputs.get(name)
        if value and any(isinstance(d, int) for d in value.shape or ()):
            return f"{graph.file} fixes the size of {value}: export with dynamic batch and sequence"
    return ""


def output(*names: str, rank: int | None = None, float32: bool = False) -> GraphRule:
    """One of these outputs exists; the first that does has this many dimensions, and this type."""

    def rule(folder: HubFolder, graph: Graph) -> str:
        found = next((graph.outputs[n] for n in names if n in graph.outputs), None)
        if found is None:
            return (
                f"{graph.file} has no output {' or '.join(names)} (it has {_and(graph.outputs)}): "
                "export the model with it"
            )
        return _as_read(graph, found, () if rank is None else (rank,), float32)

    return rule


def first_output(*ranks: int, float32: bool = False) -> GraphRule:
    """The first output has one of these numbers of dimensions, and this type."""
    return lambda folder, graph: _as_read(graph, next(iter(graph.outputs.values())), ranks, float32)


def _as_read(graph: Graph, value: Value, ranks: tuple[int, ...], float32: bool) -> str:
    if float32 and value.dtype not in ("", "float32"):
        return f"{graph.file} gives {value.name} as {value.dtype}, and float32 is read: cast it"
    if value.rank is None or not ranks or value.rank in ranks:
        return ""
    return (
        f"{graph.file} gives {value}, and {' or '.join(map(str, ranks))} dimensions are read: "
        + ("export last_hidden_state first" if 3 in ranks else "export another output")
    )


def weights(folder: HubFolder, graph: Graph) -> str:
    """Files of weights are where the graph says, and whole."""
    beside = PurePosixPath(graph.file).parent
    for location, end in graph.weights.items():
        size = folder.size((beside / location).as_posix())
        if size < 0:
            return (
                f"{graph.file} keeps weights in {location}, which is not beside it: copy it there"
            )
        if size < end:
            return (
                f"{location} is cut short ({size:,} of {end:,} bytes that {graph.file} reads): "
                "copy it again"
            )
    return ""


def inside(folder: HubFolder, graph: Graph) -> str:
    """All weights are in the .onnx file itself."""
    if not graph.weights:
        return ""
    return (
        f"{graph.file} keeps weights in {_and(graph.weights)}, and only one file is read: write "
        "the weights inside"
    )


def known_operators(folder: HubFolder, graph: Graph) -> str:
    """No operator needs a library beside ONNX Runtime."""
    known = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
    foreign = sorted({f"{d}.{name}" for d, name in graph.operators if d not in known})
    if not foreign:
        return ""
    return f"{graph.file} calls {foreign[0]}, which needs a library of operators: register one"


def own_symbols(folder: HubFolder, graph: Graph) -> str:
    """An input with a value of its own has not the symbols of those that are fed.

    ONNX Runtime reuses memory between values of one shape, which symbols tell it.
    """
    fed = {value.shape for value in graph.inputs.values()}
    for name, sizes in graph.stored.items():
        value = graph.optional[name]
        if value.shape in fed and value.shape != sizes:
            return (
                f"{graph.file} says that {value} is as large as other inputs, and its own value is "
                f"{list(sizes)}: name its dimensions otherwise, or it fails unfed"
            )
    return ""


def grouped_heads(folder: HubFolder, graph: Graph) -> str:
    """GroupQueryAttention takes heads of a width that is a multiple of 8."""
    for value in graph.cache.values() if GROUP_QUERY in graph.operators else ():
        width = (value.shape or ("",))[-1]
        if isinstance(width, int) and width % 8:
            return (
                f"{graph.file} takes {value}, and GroupQueryAttention needs heads of a multiple of "
                "8: prune whole heads, or export without it"
            )
    return ""


ALWAYS: tuple[GraphRule, ...] = (weights, known_operators, own_symbols, grouped_heads)


def task_output(*otherwise: str) -> GraphRule:
    """The output of the task that config.json's architecture is for; else one of these."""

    def rule(folder: HubFolder, graph: Graph) -> str:
        names = architectures(folder)
        if any(n.endswith("QuestionAnswering") for n in names):
            return output("start_logits")(folder, graph)
        if any(n.endswith(("Classification", "MaskedLM", *_GENERATE)) for n in names):
            return output("logits")(folder, graph)
        return output(*otherwise)(folder, graph)

    return rule


_GENERATE = ("ForCausalLM", "LMHeadModel")


def architectures(folder: HubFolder) -> list[str]:
    """The class names in config.json."""
    found = folder.json("config.json").get("architectures")
    return [str(n) for n in found] if isinstance(found, list) else []


def generates(folder: HubFolder, graph: Graph) -> bool:
    """Whether it is a decoder of text, with a cache or without."""
    return bool(graph.cache) or any(n.endswith(_GENERATE) for n in architectures(folder))


def cache_of_one_shape(graph: Graph, heads: int, width: int, because: str) -> str:
    """All layers take keys and values of as many heads, each as wide."""
    for value in graph.cache.values():
        if value.shape and len(value.shape) == 4 and value.shape[1::2] != (heads, width):
            return (
                f"{graph.file} takes {value}, and {heads} heads of {width} are fed to every layer "
                f"({because}): prune all layers alike, or use a consumer that reads the shapes"
            )
    return ""


def needs_runtime(folder: HubFolder, graph: Graph) -> str:
    """The version of ONNX Runtime that a consumer needs beside it, where that is not obvious."""
    need = floor(graph)
    if need is None:
        return unknown_opset(folder, graph)
    return f"needs ONNX Runtime {need}" if need.version >= (1, 20) else ""


def brings(version: Version, of: str) -> GraphRule:
    """The ONNX Runtime that a consumer brings runs the file."""

    def rule(folder: HubFolder, graph: Graph) -> str:
        need = floor(graph)
        if need is None:
            return unknown_opset(folder, graph)
        if need.version <= version:
            return ""
        return (
            f"{graph.file} needs ONNX Runtime {need} and {of} brings "
            f"{version[0]}.{version[1]}: export for an older one, with opset 20"
        )

    return rule


def unknown_opset(folder: HubFolder, graph: Graph) -> str:
    """The file's opset and format are of a release of ONNX Runtime that is known here."""
    if floor(graph) is not None:
        return ""
    return (
        f"{graph.file} has opset {graph.opset} and format {graph.ir_version}, newer than any ONNX "
        "Runtime known here: export with an older opset"
    )


def _and(names: Sequence[str] | Mapping[str, object]) -> str:
    *most, last = names
    if len(most) > 3:
        most, last = most[:3], f"{len(most) - 2} more"
    return f"{', '.join(most)} and {last}" if most else last
