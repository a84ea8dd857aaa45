"""Training on a program: identities, refusals, and that nothing depends on the road taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, TrainingError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import Distill, Finetune, GradualMagnitude, RemoveNoOps, Repeat
from graphprune.pipeline.base import Context, Run
from graphprune.pipeline.events import PassProgress
from graphprune.pipeline.pipeline import Pipeline
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink, take
from graphprune.training.distributed import Workers
from graphprune.training.loop import Fitted, Hooks, fit
from graphprune.training.losses import loss_of
from graphprune.training.metrics import Metric
from graphprune.training.objective import Distillation
from graphprune.training.optimizer import MOMENTS, Optimizer, Plan, zero_masks
from graphprune.training.spec import Training

Captured = Callable[[str], Program]
Batch = dict[str, Tensor]


def _batches(count: int, size: int = 3, dtype: torch.dtype = torch.float32) -> list[Batch]:
    drawn = torch.Generator().manual_seed(7)
    return [
        {
            "x": torch.randn(size, 12, generator=drawn, dtype=torch.float64).to(dtype),
            "labels": torch.randint(0, 5, (size,), generator=drawn),
        }
        for _ in range(count)
    ]


def _fit(program: Program, data: Any = None, *, seed: int = 0, **options: Any) -> Fitted:
    own = {"loss", "eval", "checkpoints", "every", "resume", "patience"}
    training = Training(
        _batches(4) if data is None else data,
        **{k: v for k, v in options.items() if k in own},
        device="cpu",
    )
    given = {"epochs": 2, "lr": 1e-2} | {k: v for k, v in options.items() if k not in own}
    plan = Plan(**{k: given.pop(k) for k in Plan.__slots__ if k in given})
    observers = given.pop("observers", ())
    reference = given.pop("reference", None)
    ctx = Context(seed=seed, reference=reference, run=Run(observers=observers))
    ctx.begin("finetune", 0)
    hooks = Hooks(**{k: given.pop(k) for k in Hooks.__slots__ if k in given})
    return fit(program, training, ctx, plan, hooks, **given)


def _same(a: Program, b: Program) -> bool:
    return all(t.equal(b.tensors[name]) for name, t in a.tensors.items())


def _float64(program: Program) -> Program:
    return program.cast(torch.float32, torch.float64)


def _zeroed(program: Program, name: str, part: float = 0.5) -> Program:
    """The program with a random part of a tensor zeroed, and that said."""
    tensor = program.tensors[name]
    gone = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) < part
    changed = program.with_tensors({name: tensor.masked_fill(gone, 0)})
    return replace(changed, zeroed=frozenset([name]))


# --- the loop is what it says ------------------------------------------------------------------


def test_it_is_adamw_on_the_model_itself(captured: Captured) -> None:
    """The same steps by torch on the original module, in float64."""
    program = _float64(captured("tiny-mlp"))
    data = _batches(3, dtype=torch.float64)
    fitted = _fit(program, data, epochs=2, lr=3e-3, warmup=0.5, weight_decay=0.1, clip=0.5)

    model = tiny("tiny-mlp")[0].double().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: Any = [{"params": matrices, "weight_decay": 0.1}]
    adam = torch.optim.AdamW([*groups, {"params": vectors, "weight_decay": 0.0}])
    rates = [1e-3, 2e-3, 3e-3, 3e-3, 2e-3, 1e-3]
    for batch, rate in zip(data * 2, rates, strict=True):
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch["x"]), batch["labels"]))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(fitted.program.tensors[name], expected, rtol=1e-12, atol=1e-12)


def test_what_was_frozen_stays(tmp_path: Path) -> None:
    """Saved and loaded too; a pass may still zero it."""
    model, inputs = tiny("tiny-mlp")
    layers: Any = model.layers
    layers[0].requires_grad_(False)
    gp.compile(model, [], example_inputs=inputs).save(tmp_path / "m")
    loaded = gp.load(tmp_path / "m")
    program = loaded.program
    assert {n for n, p in loaded.module.named_parameters() if not p.requires_grad} == {
        "layers.0.weight",
        "layers.0.bias",
    }
    fitted = _fit(program)
    for name, tensor in program.tensors.items():
        assert tensor.equal(fitted.program.tensors[name]) is name.startswith("layers.0"), name
    assert any("2 parameters were frozen" in note for note in fitted.report["notes"])
    step = GradualMagnitude(0.5, epochs=2)
    zeroed = Pipeline([step]).run(program, Context(training=Training(_batches(4)))).program
    old, new = (p.tensors["layers.0.weight"] for p in (program, zeroed))
    assert float((new == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert new.equal(old * (new != 0))
    model.requires_grad_(False)
    frozen = gp.compile(model, [], example_inputs=inputs).program
    with pytest.raises(TrainingError, match="every parameter was frozen"):
        _fit(frozen)


def test_the_given_program_stays_and_the_loss_falls(captured: Captured) -> None:
    program = captured("tiny-mlp")
    before = {n: t.clone() for n, t in program.tensors.items()}
    fitted = _fit(program, epochs=8)
    assert all(t.equal(program.tensors[n]) for n, t in before.items())
    losses = [record["loss"] for record in fitted.report["epochs"]]
    assert losses[-1] < 0.8 * losses[0]
    assert fitted.report["steps"] == 32


def test_equal_seeds_give_equal_bits_and_others_do_not(captured: Captured) -> None:
    """Dropout and a DataLoader's shuffling included, whatever was drawn before."""
    program = captured("tiny-encoder")
    entry = program.forward
    rows: Any = [
        {**{n: t[0] for n, t in zip(entry.input_names, entry.example, strict=True)}, "labels": i}
        for i in range(5)
    ]
    loader: Any = DataLoader(rows, batch_size=2, shuffle=True)
    first = _fit(program, loader).program
    torch.rand(3)
    state = torch.get_rng_state()
    assert _same(first, _fit(program, loader).program)
    assert torch.get_rng_state().equal(state), "the caller's generator was moved"
    assert not _same(first, _fit(program, loader, seed=1).program)

    drawing = RandomSampler(rows, generator=torch.Generator())
    for own in (
        DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator()),
        DataLoader(rows, batch_size=2, sampler=drawing),
        DataLoader(rows, batch_sampler=BatchSampler(drawing, 2, drop_last=False)),
        DataLoader(rows, batch_sampler=_OwnBatches(5, torch.Generator())),
    ):
        again = _fit(program, own).program
        assert _same(again, _fit(program, own).program)


