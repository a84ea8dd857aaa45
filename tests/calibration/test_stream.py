"""Streaming: the same statistics as running everything at once, whatever changes on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, consumers, is_output_head, linear_sites
from graphprune.calibration.gram import Gram
from graphprune.calibration.stream import HELD_OUT, Stream, made_of_weights
from graphprune.capture.capture import capture
from graphprune.errors import GraphPruneError
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program

Captured = Callable[[str], Program]


def batch_of(program: Program, seed: int, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    names = program.forward.input_names
    return {n: mask if "mask" in n else ids for n in names}


def inputs_of(program: Program, node: torch.fx.Node, batch: dict[str, Tensor]) -> Tensor:
    """An activation by running the whole graph."""
    found: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(graph_module(program)).run(*(batch[n] for n in program.forward.input_names))
    value: Tensor = found[node.name]
    return value


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-llama"])
def test_rows_are_those_of_a_whole_run_without_padding(name: str, captured: Captured) -> None:
    program = captured(name)
    groups = axis_groups(program)
    batches = [batch_of(program, seed) for seed in range(3)]
    stream = Stream(program, batches)
    for group in groups.with_role("neuron"):
        seen: list[Tensor] = []
        site = consumers(groups, group)[0][0]
        stream.collect(program, [site], keep_in(seen))
        for batch, rows in zip(batches, seen, strict=True):
            whole = inputs_of(program, site.operand, batch)
            mask = batch["attention_mask"].bool()
            expected = whole.reshape(-1, whole.shape[-1])[mask.reshape(-1)]
            torch.testing.assert_close(rows, expected)


def test_later_sites_see_what_changed_before_them(captured: Captured) -> None:
    program = captured("tiny-bert")
    groups = axis_groups(program)
    batches = [batch_of(program, 0)]
    first, second = (consumers(groups, g)[0][0] for g in groups.with_role("neuron"))
    stream = Stream(program, batches)
    stream.collect(program, [first], lambda *_: None)
    changed = first.with_matrix(program, first.matrix(program) * 0.5)
    seen: list[Tensor] = []
    stream.collect(changed, [second], lambda _, rows: seen.append(rows))
    whole = inputs_of(changed, second.operand, batches[0])
    mask = batches[0]["attention_mask"].bool().reshape(-1)
    torch.testing.assert_close(seen[0], whole.reshape(-1, whole.shape[-1])[mask])


def test_what_is_held_between_blocks_is_the_hidden_state(captured: Captured) -> None:
    program = captured("tiny-bert")
    groups = axis_groups(program)
    stream = Stream(program, [batch_of(program, 0)])
    sites = [consumers(groups, g)[0][0] for g in groups.with_role("neuron")]
    stream.collect(program, [sites[0]], lambda *_: None)
    stream.collect(program, [sites[1]], lambda *_: None)
    held = {tuple(v.shape) for v in stream.states[0].values() if v.is_floating_point()}
    assert (3, 8, 32) in held
    assert not any(shape[-1] == 64 for shape in held)  # no inner activation of a feed-forward


def test_running_on_to_the_end_gives_the_outputs(captured: Captured) -> None:
    program = captured("tiny-bert")
    batch = batch_of(program, 1)
    stream = Stream(program, [batch])
    stream.advance(program, len(stream.nodes) // 2)
    expected = program.run([batch[n] for n in program.forward.input_names])
    for a, b in zip(stream.outputs(program)[0], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_experts_see_their_own_rows(captured: Captured) -> None:
    program = captured("tiny-mixtral")
    groups = axis_groups(program)
    group = groups.with_role("neuron")[0]
    found = consumers(groups, group)
    grams = {site.name: Gram.empty(len(units)) for site, units in found}
    batch = batch_of(program, 0, padded=False)
    Stream(program, [batch]).collect(
        program, [s for s, _ in found], lambda site, rows: grams[site.name].add(rows)
    )
    whole = inputs_of(program, found[0][0].operand, batch).double()
    assert sum(g.count for g in grams.values()) == len(whole)
    total = sum((g.matrix for g in grams.values()), torch.zeros(1))
    torch.testing.assert_close(total, whole.T @ whole, rtol=1e-4, atol=1e-4)


def test_a_site_is_the_same_view_for_every_storage(captured: Captured) -> None:
    """matrix(x) is what the operator computes, for linear and for the transposed storage alike."""
    for name in ("tiny-bert", "tiny-gpt2"):
        program = captured(name)
        groups = axis_groups(program)
        site = consumers(groups, groups.with_role("neuron")[0])[0][0]
        x = torch.randn(5, site.matrix(program).shape[1])
        weight = program.tensors[site.tensor]
        expected = x @ (weight if site.transposed else weight.T)
        torch.testing.assert_close(x @ site.matrix(program).T, expected)
        doubled = site.with_matrix(program, site.matrix(program) * 2)
        torch.testing.assert_close(doubled.tensors[site.tensor], weight * 2)
        assert site.bias is not None


def keep_in(seen: list[Tensor]) -> Callable[[LinearSite, Tensor], None]:
    """An observer that keeps the rows."""
    return lambda _, rows: seen.append(rows)


def nothing(site: LinearSite, rows: Tensor) -> None:
    """An observer that does not look."""


def test_batches_are_checked_before_work(captured: Captured) -> None:
    program = captured("tiny-bert")
    good = batch_of(program, 0)
    with pytest.raises(GraphPruneError, match="no batch"):
        Stream(program, [])
    with pytest.raises(GraphPruneError, match="batch 1: input 'attention_mask' is missing"):
        Stream(program, [good, {"input_ids": good["input_ids"]}])
    with pytest.raises(
        GraphPruneError,
        match=r"batch 0: input .* has 3 dimensions, and the model was captured with 2",
    ):
        Stream(program, [{k: v[..., None] for k, v in good.items()}])


def test_nan_is_named_with_its_site_and_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    program = capture(model, (torch.randn(2, 4),))
    groups = axis_groups(program)
    site = consumers(groups, groups["0.weight[0]"])[0][0]
    batches = [torch.randn(2, 4), torch.full((2, 4), float("nan"))]
    with pytest.raises(GraphPruneError, match=r"batch 1 gives NaN .* input of '2.weight'"):
        Stream(program, batches).collect(program, [site], nothing)


def test_a_mask_belongs_to_its_own_sequence(captured: Captured) -> None:
    """A decoder as long as the encoder is not masked by the encoder's mask."""
    program = captured("tiny-t5")
    ids = torch.randint(3, 99, (4, 6))
    mask = torch.ones_like(ids)
    mask[:, 1:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    counts = {}
    for group in axis_groups(program).with_role("neuron"):
        site = consumers(axis_groups(program), group)[0][0]
        seen: list[Tensor] = []
        Stream(program, [batch]).collect(program, [site], keep_in(seen))
        counts[site.name.split(".")[0]] = len(seen[0])
    assert counts == {"encoder": 4, "decoder": 24}


def test_types_and_lengths_of_batches_are_checked(captured: Captured) -> None:
    program = captured("tiny-bert")
    good = batch_of(program, 0)
    with pytest.raises(GraphPruneError, match=r"input 'input_ids' is torch.int32"):
        Stream(program, [{**good, "input_ids": good["input_ids"].int()}])
    with pytest.raises(GraphPruneError, match="has 5 for sequence, another input 8"):
        Stream(program, [{**good, "attention_mask": good["attention_mask"][:, :5]}])
    with pytest.raises(GraphPruneError, match="calibration batch 0"):
        Stream(program, [None])


def layers(prefix: str, *parts: tuple[str, ...]) -> list[list[str]]:
    return [[f"{prefix}.{i}.{name}.weight" for name in part] for i in range(2) for part in parts]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "tiny-llama",
            layers(
                "model.layers",
                tuple(f"self_attn.{n}_proj" for n in "qkvo"),
                ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            ),
        ),
        (
            "tiny-bert",
            layers(
                "encoder.layer",
                (*(f"attention.self.{n}" for n in ("query", "key", "value")),
                 "attention.output.dense"),
                ("intermediate.dense", "output.dense"),
            ),
        ),
        (
            "tiny-gpt2",
            layers("transformer.h", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
        ),
    ],
)  # fmt: skip
def test_regions_are_the_halves_of_every_layer(
    name: str, expected: list[list[str]], captured: Captured
) -> None:
    program = captured(name)
    stream = Stream(program, [batch_of(program, 0)])
    sites = linear_sites(axis_groups(program))
    inner = [site for site in sites if not is_output_head(site, program)]
    assert [[s.name for s in region] for region in stream.regions(inner)] == expected
    # The head changes no region before it.
    whole = [[s.name for s in region] for region in stream.regions(sites)]
    assert whole[: len(expected) - 1] == expected[:-1]
    assert whole[len(expected) - 1][: len(expected[-1])] == expected[-1]


