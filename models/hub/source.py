"""Files that travel with a Hugging Face model: configuration, tokenizer, pooling."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.zoo.sentence import SentenceEncoder

CONFIG = "config.json"
GENERATION = "generation_config.json"
OWN_KEY = "graphprune"  # of config.json: readers of the usual keys pass over it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
)
_MODULES = ("Transformer", "Pooling", "Normalize")
_TOKENS = 512  # of a text, where neither tokenizer nor model says it


def source_files(
    module: nn.Module,
    folder: Path | None = None,
    *,
    name: str = "",
    license: str = "",
    schema: Schema | None = None,
) -> dict[str, Path | bytes]:
    """Files for an artifact beside a model, by name; none for a plain module.

    Args:
        module: a model with a Hugging Face configuration, or with one inside.
        folder: where its tokenizer and model card lie.
        name: what the user calls it.
        license: of the weights; by default what the model card in the folder says.
        schema: what a head put on it answers.
    """
    files: dict[str, Path | bytes] = {}
    if folder is not None:
        files |= {file.name: file for file in tokenizer_files(folder)}
        if (folder / GENERATION).is_file():  # it says which tokens end a text
            files[GENERATION] = folder / GENERATION
    config = config_of(module)
    if config is None:
        return files
    generation: Any = getattr(module, "generation_config", None)
    if GENERATION not in files and hasattr(generation, "to_dict"):
        files[GENERATION] = _json(generation.to_dict())
    source: dict[str, Any] = {"name": name, "license": license or _license(folder)}
    if metadata := _onnx_metadata(folder):
        source["metadata"] = metadata
    files[CONFIG] = _json({**_config(module, config, folder, schema), OWN_KEY: {"source": source}})
    if isinstance(module, SentenceEncoder):
        files |= _sentence_files(module, config, folder)
    return files


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a folder that a tokenizer or image processor is read from."""
    return [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]


def tokenizer_dir(artifact: Path) -> Path | None:
    """Where the tokenizer of an artifact is: at its root, or in a folder; None without."""
    for folder in (artifact, artifact / "tokenizer"):  # older artifacts have the folder
        if tokenizer_files(folder):
            return folder
    return None


def saved_tokenizer(tokenizer: Any) -> dict[str, Path | bytes]:
    """The files of a tokenizer: of a folder, a `transformers` one, or a `tokenizers` one.

    Raises:
        GraphPruneError: it is none of these.
    """
    if isinstance(tokenizer, str | Path):
        folder = Path(tokenizer).expanduser()
        found = tokenizer_files(folder)
        if not found:
            raise GraphPruneError(
                f"tokenizer={str(tokenizer)!r} is no folder with a tokenizer: it has none of "
                f"{', '.join(TOKENIZER_FILES[:3])} ..."
            )
        return {file.name: file for file in found}
    with tempfile.TemporaryDirectory(prefix="graphprune-") as made:
        folder = Path(made)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(folder))
        elif type(tokenizer).__module__.split(".")[0] == "tokenizers":
            tokenizer.save(str(folder / "tokenizer.json"))
        else:
            raise GraphPruneError(
                f"tokenizer is a folder, or a tokenizer of transformers or tokenizers, got a "
                f"{type(tokenizer).__name__}"
            )
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def config_of(module: Any) -> Any:
    """The Hugging Face configuration of a module, or of the encoder inside; None without."""
    for part in (module, getattr(module, "encoder", None)):
        config = getattr(part, "config", None)
        if hasattr(config, "to_dict") and hasattr(config, "model_type"):
            return config
    return None


def _config(
    module: nn.Module, config: Any, folder: Path | None, schema: Schema | None
) -> dict[str, Any]:
    """config.json as it was, whole: some runtimes know no defaults."""
    data = json.loads(json.dumps(config.to_dict(), default=str))
    data.pop("_name_or_path", None)
    written = _read(folder, CONFIG) or {}
    # Loading switches the cache off for capture; what the file said is what holds.
    data.pop("use_cache", None)
    if "use_cache" in written:
        data["use_cache"] = written["use_cache"]
    inner = (
        module if getattr(module, "config", None) is config else getattr(module, "encoder", module)
    )
    data["architectures"] = [type(inner).__name__]
    if schema is not None and inner is not module:  # a head that graphprune put on an encoder
        family = type(inner).__name__.removesuffix("Model")
        data["architectures"] = [f"{family}ForSequenceClassification"]
    if schema is not None:
        labels = dict(enumerate(schema.classes)) or {0: "LABEL_0"}
        data["id2label"] = {str(i): label for i, label in labels.items()}
        data["label2id"] = {label: i for i, label in labels.items()}
    return data


def _sentence_files(
    module: SentenceEncoder, config: Any, folder: Path | None
) -> dict[str, Path | bytes]:
    """How the sentence's vector is made, for libraries that know it by these files."""
    width = int(config.hidden_size)
    length = _length(config, folder)
    kinds = _MODULES if module.normalize else _MODULES[:2]
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    pooling = {
        # Newer releases read the first three, older ones and other runtimes the rest. One runtime
        # refuses keys that it does not know, such as the newest name of the width.
        "word_embedding_dimension": width,
        "pooling_mode": module.pooling,
        "include_prompt": True,
        "pooling_mode_cls_token": module.pooling == "cls",
        "pooling_mode_mean_tokens": module.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    made = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for file in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        made[file] = _read(folder, file) or made[file]
    return {file: _json(content) for file, content in made.items()}


def _length(config: Any, folder: Path | None) -> int:
    """How many tokens of a text count: what the tokenizer says, within the model's positions."""
    positions = int(getattr(config, "max_position_embeddings", None) or _TOKENS)
    length = (_read(folder, "tokenizer_config.json") or {}).get("model_max_length")
    return min(positions, int(length)) if isinstance(length, int | float) else positions


def _license(folder: Path | None) -> str:
    """The license in a folder's model card; empty where it names none."""
    import yaml

    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return ""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return ""
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return ""
    return str(front.get("license") or "") if isinstance(front, Mapping) else ""


def _onnx_metadata(folder: Path | None) -> dict[str, str]:
    """The metadata of an ONNX file of the same model that lies in its folder, where one does."""
    import onnx

    if folder is None:
        return {}
    for file in (folder / "onnx" / "model.onnx", folder / "model.onnx"):
        if file.is_file():
            model = onnx.load(file, load_external_data=False)
            props = {entry.key: entry.value for entry in model.metadata_props}
            return {k: v for k, v in props.items() if not k.startswith("graphprune.")}
    return {}


def _read(folder: Path | None, file: str) -> Any:
    """A JSON file of a folder, or None."""
    if folder is None or not (folder / file).is_file():
        return None
    return json.loads((folder / file).read_text(encoding="utf-8"))


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n").encode()
