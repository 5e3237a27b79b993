"""The order of work that `editing.py` is measured against: null-text inversion and prompt-to-prompt as published.

One image at a time: DDIM inversion, an embedding optimised for every step by a backward pass that also makes the
gradients of the U-Net's weights, a reconstruction pass, and then every edit from the start, with classifier-free
guidance on source and target and with all attention maps written out. So do the implementations of Hertz et al. (2023)
and Mokady et al. (2023) that later work builds on. Schedulers are diffusers' own; only words are aligned by
`prism_lib`, because both sides must ask for the same edit. Attention maps are not kept for later, which spares memory
that the published code needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor

from prism_lib.editing.alignment import align
from prism_lib.editing.attention import SELF_MAX_TOKENS
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import EditConfig
from prism_lib.language.edits import PromptPair
from prism_lib.models.pipeline import decode_latents, encode_images, encode_prompts


class Maps:
    """Prompt-to-prompt's edit of written-out attention maps; a call's rows are [source, target] twice, by guidance."""

    def __init__(self, pipe: StableDiffusionPipeline, pair: PromptPair, config: EditConfig, steps: int) -> None:
        self.transfer = align(pipe.tokenizer, pair.source, pair.target, pipe.tokenizer.model_max_length).to(pipe.device)
        self.own = self.transfer.sum(0) == 0
        self.cross_steps = round(config.cross_replace_steps * steps)
        self.self_steps = round(config.self_replace_steps * steps)
        self.step = 0

    def edit(self, maps: Tensor, cross: bool) -> Tensor:
        """Change the conditional target's maps, (4 x heads, queries, keys)."""
        *others, source, target = maps.chunk(4)
        if cross and self.step < self.cross_steps:
            target = source @ self.transfer.to(source) + target * self.own.to(target)
        elif not cross and self.step < self.self_steps and maps.shape[1] <= SELF_MAX_TOKENS:
            target = source
        return torch.cat([*others, source, target])