def test_experts_share_a_region_with_their_router(captured: Captured) -> None:
    program = captured("tiny-mixtral")
    stream = Stream(program, [batch_of(program, 0)])
    sites = linear_sites(axis_groups(program))
    regions = stream.regions([s for s in sites if not is_output_head(s, program)])
    assert [len(region) for region in regions] == [4, 9, 4, 9]
    for i in (0, 1):
        names = [s.name.removeprefix(f"model.layers.{i}.mlp.") for s in regions[2 * i + 1]]
        assert names == [
            "gate.weight",
            *(f"experts.{n}[{e}]" for n in ("gate_up_proj", "down_proj") for e in range(4)),
        ]


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-t5", "tiny-albert", "tiny-mixtral"])
def test_regions_keep_every_site_in_its_order(name: str, captured: Captured) -> None:
    program = captured(name)
    batch = batch_of(program, 0, padded=False)
    sites = linear_sites(axis_groups(program))
    regions = Stream(program, [batch]).regions(sites)
    assert [site for region in regions for site in region] == sites
    assert all(regions)
    # Sites of one operator are never torn apart.
    nodes = [{site.node for site in region} for region in regions]
    assert sum(map(len, nodes)) == len(set().union(*nodes))


def test_visiting_region_by_region_sees_what_a_whole_visit_sees(captured: Captured) -> None:
    program = captured("tiny-bert")
    batches = [batch_of(program, seed) for seed in range(2)]
    sites = linear_sites(axis_groups(program))
    whole: dict[str, list[Tensor]] = {}
    parts: dict[str, list[Tensor]] = {}
    Stream(program, batches).collect(
        program, sites, lambda site, rows: whole.setdefault(site.name, []).append(rows)
    )
    stream = Stream(program, batches)
    for region in stream.regions(sites):
        stream.collect(
            program, region, lambda site, rows: parts.setdefault(site.name, []).append(rows)
        )
    assert whole.keys() == parts.keys()
    for name, rows in whole.items():
        for a, b in zip(rows, parts[name], strict=True):
            assert torch.equal(a, b)


