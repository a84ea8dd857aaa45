"""The command line: arguments in, progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import logging
from collections.abc import Callable

from graphprune.cli import app
from graphprune.cli.budget import device_kit_command, front_command
from graphprune.cli.catalog import models_command, passes_command, recipes_command
from graphprune.cli.check import check_command
from graphprune.cli.compare import compare_command
from graphprune.cli.compile import compile_command
from graphprune.cli.demo import demo_command
from graphprune.cli.evaluate import eval_command
from graphprune.cli.generate import generate_command
from graphprune.cli.inspect import inspect_command
from graphprune.cli.sensitivity import sensitivity_command
from graphprune.cli.timing import bench_command

# In the order of --help.
_COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect_command,
    "compile": compile_command,
    "front": front_command,
    "device-kit": device_kit_command,
    "bench": bench_command,
    "compare": compare_command,
    "generate": generate_command,
    "eval": eval_command,
    "sensitivity": sensitivity_command,
    "check": check_command,
    "passes": passes_command,
    "recipes": recipes_command,
    "models": models_command,
    "demo": demo_command,
}
for _name, _command in _COMMANDS.items():
    app.app.command(_name)(app.guarded(_command))


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    app.app()
