"""Your own model and data: everything autocompress needs to know of them is the function at the end.

    PYTHONPATH=examples autocompress search --task own_model:task --time-budget 1m

Above it stands what you have already: a network, its data and a training loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitNet(nn.Module):
    """A plain convolutional network for 8x8 images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.classify = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.features(image).mean((2, 3))
        logits: Tensor = self.classify(features)
        return logits


def loaders() -> dict[str, DataLoader[Any]]:
    """Training, validation and test data: float32 images, normalised as the network expects them."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8.0 - 1.0
    data = TensorDataset(images, torch.from_numpy(digits.target).long())
    parts = torch.utils.data.random_split(data, [1097, 350, 350], torch.Generator().manual_seed(0))
    return {
        name: DataLoader(part, batch_size=64) for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def train(model: nn.Module, data: DataLoader[Any], epochs: int = 12) -> None:
    """Trains for a few seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=epochs * len(data))
    for _ in range(epochs):
        for images, targets in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            schedule.step()
    model.eval()


# ------------------------------------------------------------------------------------- all that autocompress asks for


def task(data: Path | None = None) -> dict[str, Any]:
    """The trained model and its data; ``--data DIR`` says where its weights are kept."""
    model, splits = DigitNet(), loaders()
    weights = (data or Path(__file__).parent) / "digit_net.pt"
    if weights.is_file():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, splits["train"])
        torch.save(model.state_dict(), weights)
    return {"model": model, **splits}
