"""The batches of training and its loss.

Everything random in a step (which images, which captions, noise, timesteps, dropout) is a function of (seed, step), so
a resumed run equals an uninterrupted one bit for bit, and the position inside an epoch needs no saving.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from prism_lib.data.folder import load_table
from prism_lib.files import stable_seed
from prism_lib.training.cache import Cache
from prism_lib.training.config import FinetuneConfig

Drawn = TypeVar("Drawn")
TIMESTEP_BINS = 5


def diffusion_loss(
    unet: UNet2DConditionModel,
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    embeddings: Tensor,
    snr_gamma: float = 0.0,
) -> Tensor:
    """Denoising loss per sample, (N,): squared error of epsilon or v (Ho et al. 2020; Salimans & Ho 2022).

    ``snr_gamma`` > 0 weights it by Min-SNR (Hang et al., ICCV 2023).
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    if snr_gamma > 0:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return loss


class Order:
    """The endless stream of rows that processes read in turns: each row once an epoch, shuffled anew in each."""

    def __init__(self, count: int, seed: int, weights: Tensor | None = None, rank: int = 0, world: int = 1) -> None:
        """With ``weights`` (count,) an epoch is as many draws with replacement, in proportion to them."""
        self.count, self.seed, self.weights, self.rank, self.world = count, seed, weights, rank, world
        self._epoch = lru_cache(2)(self._drawn)  # threads may draw batches on both sides of an epoch's end

    def rows(self, start: int, count: int) -> Tensor:
        places = (divmod(position, self.count) for position in range(start, start + count))
        return torch.stack([self._epoch(epoch)[offset] for epoch, offset in places])

    def _drawn(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "epoch", epoch))
        if self.weights is None:
            return torch.randperm(self.count, generator=generator)
        return torch.multinomial(self.weights, self.count, replacement=True, generator=generator)


def balancing_weights(values: Tensor) -> Tensor:
    """Weights (N,) under which every distinct value of (N,) is drawn equally often; NaN is a value of its own."""
    _, member, counts = torch.unique(torch.nan_to_num(values, nan=torch.inf), return_inverse=True, return_counts=True)
    return 1 / counts.double()[member]


class Draw(NamedTuple):
    """One batch of training, all of it determined by (seed, step)."""

    rows: Tensor  # (B,) images
    latents: Tensor  # (B, c, h, w)
    noise: Tensor  # (B, c, h, w)
    timesteps: Tensor  # (B,)
    embeddings: Tensor  # (B, tokens, width), float32


def draw_batch(cache: Cache, order: Order, config: FinetuneConfig, micro_step: int, num_timesteps: int = 1000) -> Draw:
    """The batch of the order's process at a micro-step, with timesteps below ``num_timesteps``."""
    rows = order.rows((micro_step * order.world + order.rank) * config.batch_size, config.batch_size)
    generator = torch.Generator().manual_seed(stable_seed(order.seed, "step", micro_step, order.rank))
    mean, std = cache.moments[rows].float().unbind(1)
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    timesteps = torch.randint(num_timesteps, (len(rows),), generator=generator)
    if config.noisy_share > 0.5:
        moved = torch.rand(len(rows), generator=generator) < 2 * config.noisy_share - 1
        timesteps = torch.where(moved, (timesteps + num_timesteps) // 2, timesteps)
    pick = torch.randint(cache.caption_rows.shape[1], (len(rows),), generator=generator)
    dropped = torch.rand(len(rows), generator=generator) < config.caption_dropout
    captions = torch.where(dropped, 0, cache.caption_rows[rows, pick])
    return Draw(rows, latents, noise, timesteps, cache.embeddings[captions].float())


def batches_from(
    start: int, config: FinetuneConfig, train: Cache, num_timesteps: int, accelerator: Accelerator
) -> Generator[Draw]:
    """The batches of the micro-steps from optimizer step ``start`` on, in order; for a GPU in pinned memory."""
    weights = None
    if config.balance:
        column = load_table(config.dataset, "train")[config.balance]
        weights = balancing_weights(torch.tensor(column.to_numpy(dtype=float)))
    order = Order(len(train), config.seed, weights, accelerator.process_index, accelerator.num_processes)
    gpu = accelerator.device.type == "cuda"

    def draw(micro: int) -> Draw:
        batch = draw_batch(train, order, config, micro, num_timesteps)
        return Draw(*map(Tensor.pin_memory, batch)) if gpu else batch

    numbers = range(start * config.gradient_accumulation, config.steps * config.gradient_accumulation)
    return drawn_ahead(draw, numbers, config.draw_workers if gpu else 0)


def drawn_ahead(draw: Callable[[int], Drawn], numbers: Iterable[int], threads: int) -> Generator[Drawn]:
    """``draw(number)`` of each number in order; threads draw ahead, so that a GPU does not wait. 0 draw when needed.

    Two batches a thread are ahead and no more, whatever a step takes: joblib would draw the whole run into memory.
    """
    if not threads:
        yield from map(draw, numbers)
        return
    left, pool = iter(numbers), ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(draw, number) for number in islice(left, 2 * threads))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(draw, number) for number in islice(left, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def validation_draws(cache: Cache, config: FinetuneConfig, count: int, num_timesteps: int = 1000) -> list[Draw]:
    """About ``count`` draws, at least one batch, the same ones every time; their timesteps are spread evenly."""
    batches = max(1, min(count, len(cache)) // config.batch_size)
    total = batches * config.batch_size
    spread = ((torch.arange(total) + 0.5) * num_timesteps / total).long()
    generator = torch.Generator().manual_seed(stable_seed(config.seed, "validation"))
    spread = spread[torch.randperm(total, generator=generator)]
    order, parts = Order(len(cache), config.seed), enumerate(spread.split(config.batch_size))
    return [draw_batch(cache, order, config, k, num_timesteps)._replace(timesteps=part) for k, part in parts]


def by_timestep(losses: Tensor, timesteps: Tensor, num_timesteps: int) -> dict[str, float]:
    """Mean loss in five bins of equal width, ``t0_199`` to ``t800_999``, without empty ones."""
    width = num_timesteps / TIMESTEP_BINS
    bins = (timesteps / width).long()
    return {
        f"t{round(k * width)}_{round((k + 1) * width) - 1}": float(losses[bins == k].mean())
        for k in range(TIMESTEP_BINS)
        if bool((bins == k).any())
    }
