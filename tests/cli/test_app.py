"""The command line as a whole: help, version, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import Result

import graphprune.cli  # noqa: F401 (it adds the commands)
from graphprune.cli.app import app

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['graphprune', '--help']\n"
        "from graphprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "compile" in done.stdout


def test_a_fault_of_ours_is_exit_code_one(
    run: Run, sentence: Sentence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr("graphprune.cli.catalog.builtin_recipes", broken)
    result = run("recipes")
    assert result.exit_code == 1
    assert "internal error, RuntimeError: oops" in sentence(result)


def test_version(run: Run) -> None:
    import graphprune

    assert run("--version").stdout == f"graphprune {graphprune.__version__}\n"


@pytest.mark.parametrize("command", ["compile", "front", "sensitivity"])
def test_long_helps_have_panels(command: str) -> None:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    loose = {
        p.name
        for p in parameters
        if p.param_type_name == "option" and not getattr(p, "rich_help_panel", None)
    }
    assert loose <= {"out", "seed", "as_json", "allow_pickle"}
