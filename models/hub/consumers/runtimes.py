"""Consumers of any model: transformers.js, transformers' ExportedModel, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from graphprune.models.hub.consumers.base import LAYERS, Consumer
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.graph import Graph, floor
from graphprune.models.hub.consumers.rules import (
    ALWAYS,
    TEXT,
    USUAL,
    brings,
    generates,
    integers,
    json_file,
    known_operators,
    needs_runtime,
    task_output,
    unfed,
    unknown_opset,
    usual,
    weights,
)

# transformers.js

_ENCODER_DECODER = ("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx")
_OTHER_INPUTS = ("pixel_values", "pixel_mask", "input_values", "input_features")


def _js_opens(folder: HubFolder) -> tuple[str, ...]:
    """The files that Node opens by default, and browsers."""
    if folder.json("config.json").get("is_encoder_decoder") is True:
        return _ENCODER_DECODER if all(map(folder.has, _ENCODER_DECODER)) else ()
    return tuple(n for n in ("onnx/model.onnx", "onnx/model_quantized.onnx") if folder.has(n))


def _js_processor(folder: HubFolder, graph: Graph) -> str:
    """Text needs both tokenizer files; pictures and sound their processor's."""
    if "input_ids" in graph.inputs:
        needed = ["tokenizer.json", "tokenizer_config.json"]
    else:
        needed = ["preprocessor_config.json"]
    problems = [p for name in needed if (p := folder.unreadable(name))]
    return f"{problems[0]}: copy it from the source model" if problems else ""


def _js_model_type(folder: HubFolder, graph: Graph) -> str:
    """A model without a head counts as an encoder, whatever its type is."""
    named = isinstance(folder.json("config.json").get("model_type"), str)
    plain = "last_hidden_state" in graph.outputs and not generates(folder, graph)
    if named or plain or folder.unreadable("config.json"):
        return ""
    return "config.json has no model_type that is a text: copy it from the source model's"


def _js_layers(folder: HubFolder) -> int | None:
    config = folder.json("config.json", "text_config") or folder.json("config.json")
    return next((config[k] for k in LAYERS if isinstance(config.get(k), int)), None)


def _js_inputs(folder: HubFolder, graph: Graph) -> str:
    """Encoders get what the tokenizer makes, decoders positions and an empty cache as well."""
    if graph.file in _ENCODER_DECODER:
        return ""
    fed = [*TEXT, *_OTHER_INPUTS]
    if generates(folder, graph):
        fed += ["position_ids", "num_logits_to_keep", "use_cache_branch"]
    return unfed(graph, [n for n in graph.inputs if n not in fed and n not in graph.cache], fed)


def _js_cache_names(folder: HubFolder, graph: Graph) -> str:
    """Layers are counted from 0 to config.json's number of them."""
    layers = _js_layers(folder)
    for name in graph.cache:
        found = re.fullmatch(r"past_key_values\.(\d+)\.(key|value)", name)
        if not name.startswith("past_key_values") or graph.file in _ENCODER_DECODER:
            continue
        if found is None:
            return f"{graph.file} calls an input {name}: name it past_key_values.0.key and so on"
        if layers is None and not folder.unreadable("config.json"):
            return "config.json has no num_hidden_layers: write how many layers have a cache"
        if layers is not None and int(found[1]) >= layers:
            return (
                f"{graph.file} has {name} and config.json {layers} layers, of which it feeds 0 to "
                f"{layers - 1}: number them without gaps, and write their count"
            )
    return ""


def _js_cache_shapes(folder: HubFolder, graph: Graph) -> str:
    """An empty cache is made of the shapes: batch_size by name, numbers as they are, else 0."""
    for value in graph.cache.values():
        if value.rank != 4 or value.shape is None:
            continue
        batch, heads, _, width = value.shape
        if not isinstance(batch, int) and batch not in ("batch_size", "batch_size x num_heads"):
            return (
                f"{graph.file} takes {value}, whose batch becomes 0 unless it is called "
                "batch_size: rename the dimension"
            )
        if isinstance(heads, str) or isinstance(width, str):
            return (
                f"{graph.file} takes {value}, whose heads or width become 0 unless they are "
                "numbers: export them so"
            )
    return ""


def _js_presents(folder: HubFolder, graph: Graph) -> str:
    """The next step's cache is the outputs', renamed."""
    for name in graph.cache:
        wanted = name.replace("past_key_values", "present").replace("past_", "present_")
        if wanted not in graph.outputs:
            return f"{graph.file} has {name} and no output {wanted}: name the outputs so"
    return ""


def _js_weights(folder: HubFolder, graph: Graph) -> str:
    """Browsers and the hub fetch as many files of weights as config.json says, by fixed names."""
    if not graph.weights:
        return ""
    file = PurePosixPath(graph.file).name
    names = [f"{file}_data", *(f"{file}_data_{i}" for i in range(1, len(graph.weights)))]
    if set(names) != set(graph.weights):
        return (
            f"{graph.file} keeps weights in {next(iter(graph.weights))}, and {names[0]} is what is "
            "fetched: write them under that name"
        )
    said = folder.json("config.json", "transformers.js_config").get("use_external_data_format")
    if isinstance(said, dict):
        said = said.get(file, said.get(file.removesuffix(".onnx")))
    if isinstance(said, int) and int(said) == len(names):
        return ""
    return (
        f"{graph.file} keeps weights in {names[0]}, which is not fetched: write "
        f'{{"transformers.js_config": {{"use_external_data_format": {{"{file}": {len(names)}}}}}}} '
        "into config.json"
    )


