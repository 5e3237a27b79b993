"""Fine-tune the U-Net of a Stable Diffusion pipeline on a prepared folder, with accelerate.

As in the paper the autoencoder and the text encoder stay frozen, so what they compute is cached once: the posterior's
mean and deviation per image, and one embedding per distinct caption. Everything random in a step (which images, which
captions, noise, timesteps, dropout) is a function of (seed, step), so a resumed run equals an uninterrupted one bit
for bit, and every sample is seen exactly once per epoch over any number of processes.

On a cluster: ``accelerate launch -m prism_lib.training CONFIG.json``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import cases, datasets, imagefolder, models
from prism_lib.checkpoints import load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run. Defaults follow the paper where it says (AdamW, lr 1e-5, clip 1) and SD's practice else."""

    dataset: str  # a prepared folder
    output: str  # receives checkpoints, log, samples and the final pipeline
    pipeline: str = models.SHIPPED
    steps: int = 1000
    batch_size: int = 8  # per process
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    schedule: str = "constant_with_warmup"  # any of diffusers' schedules
    warmup: int = 100
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.1
    captions_per_image: int = 4
    explicit_share: float = 0.5  # captions in the wording that edits use
    ema_decay: float = 0.999
    snr_gamma: float = 0.0  # 5 for Min-SNR weighting (Hang et al., ICCV 2023); 0 is off
    mixed_precision: str = "no"  # "no", "fp16" or "bf16"
    validation_every: int = 250
    sample_every: int = 500
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "captions_per_image",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("caption_dropout", "explicit_share", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")


@dataclass(frozen=True)
class Cache:
    """What the frozen parts make of one split: moments (N, 2, c, h, w), captions (N, k) and their embeddings."""

    moments: Tensor
    caption_rows: Tensor  # (N, k) rows of `embeddings`
    embeddings: Tensor  # (distinct captions + 1, tokens, width); row 0 is the empty prompt
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.moments)


# ---------------------------------------------------------------------------------------------- the loss


