"""Consumers that embed or classify text, by a library or in Java and Rust.

What each reads is from its sources in November 2026; the versions stand in the records.
"""

from __future__ import annotations

import sys
from pathlib import PurePosixPath

from graphprune.models.hub.consumers.base import Consumer
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.graph import Graph, floor
from graphprune.models.hub.consumers.rules import (
    ALWAYS,
    TEXT,
    USUAL,
    accepts,
    any_size,
    brings,
    cache_of_one_shape,
    feeds,
    first_output,
    inside,
    integers,
    json_file,
    key,
    known_operators,
    needs_runtime,
    output,
    present,
    task_output,
    unfed,
    usual,
    weights,
)

TOKENIZER = (json_file("tokenizer.json"), json_file("tokenizer_config.json"))
CONFIG = (json_file("config.json"), key("config.json", str, "model_type"))
# Token ids and the mask are fed always, token types where the file asks for them.
SIZES = (integers, any_size)
FED = (accepts("input_ids", "attention_mask"), feeds(*TEXT), *SIZES)


# fastembed


def _real_length(folder: HubFolder) -> str:
    """transformers writes 1e30 where it does not know."""
    file = "tokenizer_config.json"
    found = [folder.json(file).get(k) for k in ("model_max_length", "max_length")]
    if folder.unreadable(file) or any(map(_is_length, found)):
        return ""
    return f"{file} has no model_max_length that is a real length: write how many tokens fit"


def _is_length(value: object) -> bool:
    return type(value) is int and 0 < value <= sys.maxsize


def _pad_token(folder: HubFolder) -> str:
    """Its name is in either file; its number too, or the vocabulary knows the name."""
    if folder.unreadable("tokenizer.json") or folder.unreadable("tokenizer_config.json"):
        return ""
    padding = folder.json("tokenizer.json", "padding")
    token = padding.get("pad_token") or folder.json("tokenizer_config.json").get("pad_token")
    if not isinstance(token, str):
        return "tokenizer_config.json has no pad_token that is a text: copy the source model's"
    number = padding.get("pad_id", folder.json("config.json").get("pad_token_id"))
    if number is not None or token in _vocabulary(folder):
        return ""
    return f"no file says which number {token!r} has: write pad_token_id into config.json"


def _vocabulary(folder: HubFolder) -> set[str]:
    words = folder.json("tokenizer.json", "model").get("vocab")
    if isinstance(words, list):  # pairs of a word and its score
        words = [str(pair[0]) for pair in words if isinstance(pair, list) and pair]
    added = [str(t.get("content")) for t in folder.entries("tokenizer.json", "added_tokens")]
    named = [t for t in folder.json("special_tokens_map.json").values() if isinstance(t, str)]
    return {*(words if isinstance(words, dict | list) else ()), *added, *named}


def _fastembed_call(folder: HubFolder, graph: Graph) -> str:
    """The call of add_custom_model."""
    first = next(iter(graph.outputs.values()))
    cls = folder.json("1_Pooling/config.json").get("pooling_mode_cls_token") is True
    pooling = "DISABLED" if first.rank == 2 else "CLS" if cls else "MEAN"
    beside = PurePosixPath(graph.file).parent
    files = [(beside / name).as_posix() for name in graph.weights]
    more = f", additional_files={files}" if files else ""
    return f"add_custom_model(model_file={graph.file!r}, pooling=PoolingType.{pooling}{more}, ...)"


FASTEMBED = Consumer(
    "fastembed",
    "fastembed 0.9 (Python), TextEmbedding.add_custom_model",
    usual,
    USUAL,
    files=(*TOKENIZER, _real_length, _pad_token),
    graph=(*ALWAYS, accepts("input_ids"), feeds(*TEXT), *SIZES, first_output(2, 3)),
    notes=(_fastembed_call, needs_runtime),
)


# fastembed-rs


