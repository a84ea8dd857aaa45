"""export.json: what transformers' ExportedModel.from_pretrained reads to run a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree

EXPORT = "export.json"
_TORCH_TYPES = {"float": "float32", "double": "float64"}  # ONNX calls the others as torch does


def exported(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that make a folder an export of transformers, around the ONNX file as it is.

    1. Nothing for models with a key/value cache: generation takes two graphs there.
    2. Inputs that need not be fed are left out: that class feeds required ones alone.
    3. A folder on disk loads however its weights lie. By a hub id only with weights="inside": no
       more is downloaded than the graph and the file `<graph>.data`. The latter must be there,
       and is empty, because a graph names its own weights' file.

    Args:
        manifest: the artifact's.
        config: config.json, or nothing.
    """
    if manifest["entry"] != "forward":
        return {}
    file = manifest["files"]["model"]
    inputs = [i for i in manifest["inputs"] if not i.get("optional")]
    metadata: dict[str, Any] = {
        "architecture": next(iter(config.get("architectures") or ()), None),
        "packages": {name: manifest["versions"][name] for name in ("torch", "onnx", "onnxruntime")},
        "export_config": {},
        "export_dtype": "float32",
        "export_device": "cpu",
        "kwargs": {i["name"]: _tensor(i) for i in inputs},
        "in_spec": _spec(((), {i["name"]: 0 for i in inputs})),
        "out_spec": _spec({output["name"]: 0 for output in manifest["outputs"]}),
        "in_constants": {},
        "out_constants": [],
    }
    content = {
        "schema_version": 1,
        "export_format": "onnx",
        "components": {"model": {"file": file, "metadata": metadata}},
    }
    return {EXPORT: (json.dumps(content, indent=2) + "\n").encode(), f"{file}.data": b""}


def _tensor(described: Mapping[str, Any]) -> dict[str, Any]:
    shape, kind = described["shape"], described["type"]
    return {"rank": len(shape), "shape": shape, "dtype": _TORCH_TYPES.get(kind, kind)}


def _spec(tree: Any) -> str:
    return pytree.treespec_dumps(pytree.tree_structure(tree))
