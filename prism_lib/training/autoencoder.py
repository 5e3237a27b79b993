"""Train the frozen parts of a small Stable Diffusion from scratch, in the order of the original.

First the autoencoder, on phantoms and procedural textures; then a small CLIP and the words of details
(`training.clip`), whose text encoder conditions the U-Net. `training.finetuning` trains the U-Net.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import load_info, load_table, truth_is_known
from prism_lib.data.rows import sample_captions
from prism_lib.devices import default_device
from prism_lib.files import atomic, write_text
from prism_lib.language.captions import corpus
from prism_lib.language.labels import vocabulary
from prism_lib.models.pipeline import PipelineConfig, build_pipeline
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.training.cache import require_captions_fit
from prism_lib.training.checkpoints import load_checkpoint, save_checkpoint
from prism_lib.training.clip import ClipConfig, DetailConfig, teach_details, train_clip
from prism_lib.training.textures import textures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class VaeConfig:
    """Recipe of the autoencoder; patients of ``patient_seed`` must not be used for evaluation."""

    steps: PositiveInt = 2800
    batch_size: PositiveInt = 8
    crop: PositiveInt = 96
    image_size: PositiveInt = 256
    phantoms: PositiveInt = 1600
    textures: PositiveInt = 1000
    corner_share: Annotated[float, Field(ge=0, le=1)] = 0.25  # of the phantom crops: the side marker is small and rare
    learning_rate: PositiveFloat = 2e-3
    warmup: NonNegativeInt = 100
    gradient_weight: NonNegativeFloat = 1.0
    square_weight: NonNegativeFloat = 4.0
    kl_weight: NonNegativeFloat = 1e-8  # of the sum over a latent; 1e-6 leaves one nat a value, and blurs everything
    decoder_only: bool = False  # leaves the encoder, so every latent, as it is: a U-Net trained on them stays right
    start_logvar: float = -6.0  # a posterior that starts wide learns to blur first
    patient_seed: int = 100
    seed: int = 0
    checkpoint_every: PositiveInt = 250


# The recipe of the decoder, when the encoder is done: burnt-in letters hold most of the error that is left.
DECODER = VaeConfig(
    steps=10_000,
    batch_size=12,
    crop=64,
    corner_share=0.6,
    learning_rate=1e-3,
    square_weight=40,
    decoder_only=True,
    seed=7,
)


def train_vae(vae: AutoencoderKL, config: VaeConfig, folder: Path) -> list[dict[str, float]]:
    """Train in place and normalise the latent channels; returns the losses, one dict per 50 steps.

    The loss is L1 + gradient L1 + squared error + a small KL term, on random crops. Resumes from ``folder``. Runs on
    `devices.default_device`, and leaves the autoencoder on the CPU. With ``decoder_only`` `vae` is a trained one.
    """
    device = default_device()
    vae.to(device, memory_format=torch.channels_last).train()
    trained = (vae.post_quant_conv, vae.decoder) if config.decoder_only else (vae,)
    parameters = [parameter for part in trained for parameter in part.parameters()]
    vae.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    state = load_checkpoint(folder, {"vae": vae.state_dict()}, optimizer)
    if state and state["config"] != asdict(config):
        raise ValueError(f"{folder} holds a run with another configuration; choose an empty folder")
    history: list[dict[str, float]] = state.get("history", [])
    schedule.last_epoch = start = state.get("step", 0)
    if start == 0 and not config.decoder_only:
        _start_narrow(vae, config.start_logvar)
    if start < config.steps:
        pools = _pools(config)
        for step in tqdm(range(start, config.steps), initial=start, total=config.steps, desc="autoencoder"):
            for group, rate in zip(optimizer.param_groups, _rates(schedule, step), strict=True):
                group["lr"] = rate
            batch = _vae_batch(pools, config, step).to(device, memory_format=torch.channels_last)
            losses = _vae_losses(vae, batch, config, step)
            total = losses["l1"] + config.gradient_weight * losses["gradient"]
            total = total + config.square_weight * losses["square"] + config.kl_weight * losses["kl"]
            total.backward()
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


@torch.no_grad()
def _start_narrow(vae: AutoencoderKL, logvar: float) -> None:
    """Start with one small variance for every latent, whatever the image."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = logvar


