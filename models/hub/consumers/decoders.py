"""onnxruntime-genai: decoders that generate, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphprune.models.hub.consumers.base import Consumer, FileRule
from graphprune.models.hub.consumers.folder import HubFolder
from graphprune.models.hub.consumers.graph import GROUP_QUERY, Graph, Value
from graphprune.models.hub.consumers.rules import ALWAYS, json_file, needs_runtime, unfed

CONFIG = "genai_config.json"
# model_type.h of 0.18, but for gpt2 and lfm2: it wants their caches in other tensors than these.
TYPES = (
    "chatglm", "decoder", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gptoss", "granite",
    "internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phimoe", "phi3", "phi3small",
    "qwen2", "qwen3", "smollm3",
)  # fmt: skip
# Of its tokenizers, without the suffix "Fast"; each was tried.
TOKENIZERS = (
    "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "CodeLlamaTokenizer",
    "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "CodeGenTokenizer",
    "Phi3Tokenizer", "InternLM2Tokenizer", "ChatGLMTokenizer", "BaichuanTokenizer", "T5Tokenizer",
    "XLMRobertaTokenizer", "DebertaV2Tokenizer", "MarianTokenizer", "WhisperTokenizer",
    "CLIPTokenizer",
)  # fmt: skip
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def _names(folder: HubFolder, which: str, defaults: Mapping[str, str]) -> dict[str, str]:
    given = folder.json(CONFIG, "model", "decoder", which)
    return {**defaults, **{k: v for k, v in given.items() if isinstance(v, str)}}


def _opens(folder: HubFolder) -> tuple[str, ...]:
    name = folder.json(CONFIG, "model", "decoder").get("filename")
    return (name,) if isinstance(name, str) and folder.has(name) else ()


def _config(folder: HubFolder) -> str:
    problem = folder.unreadable(CONFIG)
    return f"{problem}: export a decoder for it, with target='genai'" if problem else ""


def _file(folder: HubFolder) -> str:
    if _opens(folder) or folder.unreadable(CONFIG):
        return ""
    name = folder.json(CONFIG, "model", "decoder").get("filename")
    return f"{CONFIG} names {name!r} in model.decoder.filename, which is not there: write its name"


def _type(folder: HubFolder) -> str:
    found = folder.json(CONFIG, "model").get("type")
    if folder.unreadable(CONFIG) or found in TYPES:
        return ""
    return f"{CONFIG} has model.type {found!r}, which it does not know: write 'decoder'"


def _tokenizer(folder: HubFolder) -> str:
    file = "tokenizer_config.json"
    found = folder.json(file).get("tokenizer_class")
    if found is None or str(found).removesuffix("Fast") in TOKENIZERS:
        return ""
    return (
        f"{file} has tokenizer_class {found!r}, which it does not know: write PreTrainedTokenizer"
    )


def _number(*path: str) -> FileRule:
    def rule(folder: HubFolder) -> str:
        *sections, name = path
        found = folder.json(CONFIG, *sections).get(name)
        if folder.unreadable(CONFIG) or (isinstance(found, int) and found > 0):
            return ""
        return f"{CONFIG} has no {'.'.join(path)} that is a whole number: write it"

    return rule


def _has_cache(folder: HubFolder, graph: Graph) -> str:
    if _layers(folder, graph) or folder.unreadable(CONFIG):
        return ""
    name = _names(folder, "inputs", _INPUTS)["past_key_names"]
    return f"{graph.file} has no input {name.replace('%d', '0')}: export the decoder with its cache"


def _layers(folder: HubFolder, graph: Graph) -> list[tuple[int, Value]]:
    """The layers that the graph has keys for, with their keys; gaps are allowed."""
    head, _, tail = _names(folder, "inputs", _INPUTS)["past_key_names"].partition("%d")
    found = []
    for name, value in graph.inputs.items():
        middle = name.removeprefix(head).removesuffix(tail)
        if name == f"{head}{middle}{tail}" and middle.isdecimal():
            found.append((int(middle), value))
    return sorted(found, key=lambda pair: pair[0])


def _pairs(folder: HubFolder, graph: Graph) -> Iterator[tuple[Value, str, str, str]]:
    """A layer's keys, and the names of its values and of both outputs."""
    inputs, outputs = _names(folder, "inputs", _INPUTS), _names(folder, "outputs", _OUTPUTS)
    for layer, keys in _layers(folder, graph):
        yield (
            keys,
            inputs["past_value_names"].replace("%d", str(layer)),
            outputs["present_key_names"].replace("%d", str(layer)),
            outputs["present_value_names"].replace("%d", str(layer)),
        )


