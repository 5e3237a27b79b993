"""Train `film-kinds`, which tells the kinds of devices apart: `python -m benchmarks.train_film_kinds DATA OUT`.

A film of the train split without devices is shown with devices of one to five kinds, rendered or real (--bedside and
--cut-outs, as in `benchmarks.train_film_sd`). A MONAI U-Net that reads READS x READS learns the kind at every
pixel that a device changes; it says nothing about other pixels. Every device counts alike in the loss, however large.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.train_film_sd import QUANTUM, Bank, Films, backgrounds, fainter, parser_of
from prism_lib.editing.kept import READS, kinds_network
from prism_lib.files import atomic
from prism_lib.phantom.films import KINDS
from prism_lib.training.batches import drawn_ahead

SHOWS = 0.01  # attenuation from which on a pixel counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bank", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=200)
    options = parser.parse_args(arguments)
    films, devices = backgrounds(options)
    films = [some._replace(images=reduced(some.images)) for some in films]
    devices = [bank._replace(maps=reduced(bank.maps)) for bank in devices]
    torch.manual_seed(options.seed)
    model = kinds_network(len(KINDS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    seen, begin, history = [], time.perf_counter(), []
    ahead = drawn_ahead(lambda step: batch(films, devices, options, step), range(options.steps), 1)
    for step, (images, absorbed) in enumerate(tqdm(ahead, total=options.steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss, right = loss_of(logits.float(), absorbed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append((loss.item(), right.item()))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            history.append([step + 1, *np.nanmean(seen, 0).round(4).tolist()])
            tqdm.write(f"step, loss, share of right pixels: {history[-1]} {time.perf_counter() - begin:.0f} s")
            seen = []
    log = {"config": vars(options), "step, loss, share of right pixels": history}
    with atomic(options.out) as partial:
        partial.mkdir(parents=True)
        save_file(
            {name: value.half().contiguous() for name, value in model.state_dict().items()},
            partial / "model.safetensors",
        )
        for name, content in (("kinds", KINDS), ("training", log)):
            text = json.dumps(content, default=lambda path: path.name, indent=1)
            (partial / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def loss_of(logits: Tensor, absorbed: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the share of right pixels, as means over the devices of images.

    ``absorbed`` (N, kinds, H, W) is each kind's attenuation; a pixel is of the kind that absorbs most.
    """
    most, kind = absorbed.max(1)
    shown = F.one_hot(kind, len(KINDS)).movedim(-1, 1) * (most > SHOWS)[:, None]
    count = shown.sum((2, 3))
    error = F.cross_entropy(logits, kind, reduction="none")[:, None]
    right = (logits.argmax(1) == kind)[:, None]
    of_devices = [((values * shown).sum((2, 3)) / count.clamp(min=1))[count > 8].mean() for values in (error, right)]
    return of_devices[0], of_devices[1]


def reduced(maps: np.ndarray) -> np.ndarray:
    """Maps (M, H, H) as means (M, READS, READS)."""
    side = maps.shape[-1] // READS
    means = [one.reshape(READS, side, READS, side).mean((1, 3), dtype=np.float32) for one in maps]
    return np.array(means, np.float16)


def batch(films: list[Films], devices: list[Bank], options: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Films with devices (N, 1, READS, READS), and the attenuation of each kind (N, kinds, READS, READS)."""
    random = np.random.default_rng([options.seed, 4, step])
    made = [shown(films, devices, options, random) for _ in range(options.batch_size)]
    images, absorbed = (torch.from_numpy(np.stack(each)).float() for each in zip(*made, strict=True))
    return images[:, None], absorbed


def shown(
    films: list[Films], devices: list[Bank], options: argparse.Namespace, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A film (H, H) with devices and the attenuation of each kind (kinds, H, H), turned and scaled a little."""
    some = films[-1] if random.random() < options.share else films[0]
    film = random.choice(some.images).astype(np.float32) / 255
    absorbed = np.zeros((len(KINDS), *film.shape), np.float32)
    for kind in random.choice(len(KINDS), random.integers(1, 6), replace=False):
        real = random.random() < options.cut_outs and (devices[-1].kinds == kind).any()
        bank = devices[-1] if real else devices[0]
        place = random.choice(np.flatnonzero(bank.kinds == kind))
        absorbed[kind] = bank.maps[place].astype(np.float32) * (fainter(random) / QUANTUM)
    image = 1 - (1 - film) * np.exp(-absorbed.sum(0))
    angle, zoom = math.radians(random.normal(0, 6)), math.exp(random.normal(0, 0.1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
    if random.random() < 0.3:
        turn[:, 1] *= -1
    centre = np.full(2, len(film) / 2)
    offset = centre - turn @ centre + random.normal(0, 10, 2)
    image = ndimage.affine_transform(image, turn, offset, order=1)
    for kind in np.flatnonzero(absorbed.any((1, 2))):
        absorbed[kind] = ndimage.affine_transform(absorbed[kind], turn, offset, order=1)
    image = (0.5 + (image - 0.5) * random.uniform(0.6, 1.3) + random.uniform(-0.15, 0.15)).clip(0, 1)
    image = image ** math.exp(random.uniform(-0.4, 0.4))
    if random.random() < 0.5:
        image += random.uniform(0.3, 1.5) * (
            image - ndimage.gaussian_filter(image, math.exp(random.uniform(-0.5, 1.8)))
        )
    image += random.standard_normal(image.shape, np.float32) * random.uniform(0, 0.03)
    return image.clip(0, 1), absorbed


if __name__ == "__main__":
    main()