def diffusion_loss(
    unet: UNet2DConditionModel,
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    embeddings: Tensor,
    snr_gamma: float = 0.0,
) -> Tensor:
    """Denoising loss per sample, (N,): squared error of epsilon or v (Ho et al. 2020; Salimans & Ho 2022)."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    if snr_gamma > 0:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return loss


@dataclass(frozen=True)
class Draw:
    """One batch of training, all of it determined by (seed, step)."""

    rows: Tensor  # (B,) images
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeddings: Tensor


def draw_batch(
    cache: Cache,
    config: FinetuneConfig,
    micro_step: int,
    rank: int = 0,
    world: int = 1,
    num_timesteps: int = 1000,
) -> Draw:
    """The batch of a process at a micro-step. Positions run through shuffled epochs, split over processes."""
    start = (micro_step * world + rank) * config.batch_size
    rows = torch.tensor([epoch_row(config.seed, len(cache), start + k) for k in range(config.batch_size)])
    generator = torch.Generator().manual_seed(stable_seed(config.seed, "step", micro_step, rank))
    mean, std = cache.moments[rows].float().unbind(1)
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    timesteps = torch.randint(num_timesteps, (len(rows),), generator=generator)
    pick = torch.randint(cache.caption_rows.shape[1], (len(rows),), generator=generator)
    dropped = torch.rand(len(rows), generator=generator) < config.caption_dropout
    captions = torch.where(dropped, 0, cache.caption_rows[rows, pick])
    return Draw(rows, latents, noise, timesteps, cache.embeddings[captions])


def epoch_row(seed: int, count: int, position: int) -> int:
    """Which sample stands at a global position: epoch after epoch, each a fresh permutation."""
    epoch, offset = divmod(position, count)
    return int(_permutation(seed, count, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(stable_seed(seed, "epoch", epoch)))


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------- the cache


def build_cache(pipeline: StableDiffusionPipeline, config: FinetuneConfig, split: str) -> Cache:
    """Encode a split once: moments to disk keyed by data set and autoencoder, captions in memory."""
    table = datasets.load_table(config.dataset, split)
    if not len(table):
        raise ValueError(f"{config.dataset} has no image in split {split!r}")
    captions = cases.sample_captions(
        config.dataset, table, config.seed, config.captions_per_image, config.explicit_share
    )
    distinct = ["", *dict.fromkeys(text for texts in captions for text in texts)]
    row = {text: i for i, text in enumerate(distinct)}
    embeddings = torch.cat([models.encode_prompts(pipeline, distinct[i : i + 64]) for i in range(0, len(distinct), 64)])
    return Cache(
        moments=_moments(pipeline, config, split, table),
        caption_rows=torch.tensor([[row[text] for text in texts] for texts in captions]),
        embeddings=embeddings.cpu(),
        names=tuple(table["file_name"]),
    )


def _moments(pipeline: StableDiffusionPipeline, config: FinetuneConfig, split: str, table: pd.DataFrame) -> Tensor:
    """Posterior mean and deviation, scaled, (N, 2, c, h, w) float16, read from the cache file where it fits."""
    key = hashlib.sha256(
        json.dumps([imagefolder.load_info(config.dataset)["content_hash"], split, model_hash(pipeline.vae)]).encode()
    ).hexdigest()
    path = Path(config.output) / "cache" / f"{split}-{key[:16]}.safetensors"
    if path.is_file():
        return load_file(path)["moments"]
    scale = pipeline.vae.config.scaling_factor
    vae = copy.deepcopy(pipeline.vae).to(memory_format=torch.channels_last)  # a quarter faster
    shift = vae.config.shift_factor or 0.0
    chunks = []
    for start in tqdm(range(0, len(table), 16), desc=f"latents of {split}"):
        images = datasets.read_images(config.dataset, table.iloc[start : start + 16])
        models.check_images(images, models.image_factor(vae))
        pixels = (images * 2 - 1).expand(-1, vae.config.in_channels, -1, -1).to(vae.device, vae.dtype)
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        chunks.append(torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], dim=1).half().cpu())
    moments = torch.cat(chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file({"moments": moments}, partial)
    partial.replace(path)
    return moments


def model_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- the run


def finetune(config: FinetuneConfig, pipeline: StableDiffusionPipeline | None = None) -> Path:
    """Train and return the folder of the final pipeline (EMA weights), ``output/pipeline``.

    Continues from the newest checkpoint of the same configuration; a finished run returns at once. Raises
    FloatingPointError when the loss stops being finite, with the batch's file names.
    """
    output = Path(config.output)
    final = output / "pipeline"
    _claim(output, config)
    if final.is_dir():
        return final
    pipeline = pipeline or models.load_pipeline(config.pipeline)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation
    )
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(accelerator.device)
    with accelerator.main_process_first():
        train, validation = (build_cache(pipeline, config, split) for split in ("train", "val"))

    unet = pipeline.unet.requires_grad_(True).train()
    averaged = copy.deepcopy(unet).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
    )
    state = load_checkpoint(output, {"unet": unet, "ema": averaged}, optimizer)
    start = int(state.get("step", 0))
    ema = EMAModel(averaged.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.optimization_step = start
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    averaged.to(accelerator.device)
    run = _Run(config, accelerator, pipeline, unet, averaged, ema, optimizer, schedule, train, validation)
    for step in run.steps(start):
        loss = run.train_step(step)
        run.after_step(step + 1, loss)
    if accelerator.is_main_process:
        run.save_pipeline(final)
    accelerator.wait_for_everyone()
    return final


def _claim(output: Path, config: FinetuneConfig) -> None:
    """Write the configuration, or check that the folder's own is the same."""
    path = output / "config.json"
    wanted = asdict(config)
    if path.is_file():
        found = json.loads(path.read_text())
        changed = sorted(key for key in wanted if found.get(key) != wanted[key])
        if changed:
            raise ValueError(f"{output} holds a run with another {', '.join(changed)}; choose another output folder")
        return
    output.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(wanted, indent=1))
    partial.replace(path)


