# %% [markdown]
# # A module of your own
#
# No class, name or attribute in it is known to graphprune: what belongs together follows from the
# operators of the captured graph.

# %%
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


torch.manual_seed(0)
model = Recommender().eval()
batch = (torch.randint(0, 1000, (4, 12)), torch.randn(4, 20))

# %% [markdown]
# The groups: the towers' neurons, and the width that item tower, gate and score share.

# %%
print(gp.inspect(model, example_inputs=batch))

# %% [markdown]
# `PruneAxis` takes a group by the name that `inspect` gives it.

# %%
passes = [
    PruneNeurons(0.5, round_to=8),
    PruneAxis(0.25, groups=("item_tower.2.weight[0]",)),
]
compiled = gp.compile(model, passes, example_inputs=batch)
print(compiled.report)

# %%
artifact = compiled.export("own-module")
print(f"written to {artifact.path}; inputs: {[i['name'] for i in artifact.manifest['inputs']]}")
