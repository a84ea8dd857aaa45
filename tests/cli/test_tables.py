"""Tables: how figures are written."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from graphprune.cli.tables import memory_table, timing_table


def test_times_have_three_digits_and_no_exponent_and_name_machine_and_clock() -> None:
    timing: dict[str, Any] = {"batch": "8x128", "threads": 1, "clock": "cpu", "cpu": "EPYC"}
    for name, values in (("dense", (1013.4, 999.9, 1e4)), ("pruned", (99.96, 0.01234, 12.34))):
        for key, value in zip(("_ms", "_low_ms", "_high_ms"), values, strict=True):
            timing[f"{name}{key}"] = value
    console = Console(width=120)
    with console.capture() as shown:
        console.print(timing_table(timing))
    for text in (
        "1,010 ms",
        "1,000 to 10,000",
        "100 ms",
        "0.0123 to 12.3",
        "1 thread of EPYC, CPU time",
    ):
        assert text in shown.get()


def test_memory_that_is_unknown_is_no_number() -> None:
    known = {"load_ms": 111.6, "peak_bytes": 195_000_000, "private_bytes": 31_200_000}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(memory_table({"dense": known, "pruned": {**known, "private_bytes": None}}))
    dense, pruned = (line for line in shown.get().splitlines() if " MB" in line)
    assert "112 ms" in dense
    assert "195 MB" in dense
    assert "31.2 MB" in dense
    assert pruned.count("MB") == 1
