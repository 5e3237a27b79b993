"""Multi-label image classifiers: the judge that reads counterfactuals, and the downstream models.

A MONAI network reads gray images and gives one probability per label; unknown labels (NaN, or -1) do not count in the
loss. Weights are safetensors beside a small JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prism_lib.devices import autocast, default_device
from prism_lib.files import atomic

Objective = Literal["erm", "reweighted", "group_dro"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ClassifierConfig:
    """Architecture and recipe.

    `objective` "erm" averages over images; "reweighted" draws every group equally often (Idrissi et al., CLeaR 2022);
    "group_dro" does so too and minimises the worst group's loss (Sagawa et al., ICLR 2020).
    """

    labels: tuple[str, ...] = ("Cardiomegaly", "Pleural Effusion", "Support Devices")
    blocks: tuple[int, ...] = (4, 8, 12, 8)  # this, growth and features are of "densenet" alone
    growth: PositiveInt = 16
    features: PositiveInt = 32
    epochs: PositiveInt = 4
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 1e-2
    seed: int = 0
    network: str = "densenet"  # or "resnet18", or a MONAI EfficientNet such as "efficientnet-b0"
    steps: NonNegativeInt = 0  # of the optimizer; 0: as many as `epochs` come to
    objective: Objective = "erm"
    group_step: PositiveFloat = 0.1  # of Group-DRO's weights
    mixed_precision: Literal["no", "bf16"] = "no"  # of training; predictions are always in float32
    size: NonNegativeInt = 0  # pixels to which larger images are reduced before the network reads them; 0: none


# Networks by name; the two small ones are for processors and images of about 128 pixels.
NETWORKS: dict[str, dict[str, Any]] = {
    "densenet121": {"blocks": (6, 12, 24, 16), "growth": 32, "features": 64},
    "densenet-small": {"blocks": (4, 8, 12, 8), "growth": 16, "features": 32},
    "densenet-tiny": {"blocks": (2, 4, 4, 2), "growth": 12, "features": 24},
    "resnet18": {"network": "resnet18"},
    "efficientnet-b0": {"network": "efficientnet-b0"},
}


def named_network(name: str, config: ClassifierConfig) -> ClassifierConfig:
    """The configuration with the architecture of one of `NETWORKS`."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return replace(config, **NETWORKS[name])


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """A MONAI DenseNet, ResNet or EfficientNet with one logit per label, weights drawn from the config's seed."""
    from monai.networks.nets import DenseNet, EfficientNetBN, resnet18  # three seconds: only where one is built

    outputs = len(config.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.network == "densenet":
            model: nn.Module = DenseNet(2, 1, outputs, config.features, config.growth, config.blocks)
        elif config.network == "resnet18":
            # He et al.'s stem halves the image; MONAI's own, made for small volumes, does not.
            model = resnet18(spatial_dims=2, n_input_channels=1, num_classes=outputs, conv1_t_stride=2)
        else:
            model = EfficientNetBN(config.network, pretrained=False, spatial_dims=2, in_channels=1, num_classes=outputs)
    model.register_forward_pre_hook(lambda _, given: (_reduced(given[0], config.size),))
    return model


def train_classifier(
    images: Tensor,
    labels: Tensor,
    config: ClassifierConfig,
    groups: Tensor | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train on images (N, 1, H, W), uint8 or in [0, 1], and labels (N, L) in {1, 0, NaN or -1 unknown}.

    Deterministic in the seed, on `devices.default_device`. Images are shifted and change contrast; chests are never
    mirrored. The objectives "reweighted" and "group_dro" need ``groups`` (N,), whole numbers.
    """
    known = _check_training(images, labels, config, groups)
    device = default_device()
    model = build_classifier(config).to(device).train()
    model = cast(nn.Module, model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    total = config.steps or config.epochs * (len(images) // config.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total)
    generator = torch.Generator().manual_seed(config.seed)
    worst = _WorstGroup(groups, config.group_step) if groups is not None and config.objective == "group_dro" else None
    batches = islice(_batches(len(images), config, groups, generator), total)
    for rows in tqdm(batches, total=total, desc="classifier", leave=False, disable=not progress):
        batch = _augment(_reduced(_unit(images[rows]), config.size), generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        mask = known[rows].to(device)
        target = torch.where(known[rows], labels[rows], 0.0).to(device)
        with autocast(device, config.mixed_precision):
            logits = model(batch)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none") * mask
        if worst is None:
            objective = loss.sum() / mask.sum().clamp(min=1)
        else:
            objective = worst(loss.sum(1) / mask.sum(1).clamp(min=1), rows)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def _check_training(images: Tensor, labels: Tensor, config: ClassifierConfig, groups: Tensor | None) -> Tensor:
    """Which labels are known, (N, L); ValueError for what cannot be learnt from."""
    if len(images) != len(labels) or labels.shape[1] != len(config.labels):
        raise ValueError(f"{len(images)} images do not go with labels {tuple(labels.shape)} for {config.labels}")
    if len(images) < config.batch_size:
        raise ValueError(f"{len(images)} images are fewer than one batch of {config.batch_size}")
    known = torch.isfinite(labels) & (labels >= 0)
    for column, label in enumerate(config.labels):
        if len(torch.unique(labels[known[:, column], column])) < 2:
            raise ValueError(f"label {label!r} has one class only in the training set")
    if config.objective != "erm" and (groups is None or len(groups) != len(images)):
        raise ValueError(f"objective {config.objective!r} needs the group of each of the {len(images)} images")
    return known


def _batches(count: int, config: ClassifierConfig, groups: Tensor | None, random: torch.Generator) -> Iterator[Tensor]:
    """The rows of each optimizer step, without end: epochs of all images, or groups drawn equally often."""
    while config.objective == "erm" or groups is None:
        order = torch.randperm(count, generator=random)[: count - count % config.batch_size]
        yield from order.split(config.batch_size)
    _, member, sizes = groups.unique(return_inverse=True, return_counts=True)
    weights = 1 / sizes[member].float()
    while True:
        yield torch.multinomial(weights, config.batch_size, replacement=True, generator=random)


class _WorstGroup:
    """Group-DRO's online weights: q_g is multiplied by exp(step loss_g), the objective is sum_g q_g loss_g."""

    def __init__(self, groups: Tensor, step: float) -> None:
        names, self.member = groups.unique(return_inverse=True)
        self.q = torch.full((len(names),), 1 / len(names))
        self.step = step

    def __call__(self, losses: Tensor, rows: Tensor) -> Tensor:
        onehot = F.one_hot(self.member[rows], len(self.q)).to(losses)  # (B, G)
        group_losses = (onehot * losses[:, None]).sum(0) / onehot.sum(0).clamp(min=1)
        q = self.q.to(losses) * (self.step * group_losses.detach()).exp()
        self.q = (q / q.sum()).cpu()
        return (q / q.sum() * group_losses).sum()


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _reduced(images: Tensor, size: int) -> Tensor:
    smaller = 0 < size < images.shape[-1]
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True) if smaller else images


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


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and the labels of its outputs."""

    network: nn.Module
    labels: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        network, config = load_classifier(folder)
        return cls(network, config.labels)

    def read(self, images: Tensor) -> Tensor:
        """Probabilities (N, L) in [0, 1] for images (N, C, H, W) in [0, 1], which are read in gray."""
        return predict(self.network, images.mean(1, keepdim=True))


def save_classifier(model: nn.Module, config: ClassifierConfig, folder: Path) -> Path:
    """Write ``model.safetensors`` (float16) and ``config.json`` into a folder that appears whole."""
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    with atomic(folder) as partial:
        partial.mkdir()
        save_file(halved, partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    return folder


def load_classifier(folder: Path) -> tuple[nn.Module, ClassifierConfig]:
    """Load what `save_classifier` wrote, in float32 and evaluation mode, onto `devices.default_device`."""
    if not (path := folder / "config.json").is_file():
        raise FileNotFoundError(f"no classifier at {folder}: {path.name} is missing")
    config = TypeAdapter(ClassifierConfig).validate_json(path.read_bytes())
    model = build_classifier(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))  # copied into the model's float32
    return model.eval().to(default_device()), config
