"""Train `film-kinds`, which tells the kinds of removed devices apart: `python -m benchmarks.train_film_kinds DATA OUT`.

A film of the train split without devices is shown with devices of one to five kinds, rendered or real (--bedside and
--cut-outs, as in `benchmarks.train_film_sd`), each at the place for which it was drawn. The network reads the film
and what an edit may remove from it: every device in part, with gaps, some hardly, and bright edges of the film itself.
It learns the kind at every place that a device changes, and says nothing about others. Every device counts alike in
the loss, however large.
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

from benchmarks.train_film_sd import QUANTUM, Bank, Films, backgrounds, fainter, parser_of, positive, refuse_other
from prism_lib.data import load_info
from prism_lib.editing.kept import READS, build_kinds, kinds_input
from prism_lib.files import atomic
from prism_lib.phantom.films import CATALOGUE, KINDS
from prism_lib.training.batches import drawn_ahead

SHOWS = 0.008  # attenuation from which on a place counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=positive, default=4000)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bank", type=positive, default=2500)
    parser.add_argument("--seed", type=int, default=200)
    options = parser.parse_args(arguments)
    refuse_other(options.out, "kinds.json")
    if (size := load_info(options.data)["config"]["size"]) % READS:
        raise SystemExit(f"{options.data} has films of {size} pixels, not of {READS} or a multiple")
    films, devices = backgrounds(options)
    films = [some._replace(images=reduced(some.images)) for some in films]
    devices = [bank._replace(maps=reduced(bank.maps)) for bank in devices]
    torch.manual_seed(options.seed)
    model = build_kinds(len(KINDS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    seen, begin, history = [], time.perf_counter(), []
    ahead = drawn_ahead(lambda step: batch(films, devices, options, step), range(options.steps), 1)
    for step, (read, absorbed) in enumerate(tqdm(ahead, total=options.steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(read)
        loss, right = loss_of(logits.float(), absorbed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append((loss.item(), right.item()))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            history.append([step + 1, *np.nanmean(seen, 0).round(4).tolist()])
            tqdm.write(f"step, loss, share of right places: {history[-1]} {time.perf_counter() - begin:.0f} s")
            seen = []
    log = {"config": vars(options), "step, loss, share of right places": history}
    with atomic(options.out) as partial:
        partial.mkdir(parents=True)
        weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors")
        for name, content in (("kinds", KINDS), ("training", log)):
            text = json.dumps(content, default=lambda path: path.name, indent=1)
            (partial / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def loss_of(logits: Tensor, absorbed: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the share of right places, as means over the devices of images.

    ``absorbed`` (N, kinds, h, w) is each kind's attenuation; a place is of the kind that absorbs most.
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
    """What the network reads, and the attenuation of each kind (N, kinds, READS / 2, READS / 2)."""
    random = np.random.default_rng([options.seed, 5, step])
    made = [example(films, devices, options, random) for _ in range(options.batch_size)]
    images, removed, absorbed = (torch.from_numpy(np.stack(each)).float() for each in zip(*made, strict=True))
    return kinds_input(images[:, None], removed[:, None]), F.avg_pool2d(absorbed, 2)


def example(
    films: list[Films], devices: list[Bank], options: argparse.Namespace, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A film (H, H) with devices, what an edit removes, and the attenuation of each kind (kinds, H, H)."""
    some = films[-1] if random.random() < options.share else films[0]
    film = random.choice(some.images).astype(np.float32) / 255
    absorbed = np.zeros((len(KINDS), *film.shape), np.float32)
    often = (np.array([share for share, _ in CATALOGUE.values()]) + 0.1) * np.isin(range(len(KINDS)), devices[0].kinds)
    count = min(random.integers(1, 6), np.count_nonzero(often))
    shown = random.choice(len(KINDS), count, replace=False, p=often / often.sum())
    for kind in shown:
        real = random.random() < options.cut_outs and (devices[-1].kinds == kind).any()
        bank = devices[-1] if real else devices[0]
        place = random.choice(np.flatnonzero(bank.kinds == kind))
        absorbed[kind] = bank.maps[place].astype(np.float32) * (fainter(random) / QUANTUM)
    # All are turned, scaled and shifted a little, and some mirrored.
    angle = math.radians(random.normal(0, 7))
    zoom = np.exp(random.normal(0, 0.1) + random.normal(0, 0.04, 2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
    if random.random() < 0.15:
        turn[:, 1] *= -1
    centre = np.full(2, READS / 2)
    offset = centre - turn @ centre + random.normal(0, 0.05 * READS, 2)
    film = ndimage.affine_transform(film, turn, offset, order=1)
    for kind in shown:
        absorbed[kind] = ndimage.affine_transform(absorbed[kind], turn, offset, order=1)
    image = 1 - (1 - film) * np.exp(-absorbed.sum(0))
    removed = image - (1 - (1 - image) * np.exp(found(film, absorbed[shown], random)))
    if random.random() < 0.4:
        removed = ndimage.gaussian_filter(removed, random.uniform(0.3, 1))
    brighter, contrast, gamma = (
        random.uniform(-0.12, 0.12),
        random.uniform(0.6, 1.3),
        math.exp(random.uniform(-0.35, 0.35)),
    )
    image = (0.5 + (image - 0.5) * contrast + brighter).clip(0, 1) ** gamma
    removed *= contrast * gamma
    if random.random() < 0.5:
        sharper, radius = random.uniform(0.3, 1.5), math.exp(random.uniform(-0.7, 1.2))
        image += sharper * (image - ndimage.gaussian_filter(image, radius))
    image += random.standard_normal(image.shape, np.float32) * random.uniform(0, 0.03)
    return image.clip(0, 1), removed, absorbed


def found(film: np.ndarray, devices: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The attenuation (H, H) that an edit takes for devices (D, H, H): parts of them, and bright edges of the film."""
    total = np.zeros_like(film)
    for device in devices:
        part = device * (random.uniform(0.3, 1.05) if random.random() < 0.85 else random.uniform(0, 0.3))
        if random.random() < 0.6:
            part = part * (waves(16, random) > random.uniform(-2.5, -0.3))
        total += part
    if random.random() < 0.6:
        edges = (film - ndimage.gaussian_filter(film, random.uniform(2, 8))).clip(0)
        total += edges * (waves(8, random) > random.uniform(0.5, 2)) * random.uniform(0.1, 1)
    return total


def waves(side: int, random: np.random.Generator) -> np.ndarray:
    """Noise (READS, READS) that is smooth between ``side`` x ``side`` places."""
    smooth: np.ndarray = ndimage.zoom(random.standard_normal((side, side)), READS / side, order=1)
    return smooth


if __name__ == "__main__":
    main()
