"""Tables, series, points and graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.families.base import Built, Domain
from graphprune.models.zoo.tiny import tiny

TABULAR = Domain("Tables, series, points, graphs")


class Temporal(nn.Module):
    """A block of a temporal convolutional network: causal, dilated, with weight norm."""

    def __init__(self, into: int, out: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.first = weight_norm(nn.Conv1d(into, out, 3, padding=self.past, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(out, out, 3, padding=self.past, dilation=dilation))
        self.skip = nn.Conv1d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[..., : -self.past].relu()
        h = self.second(h)[..., : -self.past].relu()
        return (h + self.skip(x)).relu()


def _tcn() -> Built:
    layers = [Temporal(4, 16, 1), Temporal(16, 16, 2), Temporal(16, 16, 4), nn.Conv1d(16, 3, 1)]
    return nn.Sequential(*layers), (torch.randn(2, 4, 20),)


class Recurrent(nn.Module):
    """Token ids, two recurrent layers, a classifier on the last state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first = kind(16, 32, batch_first=True, bidirectional=True)
        self.second = kind(64, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.first(self.embedding(ids))
        hidden, _ = self.second(hidden)
        return self.head(hidden[:, -1])


class PointNet(nn.Module):
    """PointNet with its alignment of the input: shared layers, the largest over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(*self._shared(3, 16), *self._shared(16, 32))
        self.matrix = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 9))
        self.shared = nn.Sequential(
            *self._shared(3, 16), *self._shared(16, 32), *self._shared(32, 64)
        )
        self.head = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)
        )

    @staticmethod
    def _shared(into: int, out: int) -> list[nn.Module]:
        return [nn.Conv1d(into, out, 1), nn.BatchNorm1d(out), nn.ReLU()]

    def forward(self, points: Tensor) -> Tensor:
        turn = self.matrix(self.align(points).amax(-1)).unflatten(-1, (3, 3))
        turned = (turn + torch.eye(3)) @ points
        return self.head(self.shared(turned).amax(-1))


class Gcn(nn.Module):
    """Two graph convolutions over a normalized adjacency [batch, nodes, nodes]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1).rsqrt()
        spread = degree * adjacency * degree.mT
        return spread @ self.second((spread @ self.first(features)).relu())


