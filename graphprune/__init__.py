"""graphprune compiles a PyTorch model into a smaller, faster one, and verifies each step."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.api import Compiled as Compiled
    from graphprune.api import compile as compile
    from graphprune.api import inspect as inspect
    from graphprune.api import load as load
    from graphprune.api import open as open
    from graphprune.errors import GraphPruneError as GraphPruneError
    from graphprune.ir.program import Program as Program
    from graphprune.report.report import Report as Report
    from graphprune.training.spec import Training as Training

__version__ = "0.1.0"

__all__ = [
    "Compiled",
    "GraphPruneError",
    "Program",
    "Report",
    "Training",
    "__version__",
    "compile",
    "inspect",
    "load",
    "open",
]

_HOMES = {
    "Compiled": "graphprune.api",
    "compile": "graphprune.api",
    "inspect": "graphprune.api",
    "load": "graphprune.api",
    "open": "graphprune.api",
    "GraphPruneError": "graphprune.errors",
    "Program": "graphprune.ir.program",
    "Report": "graphprune.report.report",
    "Training": "graphprune.training.spec",
}


def __getattr__(name: str) -> Any:
    # torch takes a second or two to import; `graphprune --help` does without it.
    if name not in _HOMES:
        # With name and obj the interpreter says what was probably meant.
        module = sys.modules[__name__]
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=module
        )
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
