"""From scratch: textures, the autoencoder's recipe and normalisation, the small CLIP."""

from dataclasses import replace

import pytest
import torch

from prism_lib.models.pipeline import (
    build_pipeline,
    decode_latents,
    encode_images,
    encode_prompts,
    load_pipeline,
)
from prism_lib.training import autoencoder
from prism_lib.training.clip import ClipConfig
from tests.tiny import tiny_config, tiny_images

TINY_VAE = autoencoder.VaeConfig(
    steps=4, batch_size=2, crop=16, image_size=32, phantoms=32, textures=8, warmup=1, checkpoint_every=2
)
TINY_CLIP = ClipConfig(steps=2, batch_size=4, image_size=32, patch_size=16, vision_width=32, vision_layers=1)


def test_textures_follow_their_generator():
    one, same, other = (autoencoder.textures(3, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (3, 1, 64, 64) and one.min() >= 0 and one.max() <= 1
    assert (one.std((1, 2, 3)) > 0.02).all()


def test_normalising_latents_changes_their_scale_and_no_reconstruction():
    vae = build_pipeline(tiny_config(), seed=3).vae.eval()
    images = tiny_images(6)
    before = decode_latents(vae, encode_images(vae, images))
    autoencoder.normalise_latents(vae, images)
    latents = encode_images(vae, images)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    after = decode_latents(vae, latents)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


def test_normalising_latents_scales_the_posterior_too():
    vae = build_pipeline(tiny_config(), seed=3).vae.eval()
    pixels = tiny_images(4).expand(-1, 3, -1, -1) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        relative = before.std / before.mean.std((0, 2, 3))[None, :, None, None]
        autoencoder.normalise_latents(vae, tiny_images(4))
        torch.testing.assert_close(vae.encode(pixels).latent_dist.std, relative, atol=1e-4, rtol=1e-3)


def test_a_resumed_autoencoder_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    def fresh():
        return build_pipeline(tiny_config(), seed=0).vae

    whole, resumed = fresh(), fresh()
    autoencoder.train_vae(whole, TINY_VAE, tmp_path / "whole")
    losses = autoencoder._vae_losses

    def stop(vae, batch, config, step):
        if step == 3:
            raise KeyboardInterrupt
        return losses(vae, batch, config, step)

    monkeypatch.setattr(autoencoder, "_vae_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.train_vae(resumed, TINY_VAE, tmp_path / "resumed")
    monkeypatch.setattr(autoencoder, "_vae_losses", losses)
    continued = fresh()
    autoencoder.train_vae(continued, TINY_VAE, tmp_path / "resumed")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, continued.state_dict()[key]), key
    with pytest.raises(ValueError, match="another configuration"):
        autoencoder.train_vae(fresh(), replace(TINY_VAE, seed=1), tmp_path / "whole")


def test_from_scratch_to_a_pipeline_folder(phantom_folder, tmp_path):
    parts = tiny_config(), TINY_VAE, TINY_VAE, TINY_CLIP
    config = autoencoder.PretrainConfig(str(phantom_folder), str(tmp_path), *parts)
    folder = autoencoder.pretrain(config)
    pipeline = load_pipeline(folder)
    untrained = build_pipeline(tiny_config(), 0)
    text = ["chest x-ray with cardiomegaly"]
    assert not torch.equal(encode_prompts(pipeline, text), encode_prompts(untrained, text))
    assert (tmp_path / "clip" / "model.safetensors").is_file()
    trained = build_pipeline(tiny_config(), 0).vae
    autoencoder.train_vae(trained, TINY_VAE, tmp_path / "vae")  # what it was before the decoder went on
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, trained.encoder.conv_in.weight)
    assert not torch.equal(pipeline.vae.decoder.conv_in.weight, trained.decoder.conv_in.weight)
    assert autoencoder.start_from("scratch", config) == str(folder)
    assert autoencoder.start_from("phantom-sd", config) == "phantom-sd"


def test_psnr_of_a_perfect_and_a_known_error():
    class Identity:
        config = type("Config", (), {"in_channels": 3})
        device = torch.device("cpu")

        def __init__(self, error):
            self.error = error

        def encode(self, pixels):
            return type("E", (), {"latent_dist": type("D", (), {"mean": pixels})})

        def decode(self, latents):
            return type("O", (), {"sample": latents + self.error})

    for images in (
        torch.full((2, 1, 8, 8), 0.5),
        torch.tensor([0.2, 0.5, 0.8])[None, :, None, None].expand(2, 3, 8, 8),
    ):
        psnr = autoencoder.reconstruction_psnr(Identity(0.2), images)  # 0.2 of [-1, 1] is 0.1 of [0, 1]
        torch.testing.assert_close(psnr, torch.full((2,), 20.0), atol=1e-3, rtol=0)


def test_a_decoder_learns_alone(tmp_path):
    vae = build_pipeline(tiny_config(), seed=0).vae
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    autoencoder.train_vae(vae, replace(TINY_VAE, decoder_only=True), tmp_path)
    changed = {key.split(".")[0] for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_crops_of_corners_stand_upright():
    patients = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    patients[..., 2, 28:] = 255  # a line in the upper right corner, which a turn would put upright
    config = replace(TINY_VAE, batch_size=64, corner_share=1.0)
    crops = autoencoder._vae_batch((patients, patients), config, 0)[::2, 0]
    with_line = crops[crops.amax((1, 2)) > 0]
    assert 0 < len(with_line) < len(crops)
    assert (with_line[:, 2, 12:] > with_line[:, 8, 12:]).all()
