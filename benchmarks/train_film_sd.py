"""Train `film-sd` on crops of films with devices and without: `python -m benchmarks.train_film_sd DATA OUT`.

DATA is a prepared folder of the data set "films". A crop's truth is a film of the train split that was screened and
shows no device; its input is the same crop with devices, drawn anew each time: pieces of the catalogue's devices, drawn
for one film and put at the same or at a random place of another, many turned, mirrored, made larger or smaller and
fainter, and lines, rings, plates and clips of random shape. Half of the crops are mirrored, many get another contrast,
brightness or gamma; letters, grain, blur and sharpening come to input and truth alike. The model sees little noise
(timestep 1) and is told that there are no devices, or that there are (KNOWN). Every prompt that names devices is read
as one of these two, and `film-kinds` bounds an edit that names kinds.
Its loss is the Huber error of the clean image in pixels, in which devices weigh more, faint ones most.

With --bedside, a prepared folder of the data set "nih", a share of the crops comes from bedside films that show real
devices. Readers drew these, and the truth is the film without what they absorb (`benchmarks.drawn_devices`). It counts
where a device was drawn and in the cells that were seen to be free of others (CELLS). The real devices are put into
other crops too (--cut-outs).

A run that was stopped goes on from OUT/state.pt, on a CPU to the same bits. On a GPU nothing of this was run.

The autoencoder is the lossless `HaarAutoencoder`. The text encoder is START's, and the inner layers of the U-Net begin
as START's.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.interpolate import CubicSpline
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.drawn_devices import attenuations, load_devices
from prism_lib.data import load_info, load_table, read_images
from prism_lib.data.chest import DEVICES
from prism_lib.devices import autocast, default_device, fast_attention
from prism_lib.editing.settings import FILE as EDITING
from prism_lib.files import atomic, stable_seed
from prism_lib.models import encode_prompts, load_pipeline
from prism_lib.models.pipeline import Pipe, assembled, encode_images
from prism_lib.models.published import locate
from prism_lib.models.wavelets import HaarAutoencoder
from prism_lib.phantom import with_devices
from prism_lib.phantom.films import CATALOGUE, KINDS
from prism_lib.training.batches import drawn_ahead

CELLS = Path(__file__).parents[1] / "figures/films/free_cells.csv"  # of a grid of 8 x 8, rows A to H
CROP, TIMESTEP = 256, 1
CHANNELS = (48, 96, 128, 128)  # of the U-Net, where phantom-sd's are 32, 64, 128, 128
LAYERS = (2, 3, 3, 1)  # of its blocks, where phantom-sd's have one each
SHARD = "12MB"  # of a file of weights
FAINT = 0.004  # gray below which a change is none
HUBER = 0.006  # gray from which on an error counts in proportion, not squared: a model in doubt changes nothing
QUANTUM, SEEN = 80.0, 3  # attenuation in a bank's levels of 8 bits, and above which of them a device counts
WORDS = ("L", "R", "PORTABLE", "SUPINE", "AP", "UPRIGHT", "ERECT", "SEMI-UPRIGHT", "MOBILE")
ALPHABET = np.array(list("ABCDEFGHIKLMNOPRSTUXY0123456789:./- "))
NAMED = f"(support device|{'|'.join(kind.removesuffix('s') for kind in KINDS)})s?\\b"
# Patterns of prompts, and how the model reads a prompt that fits, the first that does.
KNOWN = [
    (f"{word} {NAMED}", f"chest x-ray without cardiomegaly, without pleural effusion, {word} support devices")
    for word in ("without", "with")
]


class Bank(NamedTuple):
    """Maps of attenuation (M, H, H) in 1 / QUANTUM, and the place of each one's kind in `KINDS`, or -1."""

    maps: np.ndarray
    kinds: np.ndarray


class Films(NamedTuple):
    """Films (N, H, H) in 8 bits without devices, and which of their 8 x 8 cells surely show none (N, 8, 8).

    Where the films had devices that were drawn, ``drawn`` (N, H, H) is their attenuation in 1 / QUANTUM.
    """

    images: np.ndarray
    free: np.ndarray
    drawn: np.ndarray | None = None


