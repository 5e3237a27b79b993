"""Fine-tune the U-Net on a prepared folder, with accelerate. As in the paper all other parts stay frozen."""

import argparse
import gc
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, notebook_launcher
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import InitProcessGroupKwargs, is_cuda_available, parse_flag_from_env, patch_environment

from prism_lib.data.folder import load_info, load_table
from prism_lib.devices import default_device
from prism_lib.files import Stopped, exclusive, stop_asked, stop_children, stop_now
from prism_lib.models.pipeline import load_pipeline
from prism_lib.training.config import FinetuneConfig, load_config, require_same_origin, save_config
from prism_lib.training.loop import Run

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # ways of accelerate to split the weights


def finetune(config: FinetuneConfig) -> Path:
    """Train, from the newest checkpoint on, and return the folder of the final pipeline (averaged weights).

    Adapters are merged into the pipeline's U-Net, and kept beside it in ``output/lora``. Raises ValueError when the run
    began from other weights or data, RuntimeError when another process works in ``output``, FloatingPointError naming
    images when the loss is not finite, MemoryError with the settings that help, OSError when the disk is full. SIGTERM
    and SIGUSR1 end it after the step at hand: a checkpoint is saved and Stopped raised, which exits with 0.
    """
    output, final = Path(config.output), Path(config.output) / "pipeline"
    if not final.is_dir():
        check_run(config)  # before anything is written
    AcceleratorState._reset_state()  # a notebook may train twice, with another precision
    accelerator = Accelerator(
        cpu=default_device().type == "cpu",  # else processes of torchrun do not find each other there
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        # Processes may wait long for each other, while one of them samples.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    with exclusive(output) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            save_config(config)
            require_same_origin(config)
        accelerator.wait_for_everyone()
        if final.is_dir():
            return final
        # `Run` moves each part to the device of its process.
        pipeline = load_pipeline(config.pipeline, unet=config.unet, vae=config.vae, device="cpu", channels_last=False)
        run = Run(config, accelerator, pipeline)
        try:
            with stop_asked() as asked:
                for step in run.steps():
                    if run.after_step(step + 1, run.train_step(step), asked.is_set()):
                        break
        finally:
            run.batches.close()
        if accelerator.is_main_process and not run.asked:
            run.save_pipeline(final)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if run.asked:
            raise Stopped(0)
    return final


def check_run(config: FinetuneConfig) -> None:
    """Raise ValueError or ImportError at once for what would stop a run after long work."""
    for name in SHARDING:  # averages and checkpoints are of whole weights
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            instead = "multi-GPU (DDP) in `accelerate config`, and gradient_checkpointing or lora_rank to save memory"
            raise ValueError(f"{name} splits the weights that are averaged and saved here; choose {instead}")
    if absent := sorted({*config.trackers} - {str(name) for name in filter_trackers(config.trackers, config.output)}):
        raise ImportError(f"trackers {', '.join(absent)} are not installed")
    for split in ("train", "val"):
        if not len(load_table(config.dataset, split)):
            raise ValueError(f"{config.dataset} has no image in split {split!r}")
    labels = load_info(config.dataset)["labels"]
    if config.balance and config.balance not in labels:
        raise ValueError(f"balance={config.balance!r} is no label of {config.dataset}; labels: {', '.join(labels)}")


def launch(config: FinetuneConfig, processes: int = 1) -> Path:
    """`finetune` from a notebook over several processes; nothing may have used a GPU in the notebook before."""
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    if processes == 1:
        final = finetune(config)
        gc.collect()  # what accelerate wraps refers to itself: until then all weights and moments stay in memory
        return final
    # Without a GPU the launcher would start processes that each train alone.
    place = nullcontext() if is_cuda_available() else patch_environment(accelerate_use_cpu="true")
    with place, stop_asked(stop_children) as asked:
        notebook_launcher(_finetune_forked, (config,), processes, mixed_precision=config.mixed_precision)
    if asked.is_set():
        raise Stopped(0)
    return Path(config.output) / "pipeline"


def _finetune_forked(config: FinetuneConfig) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with stop_asked(stop_now):  # in place of the handler that the fork copied
        finetune(config)


def main(arguments: Sequence[str] | None = None) -> None:
    """``accelerate launch -m prism_lib.training.finetuning CONFIG.json``."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m prism_lib.training.finetuning")
    parser.add_argument("config", metavar="CONFIG.json")
    config = parser.parse_args(arguments).config
    logging.basicConfig(level=logging.INFO)
    with stop_asked(stop_now):
        finetune(load_config(config))


if __name__ == "__main__":
    main()