class _OwnBatches(Sampler[list[int]]):
    """Pairs in an order that it draws itself."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def __iter__(self) -> Any:
        order = torch.randperm(self.count, generator=self.generator).tolist()
        return (order[i : i + 2] for i in range(0, self.count, 2))

    def __len__(self) -> int:
        return -(-self.count // 2)


def test_dropout_is_on_while_training_and_off_after(captured: Captured) -> None:
    program = captured("tiny-encoder")
    entry = program.forward
    batch = dict(zip(entry.input_names, entry.example, strict=True))
    seen: list[Tensor] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(outputs.detach())
        return 0 * outputs.sum()

    fitted = _fit(program, [batch], loss=loss, weight_decay=0.0)
    quiet = program(**batch)
    assert not torch.allclose(seen[0], seen[1])
    assert not any(torch.allclose(outputs, quiet) for outputs in seen)
    assert torch.equal(fitted.program(**batch), quiet)


def test_batch_norm_learns_its_statistics(captured: Captured) -> None:
    program = captured("tiny-cnn")
    data = [{"x": torch.randn(4, 3, 8, 8), "labels": torch.randint(0, 5, (4,))} for _ in range(2)]
    before = program.tensors["stem_norm.running_mean"].clone()
    fitted = _fit(program, data)
    assert not fitted.program.tensors["stem_norm.running_mean"].equal(before)
    assert program.tensors["stem_norm.running_mean"].equal(before)


def test_tied_weights_are_one_parameter(captured: Captured) -> None:
    program = captured("tiny-gpt2")
    assert program.aliases
    ids = program.forward.example[0]
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    fitted = _fit(program, [{**batch, "labels": ids}], loss="causal-lm", epochs=5)
    assert fitted.program.aliases == program.aliases
    assert fitted.report["epochs"][-1]["loss"] < fitted.report["epochs"][0]["loss"]
    # Through both uses: the gradient of the tied tensor is the sum of both.
    fitted.program(**batch)


def test_half_precision_trains_in_float32_and_comes_back(captured: Captured) -> None:
    program = captured("tiny-mlp").cast(torch.float32, torch.bfloat16)
    data = _batches(2)
    fitted = _fit(program, data, epochs=1, lr=1e-4)
    assert {t.dtype for t in fitted.program.tensors.values()} == {torch.bfloat16}
    # A step of 1e-4 on weights near 1 is lost in bfloat16; in float32 twenty of them are not.
    name = "layers.0.bias"
    many = _fit(program, data, epochs=100, lr=1e-4)
    assert not many.program.tensors[name].equal(program.tensors[name])


# --- zeros that are meant ----------------------------------------------------------------------


def test_zeroed_weights_stay_zero_and_others_move(captured: Captured) -> None:
    program = _zeroed(captured("tiny-mlp"), "layers.2.weight")
    weight = program.tensors["layers.2.weight"]
    fitted = _fit(program, epochs=3, weight_decay=0.1)
    after = fitted.program.tensors["layers.2.weight"]
    assert (after[weight == 0] == 0).all()
    assert (after[weight != 0] != weight[weight != 0]).all()
    assert fitted.report["masked_weights"] == int((weight == 0).sum())
    assert fitted.program.zeroed == {"layers.2.weight"}


def test_zeros_train_as_if_they_were_not_there(captured: Captured) -> None:
    """Masking equals multiplying by the mask inside the model: gradients, moments and clipping."""
    program = _float64(_zeroed(captured("tiny-mlp"), "layers.2.weight"))
    data = _batches(3, dtype=torch.float64)
    fitted = _fit(program, data, epochs=2, clip=0.1)
    keep = (program.tensors["layers.2.weight"] != 0).double()

    model: Any = tiny("tiny-mlp")[0].double()
    torch.nn.utils.parametrize.register_parametrization(model.layers[2], "weight", _Times(keep))
    model.layers[2].parametrizations.weight.original.data *= keep
    plan = Plan(2, 1e-2, clip=0.1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: Any = [{"params": matrices, "weight_decay": 0.01}]
    adam = torch.optim.AdamW([*groups, {"params": vectors, "weight_decay": 0.0}])
    for i, batch in enumerate(data * 2):
        for group in adam.param_groups:
            group["lr"] = plan.rate(i, 6)
        adam.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch["x"]), batch["labels"]))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        adam.step()
    actual = fitted.program.tensors["layers.2.weight"]
    torch.testing.assert_close(actual, model.layers[2].weight.detach(), rtol=1e-11, atol=1e-12)


def test_zeros_that_come_on_the_way_stay_zero_at_once(captured: Captured) -> None:
    """What Adam had gathered for them would move them on."""
    program = captured("tiny-mlp")
    name = "layers.2.weight"

    def zero(now: Program, epoch: int) -> tuple[Program, Any]:
        return (_zeroed(now, name) if epoch == 0 else now), None

    fitted = _fit(program, epochs=3, after_epoch=zero)
    gone = _zeroed(program, name).tensors[name] == 0
    assert not fitted.program.tensors[name][gone].any()
    assert fitted.report["masked_weights"] == int(gone.sum())


def test_what_adam_gathered_for_a_zero_is_forgotten(captured: Captured) -> None:
    program = captured("tiny-mlp")
    name = "layers.2.weight"
    module = ProgramModule(program.with_tensors({n: t.clone() for n, t in program.tensors.items()}))
    state = {f"{m}/{n}": torch.ones_like(program.tensors[n]) for m in MOMENTS for n in [name]}
    masks = zero_masks(_zeroed(program, name))
    given = {**state, f"step/{name}": torch.tensor(1.0)}
    kept = Optimizer(module, program, Plan(1, 1e-3), masks, given).state()
    assert set(kept) == set(given)
    for moment in MOMENTS:
        assert kept[f"{moment}/{name}"].bool().equal(masks[name])
    weight = dict(module.named_parameters())[name]
    assert (weight != 0).equal(masks[name])


class _Times(nn.Module):
    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


# --- structure that goes on the way ------------------------------------------------------------


def test_a_cut_in_the_middle_equals_masking(captured: Captured) -> None:
    """Cut weights, moments and masks go on as the masked model's: float64, to rounding."""
    program = _float64(_zeroed(captured("tiny-mlp"), "layers.2.weight"))
    group = axis_groups(program).with_role("neuron")[0]
    kept = {group.id: [i for i in range(group.size) if i % 3]}
    data = _batches(4, dtype=torch.float64)

    def cut(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, kept if epoch == 1 else None

    def masked(now: Program, epoch: int) -> tuple[Program, Any]:
        return (mask(now, kept) if epoch == 1 else now), None

    small = _fit(program, data, epochs=4, after_epoch=cut)
    large = _fit(program, data, epochs=4, after_epoch=masked)
    expected = shrink(_unmasked(large.program, program), kept)
    plain = shrink(_fit(program, data, epochs=4).program, kept)
    moved = 0.0
    for name, tensor in small.program.tensors.items():
        assert tensor.shape == expected.tensors[name].shape
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-9, atol=1e-11)
        moved = max(moved, float((tensor - plain.tensors[name]).abs().max()))
    assert moved > 1e-4  # the cut is felt by what is left
    assert any("removed" in line for line in small.program.history)