@dataclass
class _Run:
    """The moving parts of one run, so that the loop above reads as a loop."""

    config: FinetuneConfig
    accelerator: Accelerator
    pipeline: StableDiffusionPipeline
    unet: Any
    averaged: UNet2DConditionModel
    ema: EMAModel
    optimizer: Any
    schedule: Any
    train: Cache
    validation: Cache

    def steps(self, start: int) -> Iterator[int]:
        """Optimizer steps with a progress bar on the main process."""
        self.bar = tqdm(
            range(start, self.config.steps),
            initial=start,
            total=self.config.steps,
            desc="fine-tuning",
            disable=not self.accelerator.is_local_main_process,
        )
        self.clock = time.perf_counter()
        return iter(self.bar)

    def train_step(self, step: int) -> Tensor:
        """One optimizer step over ``gradient_accumulation`` micro-batches; returns the mean loss."""
        config, accelerator = self.config, self.accelerator
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)  # a pure function of the step: nothing to restore
        total = torch.zeros((), device=accelerator.device)
        for k in range(config.gradient_accumulation):
            micro = step * config.gradient_accumulation + k
            with accelerator.accumulate(self.unet):
                batch = draw_batch(
                    self.train,
                    config,
                    micro,
                    accelerator.process_index,
                    accelerator.num_processes,
                    self._timesteps,
                )
                with accelerator.autocast():
                    losses = self._losses(self.unet, batch, config.snr_gamma)
                loss = losses.mean()
                if not bool(torch.isfinite(loss)):
                    self._refuse(step, batch, losses)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.unet.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach() / config.gradient_accumulation
        self.ema.step(accelerator.unwrap_model(self.unet).parameters())
        return total

    @property
    def _timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    def _losses(self, unet: Any, batch: Draw, snr_gamma: float = 0.0) -> Tensor:
        device = self.accelerator.device
        return diffusion_loss(
            unet,
            self.pipeline.scheduler,
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            batch.embeddings.to(device),
            snr_gamma,
        )

    def _refuse(self, step: int, batch: Draw, losses: Tensor) -> None:
        names = [
            self.train.names[row]
            for row, loss in zip(batch.rows.tolist(), losses.tolist(), strict=True)
            if not np.isfinite(loss)
        ]
        path = Path(self.config.output) / f"not-finite-step-{step}.json"
        path.write_text(json.dumps({"step": step, "files": names}, indent=1))
        raise FloatingPointError(f"the loss is not finite at step {step} for {', '.join(names)} (listed in {path})")

    def after_step(self, done: int, loss: Tensor) -> None:
        """Log, validate, sample and save when it is time."""
        config, last = self.config, done == self.config.steps
        if done % 10 == 0 or last:
            mean = float(self.accelerator.gather(loss.reshape(1)).mean())
            seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
            images = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes * 10
            self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{images / seconds:.1f}")
            self._log({"step": done, "loss": mean})
        if not self.accelerator.is_main_process:
            return
        if done % config.validation_every == 0 or last:
            self._refresh_average()
            self._log({"step": done, "validation_loss": self.validation_loss()})
        if done % config.sample_every == 0 or last:
            self._refresh_average()
            self.save_samples(done)
        if done % config.checkpoint_every == 0 or last:
            self._refresh_average()
            unet = self.accelerator.unwrap_model(self.unet)
            save_checkpoint(Path(config.output), done, {"unet": unet, "ema": self.averaged}, self.optimizer, {})

    def _refresh_average(self) -> None:
        self.ema.copy_to(self.averaged.parameters())

    def _log(self, row: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (Path(self.config.output) / "log.jsonl").open("a") as stream:
                stream.write(json.dumps(dict(row)) + "\n")

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the averaged weights on at most 128 validation draws, the same ones every time."""
        config = self.config
        batches = max(1, min(128, len(self.validation)) // config.batch_size)
        draws = (draw_batch(self.validation, config, k, num_timesteps=self._timesteps) for k in range(batches))
        return float(torch.cat([self._losses(self.averaged, batch) for batch in draws]).mean())

    @torch.no_grad()
    def save_samples(self, step: int) -> Path:
        """A strip of text-to-image samples from the averaged weights, for the first captions of validation."""
        rows = self.validation.caption_rows[:8, 0]
        prompt = self.validation.embeddings[rows].to(self.accelerator.device)
        empty = self.validation.embeddings[:1].expand_as(prompt).to(self.accelerator.device)
        images = sample_images(self.pipeline, self.averaged, prompt, empty, seed=self.config.seed)
        path = Path(self.config.output) / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        strip = torch.cat(list(images[:, 0]), dim=1)
        Image.fromarray((strip * 255).round().byte().cpu().numpy()).save(path)
        return path

    def save_pipeline(self, final: Path) -> None:
        self._refresh_average()
        self.pipeline.unet = self.averaged
        partial = final.with_name(f".partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        self.pipeline.save_pretrained(partial, safe_serialization=True)
        partial.replace(final)


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    steps: int = 25,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Text-to-image samples (N, 1, H, W) in [0, 1], one generator per image."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps, device=prompt_embeds.device)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(prompt_embeds))]
    latents = torch.stack(noise).to(prompt_embeds.device)
    embeddings = torch.cat([negative_prompt_embeds, prompt_embeds])
    for t in scheduler.timesteps:
        low, high = unet(torch.cat([latents, latents]), t, encoder_hidden_states=embeddings).sample.chunk(2)
        latents = scheduler.step(low + guidance_scale * (high - low), t, latents).prev_sample
    return models.decode_latents(pipeline.vae, latents)


def read_log(output: str | Path) -> pd.DataFrame:
    """The run's log as one table: step, loss, validation_loss; rows rewritten after a resume count once."""
    path = Path(output) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no run has logged there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return pd.DataFrame(rows).groupby("step", as_index=False).last()


def curve(log: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of a log, for a plot."""
    rows = log.dropna(subset=[column])
    return rows["step"].tolist(), rows[column].tolist()


def summary(log: pd.DataFrame) -> dict[str, float]:
    """First and last losses of a log, the training loss as the mean over its last tenth."""
    loss, validation = log["loss"].dropna(), log["validation_loss"].dropna()
    return {
        "steps": float(log["step"].max()),
        "loss": float(loss.tail(max(1, len(loss) // 10)).mean()),
        "validation_loss_first": float(validation.iloc[0]),
        "validation_loss": float(validation.iloc[-1]),
    }


@torch.no_grad()
def text_samples(
    pipeline_folder: str | Path, dataset: str | Path, count: int = 8, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Text-to-image samples (count, 1, H, W) for the first distinct captions of the validation split."""
    pipeline = models.load_pipeline(pipeline_folder)
    texts = datasets.load_table(dataset, "val")["text"].drop_duplicates().head(count).tolist()
    embeddings = models.encode_prompts(pipeline, [*texts, ""])
    empty = embeddings[-1:].expand(len(texts), -1, -1)
    return sample_images(pipeline, pipeline.unet, embeddings[:-1], empty, seed=seed), texts


def main(arguments: Sequence[str] | None = None) -> int:
    """``accelerate launch -m prism_lib.training CONFIG.json``."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if len(argv) != 1:
        sys.stderr.write("usage: accelerate launch -m prism_lib.training CONFIG.json\n")
        return 2
    logging.basicConfig(level=logging.INFO)
    finetune(FinetuneConfig(**json.loads(Path(argv[0]).read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
