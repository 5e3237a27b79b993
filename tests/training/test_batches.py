"""What a step sees: every sample once per epoch, captions dropped as asked, the loss by hand."""

import time
from collections import Counter

import pytest
import torch

from prism_lib.models.pipeline import ddim_scheduler
from prism_lib.training.batches import (
    Order,
    balancing_weights,
    by_timestep,
    diffusion_loss,
    draw_batch,
    drawn_ahead,
    validation_draws,
)
from prism_lib.training.cache import Cache
from prism_lib.training.config import FinetuneConfig


def draws(batch_size, caption_dropout, **more):
    return FinetuneConfig("", "", batch_size=batch_size, caption_dropout=caption_dropout, **more)


def blank_cache(count, captions=1):
    return Cache(
        torch.zeros(count, 2, 1, 2, 2),
        torch.full((count, 1), captions - 1),
        torch.arange(captions).float()[:, None, None],
        tuple(f"{k}.png" for k in range(count)),
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [30, 31])
def test_every_sample_once_per_epoch(processes, count):
    cache, orders = blank_cache(count), [Order(count, 0, rank=rank, world=processes) for rank in range(processes)]
    steps = -(-2 * count // (4 * processes))
    seen = [
        row
        for micro in range(steps)
        for order in orders
        for row in draw_batch(cache, order, draws(4, 0.1), micro).rows.tolist()
    ]
    first, second = seen[:count], seen[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second, "each epoch has its own order"


def test_an_order_can_be_entered_anywhere():
    order = Order(7, seed=3)
    stream = order.rows(0, 30).tolist()
    for start in (29, 13, 6, 0):
        assert Order(7, seed=3).rows(start, 1).item() == stream[start]
        assert order.rows(start, 1).item() == stream[start]


def test_batches_drawn_ahead_by_threads_are_the_same():
    cache, config, count = blank_cache(7), draws(4, 0.1), 20  # many epochs, and batches across two of them
    here = [draw_batch(cache, Order(7, seed=3), config, k) for k in range(count)]
    order, asked = Order(7, seed=3), []

    def draw(number):
        asked.append(number)
        return draw_batch(cache, order, config, number)

    there = list(drawn_ahead(draw, range(5, count), threads=4))  # a run that goes on does not begin at 0
    for one, other in zip(here[5:], there, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.noise, other.noise)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.timesteps, other.timesteps)
    assert sorted(asked) == list(range(5, count)), "each once"


def test_few_batches_are_drawn_ahead_of_a_slow_step():
    drawn = []
    batches = drawn_ahead(lambda number: drawn.append(number) or number, range(1000), threads=2)
    assert next(batches) == 0
    time.sleep(0.2)
    assert len(drawn) <= 5, "one in use and two a thread"
    batches.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_what_fails_in_a_thread_is_raised_and_a_run_may_end_early(threads):
    def draw(number):
        if number == 3:
            raise OSError(f"cannot read {number}")
        return number

    with pytest.raises(OSError, match="cannot read 3"):
        list(drawn_ahead(draw, range(9), threads))
    early = drawn_ahead(draw, range(4, 99), threads)
    assert [next(early), next(early)] == [4, 5]
    early.close()


def test_balancing_draws_every_value_equally_often():
    values = torch.tensor([1.0] * 5 + [0.0] * 90 + [float("nan")] * 105)
    weights = balancing_weights(values)
    drawn = values[Order(len(values), 0, weights).rows(0, 6000)]
    counts = Counter("blank" if value != value else value for value in drawn.tolist())
    assert counts.keys() == {1.0, 0.0, "blank"}
    assert all(count == pytest.approx(2000, abs=200) for count in counts.values())


def test_timesteps_come_from_the_noisier_half_as_often_as_asked():
    cache, order = blank_cache(4), Order(4, 0)
    even, noisy = (draw_batch(cache, order, draws(4000, 0.1, noisy_share=x), 0) for x in (0.5, 0.85))
    for batch, share in ((even, 0.5), (noisy, 0.85)):
        assert (batch.timesteps >= 500).float().mean().item() == pytest.approx(share, abs=0.03)
        assert batch.timesteps.min() >= 0 and batch.timesteps.max() < 1000
        upper = batch.timesteps[batch.timesteps >= 500]
        assert (upper < 750).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(even.noise, noisy.noise)
    few = draw_batch(cache, order, draws(4000, 0.1), 0, num_timesteps=40)
    assert set(few.timesteps.tolist()) == set(range(40)), "of a model that knows no more"


def test_captions_are_dropped_as_often_as_asked():
    cache = blank_cache(4, captions=2)
    kept = draw_batch(cache, Order(4, 0), draws(2000, 0.25), 0).embeddings.mean()
    assert kept == pytest.approx(0.75, abs=0.03)


def test_processes_and_steps_draw_their_own_noise():
    cache, order, config = blank_cache(8), Order(8, 0, world=2), draws(2, 0.0)
    one = draw_batch(cache, order, config, 0)
    same = draw_batch(cache, order, config, 0)
    other = draw_batch(cache, Order(8, 0, rank=1, world=2), config, 0)
    later = draw_batch(cache, order, config, 1)
    assert torch.equal(one.noise, same.noise)
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.noise, later.noise)


def test_validation_is_the_same_every_time_and_covers_all_timesteps():
    cache = blank_cache(40)
    first, again = (validation_draws(cache, draws(4, 0.1), 20) for _ in range(2))
    assert len(first) == 5
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(first, again, strict=True))
    timesteps = torch.cat([draw.timesteps for draw in first])
    assert sorted(timesteps.tolist()) == list(range(25, 1000, 50))
    assert len(validation_draws(blank_cache(2), draws(4, 0.1), 128)) == 1


def test_losses_fall_into_their_bins():
    losses, timesteps = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 199, 999])
    assert by_timestep(losses, timesteps, 1000) == {"t0_199": 2.0, "t800_999": 5.0}


class Oracle:
    """A U-Net that predicts one thing, whatever it is shown."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, *_, **__):
        return type("Output", (), {"sample": self.prediction})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_prediction_and_min_snr_weights_it(prediction):
    scheduler = ddim_scheduler(prediction)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps = torch.tensor([10, 800])
    truth = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    args = (scheduler, latents, noise, timesteps, torch.zeros(2, 1, 1))
    assert torch.equal(diffusion_loss(Oracle(truth), *args), torch.zeros(2))
    assert torch.allclose(diffusion_loss(Oracle(truth + 1), *args), torch.ones(2), atol=1e-5)
    alpha = scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    assert torch.allclose(diffusion_loss(Oracle(truth + 1), *args, snr_gamma=5.0), expected, rtol=1e-4)
