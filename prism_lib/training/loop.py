"""The loop of fine-tuning: preparation, steps, validation, samples, checkpoints and the final pipeline."""

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import load_table, load_vocabulary, read_images
from prism_lib.data.rows import sample_captions
from prism_lib.devices import PRECISIONS, fast_attention
from prism_lib.files import atomic, stable_seed, write_text
from prism_lib.models.pipeline import Pipe, assembled, sample_images, text_encoders
from prism_lib.training import checkpoints
from prism_lib.training.batches import Draw, batches_from, by_timestep, diffusion_loss, validation_draws
from prism_lib.training.cache import Cache, build_cache, require_captions_fit
from prism_lib.training.config import FinetuneConfig
from prism_lib.training.log import JsonlTracker

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # all attention projections, as in diffusers' own script


class Run:
    """One run as its newest checkpoint left it: its steps, and what follows a step."""

    def __init__(self, config: FinetuneConfig, accelerator: Accelerator, pipeline: Pipe) -> None:
        """Cache, models and optimizer; ValueError if the checkpoint is of another number of processes."""
        self.config, self.accelerator, self.pipeline = config, accelerator, pipeline
        self.output = Path(config.output)
        train, self.validation = _caches(config, accelerator, pipeline)
        self.names = train.names
        unet = _trainable(config, accelerator, pipeline)
        frozen = {id(value): value for value in unet.parameters() if not value.requires_grad}  # no second copy of these
        self.averaged = copy.deepcopy(unet, frozen).eval()
        self.trained, self.shadow = (
            {name: value for name, value in model.named_parameters() if value.requires_grad}
            for model in (unet, self.averaged)
        )
        self.averaged.requires_grad_(False)
        decay = config.weight_decay
        optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate, weight_decay=decay, fused=True)
        length = {"num_warmup_steps": config.warmup, "num_training_steps": config.steps}
        self.schedule = get_scheduler(config.schedule, optimizer, **length)
        if accelerator.is_main_process:
            size = sum(value.nbytes for value in self.trained.values())
            checkpoints.require_space(self.output, 4 * size * (config.keep_checkpoints + 1), "checkpoints")
        state = checkpoints.load_checkpoint(self.output, {"unet": self.trained, "ema": self.shadow}, optimizer)
        if state.get("processes", accelerator.num_processes) != accelerator.num_processes:
            found = f"{self.output} was trained by {state['processes']} processes"
            why = "samples would be skipped or repeated within the epoch"
            raise ValueError(f"{found} and cannot be continued by {accelerator.num_processes}: {why}")
        if accelerator.scaler is not None and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        self.start = int(state.get("step", 0))
        self.best, self.stale = state.get("best", math.inf), state.get("stale", 0)  # lowest loss, validations since
        self.asked = False  # to stop before the end, by a signal
        self.timed, self.seconds = 0, 0.0  # steps since the last row of the log, and their time without `after_step`
        self.ema = EMAModel(self.shadow.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.ema.shadow_params = list(self.shadow.values())  # the averaged U-Net's own: no second copy in memory
        self.ema.optimization_step = self.start
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if config.compile:
            unet.compile()
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        if accelerator.is_main_process:
            accelerator.log_with.append(JsonlTracker(self.output / "log.jsonl", self.start))
        accelerator.init_trackers("prism", config={key: str(value) for key, value in asdict(config).items()})
        self.num_timesteps = int(pipeline.scheduler.config.num_train_timesteps)
        if config.compile:
            self._check_compiled()
        self.batches = batches_from(self.start, config, train, self.num_timesteps, accelerator)

    def steps(self) -> Iterator[int]:
        """Optimizer steps with a progress bar on the main process."""
        start, total, hidden = self.start, self.config.steps, not self.accelerator.is_local_main_process
        self.bar = tqdm(range(start, total), "fine-tuning", total, initial=start, disable=hidden)
        return iter(() if self.stopped else self.bar)

    @property
    def stopped(self) -> bool:
        """Whether the validation loss has not fallen for long enough."""
        return 0 < self.config.early_stop <= self.stale

    def train_step(self, step: int) -> Tensor:
        """One optimizer step over ``gradient_accumulation`` micro-batches; returns the mean loss."""
        config, accelerator, begin = self.config, self.accelerator, time.perf_counter()
        checkpoints.set_learning_rate(self.optimizer, self.schedule, step)
        total = torch.zeros((), device=accelerator.device)
        for k in range(config.gradient_accumulation):
            micro = step * config.gradient_accumulation + k
            # Only a U-Net with dropout draws from here.
            torch.manual_seed(stable_seed(config.seed, "dropout", micro, accelerator.process_index))
            with accelerator.accumulate(self.unet):
                batch = next(self.batches)
                with _advice(config):
                    losses = self._losses(self.unet, batch)
                    loss = losses.mean()
                    if not bool(torch.isfinite(loss)):
                        self._refuse("loss", step, batch, torch.isfinite(losses))
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained.values(), config.max_grad_norm)
                    # A gradient scaler meets infinities by design, and skips that step.
                    if accelerator.scaler is None and not bool(torch.isfinite(norm)):
                        self._refuse("gradient", step, batch, torch.zeros_like(losses))
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach() / config.gradient_accumulation
        self.ema.step(self.trained.values())
        self.timed += 1
        self.seconds += time.perf_counter() - begin
        return total

    def _losses(self, unet: Any, batch: Draw) -> Tensor:
        there: Draw = send_to_device(batch, self.accelerator.device, non_blocking=True)
        # Checkpointing computes again in the backward pass, outside of this, and a compiler chooses by itself.
        precision = "no" if self.config.gradient_checkpointing or self.config.compile else self.config.mixed_precision
        with self.accelerator.autocast(), fast_attention(self.accelerator.device, precision):
            return diffusion_loss(unet, self.pipeline.scheduler, *there[1:], snr_gamma=self.config.snr_gamma)

    def _check_compiled(self) -> None:
        """RuntimeError if compiled code gives the U-Net another gradient than plain code, as torch 2.13 may on CPUs."""
        batch, norms = validation_draws(self.validation, self.config, 1, self.num_timesteps)[0], list[Tensor]()
        for stance in ("default", "force_eager"):
            with torch.compiler.set_stance(stance), _advice(self.config):
                (1024 * self._losses(self.unet, batch).mean()).backward()  # fp16 would lose small gradients
            gradients = (value.grad for value in self.trained.values() if value.grad is not None)
            norms.append(torch.stack([gradient.norm() for gradient in gradients]))
            self.unet.zero_grad()  # accelerate's optimizer would not, after a run that ended between micro-batches
        if not float(error := (norms[0] - norms[1]).norm() / norms[1].norm()) < 0.1:
            where = f"torch {torch.__version__} on {self.accelerator.device.type} compiles this U-Net wrongly"
            raise RuntimeError(f"{where}: its gradient is off by {error:.0%}; set compile to False")

    def _refuse(self, what: str, step: int, batch: Draw, finite: Tensor) -> None:
        names = [self.names[row] for row, fine in zip(batch.rows.tolist(), finite.tolist(), strict=True) if not fine]
        path = self.output / f"not-finite-step-{step}.json"
        write_text(path, json.dumps({"step": step, "files": names}, indent=1))
        raise FloatingPointError(f"the {what} is not finite at step {step} for {', '.join(names)} (listed in {path})")

    def after_step(self, done: int, loss: Tensor, asked: bool = False) -> bool:
        """Log, validate, sample and save when it is time; True when the run should stop, early or as it was `asked`."""
        config, last = self.config, done == self.config.steps
        if done % 10 == 0 or last:
            mean = float(self.accelerator.gather(loss.reshape(1)).mean())
            images = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes
            speed = images * self.timed / self.seconds
            self.timed, self.seconds = 0, 0.0
            self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{speed:.1f}")
            self.accelerator.log({"loss": mean, "images_per_second": speed}, step=done)
        stop = (done % config.validation_every == 0 or last) and self._validate(done)
        if self.accelerator.num_processes > 1:  # all stop at the step at which one was asked
            asked = bool(self.accelerator.gather(torch.tensor([int(asked)], device=self.accelerator.device)).any())
        self.asked = asked and not (last or stop)  # a run that ends anyway ends whole
        stop |= self.asked
        if not self.accelerator.is_main_process:
            return stop
        if config.sample_every and done % config.sample_every == 0:
            self.save_samples(done)
        if done % config.checkpoint_every == 0 or last or stop:
            info = {"processes": self.accelerator.num_processes, "best": self.best, "stale": self.stale}
            if self.accelerator.scaler is not None:
                info["scaler"] = self.accelerator.scaler.state_dict()
            states = {"unet": self.trained, "ema": self.shadow}
            checkpoints.save_checkpoint(self.output, done, states, self.optimizer, info, config.keep_checkpoints)
        return stop

    def _validate(self, done: int) -> bool:
        """Log the validation loss; True when it has not fallen for long enough, the same in every process."""
        if self.accelerator.is_main_process:
            found = self.validation_loss()
            self.accelerator.log(found, step=done)
            self.stale = 0 if found["validation_loss"] < self.best else self.stale + 1
            self.best = min(self.best, found["validation_loss"])
            if self.config.early_stop and self.stale == 0:
                checkpoints.write_tensors(self.output / "best.safetensors", self.shadow)
        if self.config.early_stop:
            self.stale = int(broadcast(torch.tensor([self.stale], device=self.accelerator.device)))
        return self.stopped

    @torch.no_grad()
    def validation_loss(self) -> dict[str, float]:
        """Loss of the averaged weights on some 128 validation draws, the same every time, weighted as in training."""
        draws = validation_draws(self.validation, self.config, 128, self.num_timesteps)
        losses = torch.cat([self._losses(self.averaged, batch) for batch in draws]).cpu()
        bins = by_timestep(losses, torch.cat([batch.timesteps for batch in draws]), self.num_timesteps)
        return {"validation_loss": float(losses.mean())} | {f"validation_loss_{key}": bins[key] for key in bins}

    @torch.no_grad()
    def save_samples(self, step: int) -> None:
        """A strip of text-to-image samples from the averaged weights, for the first captions of validation."""
        rows = self.validation.caption_rows[:8, 0]
        both = self.validation.embeddings[torch.cat([rows, torch.zeros_like(rows)])]
        prompt, empty = both.float().to(self.accelerator.device).chunk(2)
        channels = read_images(self.config.dataset, load_table(self.config.dataset, "val").head(1)).shape[1]
        own = assembled(self.pipeline.vae, None, None, self.averaged, self.pipeline.scheduler)
        with self.accelerator.autocast():
            images = sample_images(own, prompt, empty, channels=channels, seed=self.config.seed)
        path = self.output / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        strip = torch.cat(list(images), dim=2).permute(1, 2, 0).squeeze(2)  # (H, 8 W) or (H, 8 W, 3)
        Image.fromarray((strip * 255).round().byte().cpu().numpy()).save(path)

    def save_pipeline(self, final: Path) -> None:
        """Write the result, whole or not at all; with early stop, of the step that validated best."""
        if self.config.early_stop:
            checkpoints.read_tensors(final.parent / "best.safetensors", self.shadow)
        if self.config.lora_rank:
            adapters = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.averaged))
            self.pipeline.save_lora_weights(final.parent / "lora", unet_lora_layers=adapters)
            self.averaged.fuse_lora()
            self.averaged.unload_lora()
        self.pipeline.unet = self.averaged
        self.averaged.to(memory_format=torch.contiguous_format)  # as safetensors requires
        settings = Path(str(self.pipeline.name_or_path)) / "editing.json"
        with atomic(final) as partial:
            self.pipeline.to("cpu").save_pretrained(partial, safe_serialization=True)
            words = asdict(load_vocabulary(self.config.dataset))
            write_text(partial / "vocabulary.yaml", json.dumps(words, indent=1))  # JSON is YAML
            if settings.is_file():  # the base model's own settings of edits
                shutil.copy(settings, partial)