def test_masks_of_zeros_lose_what_the_weights_lose(captured: Captured) -> None:
    """Cut beside the weights or read off the cut weights: the same masks."""
    program = _zeroed(captured("tiny-mlp"), "layers.2.weight")
    for group in axis_groups(program).with_role("neuron"):
        kept = {group.id: [i for i in range(group.size) if i % 3]}
        cut = take(program, kept, zero_masks(program))
        found = zero_masks(shrink(program, kept))
        assert found.keys() == cut.keys() == {"layers.2.weight"}
        assert found["layers.2.weight"].equal(cut["layers.2.weight"])
        assert not found["layers.2.weight"].all()


def test_zeros_stay_zero_after_a_cut_in_the_middle(captured: Captured) -> None:
    name = "layers.2.weight"
    program = _zeroed(captured("tiny-mlp"), name)
    group = axis_groups(program).with_role("neuron")[0]
    kept = {group.id: [i for i in range(group.size) if i % 3]}

    def cut(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, kept if epoch == 0 else None

    fitted = _fit(program, epochs=3, after_epoch=cut)
    before, after = shrink(program, kept).tensors[name], fitted.program.tensors[name]
    assert (before == 0).any()
    assert (after[before == 0] == 0).all()
    assert (after[before != 0] != before[before != 0]).all()
    assert fitted.report["masked_weights"] == int((before == 0).sum())


def test_moments_follow_units_that_were_reordered(captured: Captured) -> None:
    """Putting neurons in another order before a cut gives what cutting in their order gives."""
    program = _float64(captured("tiny-mlp"))
    group = axis_groups(program).with_role("neuron")[0]
    kept = [i for i in range(group.size) if i % 3]
    order = torch.tensor([*kept, *range(0, group.size, 3)])
    data = _batches(4, dtype=torch.float64)

    def arrange(tensors: Any) -> dict[str, Tensor]:
        places = {o.tensor: o.dim for o in group.occurrences}
        return {
            n: t.index_select(places[n], order) if n in places else t for n, t in tensors.items()
        }

    def plain(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, {group.id: kept} if epoch == 0 else None

    def reordered(now: Program, epoch: int) -> tuple[Program, Any]:
        if epoch:
            return now, None
        return now.with_tensors(arrange(now.tensors)), {group.id: list(range(len(kept)))}

    expected = _fit(program, data, epochs=3, after_epoch=plain).program
    found = _fit(program, data, epochs=3, after_epoch=reordered, arrange=arrange).program
    lost = _fit(program, data, epochs=3, after_epoch=reordered).program
    moved = 0.0
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-9, atol=1e-11)
        moved = max(moved, float((lost.tensors[name] - tensor).abs().max()))
    assert moved > 1e-5  # moments in the old order would be seen


def test_moments_that_were_lost_would_be_seen(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity above is not blind to the optimizer's state."""
    program = _float64(captured("tiny-mlp"))
    group = axis_groups(program).with_role("neuron")[0]
    kept = {group.id: list(range(5, group.size))}
    data = _batches(4, dtype=torch.float64)

    def cut(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, kept if epoch == 0 else None

    right = _fit(program, data, after_epoch=cut)
    monkeypatch.setattr("graphprune.training.loop.cut_state", lambda *_: {})
    wrong = _fit(program, data, after_epoch=cut)
    name = "layers.0.weight"
    assert (right.program.tensors[name] - wrong.program.tensors[name]).abs().max() > 1e-4


def _unmasked(program: Program, source: Program) -> Program:
    """The trained values of a masked program in the graphs of the one that it came from."""
    return source.with_tensors({name: program.tensors[name] for name in source.tensors})


def test_values_may_change_and_heads_may_go_in_half_precision(captured: Captured) -> None:
    program = captured("tiny-encoder").cast(torch.float32, torch.bfloat16)
    group = axis_groups(program).with_role("head")[0]
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    data = [{**batch, "labels": torch.tensor([1, 2])[: len(batch["input_ids"])]}]

    def cut(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, {group.id: [0, 2]} if epoch == 0 else None

    fitted = _fit(program, data, after_epoch=cut)
    assert axis_groups(fitted.program)[group.id].size == 2
    floats = {t.dtype for t in fitted.program.tensors.values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}
    assert fitted.program(**batch).isfinite().all()


def test_a_penalty_is_added_to_the_loss(captured: Captured) -> None:
    """Adam's first step is lr · sign of the gradient, whatever its size."""
    program = captured("tiny-mlp")
    name = "layers.0.weight"
    fitted = _fit(
        program,
        [{"x": torch.ones(2, 12)}],
        loss=lambda outputs, batch: 0 * outputs.sum(),
        penalty=lambda tensors: 3 * tensors[name].abs().sum(),
        epochs=1,
        lr=1e-3,
        warmup=0.0,
        weight_decay=0.0,
        clip=0.0,
    )
    before = program.tensors[name]
    expected = before - 1e-3 * before.sign()
    torch.testing.assert_close(fitted.program.tensors[name], expected, rtol=1e-5, atol=1e-6)
    other = "layers.2.weight"
    assert fitted.program.tensors[other].equal(program.tensors[other])
    assert fitted.report["epochs"][0]["penalty"] == pytest.approx(float(3 * before.abs().sum()))


# --- masks that are chosen while training ---------------------------------------------------------


class _Smallest:
    """At one step, zeroes the weights with the smallest products with their gradients."""

    def __init__(self, at: int, scored: tuple[str, ...] | None = ("labels",)) -> None:
        self.at, self.scored = at, scored
        self.seen = torch.zeros(())
        self.gradients: list[Tensor] = []

    def choose(self, parameters: Any, step: int, total: int) -> dict[str, Tensor] | None:
        weight = parameters["layers.2.weight"]
        self.gradients.append(torch.zeros(()) if weight.grad is None else weight.grad.clone())
        self.seen = self.seen + self.gradients[-1].abs().sum()
        if step != self.at:
            return None
        return {"layers.2.weight": weight.detach().abs() > weight.detach().abs().median()}

    def settled(self, step: int, total: int) -> bool:
        return step > self.at

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load(self, state: Any) -> None:
        self.seen = state["seen"]


def test_masks_chosen_on_the_way_stay(captured: Captured) -> None:
    program = captured("tiny-mlp")
    weight = program.tensors["layers.2.weight"]
    alive = weight.abs() > weight.abs().median()
    trained = _fit(program, masking=_Smallest(0, None)).program.tensors["layers.2.weight"]
    assert torch.equal(trained == 0, ~alive)
    assert not torch.equal(trained[alive], weight[alive])


def test_scored_terms_alone_are_in_the_gradient_that_is_shown(captured: Captured) -> None:
    program = _float64(captured("tiny-mlp"))
    data = _batches(1, dtype=torch.float64)

    def penalty(tensors: Any) -> Tensor:
        return tensors["layers.2.weight"].square().sum()

    alone, both = _Smallest(9), _Smallest(9)
    _fit(program, data, epochs=1, masking=alone)
    with_penalty = _fit(program, data, epochs=1, masking=both, penalty=penalty)
    assert float(alone.gradients[0].abs().sum()) > 0
    torch.testing.assert_close(both.gradients[0], alone.gradients[0])
    # And nothing of either is lost: the step is that of both together.
    plain = _fit(program, data, epochs=1, penalty=penalty)
    for tensor, other in zip(
        with_penalty.program.tensors.values(), plain.program.tensors.values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12)


def test_what_masking_remembers_is_resumed(captured: Captured, tmp_path: Path, breaks: Any) -> None:
    program = captured("tiny-mlp")
    whole, first, second = _Smallest(9), _Smallest(9), _Smallest(9)
    options: Any = {"epochs": 3, "every": 2}
    result = _fit(program, **options, masking=whole, checkpoints=tmp_path / "a")
    folder: Any = {"checkpoints": tmp_path / "b"}
    with pytest.raises(breaks.Stops):
        _fit(program, breaks(_batches(4), 7), **options, masking=first, **folder)
    resumed = _fit(program, **options, masking=second, **folder, resume=True)
    assert _same(result.program, resumed.program)
    assert torch.equal(whole.seen, second.seen)


def test_patience_waits_until_masks_have_settled(captured: Captured) -> None:
    metrics = iter([9.0, 8.0, 1.0, 2.0, 1.5, 1.4, 1.3])
    options: Any = {"epochs": 6, "patience": 2, "eval": lambda program: next(metrics)}
    fitted = _fit(captured("tiny-mlp"), **options, masking=_Smallest(6))
    # Before training 9; the first epoch is before the masks, so that its 8 does not count.
    assert fitted.report["best_epoch"] == 3
    assert fitted.report["metric_after"] == 2.0
    assert int((fitted.program.tensors["layers.2.weight"] == 0).sum()) > 0


# --- losses ------------------------------------------------------------------------------------


def test_losses_are_those_of_torch() -> None:
    logits, labels = torch.randn(2, 4, 6), torch.randint(0, 6, (2, 4))
    labels[0, :3] = -100
    found = loss_of("classification", {"logits": logits}, {"labels": labels})
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found.total / found.count, expected)
    found = loss_of("causal-lm", (None, logits), {"labels": labels})
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.total / found.count, expected)
    scores, wanted = torch.randn(5, 1), torch.randn(5)
    found = loss_of("regression", scores, {"labels": wanted})
    torch.testing.assert_close(found.total / found.count, F.mse_loss(scores[:, 0], wanted))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_regression_compares_in_float32_at_least(kind: torch.dtype) -> None:
    scores = torch.full((4, 1), 1000.0, dtype=kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of("regression", scores, {"labels": torch.full((4,), 1003.0)})
    assert found.total.dtype is (torch.float64 if kind is torch.float64 else torch.float32)
    assert float(found.total) == 4 * 9


def test_of_several_scores_none_is_guessed() -> None:
    hidden, logits = torch.randn(4, 16), torch.randn(4, 5)
    batch = {"labels": torch.arange(4)}
    for outputs in ((hidden, logits), {"hidden": hidden, "scores": logits}):
        with pytest.raises(TrainingError, match=r"2 outputs.*\[\[4, 16\], \[4, 5\]\]: return"):
            loss_of("classification", outputs, batch)
        with pytest.raises(TrainingError, match="could be the scores"):
            Metric("classification").add(outputs, batch)
        with pytest.raises(TrainingError, match="could be the scores"):
            loss_of("regression", [t[:, 0] for t in (hidden, logits)], batch)
    expected = F.cross_entropy(logits, batch["labels"], reduction="sum")
    cache, loss = torch.randn(4, 2, 3, 8), torch.ones(())
    named = {"hidden": hidden, "logits": logits}
    for clear in (logits, (logits, cache), named, (loss, logits, hidden)):
        assert torch.equal(loss_of("classification", clear, batch).total, expected)


# --- evaluation, stopping, progress ---------------------------------------------------------------


def test_patience_keeps_the_best_epoch(captured: Captured) -> None:
    program = captured("tiny-mlp")
    evaluated: list[Program] = []
    scores = [0.1, 0.3, 0.9, 0.5, 0.8, 1.0]

    def evaluate(now: Program) -> float:
        evaluated.append(now)
        return scores[len(evaluated) - 1]

    fitted = _fit(program, eval=evaluate, epochs=6, patience=2)
    assert len(evaluated) == 5  # before, and four epochs: the last two were no better
    assert fitted.report["best_epoch"] == 2
    assert fitted.report["stopped_early"]
    assert (fitted.report["metric_before"], fitted.report["metric_after"]) == (0.1, 0.9)
    # What was evaluated stayed as it was, and is what comes back.
    assert _same(evaluated[2], fitted.program)
    assert not _same(evaluated[4], fitted.program)


def test_progress_tells_loss_and_metric(captured: Captured) -> None:
    seen: list[Any] = []
    _fit(captured("tiny-mlp"), eval=_batches(2), observers=[seen.append])
    steps = [event for event in seen if isinstance(event, PassProgress)]
    assert [e.done for e in steps if e.unit == "steps"] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert all(math.isfinite(e.values["loss"]) and e.total == 8 for e in steps)
    assert [e.where for e in steps] == ["epoch 1/2"] * 5 + ["epoch 2/2"] * 5
    assert "metric" not in steps[0].values
    assert 0 <= steps[-1].values["metric"] <= 1


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 8, 10], ids=lambda at: f"batch {at}")
def test_resumed_is_as_if_never_stopped(
    at: int, captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    """In the middle of an epoch, with dropout, a metric, masks and a cut before and after."""
    program = _zeroed(captured("tiny-mlp"), "layers.4.weight")
    group = axis_groups(program).with_role("neuron")[0]

    def cut(now: Program, epoch: int) -> tuple[Program, Any]:
        return now, {group.id: range(1, axis_groups(now)[group.id].size)}

    options: Any = {"epochs": 3, "after_epoch": cut, "eval": _batches(1), "every": 2}
    whole = _fit(program, **options, checkpoints=tmp_path / "a")
    folder: Any = {"checkpoints": tmp_path / "b"}
    with pytest.raises(breaks.Stops):
        # The first look reads a batch too.
        _fit(program, breaks(_batches(4), at + 1), **options, **folder)
    resumed = _fit(program, **options, **folder, resume=True)
    assert _same(whole.program, resumed.program)
    assert resumed.program.history == whole.program.history
    names = ("loss", "metric")
    assert [[r[n] for n in names] for r in resumed.report["epochs"]] == [
        [r[n] for n in names] for r in whole.report["epochs"]
    ]
    # What is finished is only read.
    assert _same(whole.program, _fit(program, **options, **folder, resume=True).program)


def test_no_pickle_is_in_a_checkpoint(captured: Captured, tmp_path: Path) -> None:
    _fit(captured("tiny-mlp"), checkpoints=tmp_path)
    names = {p.name for p in (tmp_path / "0-finetune").iterdir()}
    assert names == {
        "examples.safetensors", "optimiser.safetensors", "program.json", "tensors.safetensors",
        "training.json",
    }  # fmt: skip


def test_a_checkpoint_of_something_else_is_refused(captured: Captured, tmp_path: Path) -> None:
    program = captured("tiny-mlp")
    _fit(program, checkpoints=tmp_path)
    with pytest.raises(TrainingError, match=r"holds a checkpoint of an earlier run.*resume=True"):
        _fit(program, checkpoints=tmp_path)
    group = axis_groups(program).with_role("neuron")[0]
    other = shrink(program, {group.id: [0, 1, 2]})
    bias = {"layers.0.bias": program.tensors["layers.0.bias"] + 0.1}
    for different in (other, _zeroed(program, "layers.2.weight"), program.with_tensors(bias)):
        with pytest.raises(TrainingError, match="is of another model"):
            _fit(different, checkpoints=tmp_path, resume=True)
    with pytest.raises(TrainingError, match=r"was made with lr=0.01, now it is 0.02"):
        _fit(program, checkpoints=tmp_path, resume=True, lr=0.02)
    with pytest.raises(TrainingError, match=r"was made with alpha=None, now it is 0.5"):
        _fit(program, checkpoints=tmp_path, resume=True, settings={"alpha": 0.5})
    with pytest.raises(TrainingError, match=r"was made with distillation=None, now it is"):
        _fit(
            program,
            checkpoints=tmp_path,
            resume=True,
            reference=program,
            distillation=Distillation(),
        )
    # Last bits may differ: another machine may have computed the passes before.
    near = {name: t * (1 + 1e-6) for name, t in program.tensors.items() if t.is_floating_point()}
    _fit(program.with_tensors(near), checkpoints=tmp_path, resume=True)
    state = tmp_path / "0-finetune" / "optimiser.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(gp.GraphPruneError, match=r"optimiser\.safetensors"):
        _fit(program, checkpoints=tmp_path, resume=True)


def test_a_setting_that_is_no_more_wanted_is_refused_too(
    captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    _fit(program, checkpoints=tmp_path, settings={"alpha": 0.5})
    with pytest.raises(TrainingError, match=r"was made with alpha=0.5, now it is None"):
        _fit(program, checkpoints=tmp_path, resume=True)


def test_a_foreign_folder_is_left_alone(captured: Captured, tmp_path: Path) -> None:
    (tmp_path / "0-finetune").mkdir()
    (tmp_path / "0-finetune" / "thesis.txt").write_text("mine")
    with pytest.raises(gp.GraphPruneError, match="graphprune did not write it"):
        _fit(captured("tiny-mlp"), checkpoints=tmp_path)
    assert (tmp_path / "0-finetune" / "thesis.txt").read_text() == "mine"


# --- what is refused ---------------------------------------------------------------------------


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_weights(
    captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    data = _batches(4)
    calls: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        value = outputs.square().mean()
        return value * math.nan if len(calls) == 6 else value

    with pytest.raises(TrainingError, match=r"loss is nan at step 6, in epoch 2;.*0-finetune") as e:
        _fit(program, data, loss=loss, checkpoints=tmp_path, every=1, epochs=3, lr=1e-3)
    expected = _fit(
        program, data, loss=lambda o, _: o.square().mean(), epochs=3, lr=1e-3, eval=None
    )
    kept = e.value.program
    assert isinstance(kept, Program)
    assert all(t.isfinite().all() for t in kept.tensors.values())
    assert not _same(kept, program)
    # The checkpoint is of the step before, and from there it goes on.
    resumed = _fit(
        program, data, loss=loss, checkpoints=tmp_path, every=1, epochs=3, lr=1e-3, resume=True
    )
    assert _same(resumed.program, expected.program)


def test_a_gradient_that_is_nan_stops_too(captured: Captured) -> None:
    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * 0).sum().sqrt()  # zero, with an infinite slope times zero

    with pytest.raises(TrainingError, match="gradient is not at step 1, in epoch 1"):
        _fit(captured("tiny-mlp"), loss=loss)


class _Normed(nn.Module):
    """A batch norm over rows, or over rows and as many places as the input has, four a stride."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 6, 4, stride=4) if places else nn.Linear(4, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.before(x))
        return self.head(y.mean(-1) if y.dim() == 3 else y)


@pytest.mark.parametrize("places", [None, 4, 8])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_batch_norm_is_not_given_one_value(places: int | None, as_list: bool) -> None:
    """A graph has no check of its own, and the running variance would be NaN for good."""
    more = () if places is None else (places,)
    program = capture(_Normed(places is not None), {"x": torch.ones(2, 4, *more)})
    data: Any = [
        {"x": torch.randn(rows, 4, *more), "labels": torch.arange(rows) % 3} for rows in (4, 4, 1)
    ]
    loader: Any = data if as_list else DataLoader(data, batch_size=None)
    if places == 8:
        fitted = _fit(program, loader)
        assert all(t.isfinite().all() for t in fitted.program.tensors.values())
        return
    with pytest.raises(TrainingError, match=r"batch 2: the batch norm 'norm' gets one value a"):
        _fit(program, loader)


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        return hidden, self.head(hidden)


def test_outputs_among_which_the_scores_are_not_named_are_refused_at_once() -> None:
    program = capture(_TwoHeads(), {"x": torch.ones(2, 4)})
    data = [{"x": torch.randn(4, 4), "labels": torch.arange(4)}]
    with pytest.raises(TrainingError, match="batch 0: the model returns 2 outputs"):
        _fit(program, data)
    fitted = _fit(program, data, loss=lambda o, b: F.cross_entropy(o[1], b["labels"]))
    assert not fitted.program.tensors["head.weight"].equal(program.tensors["head.weight"])


def _changed(**changes: Any) -> list[Batch]:
    batch = {**_batches(1)[0], **changes}
    return [*_batches(2), {k: v for k, v in batch.items() if v is not None}]


def test_class_numbers_may_be_int32(captured: Captured) -> None:
    program, data = captured("tiny-mlp"), _batches(2)
    narrow = [{**batch, "labels": batch["labels"].int()} for batch in data]
    fitted = _fit(program, narrow, eval=narrow)
    assert _same(fitted.program, _fit(program, data, eval=data).program)


class _SparseTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def test_sparse_gradients_are_refused_at_the_start() -> None:
    program = capture(_SparseTable(), {"ids": torch.ones(2, 5).long()})
    data = [{"ids": torch.ones(2, 5).long(), "labels": torch.tensor([0, 2])}]
    with pytest.raises(TrainingError, match=r"embedding 'table.weight' has sparse gradients"):
        _fit(program, data)


def test_what_a_function_of_the_user_raised_is_kept(captured: Captured) -> None:
    def loss(outputs: Tensor, batch: Any) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(TrainingError) as e:
        _fit(captured("tiny-mlp"), loss=loss)
    assert e.value.__cause__ is not None
    assert isinstance(e.value.__cause__.__cause__, KeyError)


def test_a_batch_without_a_label_that_counts_trains_nothing(captured: Captured) -> None:
    program, data = captured("tiny-mlp"), _batches(3)
    data[1]["labels"] = torch.full((3,), -100)
    fitted = _fit(program, data, epochs=1, schedule="constant", warmup=0.0)
    expected = _fit(program, [data[0], data[2]], epochs=1, schedule="constant", warmup=0.0)
    assert _same(fitted.program, expected.program)
    losses = [f.report["epochs"][0]["loss"] for f in (fitted, expected)]
    assert losses[0] == losses[1] > 0
    with pytest.raises(TrainingError, match="no label in epoch 1 counts: all of them are -100"):
        _fit(program, [data[1]])


class _UsedUp:
    """Batches that are there once, whoever asks."""

    def __init__(self, data: Any, at_most: int) -> None:
        self.data, self.left = data, at_most

    def __iter__(self) -> Any:
        for batch in self.data:
            if not self.left:
                return
            self.left -= 1
            yield batch


class _SaysHowMany(_UsedUp):
    def __len__(self) -> int:
        return len(self.data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        # The first look reads a batch too; what says no length is counted before.
        (_SaysHowMany(_batches(2), 3), "end after 0 of 2 batches in epoch 2: give what can"),
        (_SaysHowMany(_batches(2), 4), "end after 1 of 2 batches in epoch 2: give what can"),
        (_UsedUp(_batches(2), 4), "end after 1 of 2 batches in epoch 1: give what can"),
        (_SaysHowMany(_batches(2), 0), "yield no batch; pass batches that"),
        (_UsedUp(_batches(2), 2), "yield no batch; pass batches that"),
    ],
)
def test_data_that_end_early_are_told(data: Any, says: str, captured: Captured) -> None:
    with pytest.raises(TrainingError, match=says):
        _fit(captured("tiny-mlp"), data)


def _loader(data: Any) -> Any:
    return DataLoader(data)


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (_changed(labels=torch.tensor([0, 5, 1])), {}, r"batch 2: label 5 .* classes 0 to 4"),
        (_changed(labels=torch.tensor([0, -1, 1])), {}, r"batch 2: label -1 is outside"),
        (_changed(labels=None), {}, r"batch 2: the batch has no tensor 'labels', only \['x'\]"),
        (_changed(labels=torch.ones(3)), {}, r"class numbers \(int64\), got torch.float32"),
        (_changed(labels=torch.ones(2)), {"loss": "regression"}, "one score an example"),
        (_changed(x=None), {}, "input 'x' is missing"),
        (_changed(x=torch.ones(3, 11)), {}, "batch 2: input 'x' has size 11 in dimension 1"),
        (_changed(weight=torch.ones(3)), {}, r"batch 2: the batch has \['weight'\]"),
        (_loader([]), {}, "yield no batch"),
        (_loader([torch.ones(12)]), {}, "batch 0 is a Tensor"),
        (None, {"loss": lambda o, b: o}, r"a tensor with one number, got a tensor of shape"),
        (None, {"loss": lambda o, b: 1.0}, "got a float"),
        (None, {"loss": lambda o, b: torch.ones(())}, "does not depend on the model's weights"),
        (None, {"eval": lambda program: math.nan}, "eval gives nan: it must return a finite"),
        (None, {"eval": lambda program: -math.inf}, "eval gives -inf: it must return a finite"),
        (None, {"eval": lambda program: None}, "eval gives a NoneType: it must return a number"),
        (
            None,
            {"eval": lambda program: program.tensors["acc"]},
            "eval function .* raised KeyError",
        ),
        (
            None,
            {"loss": lambda o, b: b["weights"].sum()},
            "training batch 0: the loss function .* raised KeyError: 'weights'",
        ),
        (
            _changed(x=torch.ones(0, 12), labels=torch.ones(0).long()),
            {},
            "training batch 2: input 'x' .*holds nothing",
        ),
        (None, {"eval": [{"x": torch.ones(0, 12)}]}, "eval batch 0: input 'x' .*holds nothing"),
        (None, {"eval": [{"x": torch.ones(3, 12)}]}, "eval batch 0: .*no tensor 'labels'"),
    ],
)
def test_data_that_do_not_fit(data: Any, options: Any, says: str, captured: Captured) -> None:
    with pytest.raises(TrainingError, match=says):
        _fit(captured("tiny-mlp"), data, **options)


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ([], {}, "data is empty"),
        (iter([1]), {}, "ends after one"),
        ({"x": torch.ones(2)}, {}, r"got a dict.*data=\[batch\]"),
        (3, {}, "got a int"),
        ([torch.ones(2)], {}, r"data\[0\] is a Tensor"),
        ([{}], {"loss": "clasification"}, "did you mean 'classification'"),
        ([{}], {"loss": 3}, "got a int"),
        ([{}], {"eval": []}, "eval is empty"),
        ([{}], {"every": -1}, "every must be"),
        ([{}], {"every": 2}, "give checkpoints=FOLDER"),
        ([{}], {"resume": True}, "give checkpoints=FOLDER"),
        ([{}], {"patience": 0}, "at least 1"),
        ([{}], {"patience": 1}, "give eval="),
        ([{}], {"device": "tpu!"}, "there is no device 'tpu!'"),
        ([{}], {"device": "cpu:7"}, "cannot pick the device 'cpu:7': say 'cpu'"),
        ([{}], {"device": "cuda:1"}, "say 'cuda', and which GPU by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_no_training_is_refused_at_once(data: Any, options: Any, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        Training(data, **options)


@pytest.mark.parametrize(
    ("device", "on_cpu"),
    [("cpu", True), ("cpu:0", True), ("cuda", False), ("cuda:0", False), (None, False)],
)
def test_a_device_is_known_however_it_is_written(
    device: str | None, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU."""
    seen: list[bool] = []

    class Accelerator:
        mixed_precision = "no"

        def __init__(self, cpu: bool) -> None:
            seen.append(cpu)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    Workers(device)
    assert seen == [on_cpu]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"lr": 0}, "lr must be a number above 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"warmup": 1.5}, "warmup must be"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"clip": -1}, "clip must be"),
    ],
)
def test_options_out_of_range(options: Any, says: str) -> None:
    for cls in (Finetune, Distill):
        with pytest.raises(RecipeError, match=says):
            cls(**options)


