"""load_model: a name, a folder, a hub id or own.py:factory -> a model ready for capture."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.models.hub.source import tokenizer_files
from graphprune.models.loading.inputs import example_inputs, text_batch, with_segments
from graphprune.models.loading.loaded import LoadedModel
from graphprune.models.loading.names import (
    BUILT_IN,
    check_name,
    hub_answers,
    near,
    own_source,
    unreachable,
)
from graphprune.models.loading.names import builtin_names as builtin_names
from graphprune.models.loading.own import from_factory
from graphprune.models.zoo import tiny
from graphprune.models.zoo.sentence import SentenceEncoder

_log = logging.getLogger(__name__)

_BERT_VOCABULARY = 30522


def load_model(
    name: str,
    *,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedModel:
    """Load a model by built-in name, folder, hub id, or the function in a file that makes it.

    A built-in name wins over a folder and a hub id of the same name.

    Args:
        name: for instance "minilm", "./my-model", "distilbert-base-uncased" or "own.py:factory",
            see `from_factory`, which runs that file.
        allow_pickle: load pickled weights (.bin) too. Reading a pickle can run any code in it.
        progress: called with (done, total) while a built-in model is trained the first time.

    Raises:
        GraphPruneError: there is no such model, or it cannot be loaded or fed.
    """
    check_name(name, allow_pickle)
    own = own_source(name)
    if own is not None:
        return from_factory(name, *own)
    with _quiet():
        if name in _LOADERS:
            return _LOADERS[name](progress)
        if name in BUILT_IN:
            module, inputs = tiny.tiny(name)
            return LoadedModel(module, inputs, name)
        return _pretrained(name, allow_pickle)


def _minilm(progress: Callable[[int, int], None]) -> LoadedModel:
    from graphprune.models.loading.packaged import minilm

    module, folder = minilm()
    return LoadedModel(
        module,
        with_segments(text_batch(_BERT_VOCABULARY, 32)),
        "minilm",
        tokenizer_dir=folder,
        task="neighbors",
        source="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
    )


def _smollm2(progress: Callable[[int, int], None]) -> LoadedModel:
    from graphprune.models.loading.packaged import smollm2

    found = _pretrained(str(smollm2()), allow_pickle=False)
    return LoadedModel(
        found.module,
        found.example_inputs,
        "smollm2",
        found.tokenizer_dir,
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    )


def _digits_vit(progress: Callable[[int, int], None]) -> LoadedModel:
    from graphprune.models.zoo.digits import digits, trained_vit

    module = trained_vit(progress)
    images, _ = digits("test")
    return LoadedModel(module, {"pixel_values": images[:3]}, "digits-vit", task="digits")


_LOADERS: dict[str, Callable[[Callable[[int, int], None]], LoadedModel]] = {
    "minilm": _minilm,
    "smollm2": _smollm2,
    "digits-vit": _digits_vit,
}


def _pretrained(name: str, allow_pickle: bool) -> LoadedModel:
    local = Path(name).expanduser()
    source = str(local) if local.is_dir() else name
    if not local.is_dir() and not hub_answers():
        # What was downloaded before still loads; without this, minutes of retries come first.
        with _offline():
            return _from_source(name, source, allow_pickle)
    return _from_source(name, source, allow_pickle)


def _from_source(name: str, source: str, allow_pickle: bool) -> LoadedModel:
    config = _config(source)
    pooling = _pooling(source)
    model = _weights(source, config, allow_pickle, headless=pooling is not None)
    tokenizer_dir, tokenizer_inputs = _tokenizer(source)
    if pooling is None:
        inputs = example_inputs(model, config, tokenizer_inputs)
        _check_runs(name, model, inputs)
        return LoadedModel(model, inputs, name, tokenizer_dir)
    encoder = SentenceEncoder(model, *pooling).eval()
    inputs = example_inputs(model, config, ("token_type_ids",))
    _check_runs(name, encoder, inputs)
    return LoadedModel(encoder, inputs, name, tokenizer_dir, task="neighbors")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The hub library as with HF_HUB_OFFLINE=1, which it reads at import."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise GraphPruneError(_why(source, e)) from e
    if getattr(config, "use_cache", None):
        # The forward entry takes no past and should return none.
        config.use_cache = False
    return config


def _why(source: str, error: Exception) -> str:
    """One sentence for what transformers says in a paragraph."""
    text = str(error)
    if "trust_remote_code" in text:
        return f"{source!r} needs Python code of its own, which graphprune does not run"
    if Path(source).is_dir():
        return f"the folder {source!r} cannot be loaded: {_first_sentence(text)}"
    if "connect" in text or "offline" in text.lower() or "resolve" in text.lower():
        return str(unreachable(source))
    if "safetensors" in text:
        return (
            f"{source!r} has pickled weights only, and reading a pickle can run code: "
            "pass --allow-pickle (allow_pickle=True) if you trust it"
        )
    return f"{source!r} cannot be loaded from the hub: {_first_sentence(text)}{near(source)}"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0].rstrip(".")


def _weights(source: str, config: Any, allow_pickle: bool, headless: bool) -> nn.Module:
    transformers = importlib.import_module("transformers")
    named = None if headless else next(iter(getattr(config, "architectures", None) or ()), None)
    if named is not None and getattr(config, "auto_map", None) and not hasattr(transformers, named):
        raise GraphPruneError(
            f"{source!r} needs Python code of its own, which graphprune does not run"
        )
    kind = getattr(transformers, named or "", None) or transformers.AutoModel
    try:
        # What the file lacks is drawn: the same every time, or no training could be resumed.
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            model, info = kind.from_pretrained(
                source,
                config=config,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise GraphPruneError(_why(source, e)) from e
    except Exception as e:
        # The safetensors reader raises a class of its own, on a truncated file for instance.
        if type(e).__module__.startswith(("safetensors", "builtins")):
            raise GraphPruneError(_why(source, e)) from e
        raise
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        _log.warning(
            "%s: %d weights are not in the file and were drawn at random: %s",
            source,
            len(missing),
            ", ".join(missing[:5]),
        )
    result: nn.Module = model.eval()
    return result


def _tokenizer(source: str) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of the tokenizer's files, and the inputs that the tokenizer makes."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    local = Path(source)
    if local.is_dir() and not tokenizer_files(local):
        return None, ()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        inputs = tuple(tokenizer.model_input_names)
    except Exception as e:
        # Vision and audio models have none; a broken tokenizer does not stop pruning.
        _log.info("no tokenizer for %s: %s", source, e)
        inputs = ()
    if local.is_dir():
        return local, inputs
    for file in ("tokenizer_config.json", "preprocessor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            path = cached_file(source, file)
            if path is not None:
                return Path(path).parent, inputs
    return None, inputs


def _pooling(source: str) -> tuple[str, bool] | None:
    """How a sentence-transformers model pools, and whether it normalizes; None for any other."""
    modules = _side_file(source, "modules.json")
    if not isinstance(modules, list):
        return None
    kinds = [str(m.get("type", "")).rsplit(".", 1)[-1] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        _log.warning(
            "%s: not all of its stages %s are known; only the transformer is used", source, kinds
        )
        return None
    options = _side_file(source, f"{modules[1]['path']}/config.json") or {}
    named = options.get("pooling_mode") or ()  # newer releases write this key alone
    chosen = [named] if isinstance(named, str) else [str(mode) for mode in named]
    chosen = chosen or [
        k for k, value in options.items() if k.startswith("pooling_mode_") and value
    ]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    known |= {mode: mode for mode in known.values()}
    if len(chosen) != 1 or chosen[0] not in known:
        _log.warning(
            "%s: its pooling %s is not known; only the transformer is used", source, chosen
        )
        return None
    return known[chosen[0]], "Normalize" in kinds


def _side_file(source: str, file: str) -> Any:
    """A JSON file beside the model, or None."""
    local = Path(source)
    if local.is_dir():
        path = local / file
        return json.loads(path.read_text("utf-8")) if path.is_file() else None
    from transformers.utils.hub import cached_file

    with contextlib.suppress(OSError, ValueError):
        found = cached_file(source, file)
        return json.loads(Path(found).read_text("utf-8")) if found else None
    return None


def _check_runs(name: str, module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    try:
        with torch.no_grad():
            module(**inputs)
    except Exception as e:
        raise GraphPruneError(
            f"the example inputs made for {name!r} ({', '.join(inputs)}) do not run: "
            f"{_first_sentence(str(e))}; use the Python API and give example_inputs"
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice from transformers: the command line shows its own."""
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    chatter: Any = importlib.import_module("transformers.utils.logging")

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