def _caches(config: FinetuneConfig, accelerator: Accelerator, pipeline: Pipe) -> list[Cache]:
    """The encoded splits "train" and "val"; the frozen parts move to the device, the text encoder back again."""
    folder, dtype = Path(config.cache or Path(config.output) / "cache"), PRECISIONS[config.mixed_precision]
    captions, drawn = {}, (config.seed, config.captions_per_image, config.explicit_share)
    for split in ("train", "val"):
        table = load_table(config.dataset, split)
        captions[split] = sample_captions(config.dataset, table, *drawn)
        require_captions_fit(pipeline.tokenizer, split, table["file_name"], captions[split])
    for part in (pipeline.vae, *text_encoders(pipeline)):
        part.requires_grad_(False).eval().to(accelerator.device)
    caches = [build_cache(pipeline, config.dataset, split, folder, captions[split], dtype) for split in captions]
    for encoder in text_encoders(pipeline):
        encoder.to("cpu")
    return caches


def _trainable(config: FinetuneConfig, accelerator: Accelerator, pipeline: Pipe) -> Any:
    """The U-Net in float32 on the device; with adapters, where `lora_rank` is not 0, that alone learn."""
    unet = pipeline.unet.float().train().requires_grad_(config.lora_rank == 0).to(accelerator.device)
    # On a GPU without compiled code a small U-Net was a fifth slower in this layout; on a CPU it is a tenth faster.
    if accelerator.device.type == "cpu" or config.compile:
        unet.to(memory_format=torch.channels_last)
    if rank := config.lora_rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(config.seed, "lora"))
            adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
            unet.add_adapter(adapters)
    return unet


@contextmanager
def _advice(config: FinetuneConfig) -> Iterator[None]:
    """MemoryError where memory runs out, with the settings that help, the cheapest first, without those in use."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        half = max(1, config.batch_size // 2)
        parts = config.gradient_accumulation * config.batch_size // half
        remedies = [
            ('mixed_precision="bf16"', config.mixed_precision == "no"),
            ("gradient_checkpointing=True", not config.gradient_checkpointing),
            (f"batch_size={half} with gradient_accumulation={parts}", config.batch_size > 1),
            ("lora_rank=8", not config.lora_rank),
        ]
        helps = ", ".join(name for name, possible in remedies if possible)
        advice = f"try, in this order: {helps}" if helps else "the model needs a larger device or smaller images"
        raise MemoryError(f"out of memory at batch_size={config.batch_size}; {advice}") from error
