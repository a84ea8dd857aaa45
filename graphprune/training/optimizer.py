"""AdamW by tensor names: moments follow rewrites and go to disk, and masked weights stay zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from graphprune.errors import RecipeError, TrainingError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.rewrite.shrink import take
from graphprune.suggest import suggest
from graphprune.validate import check_number, check_whole

SCHEDULES = ("linear", "cosine", "constant")
MOMENTS = ("exp_avg", "exp_avg_sq")


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train and with which steps.

    Attributes:
        epochs: passes over the data.
        lr: the highest learning rate.
        weight_decay: AdamW's, on tensors of two and more dimensions.
        warmup: fraction of all steps in which the rate rises from zero.
        schedule: what it does then: "linear" or "cosine" to zero, or "constant".
        clip: the largest norm of all gradients together; 0 for none.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs)
        check_number("lr", self.lr, "a number above 0", low=0, open_low=True)
        check_number("weight_decay", self.weight_decay, "0 or more", low=0)
        check_number("warmup", self.warmup, "a fraction of all steps, 0 to 1", low=0, high=1)
        check_number("clip", self.clip, "0 (no clipping) or more", low=0)
        if self.schedule not in SCHEDULES:
            raise RecipeError(
                f"there is no schedule {self.schedule!r}; {suggest(self.schedule, SCHEDULES)}"
            )

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step `step` (from 0) of `total`."""
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        done = min((step - rising) / max(total - rising, 1), 1.0)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr * (1 - done)


def zero_masks(program: Program) -> dict[str, Tensor]:
    """Where the tensors that a pass has zeroed are not zero: what may change there."""
    held = dict.fromkeys(program.aliases.get(name, name) for name in sorted(program.zeroed))
    return {name: program.tensors[name] != 0 for name in held if name in program.parameters}


@final
class Optimizer:
    """One AdamW over a module's parameters.

    Attributes:
        parameters: those of floats, by tensor name, tied ones once. All get gradients, which
            scores read; those that were frozen at capture take no step.
        trained: the others of them.
        masks: by tensor name, where it may change; elsewhere it is and stays zero.
    """

    def __init__(
        self,
        module: ProgramModule,
        program: Program,
        plan: Plan,
        masks: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        held = dict(module.named_parameters(remove_duplicate=False))
        self.plan = plan
        self.parameters: dict[str, nn.Parameter] = {
            name: held[name] for name in sorted(program.parameters) if held[name].requires_grad
        }
        if not self.parameters:
            raise TrainingError("the model has no parameter of floats to train")
        self.trained = [p for name, p in self.parameters.items() if name not in program.frozen]
        if not self.trained:
            raise TrainingError(
                "every parameter was frozen when the model was captured: set requires_grad of "
                "those to train, and compile it again"
            )
        self.masks = {n: mask for n, mask in masks.items() if n in self.parameters}
        decayed = [p for p in self.trained if p.dim() > 1]
        others = [p for p in self.trained if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": plan.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, fused=True)
        for name, parameter in self.parameters.items():
            if state is not None and f"step/{name}" in state:
                self.adam.state[parameter] = {
                    "step": state[f"step/{name}"].clone(),
                    **{m: state[f"{m}/{name}"].clone() for m in MOMENTS},
                }
        self._apply_masks()

    def step(self, rate: float) -> float:
        """One step along the gradients; returns their norm before clipping.

        Where the norm is not finite nothing is changed.
        """
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                # A product would keep NaN, and nothing can be learned there.
                gradient.masked_fill_(~mask, 0)
        limit = self.plan.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.trained, limit))
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
            self._apply_masks()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def restrict(self, masks: Mapping[str, Tensor]) -> None:
        """Zero what these masks leave out too, by tensor name, and keep it zero."""
        for name, mask in masks.items():
            held = self.masks.get(name)
            self.masks[name] = mask if held is None else held & mask
        self._apply_masks()

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and counts: "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            held = self.adam.state.get(parameter)
            if held:
                found |= {f"{key}/{name}": held[key] for key in ("step", *MOMENTS)}
        return found

    def _apply_masks(self) -> None:
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameter = self.parameters[name]
                parameter.masked_fill_(~mask, 0)
                for moment in MOMENTS:
                    if parameter in self.adam.state:
                        self.adam.state[parameter][moment].masked_fill_(~mask, 0)


def cut_state(
    program: Program,
    keep: Mapping[str, object],
    state: Mapping[str, Tensor],
    arrange: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Adam's moments once the program's groups keep these units, cut exactly like the weights.

    `arrange` puts them first in the order that the weights' units have been put in.
    """
    result = {name: tensor for name, tensor in state.items() if name.startswith("step/")}
    for moment in MOMENTS:
        prefix = f"{moment}/"
        named = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        named = named if arrange is None else dict(arrange(named))
        result |= {prefix + n: t for n, t in take(program, keep, named).items()}
    return result
