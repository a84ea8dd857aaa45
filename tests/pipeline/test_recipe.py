from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import RecipeError
from graphprune.passes import (
    Budget,
    FoldBatchNorm,
    FoldConstants,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    RemoveDeadNodes,
    Repeat,
)
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import builtin_recipes, dump, load, loads, to_data

TEXT = """
passes:
  - fold-batch-norm
  - prune-heads: {ratio: 0.33}
  - prune-neurons: {ratio: 0.5, round_to: 8, ignore: ["head.*"]}
"""
PASSES = [
    FoldBatchNorm(),
    PruneHeads(0.33),
    PruneNeurons(0.5, round_to=8, ignore=("head.*",)),
]


def test_yaml_mirrors_python() -> None:
    assert loads(TEXT) == PASSES


def test_a_file_a_dict_and_a_list_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    data: list[Any] = [
        "fold-batch-norm",
        {"prune-heads": {"ratio": 0.33}},
        PruneNeurons(0.5, round_to=8, ignore=("head.*",)),
    ]
    assert load(path) == load(str(path)) == load({"passes": data}) == load(data) == PASSES


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_built_in_recipes_load_and_say_what_they_do(name: str) -> None:
    assert load(name)
    assert builtin_recipes()[name].endswith(".")
    assert loads(dump(load(name))) == load(name)


def test_the_documented_recipes_exist() -> None:
    assert {"gentle", "half", "small", "clean"} <= set(builtin_recipes())


def test_nested_passes_round_trip() -> None:
    nested: list[Pass] = [Repeat((FoldConstants(max_growth=0), RemoveDeadNodes()), at_most=3)]
    assert loads(dump(nested)) == nested


def test_a_function_in_a_pass_is_named_in_plain_data() -> None:
    step = Budget(max_drop=0.1, task=dump)
    assert to_data([step]) == [
        {"budget": {"max_drop": 0.1, "task": "graphprune.pipeline.recipe.dump"}}
    ]


def test_only_what_differs_from_the_default_is_written() -> None:
    assert dump([RemoveDeadNodes(), PruneHeads(0.5)]) == (
        "passes:\n- remove-dead-nodes\n- prune-heads: {ratio: 0.5}\n"
    )


_names = st.lists(st.sampled_from(["a.*", "re:b+", "c.weight"]), max_size=3).map(tuple)


@settings(deadline=None)
@given(
    ratio=st.floats(0, 1, exclude_max=True),
    score=st.sampled_from(["magnitude", "random"]),
    allocation=st.sampled_from(["uniform", "global"]),
    round_to=st.integers(1, 64),
    targets=_names,
    ignore=_names,
    role=st.sampled_from(["neuron", ("head", "qk_dim")]),
)
def test_load_after_dump_is_the_same(role: Any, **options: Any) -> None:
    passes = [PruneHeads(**options), PruneNeurons(**options), PruneAxis(role=role, **options)]
    assert loads(dump(passes)) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [prune-haeds]", r"pass 1: there is no pass 'prune-haeds'; .*'prune-heads'"),
        ("passes: [{prune-heads: {ratoi: 0.5}}]", r"no option 'ratoi'; did you mean 'ratio'"),
        ("passes: [{prune-heads: {zzz: 1}}]", r"It takes \['allocation', "),
        ("passes: [prune-heads]", r"'prune-heads' needs a value for \['ratio'\]"),
        ("passes: [{prune-heads: {ratio: half}}]", "must be a number, got 'half'"),
        ("passes: [{prune-heads: {ratio: 50%}}]", "must be a number, got '50%': write 0.5$"),
        ("passes: [{prune-heads: {ratio: '0.5'}}]", "got '0.5': write 0.5$"),
        ("passes: [{finetune: {lr: 1e-5}}]", "got '1e-5': write 1.0e-05$"),
        ("passes: [{finetune: {epochs: '2'}}]", "must be a whole number, got '2': write 2$"),
        ("passes: [{prune-heads: {ratio: 0.5, ignore: '5'}}]", "a string, got '5'$"),
        ("passes: [{prune-heads: {ratio: true}}]", "must be a number, got True"),
        ("passes: [{prune-heads: {ratio: 1.5}}]", "at least 0 and below 1, got 1.5"),
        ("passes: [{prune-heads: {ratio: -0.1}}]", "at least 0 and below 1"),
        ("passes: [{prune-heads: {ratio: .nan}}]", "at least 0 and below 1"),
        ("passes: [{prune-heads: {ratio: 0.5, round_to: 2.5}}]", "must be a whole number"),
        ("passes: [{prune-heads: {ratio: 0.5, round_to: 0}}]", "round_to must be at least 1"),
        ("passes: [{prune-axis: {ratio: 0.5, normalised: true}}]", "did you mean 'normalized'"),
        (
            "passes: [{prune-heads: {ratio: 0.5, targets: a.b}}]",
            "must be a list, each item a string",
        ),
        ("passes: [{prune-heads: {ratio: 0.5, targets: [1]}}]", "must be a string, got 1"),
        ("passes: [{prune-heads: {ratio: 0.5, targets: ['re:(']}}]", "no regular expression"),
        ("passes: [{prune-heads: {ratio: 0.5, score: taylro}}]", "there is no score 'taylro'"),
        ("passes: [{prune-heads: {ratio: 0.5, allocation: globl}}]", "did you mean 'global'"),
        ("passes: [{prune-heads: 0.5}]", r"takes options such as \{ratio: 0.5\}, got 0.5"),
        ("passes: [{prune-axis: {ratio: 0.5}}]", "needs to know what to cut"),
        ("passes: [{prune-axis: {ratio: 0.5, role: haed}}]", "did you mean 'head'"),
        ("passes: [{prune-axis: {ratio: 0.5, role: 3}}]", "a string or a list, each item a string"),
        ("passes: [{repeat: {passes: []}}]", "at least one pass"),
        ("passes: [{repeat: {passes: [remove-dead-nods]}}]", "remove-dead-nodes"),
        ("passes: [3]", r"must be a pass name or \{name: options\}, got 3"),
        ("passes: [{a: 1, b: 2}]", "must be a pass name"),
        ("passes: prune-heads", "with a list of passes, got 'prune-heads'"),
        ("passses: []", "no key 'passses'"),
        ("", "needs 'passes:'"),
        ("{", "is not valid YAML"),
        ("passes: [!!python/object/apply:os.getcwd []]", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loads(text)


def test_an_unknown_recipe_names_near_matches() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'hafl', .* did you mean 'half'"):
        load("hafl")


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(path)