def _rs_special_tokens(folder: HubFolder) -> str:
    """Tokens are texts, or objects with all five fields."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized")
    for name, token in folder.json("special_tokens_map.json").items():
        if isinstance(token, dict) and (lacking := [f for f in fields if f not in token]):
            return f"special_tokens_map.json has {name} without {lacking[0]}: write it as a text"
    return ""


def _rs_length(folder: HubFolder) -> str:
    file = "tokenizer_config.json"
    found = folder.json(file).get("model_max_length")
    if folder.unreadable(file) or isinstance(found, int | float):
        return ""
    return f"{file} has no model_max_length that is a number: write how many tokens fit"


def _rs_output(folder: HubFolder, graph: Graph) -> str:
    """The only output, or the first of these."""
    if len(graph.outputs) == 1:
        return first_output(2, 3, float32=True)(folder, graph)
    names = ("text_embeds", "last_hidden_state", "sentence_embedding")
    return output(*names, float32=True)(folder, graph)


def _rs_weights(folder: HubFolder, graph: Graph) -> str:
    if not graph.weights:
        return ""
    names = ", ".join(graph.weights)
    return f"UserDefinedEmbeddingModel: give {names} by with_external_initializer too"


FASTEMBED_RS = Consumer(
    "fastembed-rs",
    "fastembed 5.17 (Rust), UserDefinedEmbeddingModel",
    usual,
    USUAL,
    files=(
        json_file("config.json"),
        *TOKENIZER,
        json_file("special_tokens_map.json"),
        key("tokenizer_config.json", str, "pad_token"),
        _rs_length,
        _rs_special_tokens,
    ),
    graph=(*ALWAYS, brings((1, 24), "it"), *FED, _rs_output),
    notes=(_rs_weights,),
)


# light-embed

_POOLING_KEYS = {
    "word_embedding_dimension", "pooling_mode", "pooling_mode_cls_token",
    "pooling_mode_max_tokens", "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken", "include_prompt",
}  # fmt: skip
_POOLING_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


def _light_length(folder: HubFolder) -> str:
    """Truncation is read back, so there must be one."""
    file = "tokenizer_config.json"
    found = folder.json(file).get("model_max_length")
    if folder.unreadable(file) or _is_length(found):
        return ""
    if found is None and folder.json("tokenizer.json").get("truncation"):
        return ""
    return f"{file} has no model_max_length that is a real length: write how many tokens fit"


def _light_mask(folder: HubFolder, graph: Graph) -> str:
    if "attention_mask" in graph.inputs:
        return ""
    return f"{graph.file} has no input attention_mask, which is read back: export it as an input"


_TOKEN_OUTPUTS = ("token_embeddings", "last_hidden_state", "text_embeds")


def _light_pooling(folder: HubFolder) -> str:
    """The keys become arguments, and others raise."""
    file = "1_Pooling/config.json"
    settings = folder.json(file)
    if foreign := set(settings) - _POOLING_KEYS:
        return (
            f"{file} has {min(foreign)}, which raises a TypeError: remove the key, or leave "
            "pooling_config_path out of model_config"
        )
    mode = settings.get("pooling_mode")
    if mode is None or str(mode).lower() in _POOLING_MODES:
        return ""
    return f"{file} has pooling_mode {mode!r}, which it does not know: write 'mean' or 'cls'"


def _light_call(folder: HubFolder, graph: Graph) -> str:
    pools = folder.has("1_Pooling/config.json") and any(n in graph.outputs for n in _TOKEN_OUTPUTS)
    path = ", 'pooling_config_path': '1_Pooling'" if pools else ""
    return f"model_config={{'onnx_file': {graph.file!r}{path}}}"


LIGHT_EMBED = Consumer(
    "light-embed",
    "light-embed 1.0, TextEmbedding(model_config=...)",
    usual,
    USUAL,
    files=(
        json_file("config.json"),
        *TOKENIZER,
        json_file("special_tokens_map.json"),
        key("tokenizer_config.json", str, "pad_token"),
        _light_length,
        _light_pooling,
    ),
    graph=(
        *ALWAYS,
        _light_mask,
        feeds(*TEXT),
        *SIZES,
        output("sentence_embedding", *_TOKEN_OUTPUTS),
    ),
    notes=(_light_call,),
)


# text-embeddings-inference


def _is_classifier(folder: HubFolder) -> bool:
    names = folder.json("config.json").get("architectures")
    return isinstance(names, list) and any(str(n).endswith("Classification") for n in names)


def _tei_architectures(folder: HubFolder) -> str:
    names = folder.json("config.json").get("architectures")
    listed = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if listed or folder.unreadable("config.json"):
        return ""
    return "config.json has no list of architectures: copy it from the source model's"


def _tei_pooling(folder: HubFolder) -> str:
    """Both old keys are required, whatever the new one says."""
    file = "1_Pooling/config.json"
    if _is_classifier(folder):
        return ""
    if problem := folder.unreadable(file):
        return f"{problem}: write it, or start the server with --pooling"
    modes = folder.json(file)
    for name in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        if not isinstance(modes.get(name), bool):
            return f"{file} has no {name}: write the old keys beside the new ones"
    if any(modes.get(f"pooling_mode_{m}") for m in ("cls_token", "mean_tokens", "lasttoken")):
        return ""
    return f"{file} chooses none of cls, mean and last token: start the server with --pooling"


def _tei_labels(folder: HubFolder) -> str:
    config = folder.json("config.json")
    for name in ("id2label", "label2id") if _is_classifier(folder) else ():
        if not isinstance(config.get(name), dict):
            return f"config.json has no {name}: copy it from the source model's"
    return ""


def _tei_length(folder: HubFolder) -> str:
    file = "sentence_bert_config.json"
    if not folder.has(file) or isinstance(folder.json(file).get("max_seq_length"), int):
        return ""
    return f"{file} has no max_seq_length that is a whole number: write it, or remove the file"


def _tei_padding(folder: HubFolder) -> str:
    side = folder.json("tokenizer_config.json").get("padding_side", "right")
    if side in ("left", "right"):
        return ""
    return f"tokenizer_config.json has padding_side {side!r}: write 'left' or 'right'"


def _tei_layers(folder: HubFolder) -> int:
    config = folder.json("config.json")
    found = config.get("num_hidden_layers", config.get("n_layer"))
    return found if isinstance(found, int) else 0


def _tei_inputs(folder: HubFolder, graph: Graph) -> str:
    layers = range(_tei_layers(folder)) if graph.cache else ()
    cache = [f"past_key_values.{i}.{which}" for i in layers for which in ("key", "value")]
    fed = (*TEXT, "position_ids")
    return unfed(graph, [n for n in graph.inputs if n not in fed and n not in cache], fed)


def _tei_cache(folder: HubFolder, graph: Graph) -> str:
    """One empty pair for all layers, of hidden_size over the number of key/value heads."""
    config = folder.json("config.json")
    width = config.get("hidden_size", config.get("n_embd"))
    # Its default for the heads is the number of layers.
    heads = config.get("num_key_value_heads", config.get("n_head", _tei_layers(folder)))
    if not graph.cache or not isinstance(width, int) or not isinstance(heads, int) or not heads:
        return ""
    return cache_of_one_shape(graph, heads, width // heads, "hidden_size / num_key_value_heads")


def _tei_output(folder: HubFolder, graph: Graph) -> str:
    if _is_classifier(folder):
        return output("logits", rank=2, float32=True)(folder, graph)
    if "sentence_embedding" in graph.outputs:
        return output("sentence_embedding", rank=2, float32=True)(folder, graph)
    return output("last_hidden_state", "token_embeddings", rank=3, float32=True)(folder, graph)


def _tei_pools(folder: HubFolder, graph: Graph) -> str:
    if "sentence_embedding" not in graph.outputs or _is_classifier(folder):
        return ""
    return "it takes sentence_embedding and does not pool itself, whatever 1_Pooling says"


TEI = Consumer(
    "tei",
    "text-embeddings-inference of July 2026, backend ort (ONNX Runtime 1.22)",
    usual,
    USUAL,
    files=(
        *CONFIG,
        _tei_architectures,
        key("config.json", int, "max_position_embeddings", "n_positions"),
        key("config.json", int, "hidden_size", "n_embd"),
        key("config.json", int, "num_hidden_layers", "n_layer"),
        json_file("tokenizer.json"),
        _tei_padding,
        _tei_pooling,
        _tei_length,
        _tei_labels,
    ),
    graph=(
        *ALWAYS,
        brings((1, 22), "it"),
        accepts("input_ids", "attention_mask"),
        _tei_inputs,
        *SIZES,
        _tei_cache,
        _tei_output,
    ),
    notes=(_tei_pools,),
)


# optimum, and what loads through it

_TEXT_OR_OTHER = (*TEXT, "position_ids", "pixel_values", "pixel_mask", "input_values",
                  "input_features", "use_cache_branch")  # fmt: skip
_OWN_WIDTH = ("gemma", "gpt_oss", "nemotron")


def _named(folder: HubFolder, name: str) -> tuple[str, ...]:
    return tuple(f for f in folder.onnx_files if PurePosixPath(f).name == name)


def _optimum_opens(folder: HubFolder) -> tuple[str, ...]:
    """Any model.onnx, at any depth; else any .onnx."""
    return _named(folder, "model.onnx") or folder.onnx_files


def _optimum_inputs(folder: HubFolder, graph: Graph) -> str:
    known = (*_TEXT_OR_OTHER, *graph.cache)
    return unfed(graph, [n for n in graph.inputs if n not in known], _TEXT_OR_OTHER)


def _optimum_cache(folder: HubFolder, graph: Graph) -> str:
    """One empty pair for all layers, of config.json's numbers."""
    config = folder.json("config.json")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not graph.cache or not isinstance(heads, int) or not isinstance(hidden, int):
        return ""
    width = config.get("head_dim") if _has_own_width(config.get("model_type")) else None
    return cache_of_one_shape(
        graph,
        config.get("num_key_value_heads") or heads,
        width or hidden // heads,
        "config.json's num_key_value_heads, and hidden_size / num_attention_heads",
    )


