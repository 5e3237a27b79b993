"""The frozen parts of a small Stable Diffusion from scratch: an autoencoder, then `training.clip`'s text encoder.

The autoencoder learns from phantoms and from procedural textures (occluding objects, power-law noise, thin curves,
small type), without which it would learn phantoms by heart and lose real films.
"""

import json
import logging
import math
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.configs import Share, checked
from prism_lib.data.folder import load_table, load_vocabulary, truth_is_known
from prism_lib.data.rows import sample_captions
from prism_lib.devices import default_device
from prism_lib.files import atomic, write_text
from prism_lib.language.captions import corpus
from prism_lib.models.pipeline import PipelineConfig, build_pipeline
from prism_lib.phantom.anatomy import bezier, stamp
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.training.cache import require_captions_fit
from prism_lib.training.checkpoints import load_checkpoint, save_checkpoint, set_learning_rate
from prism_lib.training.clip import ClipConfig, teach_details, train_clip

logger = logging.getLogger(__name__)


@checked()
class VaeConfig:
    """Recipe of the autoencoder; patients of ``patient_seed`` must not be used for evaluation."""

    steps: PositiveInt = 2800
    batch_size: PositiveInt = 8
    crop: PositiveInt = 96
    image_size: PositiveInt = 256
    phantoms: PositiveInt = 1600
    textures: PositiveInt = 1000
    corner_share: Share = 0.25  # of the phantom crops: the side marker is small and rare
    learning_rate: PositiveFloat = 2e-3
    warmup: NonNegativeInt = 100
    square_weight: NonNegativeFloat = 4.0
    decoder_only: bool = False  # leaves the encoder, so every latent, as it is
    patient_seed: int = 100
    seed: int = 0
    checkpoint_every: PositiveInt = 250


# The recipe of the decoder, when the encoder is done: burnt-in letters hold most of the error that is left.
DECODER = VaeConfig(10_000, batch_size=12, crop=64, corner_share=0.6, learning_rate=1e-3, square_weight=40, seed=7)


