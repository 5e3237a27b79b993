"""Inversion: the stored trajectory, its way back, and what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import check_finite, invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import EditConfig
from prism_lib.language.edits import PromptPair
from prism_lib.models.pipeline import decode_latents, encode_images, encode_prompts
from tests.tiny import SOURCE, TARGET, UNCHANGED, tiny_images, tiny_pipeline

STEPS = 5


def inverted(count=2, method="direct", **settings):
    prompts = [SOURCE, TARGET, SOURCE, TARGET][:count]
    return invert(tiny_pipeline(), tiny_images(4)[:count], prompts, method, STEPS, **settings)


def reconstructed(pipe, inversion):
    """The sources as an edit that changes nothing gives them back."""
    pairs = [PromptPair(prompt, prompt, (), ()) for prompt in inversion.prompts]
    return stack(edit(pipe, inversion, pairs), "reconstruction")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_trajectory_equals_diffusers_inverse_scheduler(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    images, prompts = tiny_images(2), [SOURCE, TARGET]
    inversion = invert(pipe, images, prompts, "direct", STEPS)
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
    torch.testing.assert_close(reconstructed(pipe, inversion), expected, atol=1e-6, rtol=0)


def test_ddim_walks_the_same_way_up_but_does_not_find_back_exactly():
    pipe, direct, ddim = tiny_pipeline(), inverted(), inverted(method="ddim")
    assert torch.equal(direct.latents, ddim.latents)
    assert (reconstructed(pipe, direct) - reconstructed(pipe, ddim)).abs().max() > 1e-6


@pytest.mark.parametrize("method", ["direct", "edit_friendly"])
def test_an_exact_method_edits_nothing_into_something_else(method):
    """An unchanged edit walks the target's own way down and ends at the clean latents."""
    pipe, found = tiny_pipeline(double=True), []
    inversion = invert(pipe, tiny_images(1), [SOURCE], method, STEPS)
    inversion = replace(inversion, latents=inversion.latents.double())
    edit(pipe, inversion, [UNCHANGED], EditConfig(), callback=lambda i, t, x: found.append(x))
    torch.testing.assert_close(found[-1], inversion.latents[0], atol=1e-4, rtol=0)


def plain_null_text(pipe, trajectory, config):
    """Mokady et al.'s loop as published: one image, the conditional prediction made anew to advance."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    text, embeds = encode_prompts(pipe, [SOURCE]), encode_prompts(pipe, [""])
    sample, latents = trajectory[-1], [trajectory[-1]]

    def below(embeds, conditional, t):
        noise = pipe.unet(sample, t, encoder_hidden_states=embeds).sample
        return scheduler.step(noise + config.guidance_scale * (conditional - noise), int(t), sample).prev_sample

    for i, t in enumerate(scheduler.timesteps):
        embeds = embeds.clone().detach().requires_grad_()
        optimizer = torch.optim.Adam([embeds], lr=config.learning_rate * (1 - i / (2 * STEPS)))
        with torch.no_grad():
            conditional = pipe.unet(sample, t, encoder_hidden_states=text).sample
        for _ in range(config.inner_steps):
            loss = torch.nn.functional.mse_loss(below(embeds, conditional, t), trajectory[STEPS - i - 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < config.threshold + i * 2e-5:
                break
        with torch.no_grad():
            sample = below(embeds, conditional, t)
        latents.insert(0, sample)
    return torch.stack(latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_null_text_in_a_batch_equals_the_published_loop(prediction_type):
    pipe, config = tiny_pipeline(prediction_type), InversionConfig(guidance_scale=3.0, inner_steps=3)
    together = invert(pipe, tiny_images(2), [SOURCE] * 2, "null_text", STEPS, config=config)
    plain = invert(pipe, tiny_images(2), [SOURCE] * 2, "direct", STEPS)
    for n in range(2):
        alone = plain_null_text(pipe, plain.latents[:, n : n + 1], config)
        torch.testing.assert_close(together.latents[:, n : n + 1], alone, atol=1e-4, rtol=1e-4)


def test_null_text_evaluates_an_image_only_until_it_has_met_its_threshold():
    pipe, images = tiny_pipeline(), tiny_images(2)
    config = InversionConfig(guidance_scale=3.0, inner_steps=6, threshold=0.0)

    def evaluations(*chosen, threshold):
        rows = []
        with evaluated(pipe, rows):
            some = images[list(chosen)]
            invert(pipe, some, [SOURCE] * len(some), "null_text", STEPS, config=replace(config, threshold=threshold))
        return sum(rows)

    alone = [evaluations(n, threshold=1.0) for n in range(2)]
    assert alone[0] != alone[1]  # one is done sooner, and would be carried along
    assert evaluations(0, 1, threshold=1.0) == sum(alone) < 2 * evaluations(0, threshold=0.0)


@contextmanager
def evaluated(pipe, rows):
    """The rows of every U-Net call inside the block."""
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield
    finally:
        handle.remove()


def test_edit_friendly_noise_is_the_images_own_and_drawn_from_the_seed():
    alone, together = inverted(1, method="edit_friendly"), inverted(2, method="edit_friendly")
    other = inverted(1, method="edit_friendly", config=InversionConfig(seed=1))
    torch.testing.assert_close(alone.latents[:, 0], together.latents[:, 0], atol=1e-5, rtol=0)
    assert (alone.latents[1:] - other.latents[1:]).abs().max() > 0.01


def test_latents_that_are_not_finite_stop_with_step_and_image():
    finite = torch.ones(3, 2, dtype=torch.bool)
    finite[2, 1] = False
    with pytest.raises(FloatingPointError, match="image 5 are not finite after step 2"):
        check_finite(finite, [4, 5], "editing")


@pytest.mark.parametrize(("name", "value"), [("inner_steps", 0), ("skip", 1.0), ("learning_rate", float("nan"))])
def test_a_setting_of_a_method_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\S* is .*: "):
        InversionConfig(**{name: value})


@pytest.mark.parametrize("method", ["direct", "null_text"])
def test_an_image_does_not_depend_on_its_batch(method):
    """In double precision: an untrained model amplifies the rounding of batched float32 kernels."""
    pipe, few = tiny_pipeline(double=True), InversionConfig(inner_steps=2)
    together, alone = (
        invert(pipe, tiny_images(4), [SOURCE, TARGET] * 2, method, STEPS, config=few, batch_size=size)
        for size in (4, 1)
    )
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
    assert reconstructed(pipe, inversion).shape == images.shape


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
        ({"method": "magic"}, "unknown inversion method 'magic'; known: edit_friendly, direct"),
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
