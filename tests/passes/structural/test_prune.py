"""PruneHeads, PruneNeurons and PruneAxis on tiny models: what goes, what stays, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphprune.axes import axis_groups
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import PruneAxis, PruneHeads, PruneNeurons
from graphprune.pipeline.base import Pass
from graphprune.pipeline.events import PassFinished
from graphprune.pipeline.pipeline import Pipeline

Captured = Callable[[str], Program]


def _run(program: Program, step: Pass) -> tuple[Program, PassFinished]:
    result = Pipeline([step]).run(program)
    return result.program, result.results[0]


def _shape(program: Program, name: str) -> list[int]:
    return list(program.tensors[name].shape)


def test_heads_take_their_slices_of_all_four_weights(captured: Captured) -> None:
    before = captured("tiny-bert")
    after, finished = _run(before, PruneHeads(0.5))
    for layer in range(2):
        prefix = f"encoder.layer.{layer}.attention"
        for name in ("query", "key", "value"):
            assert _shape(before, f"{prefix}.self.{name}.weight") == [32, 32]
            assert _shape(after, f"{prefix}.self.{name}.weight") == [16, 32]
            assert _shape(after, f"{prefix}.self.{name}.bias") == [16]
        assert _shape(after, f"{prefix}.output.dense.weight") == [32, 16]
        assert _shape(after, f"{prefix}.output.dense.bias") == [32]
    report = finished.report
    assert [(g["role"], g["before"], g["after"]) for g in report["groups"]] == [("head", 4, 2)] * 2
    assert report["parameters_before"] - report["parameters_after"] == 2 * 2 * 1048
    assert report["verification"]["max_error"] <= 1e-5


def test_the_weakest_heads_go(captured: Captured) -> None:
    program = captured("tiny-bert")
    name = "encoder.layer.0.attention.output.dense.weight"
    weight = program.tensors[name].clone()
    weight[:, 8:16] *= 10
    weight[:, 24:32] *= 10
    strong = program.with_tensors({name: weight})
    after, finished = _run(strong, PruneHeads(0.5, targets=("encoder.layer.0",)))
    assert list(finished.report["kept"].values()) == [[1, 3]]
    torch.testing.assert_close(
        after.tensors[name], torch.cat([weight[:, 8:16], weight[:, 24:32]], 1)
    )
    assert _shape(after, "encoder.layer.1.attention.self.query.weight") == [32, 32]


def test_whole_groups_go_under_grouped_query_attention(captured: Captured) -> None:
    after, finished = _run(captured("tiny-llama"), PruneHeads(0.5))
    assert {g["role"] for g in finished.report["groups"]} == {"kv_group"}
    attention = "model.layers.0.self_attn"
    assert _shape(after, f"{attention}.q_proj.weight") == [16, 32]
    assert _shape(after, f"{attention}.k_proj.weight") == [8, 32]
    assert _shape(after, f"{attention}.v_proj.weight") == [8, 32]
    assert _shape(after, f"{attention}.o_proj.weight") == [32, 16]


def test_queries_inside_groups_go_on_request(captured: Captured) -> None:
    after, _ = _run(captured("tiny-llama"), PruneHeads(0.5, queries_per_group=True))
    attention = "model.layers.0.self_attn"
    assert _shape(after, f"{attention}.q_proj.weight") == [16, 32]
    assert _shape(after, f"{attention}.k_proj.weight") == [16, 32]


def test_the_last_head_stays(captured: Captured) -> None:
    after, finished = _run(captured("tiny-bert"), PruneHeads(0.99))
    assert [g["after"] for g in finished.report["groups"]] == [1, 1]
    again = Pipeline([PruneHeads(0.3)])
    with pytest.raises(UnsupportedError, match="no axis group with role head or kv group"):
        again.run(after)


def test_neurons_take_rows_and_columns(captured: Captured) -> None:
    after, finished = _run(captured("tiny-mlp"), PruneNeurons(0.25))
    assert _shape(after, "layers.0.weight") == [24, 12]
    assert _shape(after, "layers.2.weight") == [18, 24]
    assert _shape(after, "layers.4.weight") == [5, 18]
    assert finished.modified


def test_channels_between_convolutions_are_neurons(captured: Captured) -> None:
    after, _ = _run(captured("tiny-cnn"), PruneNeurons(0.5))
    assert _shape(after, "inner.weight") == [16, 16, 3, 3]
    assert _shape(after, "inner_norm.running_var") == [16]
    assert _shape(after, "outer.weight") == [16, 16, 3, 3]


def test_kept_counts_round_up(captured: Captured) -> None:
    after, _ = _run(captured("tiny-mlp"), PruneNeurons(0.4, round_to=8))
    assert _shape(after, "layers.0.weight") == [24, 12]  # 32 - 13 = 19 -> 24
    assert _shape(after, "layers.2.weight") == [16, 24]  # 24 - 10 = 14 -> 16


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 0.1, "round_to": 64}])
def test_nothing_to_remove_returns_the_same_program(
    captured: Captured, options: dict[str, Any]
) -> None:
    before = captured("tiny-mlp")
    after, finished = _run(before, PruneNeurons(**options))
    assert after is before
    assert not finished.modified
    assert all("keep all units" in s["reason"] for s in finished.report["skipped"])


def test_global_allocation_may_cut_groups_unevenly(captured: Captured) -> None:
    program = captured("tiny-mlp")
    weight = program.tensors["layers.2.weight"].clone()
    # A few outstanding units make the others of their group relatively weak.
    weight[:4] *= 50
    after, _ = _run(
        program.with_tensors({"layers.2.weight": weight}), PruneNeurons(0.25, allocation="global")
    )
    assert _shape(after, "layers.0.weight") == [32, 12]
    # A quarter of all units would be 14; of their parameters it is 13 of these, which cost more.
    assert _shape(after, "layers.2.weight") == [11, 32]


@pytest.mark.parametrize("role", ["qk_dim", "v_dim"])
def test_dimensions_inside_heads_can_go(captured: Captured, role: str) -> None:
    before = captured("tiny-bert")
    after, finished = _run(before, PruneAxis(0.5, role=role))
    cut = "value" if role == "v_dim" else "query"
    whole = "query" if role == "v_dim" else "value"
    assert _shape(after, f"encoder.layer.0.attention.self.{cut}.weight") == [16, 32]
    assert _shape(after, f"encoder.layer.0.attention.self.{whole}.weight") == [32, 32]
    assert finished.report["verification"]["max_error"] <= 1e-5


def test_one_group_by_its_id(captured: Captured) -> None:
    before = captured("tiny-mlp")
    after, _ = _run(before, PruneAxis(0.5, groups=("layers.2.weight[0]",)))
    assert _shape(after, "layers.0.weight") == [32, 12]
    assert _shape(after, "layers.2.weight") == [12, 32]


def test_normalized_axes_report_their_drift(captured: Captured) -> None:
    after, finished = _run(captured("tiny-vit"), PruneAxis(0.25, role="residual", normalized=True))
    assert _shape(after, "vit.layers.0.mlp.fc1.weight") == [64, 24]
    verification = finished.report["verification"]
    assert verification["drift"] > 1e-3
    assert "max_error" not in verification


def test_several_roles_at_once(captured: Captured) -> None:
    _, finished = _run(captured("tiny-bert"), PruneAxis(0.5, role=("head", "neuron")))
    assert {g["role"] for g in finished.report["groups"]} == {"head", "neuron"}


def test_parameters_fall_by_what_the_axes_say(captured: Captured) -> None:
    before = captured("tiny-gpt2")
    after, finished = _run(before, PruneHeads(0.5))
    expected = axis_groups(before).num_parameters(finished.report["kept"])
    assert after.num_parameters() == expected < before.num_parameters()


def test_heads_of_a_model_without_attention_are_refused(captured: Captured) -> None:
    with pytest.raises(UnsupportedError, match=r"role head or kv group .* neuron \(2\)"):
        _run(captured("tiny-mlp"), PruneHeads(0.5))


@pytest.mark.parametrize("cls", [PruneHeads, PruneNeurons])
@pytest.mark.parametrize("ratio", [1, 1.0, -0.5, float("nan"), float("inf"), "0.5", None, True])
def test_ratios_out_of_range_are_refused_at_once(cls: Any, ratio: Any) -> None:
    with pytest.raises(RecipeError, match="ratio"):
        cls(ratio)


def test_a_pruned_program_can_be_pruned_again(captured: Captured) -> None:
    once, _ = _run(captured("tiny-bert"), PruneHeads(0.5))
    twice, finished = _run(once, PruneHeads(0.5))
    assert [g["after"] for g in finished.report["groups"]] == [1, 1]
    assert _shape(twice, "encoder.layer.0.attention.self.query.weight") == [8, 32]
