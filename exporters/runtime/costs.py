"""Costs measured on this machine, kept in a folder: a JSON file for each signature."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch

from graphprune.exporters.runtime.probe import cpu
from graphprune.pipeline.device import Cost

_log = logging.getLogger(__name__)

LASTS = 30 * 24 * 3600  # seconds: drivers, kernels and clock rates change


def machine() -> dict[str, Any]:
    """The CPU, by `probe.cpu`, and what this process may use of it, for a cache's key.

    A hypervisor, or a library loaded before this one, can hide instructions that /proc/cpuinfo
    lists; "capabilities" are those that the CPUID instruction names in this process.
    """
    # Older versions of torch name the widest vectors alone.
    known = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    found = sorted(name for name, has in known.items() if has is True)
    return {**cpu(), "capabilities": found or [torch.backends.cpu.get_cpu_capability()]}


def check_cost(cost: Cost) -> None:
    """Refuse a cost from a file that is not made of positive numbers.

    Raises:
        ValueError: a number is not positive and finite.
    """
    numbers = (cost.ms, cost.low, cost.high, cost.bytes)
    if not all(isinstance(n, int | float) and 0 < n < math.inf for n in numbers):
        raise ValueError(f"{cost} has a number that is not positive")


@final
class Costs:
    """A folder of costs. What is damaged is measured again, with one warning."""

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        """Costs of one environment.

        Args:
            folder: made when it is first written to; other environments may use it too.
            environment: what times depend on beside the signature, as JSON.
        """
        self._folder, self._environment = folder, dict(environment)
        self._warned = False

    def read(self, signatures: Iterable[str]) -> dict[str, Cost]:
        """Those that are known and not older than 30 days."""
        found: dict[str, Cost] = {}
        damaged = []
        for signature in signatures:
            path = self._path(signature)
            try:
                found |= self._entry(path, signature)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError) as e:
                damaged.append(f"{path.name} ({e})")
        if damaged:
            self._warn(f"{len(damaged)} files cannot be read, such as {damaged[0]}")
        return found

    def _entry(self, path: Path, signature: str) -> dict[str, Cost]:
        data = json.loads(path.read_text(encoding="utf-8"))
        cost = Cost(**data["cost"])
        check_cost(cost)
        if (data["signature"], data["environment"]) != (signature, self._environment):
            raise ValueError("it is about something else")
        return {signature: cost} if 0 <= time.time() - data["time"] < LASTS else {}

    def write(self, costs: Mapping[str, Cost]) -> None:
        """Keep these, each file whole or not at all."""
        try:
            for signature, cost in costs.items():
                self._folder.mkdir(parents=True, exist_ok=True)
                text = {
                    "signature": signature,
                    "environment": self._environment,
                    "time": time.time(),
                    "cost": asdict(cost),
                }
                self._write(self._path(signature), json.dumps(text, indent=1))
        except OSError as e:
            self._warn(f"it cannot be written ({e.strerror or e})")

    def _write(self, path: Path, text: str) -> None:
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=self._folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise

    def _path(self, signature: str) -> Path:
        key = json.dumps([signature, self._environment], sort_keys=True)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _warn(self, what: str) -> None:
        if not self._warned:
            _log.warning(
                "the costs kept in %r are not used: %s; remove the folder, or set "
                "$GRAPHPRUNE_CACHE to another one",
                str(self._folder),
                what,
            )
        self._warned = True