def _inputs(folder: HubFolder, graph: Graph) -> str:
    names = _names(folder, "inputs", _INPUTS)
    fed = [names[k] for k in ("input_ids", "attention_mask", "position_ids")]
    cache = {n for keys, values, *_ in _pairs(folder, graph) for n in (keys.name, values)}
    return unfed(graph, [n for n in graph.inputs if n not in cache and n not in fed], fed)


def _outputs(folder: HubFolder, graph: Graph) -> str:
    if folder.unreadable(CONFIG):
        return ""
    logits = _names(folder, "outputs", _OUTPUTS)["logits"]
    wanted = [logits, *(n for _, _, *both in _pairs(folder, graph) for n in both)]
    lacking = [n for n in wanted if n not in graph.outputs]
    if not lacking:
        return ""
    return f"{graph.file} has no output {lacking[0]}: name its outputs so, or in {CONFIG}"


def _shapes(folder: HubFolder, graph: Graph) -> str:
    """Heads and width of each layer are read from the shape of its keys."""
    for keys, values, *_ in _pairs(folder, graph):
        other = graph.inputs.get(values)
        if other is None:
            return f"{graph.file} has {keys.name} and no {values}: name keys and values alike"
        if keys.rank != 4:
            return f"{graph.file} takes {keys}, and four dimensions are fed: [batch, head, past, d]"
        assert keys.shape is not None
        if not all(isinstance(keys.shape[d], int) for d in (1, 3)):
            return f"{graph.file} takes {keys}: dimensions 1 and 3 must be numbers; export them so"
        if other.shape is None or [other.shape[d] for d in (1, 3)] != [
            keys.shape[1],
            keys.shape[3],
        ]:
            return f"{graph.file} takes {keys} and {other}: values must have the shape of keys"
    return ""


def _integer_types(folder: HubFolder, graph: Graph) -> str:
    names = _names(folder, "inputs", _INPUTS)
    both = [graph.inputs.get(names[k]) for k in ("attention_mask", "position_ids")]
    types = {v.dtype for v in both if v is not None}
    if len(types) < 2:
        return ""
    return (
        f"{graph.file} takes attention_mask and position_ids as {' and '.join(sorted(types))}: "
        "make them one type"
    )


def _shared_buffer(folder: HubFolder, graph: Graph) -> str:
    shared = folder.json(CONFIG, "search").get("past_present_share_buffer")
    if not shared or GROUP_QUERY in graph.operators:
        return ""
    return (
        f"{CONFIG} says past_present_share_buffer true, and {graph.file} takes the past's length "
        "from its shape: write false, or export GroupQueryAttention"
    )


def _copies(folder: HubFolder, graph: Graph) -> str:
    shared = folder.json(CONFIG, "search").get("past_present_share_buffer")
    if shared or GROUP_QUERY not in graph.operators:
        return ""
    return "past_present_share_buffer true would save a copy of the cache a token"


GENAI = Consumer(
    "genai",
    "onnxruntime-genai 0.18",
    _opens,
    "",
    files=(
        _config,
        _file,
        _type,
        _number("model", "vocab_size"),
        _number("model", "context_length"),
        json_file("tokenizer.json"),
        json_file("tokenizer_config.json"),
        _tokenizer,
    ),
    graph=(
        *ALWAYS,
        _has_cache,
        _inputs,
        _outputs,
        _shapes,
        _integer_types,
        _shared_buffer,
    ),
    notes=(_copies, needs_runtime),
)