def _has_own_width(model_type: object) -> bool:
    return isinstance(model_type, str) and model_type.startswith(_OWN_WIDTH)


def _optimum_choice(folder: HubFolder, graph: Graph) -> str:
    if len(_optimum_opens(folder)) < 2:
        return ""
    return f"pass file_name= and subfolder=: it may open any of {', '.join(_optimum_opens(folder))}"


def _optimum_weights(folder: HubFolder, graph: Graph) -> str:
    wanted = f"{PurePosixPath(graph.file).name}_data"
    if set(graph.weights) <= {wanted}:
        return ""
    return f"from a hub it fetches {wanted} alone, and not {next(iter(graph.weights))}"


OPTIMUM = Consumer(
    "optimum",
    "optimum-onnx 0.1, ORTModelFor...",
    _optimum_opens,
    ".onnx file",
    files=CONFIG,
    graph=(
        *ALWAYS,
        _optimum_inputs,
        integers,
        _optimum_cache,
        task_output("last_hidden_state"),
    ),
    notes=(_optimum_choice, _optimum_weights, needs_runtime),
)


def _modules(folder: HubFolder) -> str:
    """Modules with settings of their own have their folder."""
    for entry in folder.entries("modules.json"):
        kind = str(entry.get("type", "")).rpartition(".")[2]
        problem = folder.unreadable(f"{entry.get('path')}/config.json")
        if kind in ("Pooling", "Dense") and problem:
            return f"modules.json lists {kind}, and {problem}: write it"
    return ""


