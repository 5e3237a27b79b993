"""How a fine-tuning run is watched: its log, its curves, and text-to-image samples."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from prism_lib.data.folder import load_table
from prism_lib.models.pipeline import decode_latents, encode_prompts, load_pipeline


class JsonlTracker(GeneralTracker):
    """An accelerate tracker that appends one JSON object per call to a file: no network, nothing to install."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, step: int) -> None:
        """Continue ``path`` after ``step``: rows beyond it, of a run that was killed, will be written again."""
        super().__init__()
        self.path = path
        if path.is_file():
            kept = [json.dumps(row) for row in _rows(path) if row["step"] <= step]
            partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)

    @property
    def tracker(self) -> Path:
        """What accelerate calls the run."""
        return self.path

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Append ``values``."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_log(output: str | Path) -> pd.DataFrame:
    """A run's log as one table, a row per step: loss, validation_loss, and validation_loss per bin of timesteps."""
    path = Path(output) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no run has logged there")
    return pd.DataFrame(_rows(path)).groupby("step", as_index=False).last()


def curve(log: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of a log, for a plot."""
    rows = log.dropna(subset=[column])
    return rows["step"].tolist(), rows[column].tolist()


def curves_by_timestep(log: pd.DataFrame) -> dict[str, tuple[list[float], list[float]]]:
    """The validation loss of each bin of timesteps, named by its range; small timesteps are the fine detail."""
    prefix = "validation_loss_t"
    bins = [column for column in map(str, log.columns) if column.startswith(prefix)]
    return {f"t = {column.removeprefix(prefix).replace('_', ' to ')}": curve(log, column) for column in bins}


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
    embeddings = torch.cat([negative_prompt_embeds, prompt_embeds]).to(unet.dtype)
    for t in scheduler.timesteps:
        doubled = torch.cat([latents, latents]).to(unet.dtype)
        low, high = unet(doubled, t, encoder_hidden_states=embeddings).sample.to(latents).chunk(2)
        latents = scheduler.step(low + guidance_scale * (high - low), t, latents).prev_sample
    return decode_latents(pipeline.vae, latents)


@torch.no_grad()
def text_samples(
    pipeline_folder: str | Path, dataset: str | Path, count: int = 8, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Text-to-image samples (count, 1, H, W) for the first distinct captions of the validation split."""
    pipeline = load_pipeline(pipeline_folder)
    texts = load_table(dataset, "val")["text"].drop_duplicates().head(count).tolist()
    embeddings = encode_prompts(pipeline, [*texts, ""])
    empty = embeddings[-1:].expand(len(texts), -1, -1)
    return sample_images(pipeline, pipeline.unet, embeddings[:-1], empty, seed=seed).cpu(), texts
