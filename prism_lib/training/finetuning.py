"""Fine-tune the U-Net of a Stable Diffusion pipeline on a prepared folder, with accelerate.

As in the paper the autoencoder and the text encoder stay frozen, so what they compute is cached once (`cache`).
Everything random in a step is a function of (seed, step) (`objective`), so a resumed run equals an uninterrupted one
bit for bit, and every sample is seen exactly once per epoch over any number of processes. `loop` holds the steps.

On a cluster: ``accelerate launch -m prism_lib.training.finetuning CONFIG.json``.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, notebook_launcher
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import InitProcessGroupKwargs, is_cuda_available, parse_flag_from_env, patch_environment
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import Tensor, nn

from prism_lib.data.folder import load_info, load_table
from prism_lib.devices import PRECISIONS
from prism_lib.files import exclusive, stable_seed
from prism_lib.models.pipeline import load_pipeline
from prism_lib.training.batches import Ahead, Draw, DrawConfig, Order, balancing_weights, draw_batch
from prism_lib.training.cache import Share, build_cache, require_captions_fit
from prism_lib.training.checkpoints import load_checkpoint, require_space
from prism_lib.training.config import FinetuneConfig, load_config, require_same_origin, save_config
from prism_lib.training.log import JsonlTracker
from prism_lib.training.loop import Run

__all__ = ["FinetuneConfig", "check", "finetune", "launch", "load_config", "main", "save_config"]

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # all attention projections, as in diffusers' own script
# What `accelerate launch` sets where it was told to split the weights over processes.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def finetune(config: FinetuneConfig, pipeline: StableDiffusionPipeline | None = None) -> Path:
    """Train and return the folder of the final pipeline (averaged weights), ``output/pipeline``.

    Continues from the newest checkpoint of the same configuration; a finished run returns at once. Adapters are merged
    into the pipeline's U-Net, and kept beside it in ``output/lora``.

    Raises ValueError when the folder's run began from other weights or data, RuntimeError when another process works in
    it, FloatingPointError with the batch's file names when
    the loss stops being finite, MemoryError with the settings that help, and OSError when the disk is full.
    """
    output = Path(config.output)
    final = output / "pipeline"
    accelerator = _accelerator(config)
    with exclusive(output) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            save_config(config)
            if pipeline is None:
                require_same_origin(config)
        accelerator.wait_for_everyone()
        if final.is_dir():
            return final
        check(config)
        # `_prepare` brings each part to the device of its process, when its turn has come.
        pipeline = pipeline or load_pipeline(
            config.pipeline, unet=config.unet, vae=config.vae, device="cpu", channels_last=False
        )
        run = _prepare(config, accelerator, pipeline)
        try:
            for step in run.steps():
                if run.after_step(step + 1, run.train_step(step)):
                    break
        finally:
            run.batches.close()
        if accelerator.is_main_process:
            run.save_pipeline(final)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return final


def check(config: FinetuneConfig) -> None:
    """Raise at once, by name, what would stop a run only after long work.

    That is: weights that `accelerate` splits (ValueError), a data set without one of its splits or without the label to
    balance (ValueError), a tracker or an optimizer that is not installed (ImportError).
    """
    _refuse_sharding()
    absent = sorted(set(config.trackers) - {str(name) for name in filter_trackers(config.trackers, config.output)})
    if absent:
        raise ImportError(f"trackers {', '.join(absent)} are not installed")
    for split in ("train", "val"):
        if not len(load_table(config.dataset, split)):
            raise ValueError(f"{config.dataset} has no image in split {split!r}")
    labels = load_info(config.dataset)["labels"]
    if config.balance and config.balance not in labels:
        raise ValueError(f"balance={config.balance!r} is no label of {config.dataset}; labels: {', '.join(labels)}")
    if config.optimizer == "adamw8bit":
        _bitsandbytes()


def launch(config: FinetuneConfig, processes: int = 1) -> Path:
    """`finetune` from a notebook, over several processes: one per GPU, or on a CPU one per few cores.

    With CUDA nothing may have used a GPU in the notebook before.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    save_config(config)
    if processes == 1:
        return finetune(config)
    # Without a GPU the launcher would start processes that do not know of each other.
    device = nullcontext() if is_cuda_available() else patch_environment(accelerate_use_cpu="true")
    with device:
        notebook_launcher(_finetune_forked, (config,), num_processes=processes, mixed_precision=config.mixed_precision)
    return Path(config.output) / "pipeline"


def _finetune_forked(config: FinetuneConfig) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    finetune(config)


def _accelerator(config: FinetuneConfig) -> Accelerator:
    """The processes of this run; they may wait long for each other, while one of them samples."""
    _refuse_sharding()
    AcceleratorState._reset_state()  # a notebook may train twice, with another precision
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )


