"""Multi-label image classifiers: the judge that reads counterfactuals, the downstream models, and those of others.

Ours are MONAI networks of gray images, with weights as safetensors beside a small JSON; unknown labels (NaN, or -1) do
not count in the loss. A `Classifier` is any network with what it takes and gives.
"""

import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prism_lib import paths
from prism_lib.configs import checked, read
from prism_lib.devices import autocast, default_device
from prism_lib.files import atomic

logger = logging.getLogger(__name__)

Objective = Literal["erm", "reweighted", "group_dro"]


@checked()
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
    contrast: Annotated[float, Field(gt=0, le=1)] = 1.0  # least share of their contrast that training leaves images
    pool: Literal["mean", "max"] = "mean"  # of a DenseNet's last map: "max" finds what fills a small part of an image


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
            model: nn.Module = (dense := DenseNet(2, 1, outputs, config.features, config.growth, config.blocks))
            if config.pool == "max":
                dense.class_layers.pool = nn.AdaptiveMaxPool2d(1)
        elif config.network == "resnet18":
            # He et al.'s stem halves the image; MONAI's own, made for small volumes, does not.
            model = resnet18(spatial_dims=2, n_input_channels=1, num_classes=outputs, conv1_t_stride=2)
        else:
            model = EfficientNetBN(config.network, pretrained=False, spatial_dims=2, in_channels=1, num_classes=outputs)
    model.register_forward_pre_hook(lambda _, given: (_reduced(given[0], config.size),))
    return model


