"""Train a small Stable Diffusion's frozen parts from scratch, in the order the original was trained.

First the autoencoder, on phantoms and procedural textures; then a small CLIP on images and captions, whose text
encoder conditions the U-Net, and in that the words which only details use. All is frozen afterwards. The U-Net is
trained by `training.finetuning`, exactly as a fine-tuning run is.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.data.rows import sample_captions
from prism_lib.data.sources import has_details
from prism_lib.devices import default_device
from prism_lib.language.captions import corpus
from prism_lib.language.labels import vocabulary
from prism_lib.models.pipeline import PipelineConfig, build_pipeline
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.training.cache import require_captions_fit
from prism_lib.training.checkpoints import load_checkpoint, save_checkpoint
from prism_lib.training.detail_words import DetailConfig, teach_details
from prism_lib.training.textures import textures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeConfig:
    """Recipe of the autoencoder; patients of ``patient_seed`` must not be used for evaluation."""

    steps: int = 2800
    batch_size: int = 8
    crop: int = 96
    image_size: int = 256
    phantoms: int = 1600
    textures: int = 1000
    corner_share: float = 0.25  # of the phantom crops: the side marker is small, rare, and hard
    learning_rate: float = 2e-3
    warmup: int = 100
    gradient_weight: float = 1.0
    square_weight: float = 4.0
    kl_weight: float = 1e-8  # of the sum over a latent; 1e-6 leaves one nat a value, and blurs everything
    decoder_only: bool = False  # leaves the encoder, so every latent, as it is: a U-Net trained on them stays right
    start_logvar: float = -6.0  # a posterior that starts wide learns to blur first
    patient_seed: int = 100
    seed: int = 0
    checkpoint_every: int = 250


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
    """Peak signal-to-noise ratio in dB of encode-decode, per image (N,), for images (N, 1, H, W) in [0, 1]."""
    errors = []
    for chunk in images.split(8):
        pixels = (chunk * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device)
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.mean(1, keepdim=True).to(chunk) / 2 + 0.5
        errors.append(F.mse_loss(output.clamp(0, 1), chunk, reduction="none").mean((1, 2, 3)))
    return -10 * torch.cat(errors).log10()


@dataclass(frozen=True)
class ClipConfig:
    """Recipe of the small CLIP whose text encoder conditions the U-Net."""

    steps: int = 600
    batch_size: int = 48
    image_size: int = 128
    patch_size: int = 16
    vision_width: int = 128
    vision_layers: int = 4
    learning_rate: float = 1e-3
    warmup: int = 50
    label_weight: float = 1.0
    explicit_share: float = 0.5
    seed: int = 0


def train_clip(pipeline: StableDiffusionPipeline, dataset: str | Path, config: ClipConfig) -> CLIPModel:
    """Contrastive training on a prepared folder (Radford et al. 2021); the pipeline's text encoder takes the result.

    Captions of few attributes repeat, so the target spreads over all pairs of a batch with equal captions. Contrast
    alone is slow to tell "with" from "without" on so little data, so both towers also learn to read the labels: the
    image from its pooled state, the text from its pooled state and from the mean of its tokens. Runs on
    `devices.default_device`, and leaves the result on the CPU.
    """
    device = default_device()
    text = pipeline.text_encoder.config
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=text.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=text.projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        joint = CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim
        )
        clip = CLIPModel(joint).train().to(device)
    table = load_table(dataset, "train")
    images = _small_images(dataset, table, config.image_size)
    labels = torch.tensor(table[load_info(dataset)["labels"]].to_numpy(dtype=float)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        readers = nn.ModuleList(
            nn.Linear(width, labels.shape[1]) for width in (vision.hidden_size, text.hidden_size, text.hidden_size)
        )
    trained = [*clip.parameters(), *readers.to(device).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=1e-2, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    for step in tqdm(range(config.steps), desc="CLIP"):
        rows = torch.randint(len(table), (config.batch_size,), generator=generator)
        # A fresh seed per step, so that an image meets many captions.
        some = table.iloc[rows.tolist()]
        drawn = sample_captions(dataset, some, f"{config.seed}:{step}", 1, config.explicit_share)
        texts = [captions[0] for captions in drawn]
        tokens = pipeline.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        output = clip(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=images[rows].to(device).float().div(127.5).sub(1).expand(-1, 3, -1, -1),
        )
        same = torch.tensor([[float(a == b) for b in texts] for a in texts])
        target = (same / same.sum(1, keepdim=True)).to(device)
        logits = output.logits_per_image
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        words = output.text_model_output.last_hidden_state * tokens.attention_mask[..., None]
        states = (
            output.vision_model_output.pooler_output,
            output.text_model_output.pooler_output,
            words.sum(1) / tokens.attention_mask.sum(1, keepdim=True),
        )
        known = labels[rows].to(device)
        reading = [_known_bce(head(state), known) for head, state in zip(readers, states, strict=True)]
        loss = contrast + config.label_weight * torch.stack(reading).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info(
                "CLIP step %d: contrast %.3f, labels %s",
                step + 1,
                contrast.item(),
                [f"{value.item():.3f}" for value in reading],
            )
    clip.eval().requires_grad_(False).to("cpu")
    pipeline.text_encoder.load_state_dict(clip.text_model.state_dict())
    return clip


def _known_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over the labels that are known, 1 or 0."""
    known = torch.isfinite(labels) & (labels >= 0)
    loss = F.binary_cross_entropy_with_logits(logits, torch.where(known, labels, 0.0), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def _small_images(dataset: str | Path, table: pd.DataFrame, size: int) -> Tensor:
    """All images of a table at CLIP's size, uint8 (N, 1, size, size)."""
    chunks = []
    for start in tqdm(range(0, len(table), 64), desc="images for CLIP"):
        images = read_images(dataset, table.iloc[start : start + 64])
        small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        chunks.append((small.mean(1, keepdim=True) * 255).round().byte())
    return torch.cat(chunks)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything before the U-Net, from scratch: tokenizer, autoencoder, CLIP."""

    dataset: str  # a prepared folder
    output: str
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    decoder: VaeConfig | None = None  # such as `DECODER`: the decoder trained on alone, once the encoder is done
    clip: ClipConfig = field(default_factory=ClipConfig)
    details: DetailConfig | None = field(default_factory=DetailConfig)  # where the data set knows details; None: never
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
    if config.details is not None and has_details(info["source"]):
        teach_details(pipeline, vocabulary(info["config"]["vocabulary"]), config.details)
    (output / "vae" / "history.json").write_text(json.dumps(history, indent=1))
    for folder, part in ((output / "clip", clip), (final, pipeline)):
        partial = folder.with_name(f".partial-{folder.name}")
        part.save_pretrained(partial, safe_serialization=True)
        partial.replace(folder)
    return final


def start_from(model: str, scratch: PretrainConfig) -> str:
    """The pipeline that fine-tuning starts from: ``model`` itself, or for "scratch" one that is trained first."""
    return str(pretrain(scratch)) if model == "scratch" else model


def export(pipeline: StableDiffusionPipeline, folder: Path, card: str) -> Path:
    """Write a pipeline in float16 with its model card, whole or not at all; the pipeline itself stays as it is."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    halves = {
        name: copy.deepcopy(getattr(pipeline, name)).half().requires_grad_(False)
        for name in ("vae", "text_encoder", "unet")
    }
    for part in (halves["vae"], halves["unet"]):
        part.register_to_config(_name_or_path="")  # where it lay during training is nobody's business
    StableDiffusionPipeline(
        **halves,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(partial, safe_serialization=True)
    (partial / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder
