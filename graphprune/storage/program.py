"""Programs on disk: the graph as JSON, tensors as safetensors, and no pickle anywhere.

    FOLDER/program.json          entries, nodes, tied names, history, hashes of the other two
    FOLDER/tensors.safetensors   parameters, buffers and constants, tied ones once
    FOLDER/examples.safetensors  example inputs, under "entry/placeholder"

A folder may come from anybody. Reading one resolves operators inside an allow-list, checks every
name before torch.fx writes it into Python source, and recomputes all metadata.
"""

from __future__ import annotations

import io
import json
import keyword
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.ir.graph import output_node
from graphprune.ir.program import Argument, Constant, Entry, Program
from graphprune.ir.quantization import KEY, Mark
from graphprune.ir.sizes import limits_from_json, limits_to_json
from graphprune.storage.allowlist import resolve, target_name
from graphprune.storage.arguments import decode, encode
from graphprune.storage.folders import check_target, restore, sha256, whole_folder
from graphprune.storage.layout import FLAT, layout_of
from graphprune.storage.shared import Weights, read_shared, shared_in
from graphprune.storage.treespec import decode_spec, encode_spec

JSON = Any

PROGRAM = "program.json"
TENSORS = "tensors.safetensors"
EXAMPLES = "examples.safetensors"
_FORMAT = "graphprune-program"
_VERSION = 1
_SHARING = 2  # of programs with tensors in another file

# fx puts node names and dotted tensor names into the Python that it generates, a part that is no
# identifier between double quotes: anything may stand there that cannot end them.
_TENSOR_NAME = re.compile(
    r"""[^."\\\x00-\x1f\x7f\u2028\u2029]+(\.[^."\\\x00-\x1f\x7f\u2028\u2029]+)*"""
)


def save(program: Program, path: Path) -> None:
    """Write a program to a folder of its own; a program saved there before is replaced.

    Raises:
        ExportError: graphprune did not write the folder, or it cannot be written.
        UnsupportedError: the program holds something that cannot be saved.
    """
    check_target(path, lambda p: (p / PROGRAM).is_file() and layout_of(p) is None)
    with whole_folder(path) as folder:
        save_files(program, folder)


def save_files(program: Program, folder: Path, weights: Weights | None = None) -> None:
    """Write a program's three files into an existing folder.

    Args:
        program: what to write.
        folder: where.
        weights: a file of the same artifact in which tensors may lie already: these are left out.
    """
    entries = {name: _encode_entry(entry) for name, entry in program.entries.items()}
    examples = {
        f"{name}/{placeholder}": tensor
        for name, entry in program.entries.items()
        for placeholder, tensor in zip(entry.input_names, entry.example, strict=True)
    }
    shared = {} if weights is None else shared_in(program.tensors, weights)
    own = {name: tensor for name, tensor in program.tensors.items() if name not in shared}
    write_tensors(own, folder / TENSORS)
    write_tensors(examples, folder / EXAMPLES)
    data = {
        "format": _FORMAT,
        "version": _SHARING if shared else _VERSION,
        # Groups of axes are named and listed by their tensors' order, which safetensors changes.
        "order": list(program.tensors),
        "parameters": sorted(program.parameters),
        "aliases": dict(program.aliases),
        "entries": entries,
        "history": list(program.history),
        "metadata": _encode_notes(program),
        "sha256": {name: sha256(folder / name) for name in (TENSORS, EXAMPLES)},
    }
    if weights is not None and shared:
        digest = sha256(weights.root / weights.file)
        data["shared"] = {"file": weights.file, "sha256": digest, "tensors": shared}
    (folder / PROGRAM).write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")


