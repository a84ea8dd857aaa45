"""SparseLLM's alternation on one feed-forward block (arXiv 2402.17946).

The block's output is to stay: with inputs X, outputs Y and hidden values as free variables,

    J = α Σ‖z_i - W_i x‖² + γ ‖p - φ(z)‖² + β ‖y - W_down p‖²      (biases are left out; they stay)

is lowered in turn over the weights (least squares, then pruned by SparseGPT), over p (least
squares) and over each z_i (element by element). Only the ratios of α, β, γ matter.

    round 0      prune the weights as they are: SparseGPT
    round t > 0  fit the weights to z and p, prune them with the Gram matrix of the new p

J is bilinear and pruning is combinatorial, so nothing promises descent: the round with the smallest
true error ‖y - W_down φ(W x)‖² wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.ir.program import Program
from graphprune.passes.solvers.sparsegpt import Inputs
from graphprune.passes.sparsity.feedforward import FeedForward, assembled

CHUNK = 512  # rows at a time: what an elementwise step writes stays in the cache
_LONG = 2048  # rows at a time where there is only a product


@final
@dataclass(frozen=True, slots=True)
class Weights:
    """α: fit of the hidden products; β: fit of the output; γ: their agreement through φ."""

    alpha: float
    beta: float
    gamma: float


@final
@dataclass(slots=True)
class Alternation:
    """One block's variables over its calibration rows.

    Attributes:
        block: which sites, and φ.
        program: where the weights come from, and constants of φ.
        x: the block's inputs, [n, in].
        p: the hidden values, [n, hidden]; at first the dense block's.
        y: the dense block's outputs, without what is added later, [n, out].
        z: each segment's values, [n, segment]; at first the dense block's.
    """

    block: FeedForward
    program: Program
    x: Tensor
    p: Tensor
    y: Tensor
    z: list[Tensor]

    @staticmethod
    def start(block: FeedForward, program: Program, x: Tensor, p: Tensor) -> Alternation:
        """From the rows that the dense block saw: inputs [n, in], hidden values [n, hidden]."""
        state = Alternation(block, program, x, p, _product(block.down, program, p), [])
        z = state._products(slice(None), program)
        state.z = [part.contiguous() for part in z]
        return state

    def error(self, program: Program) -> float:
        """Σ|y - block(x)|² with the weights of a program."""
        return sum(
            self._error(rows, self._products(rows, program), program) for rows in self._chunks()
        )

    def update(self, program: Program, c: Weights) -> float:
        """Move p, then z, to lower J under a program's weights; the error they had before.

        Every row is on its own, so one walk over the rows does all three.
        """
        gain = self.gain(program, c)
        total = 0.0
        for rows in self._chunks():
            products = self._products(rows, program)
            total += self._error(rows, products, program)
            self.update_p(rows, gain, program)
            self.update_z(rows, products, program, c)
        return total

    def energy(self) -> float:
        """Σ|y - its bias|²: what the error is relative to."""
        return float((self.y - self._bias(self.block.down)).square().sum(dtype=torch.float64))

    def fit_up(self, up: LinearSite, inputs: Inputs) -> Tensor:
        """argmin over W of ‖z - W x‖² + λ ‖W - dense W‖² for one site, [out, in] float64."""
        return self._fit(up, self.x, assembled(self.block, up, self.z), inputs)

    def fit_down(self, inputs: Inputs) -> Tensor:
        """argmin over W of ‖y - W p‖² + λ ‖W - dense W‖², [out, hidden] float64."""
        return self._fit(self.block.down, self.p, self.y, inputs)

    def _fit(self, site: LinearSite, rows: Tensor, target: Tensor, inputs: Inputs) -> Tensor:
        # The damping of the Gram matrix, λ, is a prior: where the rows say little the weight stays
        # what it was, as it does under SparseGPT. A prior of zero would forget it.
        dense = site.matrix(self.program).to(torch.float64)
        cross = _cross(target - self._bias(site), rows) + dense @ inputs.added
        return torch.cholesky_solve(cross.T, torch.linalg.cholesky(inputs.gram)).T

    def gram(self) -> Tensor:
        """pᵀ p, [hidden, hidden] float64."""
        return _cross(self.p, self.p)

    def gain(self, program: Program, c: Weights) -> Tensor:
        """β Wᵀ (β W Wᵀ + γ I)⁻¹ of the down weight: how p follows what it misses; [hidden, out]."""
        down = self.block.down.matrix(program).to(torch.float64)
        system = c.beta * down @ down.T
        system.diagonal().add_(c.gamma)
        return torch.cholesky_solve(c.beta * down, torch.linalg.cholesky(system)).T.float()

    def update_p(self, rows: slice, gain: Tensor, program: Program) -> None:
        """J's minimum over p: (β Wᵀ W + γ I)⁻¹ (β Wᵀ (y - b) + γ φ(z)).

        Written φ(z) + gain · (y - b - W φ(z)), which is the same and takes a smaller inverse.
        """
        hidden = self.block.hidden([z[rows] for z in self.z], program)
        miss = self.y[rows] - _product(self.block.down, program, hidden)
        self.p[rows] = hidden + miss @ gain.T

    def update_z(
        self, rows: slice, products: Sequence[Tensor], program: Program, c: Weights
    ) -> None:
        """Lower J over each segment in turn, every value alone."""
        p, z = self.p[rows], [part[rows] for part in self.z]
        for i, m in enumerate(products):
            if self.block.is_relu:
                z[i] = relu_step(m, p, c)
            else:
                z[i] = elementwise_step(self._activation(z, i, program), z[i], m, p, c)
            self.z[i][rows] = z[i]

    def _products(self, rows: slice, program: Program) -> list[Tensor]:
        """W x of some rows, by segment."""
        made = {up.name: _product(up, program, self.x[rows]) for up in self.block.ups}
        return [made[s.site.name][:, s.start : s.stop] for s in self.block.segments]

    def _error(self, rows: slice, products: Sequence[Tensor], program: Program) -> float:
        hidden = self.block.hidden(products, program)
        miss = self.y[rows] - _product(self.block.down, program, hidden)
        return float(miss.square().sum(dtype=torch.float64))

    def _activation(
        self, z: Sequence[Tensor], index: int, program: Program
    ) -> Callable[[Tensor], Tensor]:
        def activation(value: Tensor) -> Tensor:
            values = [value if i == index else part for i, part in enumerate(z)]
            return self.block.hidden(values, program)

        return activation

    def _bias(self, site: LinearSite) -> Tensor:
        if site.bias is None:
            return torch.zeros(())
        return self.program.tensors[site.bias].float()

    def _chunks(self) -> list[slice]:
        return [slice(i, i + CHUNK) for i in range(0, len(self.x), CHUNK)]


def relu_step(m: Tensor, p: Tensor, c: Weights) -> Tensor:
    """argmin over z of γ (p - relu(z))² + α (z - m)², exactly: the better of two branches."""
    above = ((c.gamma * p + c.alpha * m) / (c.gamma + c.alpha)).clamp_min(0)
    below = m.clamp_max(0)
    loss_above = c.gamma * (p - above).square() + c.alpha * (above - m).square()
    loss_below = c.gamma * p.square() + c.alpha * (below - m).square()
    return torch.where(loss_above <= loss_below, above, below)


def elementwise_step(
    activation: Callable[[Tensor], Tensor], z: Tensor, m: Tensor, p: Tensor, c: Weights
) -> Tensor:
    """One descent step over z of γ (p - φ(z))² + α (z - m)², any elementwise φ.

    A Gauss-Newton step, which is the minimum where φ is linear in z; a value that it does not help
    takes m if that is better, or stays.
    """
    with torch.enable_grad():
        variable = z.detach().requires_grad_()
        value = activation(variable)
        # What a value only decides (a comparison) has no derivative: then m alone is tried.
        slope = torch.zeros_like(z)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), variable)
    value = value.detach()
    miss = p - value
    step = (c.alpha * (z - m) - c.gamma * slope * miss) / (c.alpha + c.gamma * slope.square())
    best, loss = z, c.gamma * miss.square() + c.alpha * (z - m).square()
    for candidate in (z - step, m):
        other = c.gamma * (p - activation(candidate)).square() + c.alpha * (candidate - m).square()
        better = other < loss
        best, loss = torch.where(better, candidate, best), torch.where(better, other, loss)
    return best


def _product(site: LinearSite, program: Program, rows: Tensor) -> Tensor:
    result = rows @ site.matrix(program).float().T
    return result if site.bias is None else result + program.tensors[site.bias].float()


def _cross(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, float64, summed over chunks of rows."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for i in range(0, len(left), _LONG):
        total += left[i : i + _LONG].T @ right[i : i + _LONG]
    return total
