"""A complete Stable Diffusion of some ten thousand weights, and prompts to edit with: shared by the tests."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import cache

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib import models
from prism_lib.prompts import PromptPair

SOURCE = "chest x-ray with cardiomegaly, with support devices"
TARGET = "chest x-ray with cardiomegaly, without support devices"
REMOVE = PromptPair(SOURCE, TARGET, ("support devices",), ("support devices",))
UNCHANGED = PromptPair(SOURCE, SOURCE, ("support devices",), ("support devices",))


@cache
def tiny_pipeline(prediction_type: str = "epsilon", double: bool = False) -> StableDiffusionPipeline:
    """The tiny pipeline; tests must leave it as they found it. `double` computes in float64."""
    config = replace(models.tiny_config(), prediction_type=prediction_type)
    letters = " ".join(string.ascii_lowercase)  # so that words which were never seen have tokens too
    pipe = models.build_pipeline(config, seed=0, captions=[SOURCE, TARGET, "pleural effusion", letters])
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    if double:
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.double()
    return pipe


def tiny_images(count: int, channels: int = 1, size: int = 32) -> Tensor:
    """Seeded random images in [0, 1]."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))
