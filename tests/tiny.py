"""A complete Stable Diffusion of some ten thousand weights, and prompts to edit with: shared by the tests."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import cache

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from prism_lib.language.edits import PromptPair
from prism_lib.models.pipeline import PipelineConfig, build_pipeline

SOURCE = "chest x-ray with cardiomegaly, with support devices"
TARGET = "chest x-ray with cardiomegaly, without support devices"
REMOVE = PromptPair(SOURCE, TARGET, ("support devices",), ("support devices",))
UNCHANGED = PromptPair(SOURCE, SOURCE, ("support devices",), ("support devices",))


def tiny_config() -> PipelineConfig:
    """A few thousand parameters on 32-pixel images."""
    return PipelineConfig(
        image_size=32,
        vae_channels=(8, 8),
        unet_channels=(8, 16),
        unet_attention=(True, True),
        text_width=16,
        text_layers=2,
        attention_heads=2,
        vocab_size=600,
    )


@cache
def tiny_pipeline(prediction_type: str = "epsilon", double: bool = False) -> StableDiffusionPipeline:
    """The tiny pipeline; tests must leave it as they found it. `double` computes in float64."""
    config = replace(tiny_config(), prediction_type=prediction_type)
    letters = " ".join(string.ascii_lowercase)  # so that words which were never seen have tokens too
    pipe = build_pipeline(config, seed=0, captions=[SOURCE, TARGET, "pleural effusion", letters])
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    if double:
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.double()
    return pipe


def tiny_images(count: int, channels: int = 1, size: int = 32) -> Tensor:
    """Seeded random images in [0, 1]."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


SMALL_ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_model(seed: int = 0) -> CLIPModel:
    """An untrained CLIP of images of 16 pixels that reads the tiny pipeline's tokens."""
    text = tiny_pipeline().text_encoder.config.to_dict()
    vision = SMALL_ENCODER | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