def train_vae(vae: AutoencoderKL, config: VaeConfig, folder: Path) -> list[dict[str, float]]:
    """Train in place, resuming from ``folder``, and normalise the latents; returns the losses, a dict per 50 steps.

    L1 + gradient L1 + squared error + a small KL term, on random crops. Leaves the autoencoder on the CPU.
    """
    device = default_device()
    vae.to(device, memory_format=torch.channels_last).train()
    trained = (vae.post_quant_conv, vae.decoder) if config.decoder_only else (vae,)
    vae.requires_grad_(False)
    parameters = [parameter for part in trained for parameter in part.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    state = load_checkpoint(folder, {"vae": vae.state_dict()}, optimizer)
    if state and state["config"] != asdict(config):
        raise ValueError(f"{folder} holds a run with another configuration; choose an empty folder")
    history: list[dict[str, float]] = state.get("history", [])
    start = state.get("step", 0)
    if start == 0 and not config.decoder_only:  # one small variance for every latent, whatever the image
        channels = vae.config.latent_channels
        vae.quant_conv.weight.data[channels:] = 0
        vae.quant_conv.bias.data[channels:] = -6.0  # a posterior that starts wide learns to blur first
    if start < config.steps:
        pools = _pools(config)
        for step in tqdm(range(start, config.steps), initial=start, total=config.steps, desc="autoencoder"):
            set_learning_rate(optimizer, schedule, step)
            batch = _vae_batch(pools, config, step).to(device, memory_format=torch.channels_last)
            losses = _vae_losses(vae, batch, config, step)
            loss = losses["l1"] + losses["gradient"] + config.square_weight * losses["square"]
            (loss + 1e-8 * losses["kl"]).backward()  # of the sum over a latent: 1e-6 blurs everything
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 50 == 0:
                history.append({"step": step + 1, **{name: float(value) for name, value in losses.items()}})
                logger.info("autoencoder %s", history[-1])
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                info = {"config": asdict(config), "history": history}
                save_checkpoint(folder, step + 1, {"vae": vae.state_dict()}, optimizer, info)
    vae.eval().to(memory_format=torch.contiguous_format)
    if not config.decoder_only:
        normalise_latents(vae, render(sample_patients(64, config.patient_seed), config.image_size))
    vae.to("cpu")
    return history


def _pools(config: VaeConfig) -> tuple[Tensor, Tensor]:
    """Phantoms and textures as uint8 (count, 1, size, size), rendered once."""
    patients, size = sample_patients(config.phantoms, config.patient_seed), config.image_size
    generator, parts = torch.Generator().manual_seed(config.seed), tqdm(range(0, config.phantoms, 32), desc="phantoms")
    phantoms = torch.cat([(render(patients[i : i + 32], size) * 255).byte() for i in parts])
    parts = tqdm(torch.arange(config.textures).split(8), desc="textures")
    return phantoms, torch.cat([(textures(len(part), size, generator) * 255).byte() for part in parts])


def _vae_batch(pools: tuple[Tensor, Tensor], config: VaeConfig, step: int) -> Tensor:
    """Crops of phantoms and textures in turn, with random gamma, flips and noise; (B, 3, crop, crop) in [-1, 1]."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    crops = []
    for k in range(config.batch_size):
        pool = pools[k % 2]
        pick = int(torch.randint(len(pool), (1,), generator=generator))
        furthest = config.image_size - config.crop
        top, left = torch.randint(furthest + 1, (2,), generator=generator).tolist()
        corner = k % 2 == 0 and float(torch.rand((), generator=generator)) < config.corner_share
        if corner:
            top, left = 0, furthest * (left % 2)
        image = pool[pick, :, top : top + config.crop, left : left + config.crop].float() / 255
        turn, mirror = torch.randint(4, (2,), generator=generator).tolist()
        if not corner:  # letters stand upright
            image = torch.rot90(image, turn, (1, 2))
            image = image.flip(2) if mirror % 2 else image
        gamma, level, noise = torch.rand(3, generator=generator).tolist()
        if k % 4 > 1:  # every second image keeps its own contrast
            image = image ** (0.6 + gamma) * (0.6 + 0.4 * level)
            image = (image + 0.015 * noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
        crops.append(image)
    return torch.stack(crops).expand(-1, 3, -1, -1) * 2 - 1


def _vae_losses(vae: AutoencoderKL, batch: Tensor, config: VaeConfig, step: int) -> dict[str, Tensor]:
    """L1, gradient L1, squared error (in [0, 1] units) and KL to the unit Gaussian."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 500_000_000)
    posterior = vae.encode(batch).latent_dist
    error = (vae.decode(posterior.sample(generator)).sample - batch) / 2
    return {
        "l1": error.abs().mean(),
        "gradient": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "square": error.square().mean(),
        "kl": posterior.kl().mean(),
    }


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Give latent channels zero mean and unit variance on images (N, 1, H, W); no reconstruction changes."""
    pixels = (images * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device)
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(8)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels, quant, post = len(shift), vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight *= scale[None, :, None, None]
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of encode-decode, per image (N,), for images (N, 1 or 3, H, W) in [0, 1]."""
    chunks = (images * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device).split(8)
    output = torch.cat([vae.decode(vae.encode(pixels).latent_dist.mean).sample for pixels in chunks])
    output = (output.mean(1, keepdim=True) if images.shape[1] == 1 else output).to(images) / 2 + 0.5
    return -10 * (output.clamp(0, 1) - images).square().mean((1, 2, 3)).log10()


def textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random mixtures of the four textures below, (count, 1, size, size) in [0, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    smooth = power_law(count, size, generator)
    leaves = dead_leaves(count, size, generator)
    share = uniform(0, 1)
    image = share * leaves + (1 - share) * (0.5 + uniform(0.08, 0.25) * smooth)
    image = image + uniform(0, 0.05) * power_law(count, size, generator, low=0.8, high=1.6)
    image = image + uniform(-0.1, 0.3) * curves(count, size, generator)
    image = image + uniform(0.0, 0.025) * torch.randn(count, size, size, generator=generator)
    image = torch.maximum(image, glyphs(count, size, generator) * uniform(0.5, 1.0))
    return image.clamp(0, 1)[:, None]


def power_law(count: int, size: int, generator: torch.Generator, low: float = 2.4, high: float = 3.6) -> Tensor:
    """Gaussian noise with spectrum 1 / f^(alpha / 2), alpha uniform in [low, high]; zero mean, unit variance."""
    alpha = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    frequency = (fx.square() + fy.square()).sqrt().clamp(min=1 / size)
    white = torch.fft.rfft2(torch.randn(count, size, size, generator=generator))
    noise = torch.fft.irfft2(white * frequency ** (-alpha / 2), s=(size, size))
    return (noise - noise.mean((1, 2), keepdim=True)) / noise.std((1, 2), keepdim=True)


def dead_leaves(count: int, size: int, generator: torch.Generator, leaves: int = 48) -> Tensor:
    """Opaque ellipses and bars that occlude one another, sizes by a power law; (count, size, size) in [0, 1]."""
    axis = torch.linspace(-1, 1, size)
    x, y = axis[None, None, :], axis[None, :, None]
    image = torch.rand(count, 1, 1, generator=generator).expand(count, size, size).clone()
    for _ in range(leaves):
        u = torch.rand(count, 8, 1, 1, generator=generator)
        dx, dy = x - (2.4 * u[:, 0] - 1.2), y - (2.4 * u[:, 1] - 1.2)
        angle = math.pi * u[:, 2]
        along, across = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
        radius = 0.05 / (0.05 + u[:, 3]) ** 0.9 * 0.6
        flat = 0.15 + 0.85 * u[:, 4]
        ellipse = (along / radius).square() + (across / (radius * flat)).square()
        bar = torch.maximum((along / radius).abs(), (across / (radius * flat * 0.3)).abs())
        inside = torch.where(u[:, 5] < 0.7, ellipse, bar.square())
        cover = ((1 - inside) * size * radius * flat * 0.25).clamp(0, 1) * (0.35 + 0.65 * u[:, 7])
        image = image + cover * (u[:, 6] + 0.15 * along - image)
    return image.clamp(0, 1)


def curves(count: int, size: int, generator: torch.Generator, number: int = 5) -> Tensor:
    """Thin bent lines like wires and vessel walls, (count, size, size) in [0, 1]."""
    total = torch.zeros(count, size, size)
    for _ in range(number):
        control = torch.rand(count, 4, 2, generator=generator) * size * 1.2 - 0.1 * size
        radius = (0.4 + 1.8 * torch.rand(count, 1, generator=generator)) * size / 256
        points = bezier(control, 2 * size)
        total = torch.maximum(total, stamp(points, radius.expand(points.shape[:2]), size) / (2 * radius[..., None]))
    return total


def glyphs(count: int, size: int, generator: torch.Generator, number: int = 4) -> Tensor:
    """Rows of letter-like strokes, (count, size, size) in [0, 1]."""
    strokes, t = 5, torch.linspace(0, 1, 24)[:, None]
    points = []
    for _ in range(number):
        corner = torch.rand(count, 1, 1, 2, generator=generator) * size
        height = (5 + 14 * torch.rand(count, 1, 1, 1, generator=generator)) * size / 256
        # Strokes join points of a 3 x 3 grid, as letters do.
        ends = torch.randint(0, 3, (count, strokes, 2, 2), generator=generator) / 2.0
        line = ends[:, :, :1] * (1 - t) + ends[:, :, 1:] * t
        points.append((corner + line * height * torch.tensor([0.65, 1.0])).flatten(1, 2))
    pixels = torch.cat(points, dim=1)
    radius = (0.6 + 0.7 * torch.rand(count, 1, generator=generator)) * size / 256
    return (stamp(pixels, radius.expand(pixels.shape[:2]), size) / (1.6 * radius[..., None])).clamp(0, 1)


@checked()
class PretrainConfig:
    """Everything before the U-Net, from scratch: tokenizer, autoencoder, CLIP."""

    dataset: str  # a prepared folder
    output: str
    pipeline: PipelineConfig = PipelineConfig()
    vae: VaeConfig = VaeConfig()
    decoder: VaeConfig | None = None  # such as `DECODER`: the decoder trained on alone, once the encoder is done
    clip: ClipConfig = ClipConfig()
    seed: int = 0


def pretrain(config: PretrainConfig) -> Path:
    """Train autoencoder, CLIP (kept in ``output/clip``), words of details, once: the folder ``output/pipeline``."""
    output, final = Path(config.output), Path(config.output) / "pipeline"
    if final.is_dir():
        return final
    table = load_table(config.dataset, "train")
    captions = sample_captions(config.dataset, table, config.seed, 2, 0.5)
    pipeline = build_pipeline(config.pipeline, config.seed, [*chain(*captions), *corpus()])
    require_captions_fit(pipeline.tokenizer, "train", table["file_name"], captions)
    history = train_vae(pipeline.vae, config.vae, output / "vae")
    if config.decoder is not None:
        history += train_vae(pipeline.vae, replace(config.decoder, decoder_only=True), output / "decoder")
    clip = train_clip(pipeline, config.dataset, config.clip)
    if truth_is_known(config.dataset):
        teach_details(pipeline, load_vocabulary(config.dataset))
    write_text(output / "vae" / "history.json", json.dumps(history, indent=1))
    for folder, part in ((output / "clip", clip), (final, pipeline)):
        with atomic(folder) as partial:
            part.save_pretrained(partial, safe_serialization=True)
    return final


def start_from(model: str, scratch: PretrainConfig) -> str:
    """The pipeline that fine-tuning starts from: ``model`` itself, or for "scratch" one that is trained first."""
    return str(pretrain(scratch)) if model == "scratch" else model