class _Explodes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("captured")


def test_a_pass_that_trains_is_refused_without_data_before_capture() -> None:
    inputs = (torch.ones(2),)
    with pytest.raises(RecipeError, match=r"train finetune and distill with: .*training=Training"):
        gp.compile(_Explodes(), [Finetune(), Distill()], example_inputs=inputs)
    with pytest.raises(RecipeError, match="to train repeat with"):
        gp.compile(_Explodes(), [Repeat((Finetune(), RemoveNoOps()))], example_inputs=inputs)
    with pytest.raises(RecipeError, match=r"graphprune.Training\(.*got a list"):
        gp.compile(_Explodes(), [Finetune()], example_inputs=inputs, training=[1])  # type: ignore[arg-type]


def test_recording_nodes_leaves_the_outputs_alone(captured: Captured) -> None:
    program = captured("tiny-encoder")
    names = [n.name for n in program.forward.graph.nodes if n.op == "call_function"][:3]
    module = ProgramModule(program, record=names)
    flat = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    assert torch.equal(module(**flat), program(**flat))
    assert list(module.recorded) == names


def test_what_cannot_be_trained_says_so() -> None:
    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    program = capture(Frozen(), {"x": torch.ones(2, 3)})
    with pytest.raises(TrainingError, match="no parameter of floats"):
        _fit(program, [{"x": torch.ones(2, 3)}], loss=lambda o, b: o.sum())


def test_a_program_moves_with_every_device_in_its_graphs(captured: Captured) -> None:
    """Where there is no other device, "meta" stands for one: it has shapes and no values."""
    program = captured("tiny-llama")
    meta = torch.device("meta")
    moved = program.on(meta)
    assert {t.device for t in (*moved.tensors.values(), *moved.forward.example)} == {meta}
    for node in moved.forward.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or value.device == meta, node
        assert torch.device("cpu") not in pytree.tree_leaves((node.args, node.kwargs))
    assert program.on(torch.device("cpu")) is program
