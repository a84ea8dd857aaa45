"""SparseLLM's alternation on one feed-forward block (arXiv 2402.17946).

The block is y = W p + b, p = φ(z), z_i = W_i x + b_i; its rows are x [in], z_i and p [hidden] and
y [out]. x and the dense block's y are fixed, hidden values are free variables of (without biases)

    J = α Σ_i ‖z_i - W_i x‖² + γ ‖p - φ(z)‖² + β ‖y - W p‖²        summed over the rows

which is lowered over one kind of variable after the other; only the ratios of α, β, γ matter:

    weights   least squares on (x, z_i) and (p, y), then pruned by SparseGPT
    p         (β WᵀW + γ I) p = β Wᵀ y + γ φ(z). With p = φ(z) + d and the push-through identity
              (β WᵀW + γ I)⁻¹ β Wᵀ = β Wᵀ (β W Wᵀ + γ I)⁻¹ =: gain,   d = gain (y - W φ(z))
    z_i       value by value: exact where φ is ReLU, else a Gauss-Newton step (`elementwise_step`)

Round 0 prunes the weights as they are, which is SparseGPT; round t > 0 fits them to z and p and
prunes with the Gram matrix of the new p. J is bilinear and pruning is combinatorial, so descent is
not guaranteed: the round with the smallest true error ‖y - W φ(W_i x)‖² wins.
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
        """Begin with the rows of the dense block: inputs [n, in], hidden values [n, hidden]."""
        state = Alternation(block, program, x, p, _product(block.down, program, p), [])
        z = state._products(slice(None), program)
        state.z = [part.contiguous() for part in z]
        return state

    def error(self, program: Program) -> float:
        """Return Σ |y - block(x)|² over all rows, with the weights of a program."""
        return sum(
            self._error(rows, self._products(rows, program), program) for rows in self._chunks()
        )

    def update(self, program: Program, c: Weights) -> float:
        """Move p, then z, to lower J under a program's weights.

        Rows are independent, so one walk over them does all three.

        Returns:
            The error of the program's weights, as `error` gives it.
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
        """Return Σ |y - bias|², which errors are relative to."""
        return float((self.y - self._bias(self.block.down)).square().sum(dtype=torch.float64))

    def fit_up(self, up: LinearSite, inputs: Inputs) -> Tensor:
        """Fit a site that reads x: argmin of ‖z - W x‖² + damping; [out, in] float64."""
        return self._fit(up, self.x, assembled(self.block, up, self.z), inputs)

    def fit_down(self, inputs: Inputs) -> Tensor:
        """Fit the site that reads p: argmin of ‖y - W p‖² + damping; [out, hidden] float64."""
        return self._fit(self.block.down, self.p, self.y, inputs)

    def _fit(self, site: LinearSite, rows: Tensor, target: Tensor, inputs: Inputs) -> Tensor:
        # Damping adds Λ to the Gram matrix H, and here tr((W - W₀) Λ (W - W₀)ᵀ) to the error, with
        # the dense weight W₀: a direction without rows keeps W₀, as under SparseGPT. The minimum
        # solves W (H + Λ) = Σ target rowᵀ + W₀ Λ.
        dense = site.matrix(self.program).to(torch.float64)
        cross = _cross(target - self._bias(site), rows) + dense @ inputs.added
        return torch.cholesky_solve(cross.T, torch.linalg.cholesky(inputs.gram)).T

    def gram(self) -> Tensor:
        """Return the Gram matrix of p, Σ p pᵀ; float64 [hidden, hidden]."""
        return _cross(self.p, self.p)

    def gain(self, program: Program, c: Weights) -> Tensor:
        """Return β Wᵀ (β W Wᵀ + γ I)⁻¹ of the down weight, float32 [hidden, out]."""
        down = self.block.down.matrix(program).to(torch.float64)
        system = c.beta * down @ down.T
        system.diagonal().add_(c.gamma)
        return torch.cholesky_solve(c.beta * down, torch.linalg.cholesky(system)).T.float()

    def update_p(self, rows: slice, gain: Tensor, program: Program) -> None:
        """Set p of some rows to J's minimum, φ(z) + gain (y - b - W φ(z)).

        The inverse in `gain` is [out, out]; that of the normal equations is [hidden, hidden].
        """
        hidden = self.block.hidden([z[rows] for z in self.z], program)
        miss = self.y[rows] - _product(self.block.down, program, hidden)
        self.p[rows] = hidden + miss @ gain.T

    def update_z(
        self, rows: slice, products: Sequence[Tensor], program: Program, c: Weights
    ) -> None:
        """Lower J over each segment of some rows, one segment after the other, value by value."""
        p, z = self.p[rows], [part[rows] for part in self.z]
        for i, m in enumerate(products):
            if self.block.is_relu:
                z[i] = relu_step(m, p, c)
            else:
                z[i] = elementwise_step(self._activation(z, i, program), z[i], m, p, c)
            self.z[i][rows] = z[i]

    def _products(self, rows: slice, program: Program) -> list[Tensor]:
        """Compute the products of some rows by segment, with biases: m in the steps over z."""
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
    """Minimize γ (p - relu(z))² + α (z - m)² over z, exactly: the better of two branches.

    For z >= 0 it is a parabola with its minimum at (γ p + α m) / (γ + α), for z <= 0 one with its
    minimum at m; each is clamped to its half line. All tensors have one shape.
    """
    above = ((c.gamma * p + c.alpha * m) / (c.gamma + c.alpha)).clamp_min(0)
    below = m.clamp_max(0)
    loss_above = c.gamma * (p - above).square() + c.alpha * (above - m).square()
    loss_below = c.gamma * p.square() + c.alpha * (below - m).square()
    return torch.where(loss_above <= loss_below, above, below)


def elementwise_step(
    activation: Callable[[Tensor], Tensor], z: Tensor, m: Tensor, p: Tensor, c: Weights
) -> Tensor:
    """Lower γ (p - φ(z))² + α (z - m)² over z by one step, for any elementwise φ.

    With φ(z - s) ≈ φ(z) - φ' s, the minimum over s is the Gauss-Newton step

        s = (α (z - m) - γ φ' (p - φ(z))) / (α + γ φ'²)

    exact where φ is linear in z, as a gated block is in its second factor. Where it does not lower
    the value, m is tried; else z stays.
    """
    with torch.enable_grad():
        variable = z.detach().requires_grad_()
        value = activation(variable)
        # A value that is only compared has no derivative: then m alone is tried.
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
    """Return leftᵀ right, float64, summed over chunks of rows."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for i in range(0, len(left), _LONG):
        total += left[i : i + _LONG].T @ right[i : i + _LONG]
    return total
