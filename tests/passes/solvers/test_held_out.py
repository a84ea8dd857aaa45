"""Damping and residuals as far as rows held out agree: brute force, noise, and what is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune.passes.solvers.held_out import OWN, RIDGES, Moments, Residual
from graphprune.passes.solvers.obs import damped, loss, refit

OUT, FEATURES = 5, 12
KEEP = torch.tensor([0, 1, 2, 4, 5, 8, 9, 11])


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(OUT, FEATURES, generator=generator, dtype=torch.float64), x


def noise(rows: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, OUT, generator=generator, dtype=torch.float64)


def apart(rows: int, held: int) -> Tensor:
    """Rows that are held out, of two batches some each; bool."""
    result = torch.zeros(rows, dtype=torch.bool)
    result[rows // 4 : rows // 4 + held // 2] = result[rows - held // 2 :] = True
    return result


def fitted(weight: Tensor, x: Tensor, r: Tensor, held: int, damping: float = 0.01) -> Tensor:
    residual, out = Residual.empty(OUT, FEATURES), apart(len(x), held)
    residual.add(r[~out], x[~out], held=False)
    residual.add(r[out], x[out], held=True)
    moments = Moments(x.T @ x, x[out].T @ x[out] if held else None)
    return moments.refit(weight, KEEP, damping, residual)


def without_the_lost(x: Tensor) -> Tensor:
    """The inputs where what goes is nothing, so that the weight's own output is kept."""
    mask = torch.zeros(FEATURES, dtype=torch.bool)
    mask[KEEP] = True
    return x * mask


@pytest.mark.parametrize("loud", [0.0, 3.0, 30.0])
def test_what_is_chosen_is_the_best_on_the_rows_held_out(loud: float) -> None:
    rows, held = 60, 16
    weight, x = drawn(rows)
    r = x @ noise(FEATURES, 3) + loud * noise(rows)
    out = apart(rows, held)
    others, every = ~out, torch.ones(rows, dtype=torch.bool)

    def own(at: Tensor, level: float) -> Tensor:
        return refit(weight, damped(x[at].T @ x[at], level), KEEP)

    def ridge(at: Tensor, level: float) -> Tensor:
        gram, result = damped(x[at].T @ x[at], level), torch.zeros(OUT, FEATURES).double()
        slope = r[at].T @ x[at]
        result[:, KEEP] = torch.linalg.solve(gram[KEEP][:, KEEP], slope[:, KEEP].T).T
        return result

    seen = x[out].T @ x[out]
    mu = min((0.01 * n for n in OWN), key=lambda level: loss(weight, own(others, level), seen))
    best = torch.inf, torch.zeros(OUT, FEATURES)
    for level in RIDGES:
        for part in torch.linspace(0, 1, 401).tolist():
            new = own(others, mu) + part * ridge(others, level)
            error = float((x[out] @ (new - weight).T - r[out]).square().sum())
            if error < best[0] - 1e-9:
                best = error, own(every, mu) + part * ridge(every, level)
    largest = float(best[1].abs().max())
    torch.testing.assert_close(fitted(weight, x, r, held), best[1], rtol=0.02, atol=2e-3 * largest)


def test_what_the_inputs_explain_is_gained() -> None:
    weight, x = drawn(400)
    x = without_the_lost(x)
    r = x @ noise(FEATURES, 3)
    new = fitted(weight, x, r, 100)
    wanted = x @ weight.T + r
    assert float((x @ new.T - wanted).square().sum()) < 1e-2 * float(r.square().sum())


def test_noise_is_followed_less_than_by_least_squares() -> None:
    """On other rows a fit to noise is an error; so little of it is taken."""
    weight, x = drawn(40)
    x = without_the_lost(x)
    fresh = without_the_lost(drawn(4000)[1])
    taken, all_of_it = 0.0, 0.0
    for seed in range(20):
        r = 10 * noise(40, 100 + seed)
        gram = damped(x.T @ x, 0.01)
        full = torch.linalg.solve(gram, (r.T @ x).T).T
        taken += float((fresh @ (fitted(weight, x, r, 10) - weight).T).square().sum())
        all_of_it += float((fresh @ full.T).square().sum())
    assert taken < 0.2 * all_of_it


def test_more_damping_is_taken_where_rows_are_few() -> None:
    """What the lost features add is noise to the others: a fit to it is worse on other rows."""
    closer = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(OUT, FEATURES, generator=generator, dtype=torch.float64)
        x, fresh = (
            torch.randn(n, FEATURES, generator=generator, dtype=torch.float64) for n in (16, 2000)
        )
        held = x[12:].T @ x[12:]
        new = Moments(x.T @ x, held).refit(weight, KEEP, 0.01)
        plain = refit(weight, damped(x.T @ x, 0.01), KEEP)
        seen = fresh.T @ fresh
        closer += loss(weight, new, seen) < loss(weight, plain, seen)
    assert closer > 15


def test_the_damping_asked_for_is_the_least() -> None:
    weight, x = drawn(400)
    moments = Moments(x.T @ x, x[300:].T @ x[300:])
    assert moments.damping(weight, KEEP, 0.5) == 0.5


def test_no_damping_is_none_though_fewer_rows_do_not_span_the_features() -> None:
    weight, x = drawn(12)
    moments = Moments(x.T @ x, x[8:].T @ x[8:])
    exact = refit(weight, damped(x.T @ x, 0.0), KEEP)
    torch.testing.assert_close(moments.refit(weight, KEEP, 0.0), exact)
    residual = Residual.empty(OUT, FEATURES)
    residual.add(noise(8), x[:8], held=False)
    residual.add(noise(4), x[8:], held=True)
    assert moments.refit(weight, KEEP, 0.0, residual).isfinite().all()


def test_without_rows_held_out_nothing_is_gained() -> None:
    weight, x = drawn(40)
    own = refit(weight, damped(x.T @ x, 0.01), KEEP)
    torch.testing.assert_close(fitted(weight, x, noise(40), 0), own)


def test_a_constant_input_is_not_damped() -> None:
    _, x = drawn(40)
    ones = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    whole, features = damped(ones.T @ ones, 0.1, ones=True), damped(x.T @ x, 0.1)
    torch.testing.assert_close(whole[:-1, :-1], features)
    assert whole[-1, -1] == 40
    weight = torch.cat([drawn(1)[0], torch.zeros(OUT, 1, dtype=torch.float64)], 1)
    residual = Residual.empty(OUT, FEATURES + 1)
    fives = torch.full((40, OUT), 5.0).double()
    residual.add(fives[:30], ones[:30], held=False)
    residual.add(fives[30:], ones[30:], held=True)
    keep = torch.cat([KEEP, torch.tensor([FEATURES])])
    moments = Moments(ones.T @ ones, ones[30:].T @ ones[30:], ones=True)
    new = moments.refit(weight, keep, 0.01, residual)
    assert not new[:, [i for i in range(FEATURES) if i not in KEEP.tolist()]].any()
    assert float(((new - weight) @ ones.T).mean()) == pytest.approx(5, abs=0.5)