def _rates(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> list[float]:
    """Learning rates at a step, as a pure function of the step: nothing to save for a resume."""
    return [float(base) * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]


def _pools(config: VaeConfig) -> tuple[Tensor, Tensor]:
    """Phantoms and textures as uint8 (count, 1, size, size), rendered once."""
    patients = sample_patients(config.phantoms, config.patient_seed)
    rendered = [
        (render(patients[i : i + 32], config.image_size) * 255).byte()
        for i in tqdm(range(0, config.phantoms, 32), desc="phantoms")
    ]
    generator = torch.Generator().manual_seed(config.seed)
    drawn = [
        (textures(min(8, config.textures - i), config.image_size, generator) * 255).byte()
        for i in tqdm(range(0, config.textures, 8), desc="textures")
    ]
    return torch.cat(rendered), torch.cat(drawn)


def _vae_batch(pools: tuple[Tensor, Tensor], config: VaeConfig, step: int) -> Tensor:
    """Half phantoms, half textures, random crops with random gamma, flips and noise; (B, 3, crop, crop) in [-1, 1]."""
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
    output = vae.decode(posterior.sample(generator)).sample
    error = (output - batch) / 2
    return {
        "l1": error.abs().mean(),
        "gradient": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "square": error.square().mean(),
        "kl": posterior.kl().mean(),
    }


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a shift and scale per latent channel into ``quant_conv`` and ``post_quant_conv``.

    The channels of a trained autoencoder differ widely in scale; afterwards each has zero mean and unit variance on
    ``images`` (N, 1, H, W), so the one scalar ``scaling_factor`` = 1 is right. Reconstructions do not change.
    """
    pixels = (images * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device)
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(8)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight *= scale[None, :, None, None]
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of encode-decode, per image (N,), for images (N, 1 or 3, H, W) in [0, 1]."""
    errors = []
    for chunk in images.split(8):
        pixels = (chunk * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device)
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        output = (output.mean(1, keepdim=True) if chunk.shape[1] == 1 else output).to(chunk) / 2 + 0.5
        errors.append(F.mse_loss(output.clamp(0, 1), chunk, reduction="none").mean((1, 2, 3)))
    return -10 * torch.cat(errors).log10()


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PretrainConfig:
    """Everything before the U-Net, from scratch: tokenizer, autoencoder, CLIP."""

    dataset: str  # a prepared folder
    output: str
    pipeline: PipelineConfig = PipelineConfig()
    vae: VaeConfig = VaeConfig()
    decoder: VaeConfig | None = None  # such as `DECODER`: the decoder trained on alone, once the encoder is done
    clip: ClipConfig = ClipConfig()
    details: DetailConfig | None = DetailConfig()  # where the captions have details; None: never
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decoder is not None and not self.decoder.decoder_only:
            raise ValueError("the recipe of the decoder must have decoder_only=True: the encoder's latents must stay")


def pretrain(config: PretrainConfig) -> Path:
    """Train autoencoder, CLIP and words of details; the pipeline folder, whose U-Net is untrained: ``output/pipeline``.

    ``output/clip`` keeps the whole CLIP, as it was before the details; both folders appear whole. A finished run
    returns at once.
    """
    output = Path(config.output)
    final = output / "pipeline"
    if final.is_dir():
        return final
    table = load_table(config.dataset, "train")
    captions = sample_captions(config.dataset, table, config.seed, 2, 0.5)
    texts = [text for several in captions for text in several] + corpus()
    pipeline = build_pipeline(config.pipeline, config.seed, texts)
    require_captions_fit(
        pipeline.tokenizer, config.dataset, "train", seed=config.seed, captions_per_image=2, explicit_share=0.5
    )
    history = train_vae(pipeline.vae, config.vae, output / "vae")
    if config.decoder is not None:
        history += train_vae(pipeline.vae, config.decoder, output / "decoder")
    clip = train_clip(pipeline, config.dataset, config.clip)
    info = load_info(config.dataset)
    if config.details is not None and truth_is_known(config.dataset):
        teach_details(pipeline, vocabulary(info["config"]["vocabulary"]), config.details)
    write_text(output / "vae" / "history.json", json.dumps(history, indent=1))
    for folder, part in ((output / "clip", clip), (final, pipeline)):
        with atomic(folder) as partial:
            part.save_pretrained(partial, safe_serialization=True)
    return final


def start_from(model: str, scratch: PretrainConfig) -> str:
    """The pipeline that fine-tuning starts from: ``model`` itself, or for "scratch" one that is trained first."""
    return str(pretrain(scratch)) if model == "scratch" else model
