"""GANterfactual (Mertes et al., Frontiers in AI 2022): a CycleGAN between images with and without a finding.

A frozen classifier, not the judge that measures, has to read the translation as its target. There is a GAN for each
label, without text or mask. A stopped run continues bit for bit: a step's images follow from seed and step alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import PatchDiscriminator, UNet
from pydantic import PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prism_lib.configs import checked
from prism_lib.data.folder import Folder, load_info, load_table
from prism_lib.devices import autocast, default_device
from prism_lib.editing.counterfactuals import scored
from prism_lib.evaluation.evaluate import Editor, Results, gray_bytes, own_classifier
from prism_lib.files import stable_seed, write_text
from prism_lib.language.edits import Edit, Pairs
from prism_lib.language.labels import snake_case
from prism_lib.models.classifier import Classifier, ClassifierConfig
from prism_lib.models.pipeline import Pipe
from prism_lib.training.checkpoints import load_checkpoint, save_checkpoint, write_tensors

DIRECTIONS = ("remove", "add")
Images = dict[str, Tensor]  # by direction


@checked()
class GanConfig:
    """Recipe; the learning rate is the paper's."""

    steps: PositiveInt = 2000
    batch_size: PositiveInt = 2
    learning_rate: float = 2e-4
    filters: PositiveInt = 32
    checkpoint_every: PositiveInt = 250
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"


@checked()
class Ganterfactual(Editor):
    """The trained generators below `folder` as an editor: one folder per label, named by it in snake case."""

    folder: Path

    def edit(self, pipe: Pipe, images: Tensor, pairs: Pairs, change: Edit) -> Results:
        """Translate; the reconstruction is the way back. ValueError for an edit of other than one label."""
        changed = [*change.remove, *change.add]
        if len(changed) != 1:
            raise ValueError(f"GANterfactual changes one label; {change.key} asks for {len(changed)}")
        there, back = DIRECTIONS if change.remove else DIRECTIONS[::-1]
        networks = load_generators(self.folder / snake_case(changed[0]))
        with torch.no_grad():
            translated = _translate(networks[there], images.mean(1, keepdim=True))
            returned = _translate(networks[back], translated)
        edited, decoded = (part.expand(images.shape).to(images) for part in (translated, returned))
        return scored(images, edited, edited, decoded, torch.ones_like(images[:, :1]), pairs, self)


