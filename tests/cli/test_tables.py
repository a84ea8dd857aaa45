"""Tables: how figures are written."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from graphprune.cli.tables import timing_table


def test_times_have_three_digits_and_no_exponent_and_name_the_clock() -> None:
    timing: dict[str, Any] = {"batch": "8x128", "threads": 1, "clock": "cpu"}
    for name, values in (("dense", (1013.4, 999.9, 1e4)), ("pruned", (99.96, 0.01234, 12.34))):
        for key, value in zip(("_ms", "_low_ms", "_high_ms"), values, strict=True):
            timing[f"{name}{key}"] = value
    console = Console(width=120)
    with console.capture() as shown:
        console.print(timing_table(timing))
    for text in ("1,010 ms", "1,000 to 10,000", "100 ms", "0.0123 to 12.3", "CPU time"):
        assert text in shown.get()
