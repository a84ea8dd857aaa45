"""A module of your own: no class, name or attribute in it is known to graphprune.

python examples/own_module.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.passes import PruneAxis, PruneNeurons


class Recommender(nn.Module):
    """Two towers over item ids and user features, and a gated mix of both."""

    def __init__(self, items: int = 1000, features: int = 20, width: int = 64) -> None:
        super().__init__()
        self.items = nn.Embedding(items, 48)
        self.item_tower = nn.Sequential(nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, width))
        self.user_tower = nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, width))
        self.gate = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, item_ids: Tensor, user: Tensor) -> Tensor:
        item = self.item_tower(self.items(item_ids).mean(dim=1))
        person = self.user_tower(user)
        return self.score(torch.sigmoid(self.gate(person)) * item).squeeze(-1)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = Recommender().eval()
    batch = (torch.randint(0, 1000, (4, 12)), torch.randn(4, 20))

    groups = gp.inspect(model, example_inputs=batch)
    print(groups)  # the towers' neurons, and the width that item tower, gate and score share

    compiled = gp.compile(
        model,
        [
            PruneNeurons(0.5, round_to=8),
            # The axis through item tower, gate and score, by the name that inspect gives it.
            PruneAxis(0.25, groups=("item_tower.2.weight[0]",)),
        ],
        example_inputs=batch,
    )
    print(f"\n{compiled.report}")
    artifact = compiled.export(folder)
    print(
        f"\nwritten to {artifact.path}; inputs: {[i['name'] for i in artifact.manifest['inputs']]}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-module"))
