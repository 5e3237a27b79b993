"""Inversions on disk: one safetensors file each, which says what it was made of and opens for nothing else.

An inversion belongs to its images, prompts, model, schedule and method; edited with any other it gives a wrong picture
and no error. So all of these are in the file's header, hashed where they are large, and are compared before a tensor is
read. Images are not stored: whoever edits has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_lib.editing.inversion import Inversion
from prism_lib.editing.inversion_config import InversionConfig
from prism_lib.files import image_hash, model_hash
from prism_lib.models.schedule import Schedule
from prism_lib.training.checkpoints import write_tensors

_USUAL = InversionConfig()
_HEADER = "inversion"
_LATENTS, _EMBEDS = "latents", "negative_embeds"
_SHORT = 60  # characters of a value that an error still quotes


def save_inversion(path: str | Path, inversion: Inversion, pipe: StableDiffusionPipeline) -> Path:
    """Write an inversion made by `pipe`, whole or not at all; OSError says where it failed and what space is left.

    ValueError if the inversion follows another schedule than the pipeline's.
    """
    if inversion.schedule != Schedule.from_config(pipe.scheduler.config, inversion.schedule.num_steps):
        raise ValueError("the inversion follows another schedule than this pipeline: it was made by another model")
    path = Path(path)
    tensors = {_LATENTS: inversion.latents}
    if inversion.negative_embeds is not None:
        tensors[_EMBEDS] = inversion.negative_embeds
    key = _key(pipe, inversion.images, inversion.prompts, inversion.method, inversion.schedule, inversion.config)
    write_tensors(path, tensors, {_HEADER: json.dumps(key)})
    return path


def load_inversion(
    path: str | Path,
    pipe: StableDiffusionPipeline,
    images: Tensor,
    prompts: Sequence[str],
    method: str = "direct",
    num_inference_steps: int = 50,
    *,
    config: InversionConfig = _USUAL,
) -> Inversion:
    """The saved inversion of exactly these images (N, C, H, W); the arguments are those of `invert`.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, no inversion, or of other
    images, prompts, weights or settings: it names what differs.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, got {prompts!r}")
    schedule = Schedule.from_config(pipe.scheduler.config, num_inference_steps)
    expected = _key(pipe, images, prompts, method, schedule, config)
    try:
        with safe_open(path, framework="pt") as file:
            _check_key(path, (file.metadata() or {}).get(_HEADER), expected)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no inversion: {error}") from None
    latents, embeds = tensors[_LATENTS].to(pipe.device), tensors.get(_EMBEDS)
    return Inversion(
        images, tuple(prompts), latents, schedule, method, config, None if embeds is None else embeds.to(pipe.device)
    )


def _key(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    prompts: Sequence[str],
    method: str,
    schedule: Schedule,
    config: InversionConfig,
) -> dict[str, Any]:
    """All that an inversion depends on, by name, as JSON gives it back."""
    key = {
        "method": method,
        "num_inference_steps": schedule.num_steps,
        "settings": asdict(config),
        "prompts": list(prompts),
        "tokens": pipe.tokenizer(list(prompts)).input_ids,
        "images": [image_hash(image) for image in images],
        "shape": list(images.shape),
        "scheduler": asdict(schedule),
        "unet": model_hash(pipe.unet),
        "vae": model_hash(pipe.vae),
        "text_encoder": model_hash(pipe.text_encoder),
    }
    normal: dict[str, Any] = json.loads(json.dumps(key))
    return normal


def _check_key(path: str | Path, header: str | None, expected: Mapping[str, Any]) -> None:
    if header is None:
        raise ValueError(f"{path} is no saved inversion")
    found = json.loads(header)
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        raise ValueError(
            f"{path} is the inversion of something else: {', '.join(differing)} differ"
            f"{_difference(differing[0], found.get(differing[0]), expected[differing[0]])}; invert again"
        )


def _difference(name: str, found: Any, expected: Any) -> str:
    """The first value that differs, where it is short enough to be read."""
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(n for n, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
        name, found, expected = f"{name} {place}", found[place], expected[place]
    if isinstance(found, dict) and isinstance(expected, dict):
        name = next(key for key in expected if found.get(key) != expected[key])
        found, expected = found.get(name), expected[name]
    quoted = max(len(repr(found)), len(repr(expected))) <= _SHORT
    return f" ({name}: {found!r}, not {expected!r})" if quoted else f" (first: {name})"