def train_classifier(
    images: Tensor, labels: Tensor, config: ClassifierConfig, groups: Tensor | None = None, progress: bool = True
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
        batch = _augment(_reduced(_unit(images[rows]), config.size), generator, config.contrast)
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
        raise ValueError(f"{len(images)} images are fewer than one batch: batch_size is {config.batch_size}")
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


def _augment(images: Tensor, generator: torch.Generator, contrast: float) -> Tensor:
    """Shift by up to 4 pixels, gamma 0.8 to 1.25, a little noise; a random window, where ``contrast`` is below 1."""
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    gamma = 0.8 * (1.25 / 0.8) ** torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.02 * torch.rand(len(images), 1, 1, 1, generator=generator)
    moved = torch.roll(images, shift, dims=(2, 3)).clamp(0, 1) ** gamma
    if contrast < 1:
        span, low = torch.rand(2, len(images), 1, 1, 1, generator=generator)
        span = 1 - (1 - contrast) * span
        moved = (1 - span) * low + span * moved
    return (moved + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@checked(arbitrary_types_allowed=True)
class Classifier:
    """A network and its contract: which images it takes, and what its outputs are."""

    network: nn.Module
    labels: tuple[str, ...]
    size: NonNegativeInt = 0  # pixels a side to which images are resized; 0: as they are
    channels: Literal[1, 3] = 1  # gray or colour; images are converted
    value_range: tuple[float, float] = (0.0, 1.0)  # of black and white
    outputs: Literal["logits", "probabilities"] = "logits"
    batch_size: PositiveInt = 16
    columns: tuple[NonNegativeInt, ...] = ()  # of the network's outputs, one for each label; (): all, in order
    name: str = "the classifier"

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        arguments: Mapping[str, Any] | None = None,
        rename: Mapping[str, str] | None = None,
        allow_code: bool = False,
        **contract: Any,
    ) -> "Classifier":
        """A folder of `save_classifier`, a file or "package.module:factory"; ``contract`` are fields of this class.

        Folders and files are absolute, or below PRISM_WEIGHTS or PRISM_RUNS. A factory is called with ``arguments`` and
        returns a `Classifier`, or a module whose `labels` (or `pathologies`) name its outputs, "" an untrained one.
        TorchScript needs ``allow_code``, ONNX the package onnxruntime. ``rename`` maps labels to those of the data.
        """
        made = _opened(str(source), arguments or {}, allow_code)
        if not isinstance(made, Classifier):
            given = contract.pop("labels", getattr(made, "labels", None) or getattr(made, "pathologies", ()))
            if not (labels := (given,) if isinstance(given, str) else tuple(map(str, given))):
                raise ValueError(f"{source} does not name its outputs: give its labels")
            made = cls(made.to(default_device()), labels)
        made = replace(made, **{"name": str(source)} | contract)
        if any(module.training for module in made.network.modules()):
            raise ValueError(f"{made.name} is in training mode, so an output depends on the batch: call eval() first")
        made = made.only([label for label in made.labels if label]) if "" in made.labels else made
        new = rename or {}
        renamed = tuple(new.get(label, label) for label in made.labels)
        if unknown := sorted({*new} - {*made.labels}):
            raise ValueError(f"{made.name} has no label {unknown[0]!r} to rename; it has {', '.join(made.labels)}")
        if twice := [label for label in renamed if renamed.count(label) > 1]:
            raise ValueError(f"{made.name} has two outputs for the label {twice[0]!r}")
        return replace(made, labels=renamed)

    def only(self, labels: Sequence[str]) -> "Classifier":
        """The classifier of some of its labels."""
        if missing := [label for label in labels if label not in self.labels]:
            raise ValueError(f"{self.name} does not read {missing[0]!r}; it reads {', '.join(self.labels)}")
        places = [self.labels.index(label) for label in labels]
        columns = self.columns or tuple(range(len(self.labels)))
        return replace(self, labels=tuple(labels), columns=tuple(columns[place] for place in places))

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Probabilities (N, L) in [0, 1] for images (N, 1 or 3, H, W), uint8 or in [0, 1]."""
        # All outputs before some are chosen: the last bit of a sigmoid depends on its place in memory.
        found = (values.sigmoid() if self.outputs == "logits" else values for values in self._outputs(images))
        return torch.cat([self._chosen(values) for values in found])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, L) for the same images; those of probabilities end at 16, so that 0 and 1 are finite."""
        return torch.cat([self._as_logits(self._chosen(outputs)) for outputs in self._outputs(images)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the network's last linear layer reads (N, D); ValueError if that is not one finite row an image."""
        layers = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"{self.name} has no linear layer, whose inputs would be the features of an image")
        read: list[Tensor] = []
        with layers[-1].register_forward_pre_hook(lambda _, given: read.append(given[0].flatten(1).cpu())):
            list(self._outputs(images))
        found = torch.cat(read) if read else torch.zeros(0)
        if len(found) != len(images) or not found.isfinite().all():
            raise ValueError(f"{self.name}: its last linear layer does not read one finite row of features an image")
        return found

    def _as_logits(self, values: Tensor) -> Tensor:
        return values if self.outputs == "logits" else values.logit(eps=1e-7)

    @torch.no_grad()
    def checked(self, images: Tensor, known: Sequence[str] = ()) -> "Classifier":
        """The classifier without outputs that are NaN for every image, which were not trained.

        ValueError if it cannot be right: wrong channels or size, NaN, no probabilities, outputs that are the same for
        all images, or no label among the data's ``known`` ones.
        """
        if known and not {*known} & {*self.labels}:
            have = f"the data has {', '.join(known)}"
            raise ValueError(f"{self.name} reads {', '.join(self.labels)}, but {have}: set labels or rename")
        outputs = torch.cat([*self._outputs(images)])
        values = outputs[:, list(self.columns)] if self.columns else outputs
        unread = values.isnan().all(0).tolist()
        trained = [label for label, absent in zip(self.labels, unread, strict=True) if not absent]
        if trained and any(unread):
            dropped = ", ".join(label for label in self.labels if label not in trained)
            logger.warning("%s gives NaN for %s, for which it was not trained", self.name, dropped)
        chosen = self.only(trained or self.labels)
        values = chosen._as_logits(chosen._chosen(outputs))
        if len(images) > 1 and bool((values.amax(0) - values.amin(0) < 0.01).all()):
            low, high = self.value_range
            why = f"usually its value_range is not {low:g} to {high:g}"
            raise ValueError(f"{self.name} gives the same output for all of {len(images)} images: {why}")
        return chosen

    def _outputs(self, images: Tensor) -> Iterator[Tensor]:
        """All outputs of the network (B, K), on the CPU, batch by batch."""
        low, high = self.value_range
        place = next(self.network.parameters(), images).device
        for chunk in images.split(self.batch_size):
            given = _unit(chunk)
            given = given.mean(1, keepdim=True) if self.channels == 1 else given.expand(-1, 3, -1, -1)
            if self.size and given.shape[-2:] != (self.size, self.size):
                given = F.interpolate(given, (self.size, self.size), mode="bilinear", antialias=True)
            try:
                made = self.network((low + (high - low) * given).to(place))
            except Exception as error:  # of a user's code
                size = f"{self.channels} channels and {self.size or images.shape[-1]} pixels"
                said = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(f"{self.name} does not take images of {size}: {said}") from error
            found = tuple(made.shape) if isinstance(made, Tensor) else (type(made).__name__,)
            least, count = max(self.columns, default=-1) + 1, len(self.labels)
            if len(found) != 2 or found[0] != len(chunk) or (found[1] < least if least else found[1] != count):
                raise ValueError(f"{self.name} gives {found} for {len(chunk)} images and {count} labels")
            yield made.cpu()

    def _chosen(self, outputs: Tensor) -> Tensor:
        """The columns of the labels; ValueError for NaN, infinite logits, and probabilities outside [0, 1]."""
        values = outputs[:, list(self.columns)] if self.columns else outputs
        if (bad := values.isnan().any(0)).any():
            raise ValueError(f"{self.name} gives NaN for {self.labels[int(bad.nonzero()[0])]!r}")
        if self.outputs == "logits" and (bad := values.isinf().any(0)).any():
            raise ValueError(f"{self.name} gives an infinite logit for {self.labels[int(bad.nonzero()[0])]!r}")
        if self.outputs == "probabilities" and not bool(((values >= 0) & (values <= 1)).all()):
            found = f"values from {values.min():.3g} to {values.max():.3g}"
            raise ValueError(f"{self.name} gives {found}, which are no probabilities: set outputs to logits")
        return values


def find_classifier(name: str | Path) -> Path:
    """The folder or file of that name: below PRISM_WEIGHTS or PRISM_RUNS, or itself; it may be missing."""
    places = [paths.weights() / name, paths.runs() / name, Path(name)]
    return next((path for path in places if path.exists()), places[0])


def _opened(name: str, arguments: Mapping[str, Any], allow_code: bool) -> Classifier | nn.Module:
    """The source of a classifier, without its contract where it has none."""
    path = find_classifier(name)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        module, _, factory = name.partition(":")
        logger.warning("%s runs code of the module %s on this machine", name, module)
        try:
            made = getattr(importlib.import_module(module), factory)(**arguments)
        except Exception as error:
            raise ValueError(f"the factory {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(made, Classifier | nn.Module):
            raise ValueError(f"the factory {name} returned {type(made).__name__}, not a torch.nn.Module or Classifier")
        return made
    if path.suffix not in (".onnx", ".pt", ".pts", ".pth"):
        network, config = load_classifier(path)
        return Classifier(network, config.labels)
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {path}")
    if path.suffix != ".onnx" and not allow_code:
        raise ValueError(f"{name} may hold code, which runs when it is loaded: set allow_code if you trust it")
    try:
        if path.suffix == ".onnx":
            from prism_lib.models.published import OnnxNetwork  # it imports diffusers, which takes seconds

            return OnnxNetwork(path)
        return torch.jit.load(path, map_location=default_device())
    except ImportError:
        raise ValueError(f"{name} needs onnxruntime: pip install onnxruntime") from None
    except Exception as error:
        kind = "ONNX" if path.suffix == ".onnx" else "TorchScript"
        raise ValueError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error


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
    config = read(ClassifierConfig, path.read_bytes(), f"{path} is no classifier's")
    model = build_classifier(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))  # copied into the model's float32
    return model.eval().to(default_device()), config
