"""Python files of the user's own: a function that makes a model, and one that evaluates it.

The file is run, as `python FILE` would run it: it was named for that.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.errors import GraphPruneError, first_line
from graphprune.models.loading.inputs import example_inputs
from graphprune.models.loading.loaded import LoadedModel
from graphprune.models.loading.names import check_own_file
from graphprune.suggest import suggest

_FORMS = "return a module, (module, example_inputs), or (module, example_inputs, dynamic)"


def function_in(file: Path, name: str) -> Callable[..., Any]:
    """Run a Python file and return a function that it defines.

    Files beside it can be imported by it, as with `python FILE`.

    Raises:
        GraphPruneError: there is no such file or function, or running the file raised.
    """
    check_own_file(file)
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Dataclasses look a class's module up by its name, which must not be another module's.
    spec = importlib.util.spec_from_file_location(f"_own_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise raised(f"{str(file)!r} cannot be run", e) from e
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise GraphPruneError(f"{str(file)!r} has no function {name!r}; {suggest(name, known)}")
    if not callable(function):
        raise GraphPruneError(
            f"{name!r} in {str(file)!r} is no function but a {type(function).__name__}"
        )
    return function


def from_factory(name: str, file: Path, function: str) -> LoadedModel:
    """The model that a function without arguments makes.

    It returns an nn.Module whose configuration says what it takes; (module, example_inputs), the
    inputs a dict of keyword arguments, a tuple or one tensor; or these with what `compile` takes as
    `dynamic_shapes`, such as ("height", "width").

    Args:
        name: what the user called the model.
        file: the Python file, which is run.
        function: its name in the file.

    Raises:
        GraphPruneError: the file or the function is missing, it raised, or it returned something
            else.
    """
    factory = function_in(file, function)
    try:
        made = factory()
    except Exception as e:
        raise raised(f"{function!r} in {str(file)!r} failed", e) from e
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise GraphPruneError(f"{name!r} returned {_described(made)}: {_FORMS}")
    module = parts[0].eval()
    inputs = _inputs(name, module, parts[1] if len(parts) > 1 else None)
    dynamic = parts[2] if len(parts) > 2 else "auto"
    return LoadedModel(module, inputs, name, dynamic=dynamic)


def _inputs(name: str, module: nn.Module, given: Any) -> Mapping[str, Tensor]:
    """Example inputs by the name of forward's argument."""
    if given is None:
        config = getattr(module, "config", None)
        if config is None or not hasattr(module, "main_input_name"):
            raise GraphPruneError(
                f"{name!r} returned a {type(module).__name__} without example inputs, and it has "
                "no configuration that says what it takes: return (module, example_inputs)"
            )
        return example_inputs(module, config)
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, Tensor | tuple | list):
        raise GraphPruneError(
            f"{name!r} returned example inputs of type {type(given).__name__}: give a dict of "
            "keyword arguments, a tuple, or one tensor"
        )
    arguments = (given,) if isinstance(given, Tensor) else tuple(given)
    try:
        return dict(inspect.signature(module.forward).bind(*arguments).arguments)
    except TypeError as e:
        raise GraphPruneError(
            f"{name!r} returned example inputs that do not fit {type(module).__name__}.forward: {e}"
        ) from e


def raised(what: str, error: Exception) -> GraphPruneError:
    """The error of the user's code as one of ours, with the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    if isinstance(error, SyntaxError):
        where = f" at {error.filename}:{error.lineno}"
    return GraphPruneError(f"{what}: {type(error).__name__}: {first_line(error)}{where}")


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"