class Crops(NamedTuple):
    """A batch: inputs and truths (N, 1, CROP, CROP) in [0, 1], where they are known, and the place in KNOWN of each."""

    inputs: Tensor
    truths: Tensor
    known: Tensor
    prompts: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = parser_of(__doc__)
    parser.add_argument("--start", default="phantom-sd")
    parser.add_argument("--steps", type=positive, default=6000)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--weight",
        type=float,
        default=1.5,
        help="of devices: with 1 a faint pixel weighs up to 7 times as much as one without",
    )
    parser.add_argument("--stays", type=fraction, default=1 / 8, help="share of crops told that devices are there")
    parser.add_argument("--bank", type=positive, default=3000, help="maps of devices that are taken to other films")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=positive, default=250)
    options = parser.parse_args(arguments)
    refuse_other(options.out, "model_index.json")
    torch.manual_seed(options.seed)
    start = load_pipeline(options.start, device="cpu", channels_last=False)
    films, devices = backgrounds(options)
    device = default_device()
    vae, unet = HaarAutoencoder().to(device), wider(start.unet).to(device)
    signal = float(start.scheduler.alphas_cumprod[TIMESTEP]) ** 0.5
    noise = math.sqrt(1 - signal**2)
    scale_output(unet, -noise / signal)  # training has the U-Net predict the change of clean latents, a pipeline noise
    average = EMAModel(unet.parameters(), decay=0.998)
    optimizer = Optimizer(unet, options.learning_rate, options.steps)
    state = State(options.out / "state.pt", {"average": average} | optimizer.parts, unet)
    run = vars(options) | {"layers": LAYERS}
    history = state.restored(run, device)
    start.text_encoder.config.known_prompts = KNOWN
    texts = encode_prompts(start, [prompt for _, prompt in KNOWN])
    steps = range(int(history[-1]["step"]) if history else 0, options.steps)
    threads = 1 if device.type == "cpu" else max(1, (os.cpu_count() or 2) - 2)
    ahead = drawn_ahead(lambda step: batch(films, devices, options, step), steps, threads)
    begin, seen = time.perf_counter(), []
    for step, drawn in zip(steps, tqdm(ahead, total=options.steps, initial=steps.start), strict=True):
        crops = Crops(*(values.to(device) for values in drawn))
        clean_latents = encode_images(vae, crops.inputs)
        generator = torch.Generator().manual_seed(stable_seed(options.seed, "noise", step))
        noisy = signal * clean_latents + noise * torch.randn(clean_latents.shape, generator=generator).to(device)
        with autocast(device, "bf16"), fast_attention(device, "bf16"):
            timesteps = torch.full((len(noisy),), TIMESTEP, device=device)
            change = unet(noisy, timesteps, encoder_hidden_states=texts[drawn.prompts].to(device)).sample.float()
        change = F.conv_transpose2d(change, vae.kernels, stride=4) / (2 * vae.config.scaling_factor)
        true = crops.truths - crops.inputs
        loss = loss_of(change, true, crops.known, options.weight)
        unet.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.step(unet.parameters())
        inside, outside = crops.known & (true.abs() > FAINT), crops.known & (true.abs() <= FAINT)
        with torch.no_grad():
            share = ((change - true).abs() * inside).sum() / (true.abs() * inside).sum().clamp(min=1e-3)
            seen.append((loss.item(), share.item(), change[outside].abs().mean().item()))
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            values = np.mean(seen, 0).round(5).tolist()
            history.append(dict(zip(("step", "loss", "error", "outside"), (step + 1, *values), strict=True)))
            tqdm.write(f"{history[-1]} {time.perf_counter() - begin:.0f} s")
            seen = []
            averaged = copy.deepcopy(unet)
            average.copy_to(averaged.parameters())
            scale_output(averaged, -signal / noise)
            save(averaged, vae, start, options, history)
            state.keep(run, history)


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The arguments that name films, of this program, `train_film_judge` and `train_film_kinds`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help='prepared folder of the data set "films"')
    parser.add_argument("out", type=Path)
    parser.add_argument("--bedside", type=Path, help='prepared folder of the data set "nih"')
    parser.add_argument("--share", type=fraction, default=0.3, help="of crops of bedside films")
    parser.add_argument("--cut-outs", type=fraction, default=0.0, help="share of the devices that were drawn on these")
    return parser


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def refuse_other(out: Path, file: str) -> None:
    """End the program if its folder would replace something that it did not write."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / file).is_file()):
        raise SystemExit(f"{out} exists and has no {file}: choose another folder")


def backgrounds(options: argparse.Namespace) -> tuple[list[Films], list[Bank]]:
    """The screened films and rendered devices, and those of `bedside` where its folder is named."""
    if options.cut_outs and not options.bedside:
        raise SystemExit("--cut-outs are taken from the films of --bedside: name their folder")
    images = (read_images(options.data, screened(options.data))[:, 0] * 255).round().byte().numpy()
    beside, real = zip(bedside(options.bedside, options.data)) if options.bedside else ((), ())
    clean = Films(images, np.ones((len(images), 8, 8), bool))
    return [clean, *beside], [bank(images, options.bank, options.seed), *real]


class Optimizer:
    """Muon (Jordan et al., 2024) of the inner layers' weights, as matrices (out, all else), and AdamW of the others."""

    def __init__(self, unet: UNet2DConditionModel, learning_rate: float, steps: int) -> None:
        named = list(unet.named_parameters())
        self.inner = [p for name, p in named if p.ndim > 1 and not name.startswith(("conv_", "time_"))]
        ids = {id(p) for p in self.inner}
        rest = [p for _, p in named if id(p) not in ids]
        self.matrices = [torch.nn.Parameter(p.detach().flatten(1)) for p in self.inner]  # the same memory
        adamw = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
        muon = torch.optim.Muon(self.matrices, learning_rate, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw")
        self.parts: dict[str, Any] = {"adamw": adamw, "muon": muon}
        self.parts |= {
            f"{name} schedule": get_cosine_schedule_with_warmup(part, 100, steps) for name, part in self.parts.items()
        }

    def step(self) -> None:
        """Update all weights by their gradients."""
        for kernel, matrix in zip(self.inner, self.matrices, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        for part in self.parts.values():
            part.step()


def loss_of(change: Tensor, true: Tensor, known: Tensor, weight: float) -> Tensor:
    """Mean Huber error of changes (N, 1, H, H) where they are known, by the weight of devices."""
    error = F.huber_loss(change, true, reduction="none", delta=HUBER) / HUBER
    weights = 1 + weight * true.abs() / (true.abs() + 0.01) / (true.abs() + 0.1)
    return (known * error * weights).sum() / known.sum().clamp(min=1)


class State:
    """What a stopped run needs to go on: its parts by name, and the U-Net's weights."""

    def __init__(self, path: Path, parts: dict[str, Any], unet: UNet2DConditionModel) -> None:
        self.path, self.parts, self.unet = path, parts, unet

    def keep(self, options: dict[str, Any], history: list[dict[str, float]]) -> None:
        """Write the state, whole or not at all."""
        kept = {name: part.state_dict() for name, part in self.parts.items()} | {"unet": self.unet.state_dict()}
        with atomic(self.path) as partial:
            torch.save(kept | {"options": json.dumps(options, default=str), "history": history}, partial)

    def restored(self, options: dict[str, Any], device: torch.device) -> list[dict[str, float]]:
        """Load the state if there is one, and give its history; another run's state ends the program."""
        if not self.path.is_file():
            return []
        kept = torch.load(self.path, map_location=device)
        own, found = json.loads(json.dumps(options, default=str)), json.loads(kept["options"])
        if other := [f"{name} ({found.get(name)!r})" for name in own if found.get(name) != own[name] and name != "out"]:
            raise SystemExit(f"{self.path} is of a run with another {', '.join(other)}: choose another folder")
        for name, part in self.parts.items():
            part.load_state_dict(kept[name])
        self.unet.load_state_dict(kept["unet"])
        history: list[dict[str, float]] = kept["history"]
        return history


def save(
    unet: UNet2DConditionModel,
    vae: HaarAutoencoder,
    start: Pipe,
    options: argparse.Namespace,
    history: list[dict[str, float]],
) -> None:
    """Write the pipeline in half precision, and the course of training."""
    text_encoder = copy.deepcopy(start.text_encoder).half()
    # An edit of one step ends at the clean latents, not at timestep 0 as Stable Diffusion's do.
    scheduler = DDIMScheduler.from_config(start.scheduler.config, set_alpha_to_one=True)
    pipe = assembled(vae, text_encoder, start.tokenizer, unet.half(), scheduler)
    pipe.save_pretrained(options.out, max_shard_size=SHARD)
    if (settings := Path(locate(options.start)) / EDITING).is_file():
        shutil.copy(settings, options.out)
    log = {"config": vars(options), "losses": history}
    (options.out / "training.json").write_text(
        json.dumps(log, default=lambda path: path.name, indent=1) + "\n", encoding="utf-8"
    )


def screened(folder: Path) -> pd.DataFrame:
    """The rows of train whose film was screened and shows no device."""
    if load_info(folder)["source"] != "films":
        raise SystemExit(f'{folder} does not hold the data set "films": prepare it with 01_data')
    table = load_table(folder, "train")
    clean = table[table[DEVICES].eq(0) & ~table["rendered"]]
    if clean.empty:
        raise SystemExit(f"{folder} has no screened film without devices in split 'train'")
    return clean


def bedside(folder: Path, data: Path) -> tuple[Films, Bank]:
    """The films of CELLS without the devices that were drawn on them, and these, a map a film and kind.

    ValueError if a film is missing, or of a patient in val or test of ``data``.
    """
    cells = pd.read_csv(CELLS, dtype=str, keep_default_na=False)
    table = load_table(folder)
    named = table.set_index(table["file_name"].map(lambda name: Path(name).stem))
    if missing := sorted({*cells["file_name"]} - {*named.index}):
        raise ValueError(f"{folder} lacks {missing[0]}, a film of {CELLS}")
    rows = named.loc[cells["file_name"]]
    held_out = load_table(data).query("split != 'train'")["patient_id"]
    if (other := rows["patient_id"].isin(held_out)).any():
        raise ValueError(f"{CELLS} names {rows.index[other][0]}, a film of a patient in val or test of {data}")
    free = np.zeros((len(cells), 8, 8), bool)
    for film, names in zip(free, cells["free"], strict=True):
        for name in names.split():
            film["ABCDEFGH".index(name[0]), int(name[1]) - 1] = True
    images = read_images(folder, rows)[:, 0].numpy()
    if images.shape[-1] != (size := load_info(data)["config"]["size"]):
        raise ValueError(f"{folder} has films of {images.shape[-1]} pixels, {data} of {size}")
    devices = load_devices(dict(zip(rows.index, images, strict=True)))
    maps, kinds, drawn = [], [], np.zeros(images.shape, np.float16)
    for film, own, together in zip(tqdm(images, "drawn devices"), devices.values(), drawn, strict=True):
        each, together[:] = attenuations(film, own)
        found = pd.DataFrame({"kind": [device.kind for device in own], "map": each})
        for kind, some in found.groupby("kind")["map"]:
            maps.append((np.max(some.tolist(), 0).clip(0) * QUANTUM).astype(np.float16))
            kinds.append(KINDS.index(kind) if kind in KINDS else -1)
    drawn *= QUANTUM
    without = 1 - (1 - images) * np.exp(drawn.astype(np.float32) / QUANTUM)
    films = Films((without * 255).round().clip(0, 255).astype(np.uint8), free, drawn)
    return films, Bank(np.array(maps).reshape(-1, *images.shape[1:]), np.array(kinds, int))


def bank(films: np.ndarray, count: int, seed: int) -> Bank:
    """``count`` maps of one kind of device each, drawn for one of the films (N, H, H)."""
    random, maps = np.random.default_rng([seed, 1]), np.zeros((count, *films.shape[1:]), np.uint8)
    often = np.array([share for share, _ in CATALOGUE.values()]) + 0.1
    kinds = random.choice(len(KINDS), count, p=often / often.sum())
    for place in tqdm(range(count), "devices"):
        film = torch.from_numpy(films[random.integers(len(films))])[None, None].float() / 255
        shown = with_devices(film, [int(random.integers(2**62))], [KINDS[kinds[place]]]).images
        through = ((1 - shown) / (1 - film).clamp(min=1 / 255)).clamp(0.05, 1)
        through[film > 0.94] = 1  # too few gray levels are left to tell
        maps[place] = (-through.log()[0, 0] * QUANTUM).round().clamp(0, 255).byte().numpy()
    return Bank(maps, kinds)


def wider(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net for 16 channels with the given one's weights where the shapes allow; else it predicts no change.

    Where a block has more layers than the given one's, the new ones are the identity and come second: so a film-sd of
    fewer layers predicts what it did.
    """
    config = {"in_channels": 16, "out_channels": 16, "block_out_channels": CHANNELS, "sample_size": 128}
    kept = {name: value for name, value in unet.config.items() if not name.startswith("_")}  # no place on this disk
    new = UNet2DConditionModel.from_config({**kept, **config, "layers_per_block": LAYERS})
    unet = copy.deepcopy(unet)
    for values in new.conv_out.parameters():
        torch.nn.init.zeros_(values)
    blocks = zip([*new.down_blocks, *new.up_blocks], [*unet.down_blocks, *unet.up_blocks], strict=True)
    for block, before in blocks:
        if (more := len(block.resnets) - len(before.resnets)) < 0:
            raise ValueError(f"a block of the U-Net has {len(before.resnets)} layers; it cannot get {more:+d}")
        for place in range(1, more + 1):
            before.resnets.insert(place, identity(block.resnets[place]))
            if hasattr(block, "attentions"):
                before.attentions.insert(place, identity(block.attentions[place]))
    own, old = new.state_dict(), unet.state_dict()
    new.load_state_dict(
        own | {name: old[name] for name in own.keys() & old.keys() if own[name].shape == old[name].shape}
    )
    return new


def identity(layer: torch.nn.Module) -> torch.nn.Module:
    """A residual layer that gives its input, or its input's first channels, until it is trained."""
    for values in getattr(layer, "conv2" if hasattr(layer, "conv2") else "proj_out").parameters():
        torch.nn.init.zeros_(values)
    if (shortcut := getattr(layer, "conv_shortcut", None)) is not None:
        torch.nn.init.dirac_(shortcut.weight)
        torch.nn.init.zeros_(shortcut.bias)
    return layer


def scale_output(unet: UNet2DConditionModel, factor: float) -> None:
    """Multiply what the U-Net predicts."""
    with torch.no_grad():
        for values in unet.conv_out.parameters():
            values *= factor


def batch(films: list[Films], devices: list[Bank], options: argparse.Namespace, step: int) -> Crops:
    """The crops of a step; those that are told that devices are there stay as they are."""
    random = np.random.default_rng([options.seed, 2, step])
    count, made, rows = options.batch_size, [], []
    stays = random.random(count) < options.stays
    for told in stays:
        some = films[-1] if random.random() < options.share else films[0]
        truth, image, known = crop(some, devices, random, options.cut_outs)
        made.append((image, image if told else truth, known))
        rows.append(int(told))
    inputs, truths, where = (torch.from_numpy(np.stack(images))[:, None] for images in zip(*made, strict=True))
    return Crops(inputs.float(), truths.float(), where, torch.tensor(rows))


def crop(
    films: Films, devices: list[Bank], random: np.random.Generator, real: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A crop (CROP, CROP) without devices, and with them; where the first is known.

    A share of the devices is ``real``: of the last bank, not of the first one.
    """
    row = random.integers(len(films.images))
    film, free = films.images[row], films.free[row].repeat(films.images.shape[1] // 8, 0)
    free = free.repeat(film.shape[1] // 8, 1)
    shown = np.zeros(film.shape, np.float16) if films.drawn is None else films.drawn[row]
    sure = free | (shown > 0)
    y, x = fullest(sure, random)
    here, mirrored = np.s_[y : y + CROP, x : x + CROP], random.random() < 0.5
    truth, known, goes = film[here].astype(np.float32) / 255, sure[here], shown[here].astype(np.float32) / QUANTUM
    if mirrored:
        truth, known, goes = truth[:, ::-1], known[:, ::-1], goes[:, ::-1]
    if random.random() < 0.4:
        truth = (0.5 + (truth - 0.5) * random.uniform(0.6, 1.2) + random.uniform(-0.12, 0.12)).clip(0, 1)
    if random.random() < 0.4:
        truth = truth ** math.exp(random.uniform(-0.35, 0.35))
    if random.random() < 0.3:
        truth = lettered(truth, random)
    for _ in range(random.choice(4, p=(0.06, 0.34, 0.35, 0.25))):
        some = devices[-1] if random.random() < real else devices[0]
        goes = goes + piece(random.choice(some.maps), random, (y, x), mirrored, 0.4)
    if random.random() < 0.3:
        drawn = shapes(random) * random.uniform(0.3, 1.0)
        goes = goes + drawn if random.random() < 0.7 else drawn
    scatter = random.uniform(0.05, 0.2) if random.random() < 0.5 else 0.0
    # In half of the crops the film's texture stays under the devices, so that its absence is no sign of them.
    base = ndimage.gaussian_filter(truth, 3) if random.random() < 0.5 else truth
    through = np.maximum(scatter + (1 - scatter) * np.exp(-goes), 0.1)
    both = [truth, np.where(goes < FAINT, truth, truth + (1 - base) * (1 - through))]
    if random.random() < 0.5:
        grain = random.standard_normal(truth.shape, dtype=np.float32)
        grain = ndimage.gaussian_filter(grain, random.uniform(0.5, 1.2)) if random.random() < 0.7 else grain
        grain *= random.uniform(0.002, 0.02) / grain.std()
        both = [each + grain for each in both]
    way = random.random()
    if way < 0.3:
        radius = random.uniform(0.4, 1.0)
        both = [ndimage.gaussian_filter(each, radius) for each in both]
    elif way < 0.7:  # to the bright bone edges of a bedside film
        radius, amount = math.exp(random.uniform(math.log(0.8), math.log(12))), random.uniform(0.3, 1.5)
        both = [each + amount * (each - ndimage.gaussian_filter(each, radius)) for each in both]
    return both[0].clip(0, 1), both[1].clip(0, 1), known


def piece(
    devices: np.ndarray, random: np.random.Generator, at: tuple[int, int], mirrored: bool, share: float
) -> np.ndarray:
    """A crop (CROP, CROP) of a map: a ``share`` at the film's own place, the others `taken` from anywhere."""
    if random.random() >= share:
        return taken(devices, random)
    own = devices[at[0] : at[0] + CROP, at[1] : at[1] + CROP].astype(np.float32)
    return (own[:, ::-1] if mirrored else own) * (fainter(random) / QUANTUM)


def fullest(where: np.ndarray, random: np.random.Generator) -> tuple[int, int]:
    """The upper left corner of a crop: of three places in a boolean map (H, H) the one with the most of it.

    Most crops touch an edge of a film that is known everywhere, and a quarter lies in a corner, which hardly any would
    cover otherwise.
    """
    last = len(where) - CROP
    places = random.integers(-last // 2, last + last // 2 + 1, (3, 2)).clip(0, last).tolist()
    y, x = max(places, key=lambda p: int(where[p[0] : p[0] + CROP, p[1] : p[1] + CROP].sum()))
    return y, x


def fainter(random: np.random.Generator) -> float:
    """A factor of attenuation."""
    return math.exp(random.uniform(-0.7, 0.5)) if random.random() < 0.7 else 1.0


def taken(devices: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A crop (CROP, CROP) of a map of devices, often turned, mirrored, zoomed and fainter."""
    y, x = fullest(devices > SEEN, random)
    if random.random() < 0.6:
        angle, zoom = (
            math.radians(random.integers(4) * 90 + random.uniform(-25, 25)),
            math.exp(random.uniform(-0.4, 0.4)),
        )
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
        turn[:, 1] *= random.choice([-1, 1])
        centre = np.array([y, x]) + CROP / 2
        offset = centre - turn @ np.full(2, CROP / 2)
        found = ndimage.affine_transform(devices.astype(np.float32), turn, offset, (CROP, CROP), order=1)
    else:
        found = devices[y : y + CROP, x : x + CROP].astype(np.float32)
    return found * (fainter(random) / QUANTUM)


def shapes(random: np.random.Generator) -> np.ndarray:
    """Attenuation (CROP, CROP) of one to four curves, rings, plates and clips that are no particular device."""
    side = 2 * CROP
    total: np.ndarray = np.zeros((side, side), np.float32)
    for _ in range(random.integers(1, 5)):
        layer = Image.new("L", (side, side))
        pen, level = ImageDraw.Draw(layer), 120
        kind = random.random()
        if kind < 0.6:
            knots = random.uniform(-0.3, 1.3, (random.integers(3, 6), 2)) * side
            if random.random() < 0.4:
                knots = knots[0] + np.cumsum(random.normal(0, 0.2, knots.shape), 0) * side
            path = CubicSpline(np.arange(len(knots)), knots)(np.linspace(0, len(knots) - 1, 200))
            width, look = 2 * math.exp(random.uniform(math.log(1.5), math.log(14))), random.random()
            line = [tuple(point) for point in path.tolist()]
            pen.line(line, level, max(1, round(width)), "curve")
            if look < 0.3 and width > 5:  # a tube
                pen.line(
                    line, int(level * random.uniform(0, 0.7)), max(1, round(width * random.uniform(0.4, 0.8))), "curve"
                )
            elif look < 0.5:  # a stripe or core
                pen.line(
                    line,
                    int(level * random.uniform(1.2, 2.1)),
                    max(1, round(width * random.uniform(0.15, 0.5))),
                    "curve",
                )
            elif look < 0.6:  # beads
                for u, v in line[:: random.integers(3, 9)]:
                    pen.ellipse([u - 0.7 * width, v - 0.7 * width, u + 0.7 * width, v + 0.7 * width], int(1.5 * level))
        elif kind < 0.8:
            clip(pen, random.uniform(0, side, 2), level, random)
        else:
            u, v = random.uniform(0, side, 2)
            half = 2 * np.exp(random.uniform(math.log(2), math.log(30), 2))
            angles = np.linspace(0, 2 * math.pi, 60) + random.uniform(0, math.pi)
            power, turn = random.choice([1.0, 0.3]), random.uniform(0, math.pi)
            around = np.stack(
                [half[i] * np.sign(f(angles)) * np.abs(f(angles)) ** power for i, f in enumerate((np.cos, np.sin))], 1
            )
            around = around @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) + (u, v)
            outline = [tuple(point) for point in around.tolist()]
            if random.random() < 0.5:
                pen.polygon(outline, level)
            else:
                pen.line([*outline, outline[0]], level, int(random.integers(2, 8)), "curve")
        drawn = np.asarray(layer, np.float32) / level * math.exp(random.uniform(math.log(0.05), math.log(1.2)))
        total = np.maximum(total, drawn) if random.random() < 0.3 else total + drawn
    small = total.reshape(CROP, 2, CROP, 2).mean((1, 3))
    return ndimage.gaussian_filter(small, random.uniform(0.4, 1.3))


def clip(pen: ImageDraw.ImageDraw, at: np.ndarray, level: int, random: np.random.Generator) -> None:
    """Bars, discs and rings close together, with or without a fainter pad, as at the end of a cable."""
    size = random.uniform(6, 18)
    if random.random() < 0.4:
        pad = size * random.uniform(1.2, 3)
        pen.ellipse([*(at - pad), *(at + pad)], int(level * random.uniform(0.1, 0.4)))
    for _ in range(random.integers(2, 8)):
        centre, dense = at + random.normal(0, 0.5 * size, 2), int(level * random.uniform(0.5, 2.1))
        if random.random() < 0.5:
            far = centre + random.normal(0, size, 2)
            pen.line([*centre, *far], dense, int(random.integers(2, 9)))
        else:
            radius = random.uniform(2, size)
            ring = random.random() < 0.5
            pen.ellipse(
                [*(centre - radius), *(centre + radius)], None if ring else dense, dense, int(random.integers(2, 5))
            )


def lettered(film: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The film with a word or a marker, bright or dark, half of them on a plate or framed: letters are no devices."""
    word = (
        str(random.choice(WORDS)) if random.random() < 0.5 else "".join(random.choice(ALPHABET, random.integers(1, 9)))
    )
    layer = Image.new("L", film.shape[::-1])
    pen, font = ImageDraw.Draw(layer), ImageFont.load_default(float(random.uniform(9, 46)))
    at = tuple(random.uniform(-10, CROP - 30, 2).tolist())
    film, box = film.copy(), pen.textbbox(at, word, font)
    bright, look = random.uniform(0.65, 1.0), random.random()
    x0, y0, x1, y1 = (value + far * random.integers(2, 9) for value, far in zip(box, (-1, -1, 1, 1), strict=True))
    plate = np.s_[max(int(y0), 0) : max(int(y1), 0), max(int(x0), 0) : max(int(x1), 0)]
    if look < 0.15:
        film[plate] *= random.uniform(0.2, 0.7)
    elif look < 0.4:  # lets the film through
        film[plate] += random.uniform(0.1, 0.5) * (1 - film[plate])
        bright = 1.0
    elif look < 0.5:  # with dark letters
        film[plate] = bright
        bright = random.uniform(0, 0.3)
    elif look < 0.6 and x1 > x0 and y1 > y0:
        (pen.ellipse if look < 0.55 else pen.rectangle)([x0, y0, x1, y1], outline=255, width=int(random.integers(1, 4)))
    pen.text(at, word, 255, font)
    share = np.asarray(layer, np.float32) / 255
    return film + share * (bright - film)


if __name__ == "__main__":
    main()