class MapsProcessor:
    """diffusers attention processor that writes every map out and hands it to `maps`."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention as in diffusers' AttnProcessor, for the layers of Stable Diffusion's U-Net."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        maps = self.maps.edit(attn.get_attention_scores(query, key), encoder_hidden_states is not None)
        return attn.to_out[0](attn.batch_to_head_dim(maps @ value))


@dataclass(frozen=True)
class Reference:
    """A pipeline, steps and settings; an image is (1, C, H, W) in [0, 1], its trajectory (T + 1, 1, c, h, w)."""

    pipe: StableDiffusionPipeline
    steps: int
    config: InversionConfig

    def sweep(self, image: Tensor, pair: PromptPair, configs: Sequence[EditConfig]) -> list[Tensor]:
        """All the work for one image; the decoded edits, one per setting."""
        trajectory = self.invert(image, pair.source)
        with with_weight_gradients(self.pipe):
            _, negatives = self.null_text(trajectory, pair.source)
        self.reconstruct(trajectory, negatives, pair.source)
        edits = [self.edit(trajectory, negatives, pair, config) for config in configs]
        return [decode_latents(self.pipe.vae, latents, image.shape[1])[1:] for latents in edits]

    @torch.no_grad()
    def invert(self, image: Tensor, prompt: str) -> Tensor:
        """The DDIM trajectory up, conditional on the source prompt."""
        scheduler = DDIMInverseScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(self.steps)
        text = encode_prompts(self.pipe, [prompt])
        trajectory = [encode_images(self.pipe.vae, image)]
        for t in scheduler.timesteps:
            noise = self.predict(trajectory[-1], t, text)
            trajectory.append(scheduler.step(noise, int(t), trajectory[-1]).prev_sample)
        return torch.stack(trajectory)

    def null_text(self, trajectory: Tensor, prompt: str) -> tuple[Tensor, list[Tensor]]:
        """The guided way down, (T + 1, 1, c, h, w), and the embedding that leads each step, noisiest first."""
        scheduler, config = self.scheduler(), self.config
        text, embeds = encode_prompts(self.pipe, [prompt]), encode_prompts(self.pipe, [""])
        latents, negatives = [trajectory[-1]], []
        for i, t in enumerate(scheduler.timesteps):
            embeds = embeds.clone().detach().requires_grad_()
            optimizer = torch.optim.Adam([embeds], lr=config.learning_rate * (1 - i / (2 * self.steps)))
            with torch.no_grad():
                conditional = self.predict(latents[-1], t, text)
            for _ in range(config.inner_steps):
                guided = self.guide(self.predict(latents[-1], t, embeds), conditional, config.guidance_scale)
                below = scheduler.step(guided, int(t), latents[-1]).prev_sample
                loss = torch.nn.functional.mse_loss(below, trajectory[self.steps - i - 1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if loss.item() < config.threshold + i * 2e-5:
                    break
            negatives.append(embeds.detach())
            with torch.no_grad():
                noise = self.predict(latents[-1].repeat(2, 1, 1, 1), t, torch.cat([negatives[-1], text]))
                guided = self.guide(noise[:1], noise[1:], config.guidance_scale)
                latents.append(scheduler.step(guided, int(t), latents[-1]).prev_sample)
        return torch.stack(latents[::-1]), negatives

    @torch.no_grad()
    def reconstruct(self, trajectory: Tensor, negatives: Sequence[Tensor], prompt: str) -> Tensor:
        """The source made again from its noise and the optimised embeddings, decoded."""
        scheduler, text, latents = self.scheduler(), encode_prompts(self.pipe, [prompt]), trajectory[-1]
        for t, negative in zip(scheduler.timesteps, negatives, strict=True):
            noise = self.predict(latents.repeat(2, 1, 1, 1), t, torch.cat([negative, text]))
            unconditional, conditional = noise.chunk(2)
            guided = self.guide(unconditional, conditional, self.config.guidance_scale)
            latents = scheduler.step(guided, int(t), latents).prev_sample
        return decode_latents(self.pipe.vae, latents)

    @torch.no_grad()
    def edit(self, trajectory: Tensor, negatives: Sequence[Tensor], pair: PromptPair, config: EditConfig) -> Tensor:
        """Latents of source and target, (2, c, h, w), after a pass of four U-Net rows a step."""
        scheduler, latents = self.scheduler(), trajectory[-1].repeat(2, 1, 1, 1)
        text = encode_prompts(self.pipe, [pair.source, pair.target])
        with written_out(self.pipe, Maps(self.pipe, pair, config, self.steps)) as maps:
            for step, (t, negative) in enumerate(zip(scheduler.timesteps, negatives, strict=True)):
                maps.step = step
                noise = self.predict(latents.repeat(2, 1, 1, 1), t, torch.cat([negative, negative, text]))
                unconditional, conditional = noise.chunk(2)
                guided = self.guide(unconditional, conditional, config.guidance_scale)
                latents = scheduler.step(guided, int(t), latents).prev_sample
        return latents

    def scheduler(self) -> DDIMScheduler:
        """diffusers' DDIM for this many steps."""
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def predict(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """One U-Net call."""
        dtype = self.pipe.unet.dtype
        return self.pipe.unet(latents.to(dtype), t, encoder_hidden_states=text.to(dtype)).sample.to(latents)

    @staticmethod
    def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance."""
        return unconditional + scale * (conditional - unconditional)


@contextmanager
def with_weight_gradients(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Leave the U-Net's weights trainable, as the published code does; frozen again and without gradients after."""
    pipe.unet.requires_grad_(True)
    try:
        yield
    finally:
        pipe.unet.requires_grad_(False).zero_grad(set_to_none=True)


@contextmanager
def written_out(pipe: StableDiffusionPipeline, maps: Maps) -> Iterator[Maps]:
    """Every attention layer of the U-Net by `MapsProcessor`; the old processors come back."""
    before = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(MapsProcessor(maps))
    try:
        yield maps
    finally:
        pipe.unet.set_attn_processor(before)
