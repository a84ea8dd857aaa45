"""The handwritten digits that scikit-learn ships, and a vision transformer trained on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import GraphPruneError
from graphprune.models.loading.cache import cached
from graphprune.models.zoo.vit import VisionTransformer

SEED = 0
EPOCHS = 40


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in [-1, 1] and labels [n]; "train" holds 1,437 of them, "test" 360.

    The split is drawn once with a fixed seed, stratified by digit.

    Raises:
        GraphPruneError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise GraphPruneError(
            "the digits need scikit-learn, which is not installed: pip install 'graphprune[demo]'"
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(
        data.images, data.target, test_size=0.2, random_state=SEED, stratify=data.target
    )
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    pixels = torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    return pixels, torch.tensor(labels, dtype=torch.long)


def train(
    model: torch.nn.Module,
    epochs: int = EPOCHS,
    learning_rate: float = 3e-3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train any digit classifier in place: AdamW, one cycle."""
    images, labels = digits("train")
    generator = torch.Generator().manual_seed(SEED)
    batch = 64
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for i in range(len(labels) // batch):
            chosen = order[i * batch : (i + 1) * batch]
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        progress(epoch + 1, epochs)
    model.eval()


def trained_vit(
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VisionTransformer:
    """The model `digits-vit`: trained the first time, then read from the cache."""
    from safetensors.torch import load_file, save_file

    def make(folder: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = VisionTransformer()
            train(model, progress=progress)
        save_file(model.state_dict(), folder / "model.safetensors")

    folder = cached("digits-vit-1", make)
    model = VisionTransformer()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
