"""The lossless autoencoder."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from prism_lib.models import PipelineConfig, build_pipeline, decode_latents, encode_images, image_factor, load_pipeline
from prism_lib.models.pipeline import assembled
from prism_lib.models.wavelets import HaarAutoencoder

FILM = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "factor"), [((1, 4), 2), ((1, 4, 16), 4), ((1, 4, 16, 64), 8)])
def test_nothing_is_lost_and_energy_is_kept(channels, factor):
    vae = HaarAutoencoder(block_out_channels=channels, latent_channels=channels[-1], scaling_factor=3.0)
    assert image_factor(vae) == factor
    latents = encode_images(vae, FILM)
    assert latents.shape == (2, channels[-1], 64 // factor, 64 // factor)
    torch.testing.assert_close(decode_latents(vae, latents), FILM, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents.square().sum(), 9 * (2 * FILM - 1).square().sum())


def test_the_first_channel_is_the_mean_and_a_column_shows_in_one_cell():
    vae = HaarAutoencoder(scaling_factor=1.0)
    image = torch.full((1, 1, 16, 16), 0.5)
    image[..., 9] = 1
    latents = encode_images(vae, image)
    torch.testing.assert_close(latents[0, 0, :, 2], torch.ones(4))  # four of 16 pixels are 1, times the norm of 4
    assert latents[0, :, :, [0, 1, 3]].abs().max() < 1e-6


def test_colours_are_averaged():
    colour = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    vae = HaarAutoencoder()
    gray = colour.mean(1, keepdim=True)
    torch.testing.assert_close(decode_latents(vae, encode_images(vae, colour), 3), gray.expand(-1, 3, -1, -1))


def test_channels_that_are_no_transform_are_refused():
    with pytest.raises(ValueError, match=r"must be 1, 4, 16, \.\.\.; got \(1, 8\)"):
        HaarAutoencoder(block_out_channels=(1, 8))


def test_a_pipeline_with_it_is_saved_and_loaded_without_a_warning(tmp_path, caplog):
    tiny = build_pipeline(
        PipelineConfig(64, latent_channels=16, unet_channels=(16, 16), unet_attention=(False, True)), 0
    )
    pipe = assembled(HaarAutoencoder(sample_size=64), tiny.text_encoder, tiny.tokenizer, tiny.unet, tiny.scheduler)
    pipe.save_pretrained(tmp_path)
    kind = json.loads((tmp_path / "model_index.json").read_text())["vae"]
    assert kind == ["prism_lib.models.wavelets", "HaarAutoencoder"]
    loaded = load_pipeline(tmp_path, device="cpu")
    assert isinstance(loaded.vae, HaarAutoencoder) and isinstance(loaded.vae, AutoencoderKL)
    torch.testing.assert_close(decode_latents(loaded.vae, encode_images(loaded.vae, FILM)), FILM, rtol=0, atol=1e-6)
    half = load_pipeline(tmp_path, "bf16", device="cpu")
    torch.testing.assert_close(decode_latents(half.vae, encode_images(half.vae, FILM)), FILM, rtol=0, atol=1e-6)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
