"""Multi-label image classifiers: the judge that reads counterfactuals, and the downstream models.

A MONAI DenseNet reads gray images and gives one probability per label; unknown labels (NaN, or -1) do not count in
the loss. The judge never guides or selects an edit. Weights are safetensors beside a small JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture and recipe. ``blocks=(6, 12, 24, 16), growth=32, features=64`` is DenseNet-121."""

    labels: tuple[str, ...] = ("Cardiomegaly", "Pleural Effusion", "Support Devices")
    blocks: tuple[int, ...] = (4, 8, 12, 8)
    growth: int = 16
    features: int = 32
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    seed: int = 0


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """A MONAI DenseNet with one logit per label, weights drawn from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DenseNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=len(config.labels),
            init_features=config.features,
            growth_rate=config.growth,
            block_config=config.blocks,
        )


def train_classifier(images: Tensor, labels: Tensor, config: ClassifierConfig, device: str = "cpu") -> nn.Module:
    """Train on images (N, 1, H, W), uint8 or in [0, 1], and labels (N, L) in {1, 0, NaN or -1 unknown}.

    Small shifts and changes of contrast augment; chests are never mirrored. One-cycle AdamW, deterministic in the seed.
    """
    if len(images) != len(labels) or labels.shape[1] != len(config.labels):
        raise ValueError(f"{len(images)} images do not go with labels {tuple(labels.shape)} for {config.labels}")
    known = torch.isfinite(labels) & (labels >= 0)
    for column, label in enumerate(config.labels):
        if len(torch.unique(labels[known[:, column], column])) < 2:
            raise ValueError(f"label {label!r} has one class only in the training set")
    model = build_classifier(config).to(device).train()
    model = cast(nn.Module, model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = len(images) // config.batch_size
    if not per_epoch:
        raise ValueError(f"{len(images)} images are fewer than one batch of {config.batch_size}")
    total = config.epochs * per_epoch
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total)
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)
        for k in tqdm(range(per_epoch), desc=f"classifier, epoch {epoch + 1} of {config.epochs}"):
            rows = order[k * config.batch_size : (k + 1) * config.batch_size]
            batch = _augment(_unit(images[rows]), generator).to(device, memory_format=torch.channels_last)
            mask = known[rows].to(device)
            target = torch.where(known[rows], labels[rows], 0.0).to(device)
            loss = F.binary_cross_entropy_with_logits(model(batch), target.float(), reduction="none")
            loss = (loss * mask).sum() / mask.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return model.eval()


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels, gamma 0.8 to 1.25, a little noise."""
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    gamma = 0.8 * (1.25 / 0.8) ** torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.02 * torch.rand(len(images), 1, 1, 1, generator=generator)
    moved = torch.roll(images, shift, dims=(2, 3)).clamp(0, 1) ** gamma
    return (moved + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 16) -> Tensor:
    """Probabilities (N, L) in [0, 1] for images (N, 1, H, W), uint8 or in [0, 1]."""
    device = next(model.parameters()).device
    return torch.cat([model(_unit(chunk).to(device)).sigmoid().cpu() for chunk in images.split(batch_size)])


def auc(probabilities: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Area under the ROC curve per label; rows whose label is unknown are left out.

    Raises ValueError naming a label of which only one class occurs.
    """
    areas = {}
    for column, name in enumerate(names):
        truth = labels[:, column].numpy().astype(float)
        known = np.isfinite(truth) & (truth >= 0)
        if len(np.unique(truth[known])) < 2:
            raise ValueError(f"AUC of {name!r} needs both classes; only one occurs")
        areas[name] = float(roc_auc_score(truth[known], probabilities[known, column].numpy()))
    return areas


def save_classifier(model: nn.Module, config: ClassifierConfig, folder: Path) -> Path:
    """Write ``model.safetensors`` (float16) and ``config.json`` into a folder that appears whole."""
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "model.safetensors")
    (partial / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def load_classifier(folder: Path) -> tuple[nn.Module, ClassifierConfig]:
    """Load what `save_classifier` wrote, in float32 and evaluation mode."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {folder}: {path.name} is missing")
    raw = json.loads(path.read_text())
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    config = ClassifierConfig(**values)
    model = build_classifier(config)
    model.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(folder / "model.safetensors").items()
        }
    )
    return model.eval(), config