def test_masks_and_tables_of_positions_are_not_made_of_weights(captured: Captured) -> None:
    program = captured("tiny-bert")
    graph = program.forward.graph
    made = made_of_weights(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            assert node not in made
    for site in linear_sites(axis_groups(program)):
        assert {site.node, site.operand} <= made


def test_a_product_that_is_scaled_is_no_linear_site() -> None:
    class Scaled(nn.Module):
        def __init__(self, alpha: float, beta: float) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
            self.alpha, self.beta = alpha, beta

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, alpha=self.alpha, beta=self.beta)

    for alpha, beta, count in ((1, 1, 1), (0.5, 1, 0), (1, 2, 0)):
        program = capture(Scaled(alpha, beta), (torch.randn(3, 6),))
        assert len(linear_sites(axis_groups(program))) == count


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(torch.relu(self.conv(x)).flatten(1))
        return result


@pytest.mark.parametrize("count", [3, 5])
def test_every_fourth_batch_is_held_out(count: int) -> None:
    """Of a product, and of a convolution whose patches overlap."""
    program = capture(Convolved().eval(), (torch.randn(4, 2, 6, 6),))
    given = [(torch.randn(4, 2, 6, 6),) for _ in range(count)]
    sites = linear_sites(axis_groups(program))
    assert [site.window is None for site in sites] == [False, True]
    found = Stream(program, given).moments(program, sites, held=True)
    plain = Stream(program, given).moments(program, sites)
    for both, whole in zip(found, plain, strict=True):
        assert whole.held is None
        torch.testing.assert_close(both.matrix, whole.matrix)
    if count < HELD_OUT:
        assert all(gram.held is None for gram in found)
        return
    alone = Stream(program, given[3:4]).moments(program, sites)
    for gram, expected in zip(found, alone, strict=True):
        assert gram.held is not None
        assert gram.held.count == expected.count
        torch.testing.assert_close(gram.held.matrix, expected.matrix)
        torch.testing.assert_close(gram.held.total, expected.total)
    both = found[1] + plain[1]
    assert both.held is not None
    torch.testing.assert_close(both.held.matrix, alone[1].matrix)
