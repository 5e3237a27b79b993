"""DDIM steps: against diffusers' schedulers, and against their own inverse."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, PNDMScheduler

from prism_lib.models.pipeline import ddim_scheduler
from prism_lib.models.schedule import Schedule, clean_and_noise, guided, step

PREDICTIONS = ("epsilon", "v_prediction")


def noise(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [50, 30, 7])
def test_steps_equal_diffusers_schedulers(prediction_type, steps):
    scheduler = ddim_scheduler(prediction_type)
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    inverse.set_timesteps(steps)
    schedule = Schedule.from_config(scheduler.config, steps)
    assert list(schedule.timesteps[:0:-1]) == scheduler.timesteps.tolist()
    for level in range(steps, 0, -1):
        sample, prediction, t = noise(level), noise(1000 + level), schedule.timesteps[level]
        down = scheduler.step(prediction, t, sample).prev_sample
        torch.testing.assert_close(step(schedule, sample, prediction, level), down, atol=2e-5, rtol=1e-5)
        up = inverse.step(prediction, t, sample).prev_sample
        torch.testing.assert_close(step(schedule, sample, prediction, level - 1, to=level), up, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("level", [1, 2, 25, 50])
def test_a_step_up_undoes_a_step_with_the_same_noise(level):
    schedule = Schedule.from_config(ddim_scheduler().config, 50)
    sample, prediction = noise(0, torch.float64), noise(1, torch.float64)
    there = step(schedule, sample, prediction, level)
    back = step(schedule, there, prediction, level - 1, to=level)
    torch.testing.assert_close(back, sample, atol=1e-13, rtol=0)
    assert (there - sample).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_clean_and_noise_recompose_the_sample(prediction_type):
    schedule = Schedule.from_config(ddim_scheduler(prediction_type).config, 50)
    sample = noise(0, torch.float64)
    clean, eps = clean_and_noise(schedule, sample, noise(1, torch.float64), 20)
    alpha = schedule.alphas[20]
    torch.testing.assert_close(alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps, sample, atol=1e-12, rtol=0)


def test_guidance_between_and_beyond_its_two_ends():
    low, high = noise(0), noise(1)
    torch.testing.assert_close(guided(low, high, 0.0), low)
    torch.testing.assert_close(guided(low, high, 1.0), high)
    torch.testing.assert_close(guided(low, high, 3.0), 3 * high - 2 * low)


def test_final_alpha_is_that_of_training_and_levels_are_bounded():
    scheduler = ddim_scheduler()
    schedule = Schedule.from_config(scheduler.config, 50)
    assert schedule.num_steps == 50
    assert schedule.alphas[0] == pytest.approx(float(scheduler.alphas_cumprod[0]))
    assert schedule.timesteps[-1] == 981
    with pytest.raises(ValueError, match="level 51 is outside"):
        step(schedule, noise(0), noise(1), 50, to=51)


def test_the_default_scheduler_of_sd_on_the_hub_gives_the_same_schedule():
    shared = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    hub = PNDMScheduler(**shared, skip_prk_steps=True, set_alpha_to_one=False)
    assert Schedule.from_config(hub.config, 50) == Schedule.from_config(ddim_scheduler().config, 50)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps is"):
        Schedule.from_config(ddim_scheduler().config, steps)


def test_more_steps_than_the_model_has_timesteps_are_refused():
    with pytest.raises(ValueError, match="timestep 1000"):
        Schedule.from_config(ddim_scheduler().config, 1000)


def test_an_unknown_prediction_type_is_refused():
    config = DDIMScheduler(prediction_type="sample").config
    with pytest.raises(ValueError, match=r"prediction_type is 'sample': .*'epsilon' or 'v_prediction'"):
        Schedule.from_config(config, 10)
