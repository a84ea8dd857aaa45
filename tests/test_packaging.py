"""What is listed in pyproject.toml, what is on disk and what the links say agree."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("exporters", "models", "passes")


def _settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _packages_on_disk() -> set[str]:
    """Folders with an __init__.py; os.walk does not follow the links inside graphprune/."""
    found = set()
    for top in ("graphprune", *MAPPED):
        prefix = "graphprune" if top == "graphprune" else f"graphprune.{top}"
        for folder, _, files in os.walk(ROOT / top):
            if "__init__.py" in files:
                parts = Path(folder).relative_to(ROOT / top).parts
                found.add(".".join((prefix, *parts)))
    return found


def test_every_package_is_listed() -> None:
    listed = _settings()["tool"]["setuptools"]["packages"]
    assert listed == sorted(set(listed))
    assert set(listed) == _packages_on_disk()


def test_no_folder_with_code_lacks_an_init() -> None:
    bare = [
        folder
        for top in ("graphprune", *MAPPED)
        for folder, _, files in os.walk(ROOT / top)
        if any(f.endswith(".py") for f in files) and "__init__.py" not in files
    ]
    assert bare == []


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_packages_refuse_their_bare_name(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"is part of graphprune: import graphprune.{name}" in run.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_packages_import_under_graphprune(name: str) -> None:
    module = importlib.import_module(f"graphprune.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.skipif(sys.platform == "win32", reason="git makes text files of links on Windows")
def test_links_lead_to_their_folders(name: str) -> None:
    link = ROOT / "graphprune" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_recipes_are_package_data() -> None:
    data = _settings()["tool"]["setuptools"]["package-data"]["graphprune"]
    assert {"py.typed", "recipes/*.yaml"} <= set(data)
    assert list((ROOT / "graphprune" / "recipes").glob("*.yaml"))


def test_constraints_pin_every_direct_dependency() -> None:
    project = _settings()["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=\[ ]", line)[0].lower() for line in wanted} - {"graphprune"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert names <= pinned


def test_version_is_the_installed_one() -> None:
    assert distribution("graphprune").version == _settings()["project"]["version"]
