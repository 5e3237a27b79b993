"""Train `film-judge`, which reads devices on films: `python -m benchmarks.train_film_judge DATA OUT`.

Its crops are those of `benchmarks.train_film_sd` (with its DATA, --bedside and --cut-outs), with other devices: half of
a batch shows them, the other half is the same crops without. Each cell of the network's last map learns whether the
pixels in it show a device, and the network whether a crop does. The cells of bedside films that were not seen to be
free of devices count only where they show one. On the films of the train split, as they are and with rendered devices,
logistic regression then sets scale and bias of the logit. The judge never guides an edit, and shares no weights with a
model that makes one.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.train_film_sd import Bank, Films, backgrounds, crop, parser_of, positive, refuse_other
from prism_lib.data import load_table, read_images
from prism_lib.data.chest import DEVICES
from prism_lib.models.classifier import (
    Classifier,
    ClassifierConfig,
    build_classifier,
    find_classifier,
    load_classifier,
    save_classifier,
)
from prism_lib.training.batches import drawn_ahead

CONFIG = ClassifierConfig((DEVICES,), blocks=(3, 6, 10, 8), growth=12, features=24, size=512, pool="max")
CELL = 32  # pixels of a cell of the last map
SHOWS, ENOUGH = 0.01, 6  # change in gray of a pixel that shows a device, and how many of these a cell needs


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, calibrate and save."""
    parser = parser_of(__doc__)
    parser.add_argument("--start", help="a judge of this program that learns on")
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--pairs", type=positive, default=8, help="crops of a batch, each with devices and without")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bank", type=positive, default=1500)
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args(arguments)
    refuse_other(options.out, "training.json")
    if not len(films_of(options.data)):
        raise SystemExit(f"{options.data} has no film with rendered devices in split 'train' to calibrate by")
    films, devices = backgrounds(options)
    network, config = load_classifier(find_classifier(options.start)) if options.start else (None, CONFIG)
    if config != CONFIG:
        raise SystemExit(f"--start {options.start} has another architecture: {config}")
    model = cast(DenseNet, (network or build_classifier(CONFIG)).cpu().train())
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    seen, begin, history = [], time.perf_counter(), []
    ahead = drawn_ahead(lambda step: batch(films, devices, options, step), range(options.steps), 1)
    for step, (crops, shown, known) in enumerate(tqdm(ahead, total=options.steps)):
        with torch.autocast("cpu", torch.bfloat16):
            cells, whole = read(model, crops)
        of_cells = F.binary_cross_entropy_with_logits(cells, shown.float(), reduction="none")
        loss = (of_cells * known).sum() / known.sum().clamp(min=1)
        any_shown, sure = shown.flatten(1).any(1), known.flatten(1).all(1) | (shown & known).flatten(1).any(1)
        of_crops = F.binary_cross_entropy_with_logits(whole, any_shown.float(), reduction="none")
        loss = loss + 0.3 * (of_crops * sure).sum() / sure.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append((loss.item(), ((whole > 0) == any_shown)[sure].float().mean().item()))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            history.append([step + 1, *np.nanmean(seen, 0).round(4).tolist()])
            tqdm.write(f"step, loss, accuracy of crops: {history[-1]} {time.perf_counter() - begin:.0f} s")
            seen = []
    calibrate(model.eval(), options.data)
    save_classifier(model, CONFIG, options.out)
    log = {"config": vars(options), "step, loss, accuracy of crops": history}
    (options.out / "training.json").write_text(
        json.dumps(log, default=lambda path: path.name, indent=1) + "\n", encoding="utf-8"
    )


def batch(
    films: list[Films], devices: list[Bank], options: argparse.Namespace, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (N, 1, H, H) with devices and without; the cells (N, h, h) that show a device, and those that are known."""
    random = np.random.default_rng([options.seed, 3, step])
    drawn = []
    for _ in range(options.pairs):
        some = films[-1] if random.random() < options.share else films[0]
        drawn.append(crop(some, devices, random, options.cut_outs))
    truth, image, sure = (torch.from_numpy(np.stack(each))[:, None] for each in zip(*drawn, strict=True))
    count = F.avg_pool2d(((image - truth).abs() > SHOWS).float(), CELL)[:, 0] * CELL**2
    known = -F.max_pool2d(-sure.float(), CELL)[:, 0] > 0
    shown = count >= ENOUGH
    # A cell that hardly shows a device is neither; a device makes a cell known, whatever else may be in it.
    sure_cells = torch.cat([shown | known & (count == 0), known])
    return torch.cat([image, truth]).float(), torch.cat([shown, torch.zeros_like(shown)]), sure_cells


def read(model: DenseNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the cells of the last map (N, h, h), and of the images (N,)."""
    features, head = model.features(images), model.class_layers
    cells = head.out(F.relu(features).movedim(1, -1))[..., 0]
    return cells.float(), head(features)[:, 0].float()


def films_of(data: Path) -> pd.DataFrame:
    """The rows of train whose film has rendered devices and a twin without."""
    table = load_table(data, "train")
    return table[table["rendered"] & table["copy"].eq(0) & table[DEVICES].eq(1)]


def calibrate(model: DenseNet, data: Path) -> None:
    """Scale and bias of the logit, by the films of the train split that show no device, and their twins that do."""
    table = films_of(data)
    with_devices, without = read_images(data, table), read_images(data, table.assign(file_name=table["twin"]))
    logits = Classifier(model, CONFIG.labels).logits(torch.cat([with_devices, without])).numpy()
    labels = np.repeat([1, 0], len(table))
    fit = LogisticRegression(C=1e6).fit(logits, labels)
    scale, bias = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    out = model.class_layers.out
    with torch.no_grad():
        out.weight.mul_(scale)
        out.bias.copy_(out.bias * scale + bias)


if __name__ == "__main__":
    main()
