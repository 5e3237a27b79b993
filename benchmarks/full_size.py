"""How fast a GPU edits and trains at SD v1.5's size: `python -m benchmarks.full_size`.

It writes figures/phantom/full_size.json: a pipeline of that size with random weights, on 512 x 512; counterfactuals
(direct inversion of 50 steps and one edit, in bfloat16, by batch size, plain and with compiled blocks) and fine-tuning
steps (under bfloat16 autocast, fed from the cache and by the frozen parts). `share_of_peak` is of an H100's dense
bfloat16 rate, which is an H200's too. Pictures of random weights mean nothing, but cost what others cost. `--size tiny`
is a trial that a CPU can do as well; its numbers go to a folder of their own.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.editing import EDIT, SEED, Cases, counted
from prism_lib import paths, records
from prism_lib.editing.counterfactuals import sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.language.edits import PromptPair
from prism_lib.models import (
    PipelineConfig,
    build_pipeline,
    compile_blocks,
    encode_images,
    encode_prompts,
    image_factor,
)
from prism_lib.training import diffusion_loss

SD_V1_5 = PipelineConfig(
    image_size=512,
    vae_channels=(128, 256, 512, 512),
    unet_channels=(320, 640, 1280, 1280),
    unet_attention=(True, True, True, False),
    unet_layers=2,
    text_width=768,
    text_layers=12,
    attention_heads=8,
)
TINY = PipelineConfig(
    image_size=32,
    vae_channels=(8, 8),
    unet_channels=(8, 16),
    unet_attention=(True, True),
    text_layers=2,
    vocab_size=600,
)
H100_BF16 = 989e12  # dense multiply-adds count as two


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny is a trial of seconds")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--edited", type=int, nargs="+", default=[1, 4, 16], help="batch sizes of edits")
    parser.add_argument("--trained", type=int, nargs="+", default=[8, 32], help="batch sizes of training")
    given = parser.parse_args()
    tiny = given.size == "tiny"
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cpu" and not tiny:
        parser.error("a model of this size needs a GPU; --size tiny does not")
    config = TINY if tiny else SD_V1_5
    with records.Timer() as timer:
        pipe = build_pipeline(config, SEED)
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.requires_grad_(False).eval().to(place, torch.bfloat16)
        for part in (pipe.vae, pipe.unet):
            part.to(memory_format=torch.channels_last)
        metrics: dict[str, Any] = {"training": training(pipe, given.trained), "editing": editing(pipe, given)}
        compile_blocks(pipe)
        metrics["editing_compiled"] = editing(pipe, given)
    records.record(
        "full_size",
        dataset="phantom",
        notebook="benchmarks/full_size.py",
        parameters={"num_inference_steps": given.steps, "edit": EDIT.key, "config": EditConfig(), "model": config},
        seed=SEED,
        metrics=metrics,
        figures_dir=paths.runs() / "benchmarks" if tiny else "",
        model="random weights",
        seconds=timer.seconds,
    )


def editing(pipe: StableDiffusionPipeline, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and memory of a counterfactual, autoencoder included, by batch size."""
    cases = Cases.draw(max(given.edited), pipe.unet.config.sample_size * image_factor(pipe.vae))
    operations, found = evaluation_flops(pipe), {}
    for batch in given.edited:
        images, pairs = cases.images[:batch], cases.pairs[:batch]
        one_edit(pipe, images, pairs, 2)  # compiles, and chooses kernels
        with counted(pipe) as rows:
            seconds, memory = measured(partial(one_edit, pipe, images, pairs, given.steps))
        found[f"batch_{batch}"] = {
            "seconds_per_counterfactual": seconds / batch,
            "unet_evaluations_per_counterfactual": sum(rows) / batch,
            "share_of_peak": sum(rows) * operations / seconds / H100_BF16,
            "peak_memory_gib": memory,
        }
    return found


def one_edit(pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], steps: int) -> None:
    """Inversion and one edit of every image, all in one batch."""
    inversion = invert(pipe, images, [pair.source for pair in pairs], "direct", steps, batch_size=len(images))
    sweep(pipe, inversion, pairs, [EditConfig(batch_size=len(images))])


def training(pipe: StableDiffusionPipeline, batches: Sequence[int], steps: int = 8) -> dict[str, dict[str, float]]:
    """Images a second of training steps, latents and embeddings cached or made in every step, by batch size."""
    unet = pipe.unet
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.float().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    operations, found = 3 * evaluation_flops(pipe), {}  # forward, and twice that backward
    size, tokens = unet.config.sample_size, pipe.tokenizer.model_max_length
    for batch in batches:
        latents = torch.randn(batch, unet.config.in_channels, size, size, device=unet.device)
        embeddings = torch.randn(batch, tokens, unet.config.cross_attention_dim, device=unet.device)
        pixels = torch.rand(batch, 1, *[size * image_factor(pipe.vae)] * 2)

        def cached(latents: Tensor = latents, embeddings: Tensor = embeddings) -> None:
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (len(latents),), device=latents.device)
            with torch.autocast(latents.device.type, torch.bfloat16):
                losses = diffusion_loss(unet, pipe.scheduler, latents, noise, timesteps, embeddings)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def uncached(pixels: Tensor = pixels) -> None:
            cached(encode_images(pipe.vae, pixels).float(), encode_prompts(pipe, [""] * len(pixels)).float())

        speed = {}
        for name, step in (("uncached", uncached), ("cached", cached)):
            repeat(step, 3)
            seconds, memory = measured(partial(repeat, step, steps))
            speed[name] = batch * steps / seconds
        found[f"batch_{batch}"] = {
            "images_per_second_cached": speed["cached"],
            "images_per_second_uncached": speed["uncached"],
            "speedup_cached": speed["cached"] / speed["uncached"],
            "share_of_peak": speed["cached"] * operations / H100_BF16,
            "peak_memory_gib": memory,
        }
    unet.to(torch.bfloat16).eval().requires_grad_(False).load_state_dict(state)
    return found


def repeat(work: Callable[[], None], times: int) -> None:
    """The same again and again."""
    for _ in range(times):
        work()


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of some work, and the GPU's peak memory in GiB (0 on a CPU)."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0


def evaluation_flops(pipe: StableDiffusionPipeline) -> float:
    """Floating-point operations of one U-Net evaluation."""
    config, place = pipe.unet.config, {"device": pipe.unet.device, "dtype": pipe.unet.dtype}
    sample = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, **place)
    text = torch.randn(1, pipe.tokenizer.model_max_length, config.cross_attention_dim, **place)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(sample, 500, encoder_hidden_states=text)
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
