"""Files of a hub folder that depend on the pruned model: config.json and the model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import ExportError, GraphPruneError
from graphprune.ir.decoding import is_past
from graphprune.models.hub.card import model_card
from graphprune.models.hub.consumers.base import LAYERS
from graphprune.models.hub.exported import EXPORT, exported
from graphprune.models.hub.genai import FILE, genai_config
from graphprune.models.hub.source import CONFIG, GENERATION, OWN_KEY
from graphprune.models.hub.tokenizer import CONFIG as TOKENIZER_CONFIG
from graphprune.models.hub.tokenizer import completed
from graphprune.report.report import Report

# Inputs that most runtimes feed, and some do not: zero where they are not fed.
OPTIONAL = ("token_type_ids",)
# Written for each artifact.
MADE = ("README.md", EXPORT, FILE)

_log = logging.getLogger(__name__)

Files = Mapping[str, Path | bytes]


def is_hub_model(files: Files, inputs: Collection[str]) -> bool:
    """Whether hub folders are for a model: it reads text, and has a configuration or tokenizer."""
    return "input_ids" in inputs and bool({CONFIG, "tokenizer.json"} & files.keys())


def source_of(files: Files) -> Mapping[str, Any]:
    """Read what is known of the source model: "name", "license", ONNX "metadata"."""
    if CONFIG not in files:
        return {}
    return (json.loads(content(files[CONFIG])).get(OWN_KEY) or {}).get("source") or {}


def check_tokenizer(files: Files, table: int | None) -> None:
    """Refuse a tokenizer whose ids go beyond the model's table of embeddings.

    Args:
        files: those of the tokenizer.
        table: rows of the table that input_ids look up; None where there is none.

    Raises:
        GraphPruneError: the tokenizer makes an id that the table does not have.
    """
    if table is None or "tokenizer.json" not in files:
        return
    try:
        data = json.loads(content(files["tokenizer.json"]))
        vocabulary = data["model"]["vocab"]
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = [token["id"] for token in data.get("added_tokens") or ()]
        largest = max([*ids, *added], default=-1)
    except (ValueError, KeyError, TypeError) as e:
        raise GraphPruneError(
            f"tokenizer.json cannot be read ({type(e).__name__}: {e}); save the tokenizer again"
        ) from e
    if largest >= table:
        raise GraphPruneError(
            f"the tokenizer makes ids up to {largest}, and the model's table ends at {table - 1}: "
            "give the tokenizer that belongs to the model"
        )


def finished(files: Files, manifest: Mapping[str, Any], report: Report) -> dict[str, bytes]:
    """The files of a hub folder that say what became of the model.

    Args:
        files: what travels with it; config.json among them, or not.
        manifest: the artifact's.
        report: what the passes did.
    """
    found: dict[str, bytes] = {}
    config: dict[str, Any] = {}
    if CONFIG in files:
        config = json.loads(content(files[CONFIG]))
        found[CONFIG] = _json(_config(config, manifest, report))
        if any(is_past(i["name"]) for i in manifest["inputs"]):
            found |= _genai(config, files, manifest)
    found |= exported(manifest, config) | _tokenizer(files, config, manifest)
    found["README.md"] = model_card(
        source_of(files), files.keys() | found.keys(), manifest, report
    ).encode()
    return found


def _tokenizer(
    files: Files, config: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, bytes]:
    """Complete a tokenizer's files: those that are missing, and its length where it has none."""
    if "tokenizer.json" not in files:
        return {}
    try:
        tokenizer = json.loads(content(files["tokenizer.json"]))
        tokenizer["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return {}  # none that could be completed; its reader reports what is wrong
    described = None
    if TOKENIZER_CONFIG in files:
        described = json.loads(content(files[TOKENIZER_CONFIG]))
    bounds = manifest["bounds"] if manifest["entry"] == "forward" else {}
    longest = bounds.get("sequence_length", (1, None))[1] or config.get("max_position_embeddings")
    made = completed(tokenizer, described, config.get("pad_token_id"), longest)
    return {name: made[name] for name in made if name not in files or name == TOKENIZER_CONFIG}


def _genai(
    config: Mapping[str, Any], files: Files, manifest: Mapping[str, Any]
) -> dict[str, bytes]:
    """genai_config.json for a decoder; for another target than genai only where it can be driven.

    Raises:
        ExportError: the target is genai, which cannot drive the graph.
    """
    generation = json.loads(content(files[GENERATION])) if GENERATION in files else None
    shared = manifest["target"] == "genai"
    try:
        made = genai_config(
            config,
            manifest["inputs"],
            manifest["outputs"],
            shared=shared,
            generation=generation,
            filename=manifest["files"]["model"],
        )
    except ExportError as e:
        if shared:
            raise
        _log.info("no %s: %s", FILE, e)
        return {}
    return {FILE: made}


def _config(config: dict[str, Any], manifest: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The configuration, with what changed under a key of our own.

    Readers that make caches or towers from the usual numbers would be wrong for layers that differ,
    and transformers' own key for those makes reading the usual numbers an error.
    """
    own = dict(config.get(OWN_KEY) or {})
    own |= {
        "parameters": [report.before.parameters, report.after.parameters],
        "passes": [done.name for done in report.passes],
        "layers": _layers(report),
    }
    if dropped := _dropped(report):
        own["dropped"] = dropped
        config = {**config, **_cached_layers(config, manifest)}
    if manifest["precision"]["onnx"] != "float32":
        own["quantization"] = manifest["precision"]["onnx"]
    web = dict(config.get("transformers.js_config") or {})
    beside = [name for name in manifest["beside"] if name.startswith("onnx/")]
    if beside:
        web["use_external_data_format"] = {Path(name).name: 1 for name in beside}
    else:
        web.pop("use_external_data_format", None)
    result = {**config, OWN_KEY: own}
    result.pop("transformers.js_config", None)
    return {**result, "transformers.js_config": web} if web else result


def _layers(report: Report) -> dict[str, Any]:
    """For each group of units that lost some: its role, and how many there were and are."""
    layers: dict[str, Any] = {}
    for _, details in report.steps():
        for group in details.get("groups") or ():
            known = layers.get(group["id"], {})
            before = known.get("before", group["before"])
            layers[group["id"]] = {"role": group["role"], "before": before, "after": group["after"]}
    return {name: layer for name, layer in layers.items() if layer["before"] != layer["after"]}


def _dropped(report: Report) -> list[str]:
    """Ids of the residual branches that are gone."""
    return [name for _, details in report.steps() for name in details.get("dropped") or ()]


def _cached_layers(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, int]:
    """The number of layers that have a cache: readers feed one to as many as they find here."""
    pasts = [i["name"] for i in manifest["inputs"] if is_past(i["name"])]
    count = len({name.split(".")[1] for name in pasts})
    key = next((key for key in LAYERS if isinstance(config.get(key), int)), None)
    return {key: count} if key is not None and 0 < count < config[key] else {}


def content(file: Path | bytes) -> bytes:
    """The bytes of a file that travels with a model."""
    return file.read_bytes() if isinstance(file, Path) else file


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
