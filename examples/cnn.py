# %% [markdown]
# # A convolutional network: cut channels, train for seconds, export
#
# A small residual network reads scikit-learn's handwritten digits. Half of its channels go, then
# a few epochs recover what that cost.

# %%
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.models.tasks import evaluate
from graphprune.models.zoo.digits import digits, train
from graphprune.passes import FoldBatchNorm, PruneAxis, PruneNeurons


class Block(nn.Module):
    """x + f(x), with two convolutions and batch norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Network(nn.Module):
    """Two blocks, pooling, a linear layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            Block(width),
            nn.MaxPool2d(2),
            Block(width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values)


torch.manual_seed(0)
model = Network()
train(model, epochs=5)
print(f"dense: {evaluate('digits', model).value:.3f} accuracy")

# %% [markdown]
# ## What can be removed
#
# The channels inside of each block have the role "neuron". Those of the residual stream are one
# group: every block adds to them.

# %%
batch = {"pixel_values": digits("test")[0][:4]}
print(gp.inspect(model, example_inputs=batch))

# %% [markdown]
# ## Prune
#
# Half of the channels inside of blocks go, and a quarter of the stream's. Each cut is verified:
# the graph without the channels computes what the graph with the channels set to zero computes.

# %%
passes = [
    PruneNeurons(0.5),
    PruneAxis(0.25, groups=("layers.0.weight[0]",)),
    FoldBatchNorm(),
]
compiled = gp.compile(model, passes, example_inputs=batch)
print(compiled.report)
print(f"pruned: {evaluate('digits', compiled.module).value:.3f} accuracy")

# %% [markdown]
# ## Train what is left
#
# `compiled.module` is an ordinary module: any training loop works on it, and what is trained
# there is what is exported.

# %%
train(compiled.module, epochs=5, learning_rate=1e-3)
print(f"pruned and trained: {evaluate('digits', compiled.module).value:.3f} accuracy")

# %%
artifact = compiled.export("cnn")
print(f"in ONNX Runtime: {evaluate('digits', artifact.session()).value:.3f} accuracy")
