"""Random networks of the supported operators, random removals: masked and shrunk are the same."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "constant at zero": lambda x: F.elu(x) + 1,  # a masked unit is not zero behind this one
    "square": lambda x: x * x,
}


class Step(nn.Module):
    """One drawn step; `width` is what it leaves."""

    a: Any
    b: Any

    def __init__(self, kind: str, width: int, n: int, activation: str) -> None:
        super().__init__()
        self.kind, self.n, self.f = kind, n, ACTIVATIONS[activation]
        self.width = width
        build = getattr(self, "_make_" + kind, None)
        if build is not None:
            build(width, n)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, "_" + self.kind)(x)
        return result

    def _make_linear(self, width: int, n: int) -> None:
        self.a = nn.Linear(width, 4 * n)
        self.width = 4 * n

    def _linear(self, x: Tensor) -> Tensor:
        return self.f(self.a(x))

    def _make_residual(self, width: int, n: int) -> None:
        self.a, self.b = nn.Linear(width, 3 * n), nn.Linear(3 * n, width)

    def _residual(self, x: Tensor) -> Tensor:
        return x + self.b(self.f(self.a(x)))

    def _make_gated(self, width: int, n: int) -> None:
        self.a, self.b = nn.Linear(width, 4 * n), nn.Linear(2 * n, width, bias=False)

    def _gated(self, x: Tensor) -> Tensor:
        gate, up = self.a(x).chunk(2, -1)
        return self.b(F.silu(gate) * up)

    def _make_attention(self, width: int, n: int) -> None:
        self.q, self.k, self.v = (
            nn.Linear(width, 6 * n),
            nn.Linear(width, 6 * n),
            nn.Linear(width, 4 * n),
        )
        self.o = nn.Linear(4 * n, width)

    def _attention(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k = (f(x).view(b, s, self.n, 6).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(b, s, self.n, 4).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(z.transpose(1, 2).reshape(b, s, -1))

    def _make_fused(self, width: int, n: int) -> None:
        self.qkv, self.o = nn.Linear(width, 12 * n), nn.Linear(4 * n, width)

    def _fused(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, self.n, 4).permute(2, 0, 3, 1, 4).unbind(0)
        z = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return self.o(z.transpose(1, 2).reshape(b, s, -1))

    def _make_grouped(self, width: int, n: int) -> None:
        self.q, self.kv, self.o = (
            nn.Linear(width, 8 * n), nn.Linear(width, 8 * n), nn.Linear(8 * n, width)
        )  # fmt: skip

    def _grouped(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 2 * self.n, 4).transpose(1, 2)
        k, v = self.kv(x).split(4 * self.n, -1)
        k, v = (t.view(b, s, self.n, 4).transpose(1, 2) for t in (k, v))
        k, v = (t[:, :, None].expand(b, self.n, 2, s, 4).reshape(b, -1, s, 4) for t in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).reshape(b, s, -1))

    def _swap(self, x: Tensor) -> Tensor:
        cut = x.shape[-1] // 4
        return torch.cat([self.f(x[..., cut:]), x[..., :cut]], -1)

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x + torch.cat([-x[..., half:], x[..., :half]], -1)

    def _shuffle(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        return self.f(x.view(b, s, 2, c // 2).transpose(2, 3)).reshape(b, s, c)

    def _make_pooled(self, width: int, n: int) -> None:
        self.a, self.b = nn.Linear(width, 4 * n), nn.Linear(4, width)

    def _pooled(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.a(x).view(b, s, self.n, 4)
        return x + self.b(h.mean(2) + h.sum(2))

    def _make_rms(self, width: int, n: int) -> None:
        self.a, self.weight = nn.Linear(width, 3 * n), nn.Parameter(torch.randn(3 * n))
        self.b = nn.Linear(3 * n, width)

    def _rms(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mine = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight
        return self.b(mine + F.rms_norm(h, h.shape[-1:], self.weight, 1e-3))

    def _make_conv(self, width: int, n: int) -> None:
        self.a = nn.Conv1d(width, 4 * n, 3, padding=1)
        self.norm = nn.BatchNorm1d(4 * n)
        self.b = nn.Conv1d(4 * n, 8, 1, groups=2)
        self.c = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.d = nn.Linear(8, width)

    def _conv(self, x: Tensor) -> Tensor:
        h = self.c(self.b(self.f(self.norm(self.a(x.transpose(1, 2))))))
        return self.d(h.transpose(1, 2))

    def _make_experts(self, width: int, n: int) -> None:
        self.up = nn.Parameter(torch.randn(3, width, 2 * n))
        self.down = nn.Parameter(torch.randn(3, 2 * n, width))

    def _experts(self, x: Tensor) -> Tensor:
        h = self.f(torch.einsum("bsd,edf->bsef", x, self.up))
        return torch.einsum("bsef,efd->bsd", h, self.down)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2] + x.repeat(1, 1, 2)[..., : x.shape[-1]]


KINDS = sorted(
    {name[1:] for name in vars(Step) if name[0] == "_" and name[1] != "_" and "make" not in name}
)
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(2, 3), st.sampled_from(sorted(ACTIVATIONS))),
    min_size=1,
    max_size=4,
)


class Network(nn.Module):
    """Drawn steps over [batch, sequence, 8], and a classifier."""

    def __init__(self, steps: list[tuple[str, int, str]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        width = 8
        for kind, n, activation in steps:
            step = Step(kind, width, n, activation)
            width = step.width
            self.steps.append(step)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        result: Tensor = self.head(x)
        return result


def randomize(model: nn.Module) -> None:
    """Every parameter and running statistic random: zeros and ones hide wrong rewrites."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, seed=st.integers(0, 2**16), data=st.data())
def test_masked_is_shrunk(steps: list[tuple[str, int, str]], seed: int, data: Any) -> None:
    torch.manual_seed(seed)
    model = Network(steps)
    randomize(model)
    program = capture(model, (torch.randn(2, 5, 8),))
    groups = axis_groups(program)
    free = [g for g in groups if not g.frozen and not g.normalized]
    if not free:
        return
    chosen = data.draw(st.lists(st.sampled_from(free), min_size=1, unique_by=lambda g: g.id))
    kept = {
        g.id: data.draw(st.sets(st.integers(0, g.size - 1), min_size=1, max_size=g.size), g.id)
        for g in chosen
    }
    kept = {name: sorted(units) for name, units in kept.items()}
    shrunk = shrink(program, kept)
    assert shrunk.num_parameters() == groups.num_parameters(kept)
    verify_rewrite(mask(program, kept), shrunk)
    if all(len(units) == groups[name].size for name, units in kept.items()):
        verify_rewrite(program, shrunk)


def test_every_kind_of_step_leaves_something_free() -> None:
    """The property above would be empty if these networks froze."""
    for kind in KINDS:
        torch.manual_seed(0)
        model = Network([("linear", 2, "gelu"), (kind, 2, "relu")])
        groups = axis_groups(capture(model, (torch.randn(2, 5, 8),)))
        free = [g for g in groups if not g.frozen]
        assert len(free) >= (
            1 if kind in {"repeated", "swap", "rotate", "shuffle", "linear"} else 2
        ), (
            kind,
            str(groups),
        )
