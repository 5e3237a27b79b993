"""Editing on U-Nets shaped like the published families: SD 1.x, and SD 2.x with all that differs there."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from prism_lib.editing import attention
from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.models.pipeline import PipelineConfig, build_pipeline, decode_latents
from tests.editing.test_counterfactuals import reference_edit
from tests.tiny import REMOVE, SOURCE, TARGET, UNCHANGED, tiny_images

STEPS, SIZE = 5, 96  # latents of 48 x 48, which halve to 24 x 24 and 12 x 12
FAMILIES = {
    "sd1": {"attention_head_dim": 2, "use_linear_projection": False},
    "sd2": {"attention_head_dim": (1, 2, 4), "use_linear_projection": True},
}
CONFIG = EditConfig(guidance_scale=5.0, cross_replace_steps=0.6, self_replace_steps=0.4)


@cache
def pipeline(family):
    """In double precision, so that only a difference of method could show; the two differ as SD 1.x and 2.x do."""
    config = PipelineConfig(
        image_size=SIZE, vae_channels=(8, 8), text_width=24 if family == "sd2" else 16, text_layers=2,
        attention_heads=2, vocab_size=600, prediction_type="v_prediction" if family == "sd2" else "epsilon",
        unet_channels=(8, 8), unet_attention=(True, True),
    )  # fmt: skip
    letters = " ".join(string.ascii_lowercase)
    pipe = build_pipeline(config, seed=0, captions=[SOURCE, TARGET, letters])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(8, 8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=config.text_width,
            norm_num_groups=4,
            **FAMILIES[family],
        )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval().double()
    return pipe


@cache
def inverted(family, pair):
    inversion = invert(pipeline(family), tiny_images(1, size=SIZE), [pair.source], "direct", STEPS)
    assert inversion.latents.shape[-2:] == (48, 48)
    return replace(inversion, latents=inversion.latents.double())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_has_what_it_is_named_for(family):
    pipe = pipeline(family)
    attention = [m for m in pipe.unet.modules() if type(m).__name__ == "Transformer2DModel"]
    linear = {isinstance(m.proj_in, torch.nn.Linear) for m in attention}
    heads = {m.transformer_blocks[0].attn1.heads for m in attention}
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert (linear, len(heads) > 1) == (({True}, True) if family == "sd2" else ({False}, False))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_without_change_returns_the_reconstruction(family):
    pipe, inversion, latents = pipeline(family), inverted(family, UNCHANGED), []
    (result,) = edit(pipe, inversion, [UNCHANGED], CONFIG, callback=lambda i, t, x: latents.append(x))
    torch.testing.assert_close(torch.stack(latents), inversion.latents[:-1].flip(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(result.raw, decode_latents(pipe.vae, inversion.latents[0])[0], atol=5e-4, rtol=0)
    assert torch.equal(result.image, inversion.images[0])
    assert not result.mask.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_edit_equals_full_maps(family, monkeypatch):
    monkeypatch.setattr(attention, "SELF_MAX_TOKENS", 24 * 24)
    pipe, inversion, fast = pipeline(family), inverted(family, REMOVE), []
    config = replace(CONFIG, negative="empty", correct_drift=False, confine=0.0, word_weight=2.0)
    edit(pipe, inversion, [REMOVE], config, callback=lambda i, t, latents: fast.append(latents))
    with torch.no_grad():
        slow = list(reference_edit(pipe, inversion, REMOVE, config))
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert (fast[-1] - inversion.latents[0]).abs().max() > 1e-2
