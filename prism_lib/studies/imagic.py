"""Imagic as an editor (Kawar et al., CVPR 2023): tune an embedding, then the U-Net, to one image; interpolate.

(A) the target's text embedding is optimised until it explains the image; (B) the U-Net is tuned to the image under that
embedding, by LoRA adapters that are removed again; (C) an image is sampled under a mixture of both embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Adam
from tqdm.auto import tqdm

from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.pipeline import encode_images, encode_prompts, mixed_calls, sample_images
from prism_lib.studies.editors import Editor, Pairs, Results, seed_of, unmasked
from prism_lib.training.batches import diffusion_loss
from prism_lib.training.loop import LORA_LAYERS

_ADAPTER = "imagic"


class Fit(NamedTuple):
    """One image (C, H, W) with its optimised embedding (1, L, D) and the weights of its adapters."""

    image: Tensor
    embedding: Tensor
    adapters: dict[str, Tensor]


@dataclass(frozen=True)
class Imagic(Editor):
    """Settings; `eta` is the share of the target's embedding in the mixture: 0 is the image, 1 is the prompt."""

    eta: float = 0.8
    embedding_steps: PositiveInt = 200
    embedding_learning_rate: float = 2e-3
    unet_steps: PositiveInt = 300
    unet_learning_rate: float = 1e-3
    rank: PositiveInt = 4
    batch_size: PositiveInt = 4
    guidance_scale: float = 3.0
    num_inference_steps: PositiveInt = 50
    seed: int = 0

    @property
    def inverts(self) -> Hashable:
        return replace(self, eta=0.0, guidance_scale=0.0, num_inference_steps=1)

    def invert(self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Pairs) -> list[Fit]:
        progress = tqdm(zip(images, pairs, strict=True), desc="imagic", total=len(images), leave=False)
        return [self._tuned(pipe, image, pair) for image, pair in progress]

    def edit(self, pipe: StableDiffusionPipeline, inverted: list[Fit], pairs: Pairs, change: Edit) -> Results:
        images = torch.stack([fit.image for fit in inverted])
        edited = torch.cat([self._sampled(pipe, fit, pair) for fit, pair in zip(inverted, pairs, strict=True)])
        return unmasked(pipe, images, pairs, edited, self)

    def _sampled(self, pipe: StableDiffusionPipeline, fit: Fit, pair: PromptPair) -> Tensor:
        seed = seed_of(fit.image, self.seed)
        target, empty = encode_prompts(pipe, [pair.target, ""]).to(pipe.unet.dtype).split(1)
        with self._adapted(pipe, seed), torch.no_grad():
            set_peft_model_state_dict(pipe.unet, fit.adapters, _ADAPTER)
            mixed = self.eta * target + (1 - self.eta) * fit.embedding
            how: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, "seed": seed % 2**32}
            how |= {"guidance_scale": self.guidance_scale, "channels": len(fit.image)}
            return sample_images(pipe, mixed, empty, **how).cpu()

    def _tuned(self, pipe: StableDiffusionPipeline, image: Tensor, pair: PromptPair) -> Fit:
        seed = seed_of(image, self.seed)
        noise = torch.Generator().manual_seed(seed)
        clean = encode_images(pipe.vae, image[None]).to(pipe.unet.dtype).expand(self.batch_size, -1, -1, -1)
        embedding = nn.Parameter(encode_prompts(pipe, [pair.target]).to(pipe.unet.dtype))
        _fit(pipe, clean, embedding, Adam([embedding], self.embedding_learning_rate), self.embedding_steps, noise)
        optimised = embedding.detach()
        with self._adapted(pipe, seed):
            weights = [value for value in pipe.unet.parameters() if value.requires_grad]
            _fit(pipe, clean, optimised, Adam(weights, self.unet_learning_rate), self.unet_steps, noise)
            tuned = get_peft_model_state_dict(pipe.unet, adapter_name=_ADAPTER)
            return Fit(image, optimised, {name: value.detach().clone() for name, value in tuned.items()})

    @contextmanager
    def _adapted(self, pipe: StableDiffusionPipeline, seed: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters = LoraConfig(r=self.rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
            pipe.unet.add_adapter(adapters, _ADAPTER)
        try:
            yield
        finally:
            pipe.unet.unload_lora()


def _fit(
    pipe: StableDiffusionPipeline, clean: Tensor, embedding: Tensor, adam: Adam, steps: int, noise: torch.Generator
) -> None:
    count = pipe.scheduler.config.num_train_timesteps
    for _ in range(steps):
        eps = torch.randn(clean.shape, generator=noise).to(clean)
        timesteps = torch.randint(count, (len(clean),), generator=noise).to(clean.device)
        states = embedding.expand(len(clean), -1, -1)
        with mixed_calls(pipe.unet):
            loss = diffusion_loss(pipe.unet, pipe.scheduler, clean, eps, timesteps, states).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
