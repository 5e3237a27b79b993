"""Inversion: the stored trajectory, its way back, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler
from tiny import SOURCE, TARGET, tiny_images, tiny_pipeline

from prism_lib.inversion import invert
from prism_lib.models import decode_latents, encode_images, encode_prompts

STEPS = 5


def inverted(count=2, **settings):
    prompts = [SOURCE, TARGET, SOURCE, TARGET][:count]
    return invert(tiny_pipeline(), tiny_images(4)[:count], prompts, num_inference_steps=STEPS, **settings)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_trajectory_equals_diffusers_inverse_scheduler(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    images, prompts = tiny_images(2), [SOURCE, TARGET]
    inversion = invert(pipe, images, prompts, num_inference_steps=STEPS)
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    embeds, latents = encode_prompts(pipe, prompts), encode_images(pipe.vae, images)
    torch.testing.assert_close(inversion.latents[0], latents)
    with torch.no_grad():
        for level, t in enumerate(scheduler.timesteps, start=1):
            noise = pipe.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = scheduler.step(noise, int(t), latents).prev_sample
            torch.testing.assert_close(inversion.latents[level], latents, atol=1e-5, rtol=1e-5)


def test_direct_inversion_reconstructs_the_autoencoders_round_trip_exactly():
    pipe, inversion = tiny_pipeline(), inverted()
    expected = decode_latents(pipe.vae, encode_images(pipe.vae, inversion.images), 1)
    torch.testing.assert_close(inversion.reconstruct(pipe), expected, atol=1e-6, rtol=0)
    error = (expected - inversion.images).abs().mean((1, 2, 3))
    torch.testing.assert_close(inversion.reconstruction_error(pipe), error, atol=1e-6, rtol=0)


def test_ddim_walks_the_same_way_up_but_does_not_find_back_exactly():
    pipe, direct, ddim = tiny_pipeline(), inverted(), inverted(method="ddim")
    assert torch.equal(direct.latents, ddim.latents)
    assert (direct.reconstruct(pipe) - ddim.reconstruct(pipe)).abs().max() > 1e-6
    assert ddim.reconstruct(pipe).shape == ddim.images.shape


def test_an_image_does_not_depend_on_its_batch():
    together, alone = inverted(4, batch_size=4), inverted(4, batch_size=1)
    torch.testing.assert_close(together.latents, alone.latents, atol=1e-5, rtol=0)


def test_a_slice_is_the_inversion_of_some_images():
    whole = inverted(4)
    part = whole[1:3]
    assert len(part) == 2
    assert part.prompts == whole.prompts[1:3]
    assert torch.equal(part.latents, whole.latents[:, 1:3])


def test_colour_and_oblong_images():
    pipe = tiny_pipeline()
    images = tiny_images(1, channels=3, size=48)[:, :, :32]
    inversion = invert(pipe, images, [SOURCE], num_inference_steps=2)
    assert inversion.latents.shape == (3, 1, 4, 16, 24)
    assert inversion.reconstruct(pipe).shape == images.shape


def test_the_callback_sees_every_step_and_may_cancel():
    steps = []

    def cancel(index, timestep, latents):
        steps.append((index, timestep, tuple(latents.shape)))
        if index == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        inverted(callback=cancel)
    assert steps == [(n, 1 + 200 * n, (2, 4, 16, 16)) for n in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown inversion method 'magic'; known: direct, ddim"),
        ({"prompts": [SOURCE]}, "2 images need as many prompts"),
        ({"prompts": SOURCE}, "2 images need as many prompts"),
        ({"prompts": ["with " * 100] * 2}, "tokens"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"images": torch.zeros(0, 1, 32, 32), "prompts": []}, "no image"),
        ({"images": torch.zeros(2, 32, 32)}, "shape"),
        ({"images": torch.zeros(2, 1, 33, 32)}, "multiple"),
        ({"images": torch.zeros(2, 1, 32, 32, dtype=torch.uint8)}, "floating point"),
        ({"images": torch.full((2, 1, 32, 32), float("nan"))}, "NaN"),
        ({"images": torch.full((2, 1, 32, 32), 255.0)}, r"\[0, 1\]"),
        ({"images": torch.full((2, 1, 32, 32), -0.1)}, r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"images": tiny_images(2), "prompts": [SOURCE] * 2, "num_inference_steps": 2} | change
    with pytest.raises(ValueError, match=message):
        invert(tiny_pipeline(), **arguments)
