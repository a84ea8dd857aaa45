"""What every test can use: seeded randomness, captured tiny models, the folder of real data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.capture.capture import capture
from graphprune.ir.batches import second_sizes
from graphprune.ir.program import Argument, Entry, Program
from graphprune.models.zoo.tiny import tiny

if TYPE_CHECKING:
    from graphprune.exporters import Artifact

torch.set_num_threads(1)


class Breaks:
    """Training batches that stop the run at one of them, once."""

    class Stops(Exception):
        """What they raise."""

    def __init__(self, data: Sequence[Any], at: int) -> None:
        self.data, self.left = data, at

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left == 0:
                raise self.Stops
            self.left -= 1
            yield batch


@pytest.fixture(scope="session")
def breaks() -> type[Breaks]:
    """Batches with an interruption: `breaks(batches, at)` raises `breaks.Stops`."""
    return Breaks


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@functools.cache
def _captured(name: str) -> Program:
    model, inputs = tiny(name)
    return capture(model, inputs)


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Program]:
    """The captured program of a tiny model, by name; programs are values, so tests may share it."""
    return _captured


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets, from GRAPHPRUNE_DATA; tests that need it skip without."""
    named = os.environ.get("GRAPHPRUNE_DATA")
    folder = Path(named or "")
    if not named or not folder.is_dir():
        pytest.skip(f"GRAPHPRUNE_DATA is {named!r}: set it to the folder of data sets to run this")
    return folder


def _written(
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    write: Callable[[fx.Graph, dict[str, fx.Node]], Any],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    graph = fx.Graph()
    node = {name: graph.placeholder(name) for name in inputs}
    node |= {name: graph.create_node("get_attr", name) for name in tensors}
    outputs, out_spec = pytree.tree_flatten(write(graph, node))
    graph.output(tuple(outputs))
    leaf = pytree.tree_flatten(0)[1]
    entry = Entry(
        graph=graph,
        arguments=tuple(Argument(name, leaf, (name,)) for name in inputs),
        out_spec=out_spec,
        example=tuple(inputs.values()),
        dynamic=dynamic or {},
        second=second_sizes(tuple(inputs), tuple(inputs.values()), dynamic or {})[0],
    )
    parameters = frozenset(n for n, t in tensors.items() if t.is_floating_point())
    return Program(tensors, parameters, {}, {"forward": entry}).with_graphs({})


@pytest.fixture(scope="session")
def program_of() -> Callable[..., Program]:
    """A Program written by hand: `program_of(tensors, inputs, write)`.

    `write(graph, node)` gets a node for each input and tensor by name, and returns the outputs, a
    tuple or a dict of nodes. `dynamic` names the sizes of inputs that may change.
    """
    return _written


@functools.cache
def _ragged() -> Program:
    import transformers

    from graphprune.axes import axis_groups
    from graphprune.capture.decoder import with_decode
    from graphprune.models.loading.inputs import text_batch
    from graphprune.models.zoo.tiny import randomize
    from graphprune.rewrite.shrink import shrink

    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: Any = transformers.LlamaForCausalLM(config)
        model = made.eval()
        randomize(model)
        inputs = text_batch(99, 12)
    program = with_decode(model, capture(model, inputs), check=False)
    groups = axis_groups(program).with_role("kv_group")
    kept = zip(groups, ([0, 2, 3], [1, 2, 3], [0, 3]), strict=True)
    return shrink(program, {group.id: units for group, units in kept})


@pytest.fixture(scope="session")
def ragged_decoder() -> Program:
    """A decoder with a cache whose three layers keep 3, 3 and 2 of 4 key/value heads."""
    return _ragged()


@pytest.fixture(scope="session")
def ragged_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """That decoder exported, by target."""
    from graphprune.exporters import export

    @functools.cache
    def exported(target: str) -> Artifact:
        return export(_ragged(), tmp_path_factory.mktemp("ragged") / target, target=target)

    return exported
