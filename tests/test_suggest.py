"""Errors that say what was probably meant."""

import pickle

import pytest

import graphprune
from graphprune.errors import OptionError, RecipeError
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneHeads
from graphprune.suggest import suggest


def test_suggest_says_when_there_is_nothing() -> None:
    assert suggest("x", []) == "there are none"


def test_a_pass_names_the_option_that_was_probably_meant() -> None:
    with pytest.raises(RecipeError, match="'prune-heads' has no option 'ration'; did you mean 'r"):
        PruneHeads(ration=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="required"):
        PruneHeads()  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(PruneHeads(0.5))) == PruneHeads(ratio=0.5)


def test_compile_names_the_argument_that_was_probably_meant() -> None:
    model, inputs = tiny("tiny-mlp")
    with pytest.raises(OptionError, match=r"graphprune.compile has no option 'calibrations'; did"):
        graphprune.compile(model, [], example_inputs=inputs, calibrations=[])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean 'example_inputs'"):
        graphprune.compile(model, [], example_input=inputs)  # type: ignore[call-arg]


def test_a_pass_given_as_a_recipe_is_explained() -> None:
    model, inputs = tiny("tiny-mlp")
    with pytest.raises(RecipeError, match=r"'prune-heads' is a pass: give \['prune-heads'\]"):
        graphprune.compile(model, "prune-heads", example_inputs=inputs)
    with pytest.raises(RecipeError, match="did you mean 'prune-heads'"):
        graphprune.compile(model, ["prune-haeds"], example_inputs=inputs)  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="did you mean 'prune-heads'"):
        graphprune.compile(model, "prune-haeds", example_inputs=inputs)
