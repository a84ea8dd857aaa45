"""Two processes that train together do what one does with batches twice as large."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import GradualStructure
from graphprune.pipeline.base import Context, Keep, PassResult
from graphprune.training.loop import Fitted, Hooks, fit
from graphprune.training.optimizer import Plan
from graphprune.training.spec import Training

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed
from safetensors.torch import save_file
from tests.training.test_distributed import data, prune, train

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
fitted = train(data(2), folder / "checkpoints")
pruned = prune(data(2))
for name, found in (("train", fitted), ("prune", pruned)):
    tensors = {n: t.contiguous() for n, t in found.program.tensors.items()}
    save_file(tensors, folder / f"{name}-{rank}.st")
found = [fitted.report["processes"], fitted.report["steps"]]
found.append([[r["loss"], r["metric"]] for r in fitted.report["epochs"]])
found.append(pruned.report["groups"])
(folder / f"{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def program() -> Program:
    """A network with a zeroed half of a weight, in float64."""
    model, inputs = tiny("tiny-mlp")
    found = capture(model, inputs).cast(torch.float32, torch.float64)
    weight = found.tensors["layers.2.weight"].clone()
    weight[::2] = 0
    zeroed = frozenset(["layers.2.weight"])
    return replace(found.with_tensors({"layers.2.weight": weight}), zeroed=zeroed)


def data(size: int) -> list[dict[str, torch.Tensor]]:
    """Fourteen examples in batches of this size; one label counts for nothing."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(14, 12, generator=drawn, dtype=torch.float64)
    labels = torch.randint(0, 5, (14,), generator=drawn)
    labels[3] = -100
    return [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(x), size)]


def train(batches: list[dict[str, torch.Tensor]], checkpoints: Path | None = None) -> Fitted:
    """Three epochs with a metric, a penalty and a cut on the way."""
    start = program()
    group = axis_groups(start).with_role("neuron")[0].id

    def after(now: Program, epoch: int) -> tuple[Program, Keep | None]:
        return now, {group: range(2, axis_groups(now)[group].size)} if epoch == 1 else None

    training = Training(batches, eval=data(5), checkpoints=checkpoints, device="cpu")
    return fit(
        start,
        training,
        Context(),
        Plan(3, 1e-2),
        Hooks(
            penalty=lambda held: 1e-3 * torch.stack([t.abs().sum() for t in held.values()]).sum(),
            after_epoch=after,
        ),
    )


def prune(batches: list[dict[str, torch.Tensor]]) -> PassResult:
    """Neurons go by the gradients of all processes, also in the round that not all have a batch."""
    start = program()
    training = Training(batches, device="cpu")
    step = GradualStructure(0.4, epochs=2, lr=1e-2, begin=0.0, end=0.8, distill=False)
    return step.run(start, Context(training=training, reference=start))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's store wants a POSIX system")
def test_two_processes_equal_one_with_doubled_batches(tmp_path: Path) -> None:
    """Seven batches for two: the last round has one of them without a batch."""
    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent.parent
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_port", str(port), str(script), str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    alone, pruned = train(data(4)), prune(data(4))
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert found == other
    processes, steps, epochs, groups = found
    assert (processes, steps) == (2, alone.report["steps"])
    assert groups == pruned.report["groups"]
    for which, single in (("train", alone.program), ("prune", pruned.program)):
        first, second = (load_file(tmp_path / f"{which}-{rank}.st") for rank in (0, 1))
        for name, expected in single.tensors.items():
            assert first[name].equal(second[name]), "the ranks do not agree"
            torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-11)
    for (_, metric), record in zip(epochs, alone.report["epochs"], strict=True):
        assert metric == record["metric"]
    assert (tmp_path / "checkpoints" / "0-fit" / "training.json").is_file()
