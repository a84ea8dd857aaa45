"""Fail where the inner loop of a kernel keeps vectors on the stack: such a loop is 2x slower.

    python check_spills.py OBJDUMP FILE.o PRODUCT

PRODUCT is the instruction that multiplies. An inner loop goes from the target of a jump back to
the jump, without another such jump between.
"""

from __future__ import annotations

import re
import subprocess
import sys

STACK = re.compile(r"[xyz]mm.*\(%r[sb]p|\(%r[sb]p.*[xyz]mm|\b[qv]\d+.*\[(sp|x29)")


def main() -> int:
    """Print each spill; returns the exit status."""
    tool, path, product = sys.argv[1:]
    out = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    loops = [loop for loop in inner_loops(out) if any(product in line for line in loop)]
    spills = [line for loop in loops for line in loop if STACK.search(line)]
    print(f"{path}: {len(loops)} inner loops with {product}, {len(spills)} spills")
    print("\n".join(spills))
    return 1 if spills or not loops else 0


def inner_loops(listing: str) -> list[list[str]]:
    """The instructions of each innermost loop."""
    found = []
    for function in re.split(r"\n\n", listing):
        lines = [m.groups() for m in re.finditer(r"^ +([0-9a-f]+):\t(.*)$", function, re.MULTILINE)]
        places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        spans = list(_jumps_back([text for _, text in lines], places))
        for first, last in spans:
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
                found.append([text for _, text in lines[first : last + 1]])
    return found


def _jumps_back(lines: list[str], places: dict[int, int]) -> list[tuple[int, int]]:
    spans = []
    for i, text in enumerate(lines):
        jump = re.match(r"(?:j\w+|b\.?\w*|cbn?z|tbn?z)\s+(?:[^<]*,\s*)?([0-9a-f]+) <", text)
        target = places.get(int(jump[1], 16)) if jump else None
        if target is not None and target <= i:
            spans.append((target, i))
    return spans


if __name__ == "__main__":
    sys.exit(main())
