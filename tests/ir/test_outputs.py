"""Of several outputs, losses, tasks and drift take the one that is the model's answer, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.exporters.runtime.drift import Drift, worst
from graphprune.ir.outputs import answer_of
from graphprune.models.tasks import runner
from graphprune.training.losses import logits_of


def test_an_answer_is_known_by_its_name() -> None:
    assert answer_of(["last_hidden_state", "sentence_embedding"]) == "sentence_embedding"
    assert answer_of(["sentence_embedding", "logits"]) == "logits"
    assert answer_of(["last_hidden_state", "pooler_output"]) is None


class Two(nn.Module):
    """One vector a token first, then one a text."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": x, self.name: x.sum(1)}


class Session:
    """The same as a session."""

    def __init__(self, name: str, optional: tuple[str, ...] = ()) -> None:
        self.names, self.optional = ["last_hidden_state", name], optional

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x", shape=["batch_size", 3, 4])]

    def get_overridable_initializers(self) -> list[Any]:
        return [SimpleNamespace(name=name, shape=[1, 1]) for name in self.optional]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.names]

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        x = feeds["x"] + feeds.get("kinds", 0)
        values = dict(zip(self.names, (x, x.sum(1)), strict=True))
        return [values[name] for name in names]


@pytest.mark.parametrize("name", ["logits", "sentence_embedding"])
def test_tasks_and_losses_take_the_answer(name: str) -> None:
    x = torch.randn(2, 3, 4)
    for model in (Two(name), Session(name)):
        torch.testing.assert_close(runner(model)({"x": x}), x.sum(1))
    torch.testing.assert_close(logits_of(Two(name)(x)), x.sum(1))
    torch.testing.assert_close(runner(Two("pooler_output"))({"x": x}), x)


def test_a_runner_feeds_what_need_not_be_fed() -> None:
    """A pair's second sentence is another segment: zeros would be another text."""
    x, kinds = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    given = {"x": x, "kinds": kinds, "unknown": x}
    assert runner(Session("logits", ("kinds",)))(given).eq(3).all()
    assert runner(Session("logits"))(given).eq(0).all()


def test_the_drift_that_decides_is_that_of_the_answer_and_the_cache() -> None:
    def of(*errors: tuple[str, float]) -> float:
        return worst([Drift(name, 1.0, error, error) for name, error in errors])

    assert of(("last_hidden_state", 0.9), ("sentence_embedding", 0.1)) == 0.1
    assert of(("logits", 0.1), ("present.0.key", 0.3)) == 0.3
    assert of(("last_hidden_state", 0.9), ("pooler_output", 0.1)) == 0.9
    assert of() == 0