def load(path: Path, expect: str | None = None) -> Program:
    """Read a program from its folder, or from an artifact's, whose hashes are checked first.

    Args:
        path: the folder.
        expect: its `digest`, from a place that whoever wrote the folder cannot write to.

    Raises:
        ArtifactError: missing, corrupt, tampered with, or not written by graphprune; the file is
        named.
    """
    restore(path)
    if expect is not None:
        _check_digest(path, expect)
    folder = path
    if (layout := layout_of(path)) is not None:
        folder = path / layout.program
        hashes = check_hashes(path, f"{layout.program}/")["sha256"]
        for name in (PROGRAM, TENSORS, EXAMPLES):
            if f"{layout.program}/{name}" not in hashes:
                raise ArtifactError(
                    f"{str(path / layout.manifest)!r} has no hash of '{layout.program}/{name}'; "
                    "export the artifact again"
                )
    file = folder / PROGRAM
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ArtifactError(f"{str(file)!r} is not a program that graphprune saved")
    if data.get("version") not in (_VERSION, _SHARING):
        raise ArtifactError(
            f"{str(file)!r} has version {data.get('version')!r}, this graphprune reads "
            f"{_VERSION} and {_SHARING}; install the graphprune that wrote it"
        )
    try:
        tensors = read_tensors(folder / TENSORS, data["sha256"][TENSORS])
        if data["version"] == _SHARING:
            check_file(path, data["shared"]["file"], data["shared"]["sha256"])
            tensors |= read_shared(path, data["shared"])
        examples = read_tensors(folder / EXAMPLES, data["sha256"][EXAMPLES])
        return _decode_program(data, tensors, examples)
    except ArtifactError as e:
        raise ArtifactError(f"{str(file)!r} cannot be used: {e}") from e
    except (GraphPruneError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ArtifactError(f"{str(file)!r} is corrupt: {type(e).__name__}: {e}") from e


def to_bytes(program: Program) -> bytes:
    """A program as the bytes of a ZIP archive of its three files."""
    target = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        save_files(program, Path(folder))
        with zipfile.ZipFile(target, "w") as archive:
            for name in (PROGRAM, TENSORS, EXAMPLES):
                archive.write(Path(folder) / name, name)
    return target.getvalue()


def from_bytes(data: bytes) -> Program:
    """The program that `to_bytes` wrote.

    Raises:
        ArtifactError: it is corrupt, or no such archive.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for name in (PROGRAM, TENSORS, EXAMPLES):
                    (Path(folder) / name).write_bytes(archive.read(name))
        except (zipfile.BadZipFile, KeyError) as e:
            raise ArtifactError(f"these bytes hold no program: {e}") from e
        return load(Path(folder))


def digest(path: Path) -> str:
    """The SHA-256 of what names all other hashes of an artifact, or of a saved program.

    Returns:
        "sha256:" and 64 hex digits. Two folders of one digest hold the same files.

    Raises:
        ArtifactError: there is neither.
    """
    layout = layout_of(path)
    file = path / (PROGRAM if layout is None else layout.manifest)
    if not file.is_file():
        raise ArtifactError(f"there is no {str(file)!r}: not a folder that graphprune wrote")
    return f"sha256:{sha256(file)}"


def _check_digest(path: Path, expect: str) -> None:
    if not re.fullmatch("sha256:[0-9a-f]{64}", expect):
        raise ArtifactError(
            f"expect is 'sha256:' and 64 hex digits, as Artifact.digest gives it, got {expect!r}"
        )
    found = digest(path)
    if found != expect:
        raise ArtifactError(
            f"{str(path)!r} is {found}, not {expect}: it is another artifact, or somebody changed "
            "it"
        )


def check_hashes(path: Path, prefix: str = "") -> JSON:
    """Compare an artifact's files with its manifest; returns the manifest.

    Files that the manifest calls "removable" (baselines) may be gone, those that it calls
    "editable" (the model card) may be changed or gone.

    Raises:
        ArtifactError: a file is missing, changed, or lies outside the artifact.
    """
    source = path / (layout_of(path) or FLAT).manifest
    manifest = read_json(source)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or manifest.get("format") != "graphprune-artifact":
        raise ArtifactError(f"{str(source)!r} is not a manifest that graphprune wrote")
    editable = set(manifest.get("editable") or ())
    removable = set(manifest.get("removable") or ())
    for name, expected in hashes.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{str(source)!r} names {name!r}, outside the artifact")
        if not name.startswith(prefix):
            continue
        if name in editable or (name in removable and not file.exists()):
            continue
        check_file(path, name, expected)
    return manifest


def check_file(root: Path, name: str, expected: str) -> None:
    """Compare one file of a folder with its hash.

    Raises:
        ArtifactError: it is missing, another one, a link, or lies outside the folder.
    """
    file = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtifactError(f"it names {name!r}, outside the artifact")
    if file.resolve() != root.resolve() / name:
        raise ArtifactError(
            f"{str(file)!r} is a link, or lies in one; copy the artifact with what it links to"
        )
    if not file.is_file():
        raise ArtifactError(f"{str(file)!r} is missing; export the artifact again")
    if sha256(file) != expected:
        raise ArtifactError(
            f"{str(file)!r} is not the file that was exported (its SHA-256 differs); export "
            "the artifact again, or get an untouched copy"
        )


def read_json(file: Path) -> JSON:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing or no JSON; the file is named.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ArtifactError(f"there is no {str(file)!r}: not a folder that graphprune wrote") from e
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"{str(file)!r} cannot be read: {e}") from e


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_separate(tensors), file)
    except SafetensorError as e:  # a full disk comes as this, where other writers say OSError
        raise OSError(str(e)) from e


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def read_tensors(file: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ArtifactError(f"{file.name!r} is missing")
    if sha256(file) != expected:
        raise ArtifactError(f"{file.name!r} is not the file that was saved (its SHA-256 differs)")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise ArtifactError(f"{file.name!r} is no safetensors file: {e}") from e


def _encode_entry(entry: Entry) -> JSON:
    arguments = [_encode_argument(argument) for argument in entry.arguments]
    return {
        "nodes": [_encode_node(n) for n in entry.graph.nodes],
        "arguments": arguments,
        "outputs": encode_spec(entry.out_spec),
        "dynamic": {
            name: {str(d): symbol for d, symbol in dims.items()}
            for name, dims in entry.dynamic.items()
        },
        "second": dict(entry.second),
        "cache": dict(entry.cache),
        **limits_to_json(**entry.limits),
    }


def _encode_argument(argument: Argument) -> JSON:
    leaves = [_encode_leaf(leaf) for leaf in argument.leaves]
    data = {"name": argument.name, "spec": encode_spec(argument.spec), "leaves": leaves}
    return data if argument.default is None else data | {"default": encode(argument.default.value)}


def _encode_leaf(leaf: str | Constant) -> JSON:
    return {"input": leaf} if isinstance(leaf, str) else {"constant": encode(leaf.value)}


def _encode_node(node: fx.Node) -> JSON:
    if node.op == "placeholder":
        return {"op": "placeholder", "name": node.name}
    if node.op == "get_attr":
        return {"op": "get_attr", "name": node.name, "target": node.target}
    if node.op == "output":
        return {"op": "output", "name": node.name, "args": encode(tuple(node.args))}
    data: dict[str, JSON] = {"op": node.op, "name": node.name, "target": target_name(node.target)}
    data["args"] = [encode(a) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
    return data


def _encode_notes(program: Program) -> dict[str, JSON]:
    """The notes of a program beside its graphs; most are omitted where they are empty."""
    mark = program.quantization
    some = {
        "zeroed": sorted(program.zeroed),
        "axis_names": dict(program.axis_names),
        KEY: mark and mark.to_json(),
        "report": program.report,
    }
    return {
        "model": program.model,
        "overlapping": sorted(program.overlapping),
        "frozen": sorted(program.frozen),
        **{key: value for key, value in some.items() if value},
    }


def _decode_notes(data: JSON) -> dict[str, Any]:
    return {
        "model": str(data.get("model", "")),
        **{key: frozenset(data.get(key, ())) for key in ("overlapping", "frozen", "zeroed")},
        "axis_names": dict(data.get("axis_names", {})),
        "quantization": Mark.from_json(data[KEY]) if KEY in data else None,
        "report": data.get("report"),
    }


def _decode_program(data: JSON, tensors: dict[str, Tensor], examples: dict[str, Tensor]) -> Program:
    for name in (*tensors, *data["aliases"]):
        if not _TENSOR_NAME.fullmatch(name):
            raise ArtifactError(f"{name!r} is not a tensor name")
    for name in (*data["parameters"], *data["aliases"].values()):
        if name not in tensors:
            raise ArtifactError(f"tensor {name!r} is missing")
    if sorted(order := data.get("order", list(tensors))) != sorted(tensors):
        raise ArtifactError("the list of its tensors does not name those that there are")
    tensors = {name: tensors[name] for name in order}
    entries = {n: _decode_entry(n, e, tensors, examples) for n, e in data["entries"].items()}
    program = Program(
        tensors=tensors,
        parameters=frozenset(data["parameters"]),
        aliases=dict(data["aliases"]),
        entries=entries,
        history=tuple(data["history"]),
        **_decode_notes(data["metadata"]),
    )
    program.forward  # noqa: B018  (KeyError where there is none)
    return program.with_graphs({})


def _decode_entry(
    name: str, data: JSON, tensors: dict[str, Tensor], examples: dict[str, Tensor]
) -> Entry:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        _decode_node(item, graph, nodes, tensors)
    placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
    arguments = tuple(_decode_argument(argument) for argument in data["arguments"])
    given = [leaf for a in arguments for leaf in a.leaves if isinstance(leaf, str)]
    if sorted(given) != sorted(placeholders):
        raise ArtifactError(f"the arguments {given} are not the graph's inputs {placeholders}")
    output = output_node(graph)
    spec = decode_spec(data["outputs"])
    if output.op != "output" or len(pytree.tree_leaves(output.args[0])) != spec.num_leaves:
        raise ArtifactError("the graph's outputs do not fit their nesting")
    graph.lint()
    cache = {str(p): int(number) for p, number in data.get("cache", {}).items()}
    if not cache.keys() <= set(placeholders) or not all(
        0 <= number < spec.num_leaves for number in cache.values()
    ):
        raise ArtifactError("the cache is not made of the graph's inputs and outputs")
    limits = limits_from_json(data)
    ranks = {p: examples[f"{name}/{p}"].dim() for p in placeholders}
    for place, dim in (x for r in limits["relations"] for x in r.sizes.values()):
        if not 0 <= dim < ranks.get(place, 0):
            raise ArtifactError(f"{place!r} has no dimension {dim}")
    return Entry(
        graph=graph,
        arguments=arguments,
        out_spec=spec,
        example=tuple(examples[f"{name}/{p}"] for p in placeholders),
        dynamic={p: {int(d): str(s) for d, s in x.items()} for p, x in data["dynamic"].items()},
        second={str(symbol): int(size) for symbol, size in data["second"].items()},
        cache=cache,
        **limits,
    )


def _decode_argument(data: JSON) -> Argument:
    default = Constant(decode(data["default"], {})) if "default" in data else None
    leaves = tuple(_decode_leaf(leaf) for leaf in data["leaves"])
    return Argument(data["name"], decode_spec(data["spec"]), leaves, default)


def _decode_leaf(data: JSON) -> str | Constant:
    if "input" in data:
        return _checked_name(data["input"])
    return Constant(decode(data["constant"], {}))


def _decode_node(
    data: JSON, graph: fx.Graph, nodes: dict[str, fx.Node], tensors: Mapping[str, Tensor]
) -> None:
    op, name = data["op"], _checked_name(data["name"])
    if name in nodes:
        raise ArtifactError(f"two nodes are called {name!r}")
    if op == "placeholder":
        node = graph.placeholder(name)
    elif op == "get_attr":
        if data["target"] not in tensors:
            raise ArtifactError(f"node {name!r} reads {data['target']!r}, which is no tensor")
        # Not graph.get_attr: it looks the name up in a module and warns where there is none.
        node = graph.create_node("get_attr", data["target"])
    elif op == "output":
        (values,) = decode(data["args"], nodes)
        node = graph.output(tuple(values))
    elif op == "call_function":
        target = resolve(data["target"])
        args = tuple(decode(a, nodes) for a in data["args"])
        kwargs = {_checked_name(k): decode(v, nodes) for k, v in data.get("kwargs", {}).items()}
        node = graph.call_function(target, args, kwargs)
    else:
        raise ArtifactError(f"node {name!r} has the kind {op!r}")
    if node.name != name:
        node.name = name
    nodes[name] = node


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"{name!r} is not a name")
    return name