def _assumes_mean(folder: HubFolder, graph: Graph) -> str:
    if folder.has("modules.json"):
        return ""
    return "without modules.json it pools by the mean, with a warning"


def _not_installable(folder: HubFolder, graph: Graph) -> str:
    return (
        "sentence-transformers 6 with its ONNX extra cannot be installed: optimum-onnx 0.1 needs "
        "transformers below 4.58"
    )


SENTENCE_TRANSFORMERS = Consumer(
    "sentence-transformers",
    "sentence-transformers 6.2, backend='onnx'",
    usual,
    USUAL,
    files=(*CONFIG, json_file("tokenizer_config.json"), _modules),
    graph=(*ALWAYS, feeds(*TEXT), *SIZES, output("last_hidden_state", rank=3)),
    notes=(_assumes_mean, _not_installable, needs_runtime),
)


def _infinity_opens(folder: HubFolder) -> tuple[str, ...]:
    """The last of those that say quantize; of all, where none does."""
    return tuple(f for f in folder.onnx_files if "quantize" in PurePosixPath(f).name) or (
        folder.onnx_files
    )


def _infinity_choice(folder: HubFolder) -> str:
    found = _infinity_opens(folder)
    if len(found) < 2:
        return ""
    return (
        f"it opens one of {', '.join(found)}, whichever the disk lists last: keep one .onnx file, "
        "or one whose name contains quantize"
    )


