"""How fast fine-tuning is, and what kill -9 costs: `python -m benchmarks.training` writes two records.

`figures/phantom/training_speed.json`: images a second with latents and captions from the cache against the order of
work of diffusers' `train_text_to_image.py`, which runs autoencoder and text encoder in every step (in float32 and, as
that script does it, with the frozen parts cast to bfloat16 and the U-Net under autocast); two processes against one
at the same global batch; and runs in bfloat16 (`MIXED_PRECISION` "auto" on a processor that has it) against runs in
float32, in turns.

`figures/phantom/resume.json`: the largest difference between an uninterrupted run and one that was killed in
mid-epoch and resumed, with EMA, for one and two processes, with and without LoRA. It should be zero.
"""

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from prism_lib import paths, records
from prism_lib.data.folder import load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.rows import sample_captions
from prism_lib.models import encode_prompts, load_pipeline
from prism_lib.paths import SHIPPED
from prism_lib.training import (
    FinetuneConfig,
    Order,
    build_cache,
    diffusion_loss,
    draw_batch,
    read_log,
    save_config,
)

BATCH, ROUNDS, TURNS = 8, 5, 3


def main() -> None:
    """The records; `--size small` is a trial of seconds, whose numbers go to a folder of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small is a trial of seconds")
    parser.add_argument("--only", choices=("speed", "resume"), help="make one of the two records")
    given = parser.parse_args()
    small = given.size == "small"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = prepare(
            PrepareConfig("phantom", folder / "data", num_images=40 if small else 400, vocabulary="phantom")
        )
        figures = paths.runs() / "benchmarks" if small else ""
        if given.only != "resume":
            with records.Timer() as timer:
                metrics: dict[str, Any] = {}
                for dtype in (torch.float32, torch.bfloat16):
                    metrics |= cached_against_uncached(dataset, folder, 2 if small else 10, dtype)
                metrics |= processes_against_one(dataset, folder, 4 if small else 40)
                metrics |= bfloat16_against_float32(dataset, folder, 4 if small else 40)
            settings = {"batch_size": BATCH, "rounds": ROUNDS, "turns": TURNS, "threads": torch.get_num_threads()}
            save("training_speed", settings, metrics, figures, timer.seconds)
        if given.only != "speed":
            steps = 12 if small else 30
            with records.Timer() as timer:
                metrics = killed_against_whole(dataset, folder, steps)
            save("resume", {"steps": steps, "checkpoint_every": 5}, metrics, figures, timer.seconds)


def save(name: str, parameters: dict[str, Any], metrics: dict[str, Any], figures: str | Path, seconds: float) -> None:
    """A record of this file."""
    records.record(
        name,
        dataset="phantom",
        notebook="benchmarks/training.py",
        parameters=parameters,
        seed=0,
        metrics=metrics,
        figures_dir=figures,
        model=SHIPPED,
        seconds=seconds,
    )


def cached_against_uncached(dataset: Path, folder: Path, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Images a second of the same training step, fed from the cache and by the frozen parts; rounds alternate."""
    pipeline = load_pipeline(SHIPPED)
    device = Accelerator().device
    pipeline.to(device)
    pipeline.vae.to(dtype)
    pipeline.text_encoder.to(dtype)
    table = load_table(dataset, "train")
    cache = build_cache(pipeline, dataset, "train", folder / "cache", sample_captions(dataset, table, 0, 4, 0.5))
    captions = [texts[0] for texts in sample_captions(dataset, table, 0, 1, 0.5)]
    order, draws = Order(len(cache), 0), FinetuneConfig(str(dataset), "", batch_size=BATCH)
    unet = pipeline.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)

    def from_cache(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = draw_batch(cache, order, draws, step)
        return draw.latents, draw.embeddings

    def by_frozen_parts(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = order.rows(step * BATCH, BATCH).tolist()
        images = read_images(dataset, table.iloc[rows]).to(device)
        with torch.no_grad():
            pixels = (images * 2 - 1).expand(-1, 3, -1, -1).to(dtype)
            latents = pipeline.vae.encode(pixels).latent_dist.sample().float() * pipeline.vae.config.scaling_factor
        return latents, encode_prompts(pipeline, [captions[row] for row in rows])

    speeds: dict[str, list[float]] = {"cached": [], "uncached": []}
    feeds = {"cached": from_cache, "uncached": by_frozen_parts}
    counter = itertools.count()
    for _, (name, feed) in itertools.product(range(ROUNDS + 1), feeds.items()):
        begin = now()
        for _ in range(steps):
            latents, embeddings = (part.to(device) for part in feed(next(counter)))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                train_step(unet, optimizer, pipeline.scheduler, latents, embeddings)
        speeds[name].append(BATCH * steps / (now() - begin))
    cached, uncached = (statistics.median(speeds[name][1:]) for name in ("cached", "uncached"))  # the first warms up
    suffix = "" if dtype == torch.float32 else "_bfloat16"
    return {
        f"images_per_second_cached{suffix}": cached,
        f"images_per_second_uncached{suffix}": uncached,
        f"speedup_cached{suffix}": cached / uncached,
    }


def train_step(
    unet: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    scheduler: DDIMScheduler,
    latents: Tensor,
    embeddings: Tensor,
) -> None:
    """What both orders of work have in common."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (len(latents),), device=latents.device)
    diffusion_loss(unet, scheduler, latents, noise, timesteps, embeddings).mean().backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processes_against_one(dataset: Path, folder: Path, steps: int) -> dict[str, float]:
    """Images a second of two processes of half the batch, a thread each, against one process of one and of two."""
    speed = {
        name: images_per_second(dataset, folder / name, steps, processes, threads)
        for name, processes, threads in (("one_thread", 1, 1), ("one_process", 1, 2), ("two_processes", 2, 1))
    }
    return {f"images_per_second_{name}": value for name, value in speed.items()} | {
        "speedup_two_processes": speed["two_processes"] / speed["one_thread"],
        "speedup_two_processes_of_same_cores": speed["two_processes"] / speed["one_process"],
    }


def bfloat16_against_float32(dataset: Path, folder: Path, steps: int) -> dict[str, float]:
    """Images a second of whole runs on two cores, in turns: one process of two threads, and two of one in bfloat16."""
    ways: dict[str, tuple[int, int, Literal["no", "bf16"]]] = {
        "float32_run": (1, 2, "no"), "bfloat16_run": (1, 2, "bf16"), "two_bfloat16_processes_run": (2, 1, "bf16"),
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn, (name, way) in itertools.product(range(TURNS), ways.items()):
        speeds[name].append(images_per_second(dataset, folder / f"{name}-{turn}", steps, *way))
    first = speeds["float32_run"]
    ratios = {
        f"speedup_{name}": statistics.median(new / old for old, new in zip(first, found, strict=True))
        for name, found in speeds.items()
        if found is not first
    }
    return {f"images_per_second_{name}": statistics.median(found) for name, found in speeds.items()} | ratios


def images_per_second(
    dataset: Path, output: Path, steps: int, processes: int, threads: int, precision: Literal["no", "bf16"] = "no"
) -> float:
    """The median of the log of a run with a global batch of 16."""
    config = FinetuneConfig(
        dataset=str(dataset), output=str(output), batch_size=2 * BATCH // processes, steps=steps,
        validation_every=10**6, sample_every=10**6, checkpoint_every=10**6, mixed_precision=precision,
        cache=str(output.parent / f"shared-{precision}"),
    )  # fmt: skip
    finish(start(config, processes, threads))
    return float(read_log(config.output)["images_per_second"].median())


def start(config: FinetuneConfig, processes: int, threads: int = 1) -> subprocess.Popen[bytes]:
    """`torchrun`, on the CPU."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, "-m", "prism_lib.training.finetuning", str(save_config(config))]
    environment = {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(paths.root())}
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)


def kill_9(process: subprocess.Popen[bytes]) -> None:
    """The launcher and every process that it started, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait, and fail if it failed."""
    if process.wait() != 0:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")


def killed_against_whole(dataset: Path, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """Largest difference of weights, averages, optimizer state and losses after kill -9 at the first checkpoint."""
    found = {}
    for processes, rank in ((1, 0), (1, 4), (2, 0), (2, 4)):
        name = f"{'lora' if rank else 'unet'}_{processes}"
        whole = FinetuneConfig(
            dataset=str(dataset), output=str(folder / f"whole_{name}"), batch_size=3, steps=steps, lora_rank=rank,
            checkpoint_every=5, validation_every=5, sample_every=10**6, learning_rate=1e-4, warmup=2,
            cache=str(folder / "shared"),
        )  # fmt: skip
        finish(start(whole, processes))
        killed = replace(whole, output=str(folder / f"killed_{name}"))
        process = start(killed, processes)
        while not list(Path(killed.output).glob("step-*")):
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
            time.sleep(0.01)
        kill_9(process)
        killed_at = max(int(path.name.removeprefix("step-")) for path in Path(killed.output).glob("step-*"))
        finish(start(killed, processes))
        found[name] = difference(Path(whole.output), Path(killed.output)) | {"resumed_at_step": float(killed_at)}
    return found


def difference(first: Path, second: Path) -> dict[str, float]:
    """The largest absolute difference of each kind of state."""
    newest = [sorted(folder.glob("step-*"))[-1] for folder in (first, second)]
    worst = {}
    for name in ("unet", "ema", "optimizer"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in newest)
        if one.keys() != other.keys():
            raise RuntimeError(f"{name} of {first} and {second} have different tensors")
        worst[f"{name}_difference"] = max(float((one[key] - other[key]).abs().max()) for key in one)
    logs = [read_log(folder).drop(columns="images_per_second") for folder in (first, second)]
    return worst | {"loss_difference": float((logs[0] - logs[1]).abs().max().max())}


if __name__ == "__main__":
    main()