def _refuse_sharding() -> None:
    """Averages and checkpoints are of whole weights, which every process must have."""
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"{name} splits the weights that are averaged and saved here; choose multi-GPU (DDP) in "
                "`accelerate config`, and gradient_checkpointing or lora_rank to save memory"
            )


def _prepare(config: FinetuneConfig, accelerator: Accelerator, pipeline: StableDiffusionPipeline) -> Run:
    """Cache, models and optimizer, as the newest checkpoint left them."""
    output = Path(config.output)
    text: dict[str, Any] = {
        "seed": config.seed,
        "captions_per_image": config.captions_per_image,
        "explicit_share": config.explicit_share,
    }
    for split in ("train", "val"):
        require_captions_fit(pipeline.tokenizer, config.dataset, split, **text)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(accelerator.device)
    weights = _label_weights(config)
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    train, validation = (
        build_cache(
            pipeline,
            config.dataset,
            split,
            Path(config.cache or output / "cache"),
            **text,
            dtype=PRECISIONS[config.mixed_precision],
            share=share,
        )
        for split in ("train", "val")
    )
    pipeline.text_encoder.to("cpu")  # its work is done

    unet = pipeline.unet.float().train().requires_grad_(config.lora_rank == 0).to(accelerator.device)
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu and config.compile:  # without compiled code a small U-Net was a fifth slower so
        unet.to(memory_format=torch.channels_last)
    if config.lora_rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(config.seed, "lora"))
            rank = config.lora_rank
            adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
            unet.add_adapter(adapters)
    averaged = copy.deepcopy(unet).eval()
    trained, shadow = (_trainable(model) for model in (unet, averaged))
    averaged.requires_grad_(False)
    optimizer = _optimizer(config, list(trained.values()))
    schedule = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
    )
    if accelerator.is_main_process:
        size = sum(value.nbytes for value in trained.values())
        require_space(output, 4 * size * (config.keep_checkpoints + 1), "checkpoints")
    state = load_checkpoint(output, {"unet": trained, "ema": shadow}, optimizer)
    if state.get("processes", accelerator.num_processes) != accelerator.num_processes:
        raise ValueError(
            f"{output} was trained by {state['processes']} processes and cannot be continued by "
            f"{accelerator.num_processes}: samples would be skipped or repeated within the epoch"
        )
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    start = int(state.get("step", 0))
    ema = EMAModel(shadow.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.shadow_params = list(shadow.values())  # the averaged U-Net's own: no second copy in memory
    ema.optimization_step = start
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        unet.compile()
    unet, optimizer = accelerator.prepare(unet, optimizer)
    _start_trackers(config, accelerator, start)
    draws = DrawConfig(
        config.batch_size,
        config.caption_dropout,
        int(pipeline.scheduler.config.num_train_timesteps),
        accelerator.process_index,
        accelerator.num_processes,
        config.noisy_share,
    )
    order = Order(len(train), config.seed, weights)

    def draw(micro: int) -> Draw:
        batch = draw_batch(train, order, draws, micro)
        return batch.pinned() if on_gpu else batch

    batches = Ahead(draw, config.steps * config.gradient_accumulation, config.draw_workers if on_gpu else 0)
    return Run(
        config, accelerator, pipeline, unet, averaged, trained, shadow, ema, optimizer, schedule, train, validation,
        draws, batches, start, state.get("best", math.inf), state.get("stale", 0),
    )  # fmt: skip


def _label_weights(config: FinetuneConfig) -> Tensor | None:
    """How often each training image is drawn, where a label is to be balanced."""
    if not config.balance:
        return None
    column = load_table(config.dataset, "train")[config.balance]
    return balancing_weights(torch.tensor(column.to_numpy(dtype=float)))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(config: FinetuneConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    eight_bit: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return eight_bit


def _bitsandbytes() -> ModuleType:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError('optimizer="adamw8bit" needs bitsandbytes: pip install bitsandbytes') from error


def _start_trackers(config: FinetuneConfig, accelerator: Accelerator, start: int) -> None:
    """log.jsonl, beside those of accelerate's trackers that were asked for."""
    if accelerator.is_main_process:
        accelerator.log_with.append(JsonlTracker(Path(config.output) / "log.jsonl", start))
    accelerator.init_trackers("prism", config={key: str(value) for key, value in asdict(config).items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """``accelerate launch -m prism_lib.training.finetuning CONFIG.json``."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if len(argv) != 1:
        sys.stderr.write("usage: accelerate launch -m prism_lib.training.finetuning CONFIG.json\n")
        return 2
    logging.basicConfig(level=logging.INFO)
    finetune(load_config(argv[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