INFINITY = Consumer(
    "infinity",
    "infinity-emb 0.0.78, engine optimum, on CPUs",
    _infinity_opens,
    ".onnx file",
    files=(
        *CONFIG,
        key("config.json", int, "max_position_embeddings"),
        json_file("tokenizer_config.json"),
        _infinity_choice,
    ),
    graph=(*ALWAYS, feeds(*TEXT), *SIZES, task_output("last_hidden_state")),
    notes=(needs_runtime,),
)


# chromadb


def _chroma_place(folder: HubFolder, graph: Graph) -> str:
    beside = "".join(f", {name}" for name in graph.weights)
    return (
        f"copy the six files{beside} into ~/.cache/chroma/onnx_models/all-MiniLM-L6-v2/onnx: they "
        "replace its default embedder"
    )


CHROMADB = Consumer(
    "chromadb",
    "chromadb 1.5, its default embedding function",
    usual,
    USUAL,
    files=(
        present("config.json"),
        present("special_tokens_map.json"),
        present("tokenizer_config.json"),
        json_file("tokenizer.json"),
        present("vocab.txt", "copy it from the source model; its text is not read"),
    ),
    # Token types are always fed, so their own value may be of any size.
    graph=(weights, known_operators, accepts(*TEXT), feeds(*TEXT), *SIZES, first_output(3)),
    notes=(_chroma_place, needs_runtime),
)


# Java


def _from_path(folder: HubFolder, graph: Graph) -> str:
    return "give the model's path, no stream: its weights are beside it" if graph.weights else ""


LANGCHAIN4J = Consumer(
    "langchain4j",
    "langchain4j-embeddings, OnnxEmbeddingModel",
    usual,
    USUAL,
    files=(json_file("tokenizer.json"),),
    graph=(*ALWAYS, *FED, first_output(3, float32=True)),
    notes=(_from_path, needs_runtime),
)


def _spring_runtime(folder: HubFolder, graph: Graph) -> str:
    need = floor(graph)
    if need is None or need.version <= (1, 19):
        return ""
    return f"Spring AI 1.1 brings ONNX Runtime 1.19: set onnxruntime.version, this needs {need}"


SPRING_AI = Consumer(
    "spring-ai",
    "spring-ai-transformers, TransformersEmbeddingModel",
    usual,
    USUAL,
    files=(json_file("tokenizer.json"),),
    graph=(
        *ALWAYS,
        inside,
        feeds(*TEXT),
        *SIZES,
        output("last_hidden_state", rank=3, float32=True),
    ),
    notes=(_spring_runtime,),
)


def _vespa_inputs(folder: HubFolder, graph: Graph) -> str:
    """One input, or two, or three, in this order."""
    if len(graph.inputs) > len(TEXT):
        return unfed(graph, [n for n in graph.inputs if n not in TEXT], TEXT)
    for name in TEXT[: len(graph.inputs)]:
        if name not in graph.inputs:
            return (
                f"{graph.file} has {len(graph.inputs)} inputs and none is called {name}: name it "
                "in services.xml (transformer-input-ids and so on)"
            )
    return ""


VESPA = Consumer(
    "vespa",
    "vespa, hugging-face-embedder",
    usual,
    USUAL,
    files=(json_file("tokenizer.json"),),
    graph=(*ALWAYS, _vespa_inputs, any_size, output("last_hidden_state", rank=3)),
    notes=(needs_runtime,),
)