def train_gan(folder: Folder, label: str, classifier: Classifier, output: Path, config: GanConfig) -> Path:
    """Train on a prepared folder, or go on, or reuse; returns the folder below ``output`` with the generators."""
    table = load_table(folder, "train")
    if label not in classifier.labels or label not in table:
        raise ValueError(f"label {label!r} is not in {folder} or not among the classifier's")
    sides = {value: table[table[label] == value] for value in (0, 1)}
    for value, rows in sides.items():
        if rows.empty:
            raise ValueError(f"{label!r} has one class only in {folder}: no image is labelled {value}")
    target = output / snake_case(label)
    path, text = target / "config.json", json.dumps(asdict(config), indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{target} holds a run with other settings; choose another output folder")
    write_text(path, text)
    finished = target / "generators.safetensors"
    if finished.is_file():
        return target
    training = _Training(config, classifier, label, int(load_info(folder)["config"]["size"]))
    start = load_checkpoint(target, training.states, training.optimizer).get("step", 0)
    pixels = {value: gray_bytes(folder, rows) for value, rows in sides.items()}
    for step in tqdm(range(start, config.steps), initial=start, total=config.steps, desc=f"GAN: {label}"):
        draw = torch.Generator().manual_seed(stable_seed(config.seed, step))
        negative, positive = (
            pixels[value][torch.randint(len(pixels[value]), (config.batch_size,), generator=draw)] for value in (0, 1)
        )
        training.step(negative.float() / 127.5 - 1, positive.float() / 127.5 - 1)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            save_checkpoint(target, step + 1, training.states, training.optimizer, {}, keep=1)
    write_tensors(finished, training.generators.state_dict())
    return target


def train_for(
    folder: Folder, edits: Sequence[Edit], output: Path, config: GanConfig, guide: ClassifierConfig, images: int
) -> Ganterfactual:
    """The editor with a GAN for every label that ``edits`` change, kept below ``output`` by data and settings."""
    made = (load_info(folder)["content_hash"], config, guide, images)
    home = output / hashlib.sha256(repr(made).encode()).hexdigest()[:12]
    classifier = own_classifier(folder, home / "guide", guide, images)
    for label in dict.fromkeys(name for change in edits for name in (*change.remove, *change.add)):
        train_gan(folder, label, classifier, home, config)
    return Ganterfactual(home)


def load_generators(folder: Path) -> nn.ModuleDict:
    """The two generators that `train_gan` wrote, by direction."""
    networks = _generators(GanConfig(**json.loads((folder / "config.json").read_text()))).eval()
    networks.load_state_dict(load_file(folder / "generators.safetensors"))
    return networks.to(default_device())


class _Training:
    """Images are (B, 1, H, W) in [-1, 1]."""

    def __init__(self, config: GanConfig, classifier: Classifier, label: str, size: int) -> None:
        if size % 16:
            raise ValueError(f"the generators halve images four times; {size} pixels are not a multiple of 16")
        self.config = config
        self.column = classifier.labels.index(label)
        self.classifier = classifier.network.eval().requires_grad_(False)
        self.device = next(self.classifier.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.generators = _generators(config).to(self.device)
            how = {"spatial_dims": 2, "channels": 2 * config.filters, "in_channels": 1, "norm": "INSTANCE"}
            discriminators = {name: PatchDiscriminator(**how) for name in DIRECTIONS}
            self.discriminators = nn.ModuleDict(discriminators).to(self.device)
        parts = nn.ModuleDict({"generators": self.generators, "discriminators": self.discriminators})
        self.states = {name: part.state_dict() for name, part in parts.items()}
        # One Adam for both: it leaves alone what has no gradient in a step.
        self.optimizer = torch.optim.Adam(parts.parameters(), lr=config.learning_rate, betas=(0.5, 0.999))

    def step(self, negative: Tensor, positive: Tensor) -> None:
        """One step of the generators, then one of the discriminators."""
        negative, positive = negative.to(self.device), positive.to(self.device)
        # A direction takes from one side to the other: "remove" from positive to negative.
        given, wanted = {"remove": positive, "add": negative}, {"remove": negative, "add": positive}
        self.discriminators.requires_grad_(False)
        loss, fakes = self._generator_loss(given, wanted)
        self._optimise(loss)
        self.discriminators.requires_grad_(True)
        errors = []
        for name in DIRECTIONS:
            for image, real in ((wanted[name], 1.0), (fakes[name].detach(), 0.0)):
                score = self._called(self.discriminators[name], image)
                errors.append(F.mse_loss(score, torch.full_like(score, real)))
        self._optimise(0.5 * torch.stack(errors).sum())

    def _generator_loss(self, given: Images, wanted: Images) -> tuple[Tensor, Images]:
        total, fakes = torch.zeros((), device=self.device), {}
        for name, other in zip(DIRECTIONS, DIRECTIONS[::-1], strict=True):
            fake = fakes[name] = self._called(self.generators[name], given[name]).tanh()
            score = self._called(self.discriminators[name], fake)
            read = self._called(self.classifier, (fake + 1) / 2)[:, self.column].sigmoid()
            intended = torch.full_like(read, float(name == "add"))
            returned = self._called(self.generators[other], fake).tanh()
            same = self._called(self.generators[name], wanted[name]).tanh()
            total = total + F.mse_loss(score, torch.ones_like(score)) + F.mse_loss(read, intended)
            total = total + 10 * F.l1_loss(returned, given[name]) + F.l1_loss(same, wanted[name])
        return total, fakes

    def _called(self, network: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.device, self.config.mixed_precision):  # networks only; losses are float32
            output = network(images)
        return (output[-1] if isinstance(output, list) else output).float()  # a discriminator gives its layers too

    def _optimise(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _generators(config: GanConfig) -> nn.ModuleDict:
    """The paper's U-Nets; tanh follows where they are called."""
    widths = [config.filters * factor for factor in (1, 2, 4, 8, 8)]
    how = {"strides": [2] * 4, "norm": "INSTANCE", "act": ("LEAKYRELU", {"negative_slope": 0.2})}
    return nn.ModuleDict({name: UNet(2, 1, 1, widths, **how) for name in DIRECTIONS})


def _translate(network: nn.Module, images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [0, 1], through a generator and back to [0, 1]."""
    device = next(network.parameters()).device
    return torch.cat([(network(part.to(device) * 2 - 1).tanh() + 1) / 2 for part in images.split(8)])