def _js_dtype(folder: HubFolder, graph: Graph) -> str:
    """Node takes the float file by default, browsers the quantized one."""
    if graph.file == "onnx/model.onnx" and not folder.has("onnx/model_quantized.onnx"):
        return "in a browser say dtype: 'fp32': its default is onnx/model_quantized.onnx"
    if graph.file == "onnx/model_quantized.onnx" and not folder.has("onnx/model.onnx"):
        return "in Node say dtype: 'q8': its default is onnx/model.onnx"
    return ""


def _js_ragged(folder: HubFolder, graph: Graph) -> str:
    if len({value.shape and value.shape[1:] for value in graph.cache.values()}) < 2:
        return ""
    return "versions before 4 make all layers' caches alike, and these differ"


TRANSFORMERS_JS = Consumer(
    "transformers.js",
    "@huggingface/transformers 4.3, in Node and browsers",
    _js_opens,
    "onnx/model.onnx or onnx/model_quantized.onnx (onnx/encoder_model.onnx and "
    "onnx/decoder_model_merged.onnx of an encoder-decoder)",
    files=(json_file("config.json"),),
    graph=(
        *ALWAYS,
        brings((1, 30), "it"),
        _js_model_type,
        _js_processor,
        _js_inputs,
        integers,
        _js_cache_names,
        _js_cache_shapes,
        _js_presents,
        task_output("last_hidden_state", "logits", "token_embeddings"),
        _js_weights,
    ),
    notes=(_js_dtype, _js_ragged),
)


# transformers' ExportedModel

_EXPORT = "export.json"


def _components(folder: HubFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of each part of the export."""
    for name in folder.json(_EXPORT, "components"):
        yield name, folder.json(_EXPORT, "components", name)


def _export_opens(folder: HubFolder) -> tuple[str, ...]:
    files = [entry.get("file") for _, entry in _components(folder)]
    return tuple(f for f in files if isinstance(f, str) and folder.has(f))


def _export_format(folder: HubFolder) -> str:
    found = folder.json(_EXPORT).get("export_format")
    if folder.unreadable(_EXPORT) or found == "onnx":
        return ""
    return f"{_EXPORT} has export_format {found!r}: write 'onnx'"


def _export_files(folder: HubFolder) -> str:
    for name, entry in _components(folder):
        for file in (entry.get("file"), f"{entry.get('file')}.data"):
            if not folder.has(str(file)):
                return (
                    f"{_EXPORT} needs {file} for component {name!r}, which is not there: write it; "
                    "the .data file may be empty"
                )
    return ""


def _export_metadata(folder: HubFolder) -> str:
    for name, _ in _components(folder):
        metadata = folder.json(_EXPORT, "components", name, "metadata")
        for wanted, kind in (("kwargs", dict), ("out_spec", str)):
            if not isinstance(metadata.get(wanted), kind):
                return f"{_EXPORT} has no metadata.{wanted} for component {name!r}: write it"
    return ""


def _export_inputs(folder: HubFolder, graph: Graph) -> str:
    """Inputs bind by name; arguments that were not recorded are dropped."""
    for name, entry in _components(folder):
        if entry.get("file") == graph.file:
            kwargs = folder.json(_EXPORT, "components", name, "metadata", "kwargs")
            lacking = [n for n in graph.inputs if n.split(".")[0] not in kwargs]
            if lacking and kwargs:
                return (
                    f"{graph.file} takes {lacking[0]}, which {_EXPORT} does not list in "
                    f"metadata.kwargs of component {name!r}: add it"
                )
    return ""


EXPORTED_MODEL = Consumer(
    "exported-model",
    "transformers 5.23, transformers.exporters.ExportedModel",
    _export_opens,
    "",
    files=(
        json_file(_EXPORT, "write one, or save with transformers' exporters"),
        _export_format,
        _export_files,
        _export_metadata,
    ),
    graph=(*ALWAYS, _export_inputs),
    notes=(needs_runtime,),
)


# ONNX Runtime and OpenVINO


def _floor(folder: HubFolder, graph: Graph) -> str:
    need = floor(graph)
    return f"{graph.file} runs on ONNX Runtime {need}" if need else ""


ONNXRUNTIME = Consumer(
    "onnxruntime",
    "ONNX Runtime, any version up to 1.32",
    lambda folder: folder.models,
    ".onnx file",
    graph=(*ALWAYS, unknown_opset),
    notes=(_floor,),
)

OPENVINO = Consumer(
    "openvino",
    "OpenVINO 2026.4, reading .onnx itself",
    usual,
    USUAL,
    graph=(weights, known_operators),
)