class EdgeGcn(nn.Module):
    """Two graph convolutions over a list of edges, with sums scattered to nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 5)

    def spread(self, x: Tensor, edges: Tensor) -> Tensor:
        return x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        hidden = self.spread(self.first(features), edges).relu()
        return self.spread(self.second(hidden), edges)


class Gat(nn.Module):
    """Graph attention with four heads over an adjacency [batch, nodes, nodes]."""

    def __init__(self, heads: int = 4, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(8, heads * width)
        self.source = nn.Parameter(torch.randn(heads, width))
        self.target = nn.Parameter(torch.randn(heads, width))
        self.out = nn.Linear(heads * width, 5)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        h = self.project(features).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        a = (h * self.source[:, None]).sum(-1, keepdim=True)
        b = (h * self.target[:, None]).sum(-1, keepdim=True)
        scores = F.leaky_relu(a + b.mT, 0.2).masked_fill(adjacency[:, None] == 0, -1e4)
        return self.out(F.elu(scores.softmax(-1) @ h).transpose(1, 2).flatten(2))


class Dlrm(nn.Module):
    """DLRM: tables of categories and a bottom network meet in products of pairs."""

    rows: Tensor
    columns: Tensor

    def __init__(self, fields: int = 4, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, width) for _ in range(fields))
        self.bottom = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        rows, columns = torch.tril_indices(fields + 1, fields + 1, -1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.top = nn.Sequential(
            nn.Linear(width + len(rows), 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid()
        )

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        looked = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([bottom, *looked], 1)
        pairs = (stacked @ stacked.mT)[:, self.rows, self.columns]
        return self.top(torch.cat([bottom, pairs], 1))


class TabTransformer(nn.Module):
    """TabTransformer: attention over embedded categories, beside normalized numbers."""

    def __init__(self, fields: int = 5, width: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, width) for _ in range(fields))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(fields * width + 6, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        looked = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        hidden = self.layers(torch.stack(looked, 1)).flatten(1)
        return self.head(torch.cat([hidden, self.norm(numbers)], 1))


class FtTransformer(nn.Module):
    """FT-Transformer: each number is a token, scaled and shifted; a class token is read."""

    def __init__(self, numbers: int = 6, width: int = 32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(numbers, width))
        self.shift = nn.Parameter(torch.randn(numbers, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, numbers: Tensor) -> Tensor:
        tokens = numbers[..., None] * self.scale + self.shift
        tokens = torch.cat([self.token.expand(numbers.shape[0], -1, -1), tokens], 1)
        return self.head(self.layers(tokens)[:, 0])


class NBeats(nn.Module):
    """N-BEATS: blocks subtract their backcast and add their forecast."""

    def __init__(self, past: int = 20, ahead: int = 5, blocks: int = 3) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(past, 32),
                nn.ReLU(),
                nn.Linear(32, 32),
                nn.ReLU(),
                nn.Linear(32, past + ahead),
            )
            for _ in range(blocks)
        )

    def forward(self, series: Tensor) -> Tensor:
        forecast: Tensor | float = 0.0
        for block in self.blocks:
            both = block(series)
            series = series - both[:, : self.past]
            forecast = forecast + both[:, self.past :]
        assert isinstance(forecast, Tensor)
        return forecast


class DeepCross(nn.Module):
    """DCN V2: crosses of the input with itself beside a network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(width + 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for cross in self.crosses:
            crossed = x * cross(crossed) + crossed
        return self.head(torch.cat([crossed, self.deep(x)], 1)).sigmoid()


def _adjacency() -> Tensor:
    drawn = (torch.rand(2, 10, 10) > 0.6).float()
    return ((drawn + drawn.mT + torch.eye(10)) > 0).float()


def _ids(*shape: int, rows: int = 20) -> Tensor:
    return torch.randint(0, rows, shape)


TABULAR.add("TCN, weight norm", _tcn)
TABULAR.add("LSTM", lambda: (Recurrent(nn.LSTM), (_ids(2, 12, rows=50),)))
TABULAR.add("GRU", lambda: (Recurrent(nn.GRU), (_ids(2, 12, rows=50),)))
TABULAR.add("PointNet", lambda: (PointNet(), (torch.randn(2, 3, 30),)))
TABULAR.add("GCN, matrix", lambda: (Gcn(), (torch.randn(2, 10, 8), _adjacency())))
TABULAR.add("GCN, edges", lambda: (EdgeGcn(), (torch.randn(10, 8), _ids(2, 25, rows=10))))
TABULAR.add("GAT", lambda: (Gat(), (torch.randn(2, 10, 8), _adjacency())))
TABULAR.add("DLRM", lambda: (Dlrm(), (torch.randn(3, 6), _ids(3, 4))))
TABULAR.add("DCN V2", lambda: (DeepCross(), (torch.randn(3, 16),)))
TABULAR.add("TabTransformer", lambda: (TabTransformer(), (_ids(3, 5), torch.randn(3, 6))))
TABULAR.add("FT-Transformer", lambda: (FtTransformer(), (torch.randn(3, 6),)))
TABULAR.add("N-BEATS", lambda: (NBeats(), (torch.randn(3, 20),)))
TABULAR.add("MLP", lambda: tiny("tiny-mlp"))
TABULAR.hf(
    "PatchTST",
    "PatchTSTForPrediction",
    "PatchTSTConfig",
    {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "prediction_length": 4,
        "scaling": None,
        "norm_type": "layernorm",
    },
    lambda: {"past_values": torch.randn(2, 32, 3)},
)
TABULAR.hf(
    "PatchTSMixer",
    "PatchTSMixerForPrediction",
    "PatchTSMixerConfig",
    {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_layers": 2,
        "prediction_length": 4,
        "scaling": None,
    },
    lambda: {"past_values": torch.randn(2, 32, 3)},
)
