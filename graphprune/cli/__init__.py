"""The command line: arguments in, progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.cli import app
from graphprune.cli.budget import front_command
from graphprune.cli.catalog import models_command, passes_command, recipes_command
from graphprune.cli.check import check_command
from graphprune.cli.compare import compare_command
from graphprune.cli.compile import compile_command
from graphprune.cli.demo import demo_command
from graphprune.cli.device_kit import device_kit_command
from graphprune.cli.evaluate import eval_command
from graphprune.cli.generate import generate_command
from graphprune.cli.inspect import inspect_command
from graphprune.cli.quiet import quiet_start
from graphprune.cli.sensitivity import sensitivity_command
from graphprune.cli.timing import bench_command

# In the order of --help: panel, command.
_COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "compile": (app.COMPILING, compile_command),
    "front": (app.COMPILING, front_command),
    "device-kit": (app.COMPILING, device_kit_command),
    "demo": (app.COMPILING, demo_command),
    "inspect": (app.LOOKING, inspect_command),
    "sensitivity": (app.LOOKING, sensitivity_command),
    "bench": (app.USING, bench_command),
    "eval": (app.USING, eval_command),
    "compare": (app.USING, compare_command),
    "generate": (app.USING, generate_command),
    "check": (app.USING, check_command),
    "passes": (app.LISTS, passes_command),
    "recipes": (app.LISTS, recipes_command),
    "models": (app.LISTS, models_command),
}
for _name, (_panel, _command) in _COMMANDS.items():
    app.app.command(_name, rich_help_panel=_panel)(app.guarded(_command))


def main() -> None:
    """The console script."""
    quiet_start()
    app.app()
