"""What the paper and users compare with: frozen settings that turn images and prompt pairs into results."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field, replace
from typing import Annotated, Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion, StableDiffusionImg2ImgPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim import Adam
from tqdm.auto import tqdm

from prism_lib.configs import checked
from prism_lib.editing.counterfactuals import edit, scored, stack
from prism_lib.editing.inversion import Inversion, invert
from prism_lib.editing.methods import RECOMMENDED, InversionConfig
from prism_lib.editing.settings import EditConfig, recommended_inversion, resolved
from prism_lib.evaluation.evaluate import Editor, Results
from prism_lib.files import image_hash, stable_seed
from prism_lib.language.edits import Edit, Pairs
from prism_lib.models.pipeline import (
    Pipe,
    assembled,
    decode_latents,
    encode_images,
    encode_prompts,
    mixed_calls,
    predict_noise,
    sample_images,
    text_encoders,
)
from prism_lib.models.schedule import Schedule, clean_and_noise, guided
from prism_lib.training.batches import diffusion_loss
from prism_lib.training.loop import LORA_LAYERS

Share = Annotated[float, Field(gt=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
# A mapping stays a mapping: made an `EditConfig`, it would replace what the model recommends for other fields.
Overrides = Annotated[Mapping[str, Any] | EditConfig, Field(union_mode="left_to_right")]

# Null-text inversion's editor as published: guidance from the empty prompt, cross .8, self .4, local blend, no mask.
PLAIN = EditConfig(negative="empty", correct_drift=False, local_blend=True)
_ADAPTER = "imagic"
Fit = tuple[Tensor, Tensor, dict[str, Tensor]]  # an image (C, H, W), its embedding (1, L, D), weights of its adapters


@checked()
class PromptToPrompt(Editor):
    """Prompt-to-prompt on an inversion (Hertz et al., ICLR 2023), ours with the defaults.

    `settings` are overrides of the model's recommended settings, or an `EditConfig` that is taken as it is; `mask`
    "off" gives the raw decode, nothing put back into the input. Without an `inversion` the model's own is used.
    """

    method: str = RECOMMENDED
    num_inference_steps: PositiveInt = 50
    settings: Overrides = field(default_factory=dict, hash=False)
    mask: Literal["auto", "off"] = "auto"
    inversion: InversionConfig | None = None

    @property
    def inverts(self) -> Hashable:
        return self.method, self.num_inference_steps, self.inversion

    def invert(self, pipe: Pipe, images: Tensor, pairs: Pairs) -> Inversion:
        sources, config = [pair.source for pair in pairs], self.inversion
        return invert(pipe, images, sources, self.method, self.num_inference_steps, config=config)

    def edit(self, pipe: Pipe, inverted: Inversion, pairs: Pairs, change: Edit) -> Results:
        return edit(pipe, inverted, pairs, self.settings, mask=self.mask)

    def effect(self, pipe: Pipe, pairs: Pairs) -> str:
        steps, how = self.num_inference_steps, self.inversion or recommended_inversion(pipe, self.num_inference_steps)
        used = [resolved(pipe, pair, steps, self.settings) for pair in pairs]
        return repr([replace(self, settings=settings, inversion=how) for settings in used])


@checked()
class TwoMasks(Editor):
    """Editing between two masks on edit-friendly inversion, after RadEdit (Perez-Garcia et al., ECCV 2024).

    Drawn masks, as in RadEdit, would give this method the truth; so the edit mask is the one that our own editor finds,
    `margin` pixels wider, and everything further away is kept. No attention is injected.
    """

    guidance_scale: float = 7.5
    num_inference_steps: PositiveInt = 50
    margin: NonNegativeInt = 4

    @property
    def inverts(self) -> Hashable:
        return self.num_inference_steps

    def invert(self, pipe: Pipe, images: Tensor, pairs: Pairs) -> tuple[Inversion, Tensor]:
        """The inversion, and the masks (N, 1, H, W) that our editor finds on it."""
        inversion = invert(pipe, images, [pair.source for pair in pairs], "edit_friendly", self.num_inference_steps)
        return inversion, stack(edit(pipe, inversion, pairs), "mask")

    def edit(self, pipe: Pipe, inverted: tuple[Inversion, Tensor], pairs: Pairs, change: Edit) -> Results:
        inversion, found = inverted
        # Soft, not cut off at a threshold: a rounding error must not move the mask's border.
        wide = nn.functional.max_pool2d(found, 2 * self.margin + 1, 1, self.margin)
        config = replace(PLAIN, guidance_scale=self.guidance_scale, local_blend=False)
        config = replace(config, cross_replace_steps=0.0, self_replace_steps=0.0)
        return [replace(result, settings=self) for result in edit(pipe, inversion, pairs, config, mask=wide)]


def _checked_steps(editor: Any) -> Any:
    if int(editor.num_inference_steps * editor.strength) < 1:
        raise ValueError(f"strength {editor.strength} of {editor.num_inference_steps} steps leaves none to denoise")
    return editor


@checked()
class SDEdit(Editor):
    """Noise the image to `strength` and denoise it under the target prompt (Meng et al., ICLR 2022)."""

    strength: Share = 0.5
    guidance_scale: float = 7.5
    num_inference_steps: PositiveInt = 50
    seed: int = 0

    _has_steps = model_validator(mode="after")(_checked_steps)

    @torch.no_grad()
    def edit(self, pipe: Pipe, inverted: Tensor, pairs: Pairs, change: Edit) -> Results:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        image_to_image = _sharing(pipe, StableDiffusionImg2ImgPipeline, scheduler)
        with mixed_calls(pipe.unet):
            latents = image_to_image(
                prompt=[pair.target for pair in pairs],
                image=inverted.expand(-1, pipe.vae.config.in_channels, -1, -1),
                strength=self.strength,
                guidance_scale=self.guidance_scale,
                num_inference_steps=self.num_inference_steps,
                generator=[torch.Generator().manual_seed(_seed_of(image, self.seed)) for image in inverted],
                output_type="latent",
            ).images
        return unmasked(pipe, inverted, pairs, decode_latents(pipe.vae, latents, inverted.shape[1]), self)


@checked()
class LEdits(Editor):
    """LEDITS++ (Brack et al., CVPR 2024): the target prompt is a concept to add, the source prompt one to remove.

    `threshold` is the quantile that opens the mask; `intersect` also uses the attention, which needs a U-Net that
    attends at a quarter of the latents' size. One image at a time: diffusers' concepts belong to a batch.
    """

    edit_guidance_scale: float = 5.0
    threshold: Below1 = 0.9
    skip: Below1 = 0.15
    num_inference_steps: PositiveInt = 30
    intersect: bool = True
    seed: int = 0

    @torch.no_grad()
    def edit(self, pipe: Pipe, inverted: Tensor, pairs: Pairs, change: Edit) -> Results:
        if (channels := pipe.vae.config.latent_channels) != 4:
            raise ValueError(f"LEDITS++ of diffusers edits latents of 4 channels, this model has {channels}")
        how = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **how)
        ledits = _sharing(pipe, LEditsPPPipelineStableDiffusion, scheduler)
        latents = []
        with ExitStack() as after, mixed_calls(pipe.unet):
            # LEDITS++ replaces all attention processors and leaves its own behind.
            after.callback(pipe.unet.set_attn_processor, dict(pipe.unet.attn_processors))
            for image, pair in zip(inverted, pairs, strict=True):
                noise = torch.Generator().manual_seed(_seed_of(image, self.seed))
                ledits.invert(
                    image=image[None].expand(-1, pipe.vae.config.in_channels, -1, -1),
                    num_inversion_steps=self.num_inference_steps,
                    skip=self.skip,
                    generator=noise,
                )
                edited = ledits(
                    editing_prompt=[pair.target, pair.source],
                    reverse_editing_direction=[False, True],
                    edit_guidance_scale=[self.edit_guidance_scale] * 2,
                    edit_threshold=[self.threshold] * 2,
                    use_intersect_mask=self.intersect,
                    generator=noise,
                    output_type="latent",
                )
                latents.append(edited.images)
        return unmasked(pipe, inverted, pairs, decode_latents(pipe.vae, torch.cat(latents), inverted.shape[1]), self)


@checked()
class Edict(Editor):
    """EDICT: two latents that denoise each other, so every step can be undone (Wallace, Gokul & Naik, CVPR 2023).

    A step makes x from y's noise and then y from the new x's, and mixes the two a little, because they would drift
    apart. `strength` is the share of the steps that are walked, `mixing` the paper's p: 1 does not mix. Latents are
    float64, as published: mixing multiplies rounding by 1 / p a step.
    """

    guidance_scale: float = 3.0
    strength: Share = 0.8
    mixing: Share = 0.93
    num_inference_steps: PositiveInt = 50

    _has_steps = model_validator(mode="after")(_checked_steps)

    @torch.no_grad()
    def edit(self, pipe: Pipe, inverted: Tensor, pairs: Pairs, change: Edit) -> Results:
        clean = encode_images(pipe.vae, inverted)
        noised = self.walk(pipe, (clean, clean), [pair.source for pair in pairs], up=True)
        edited, _ = self.walk(pipe, noised, [pair.target for pair in pairs], up=False)
        return unmasked(pipe, inverted, pairs, decode_latents(pipe.vae, edited.to(clean), inverted.shape[1]), self)

    def walk(self, pipe: Pipe, pair: tuple[Tensor, Tensor], prompts: Sequence[str], up: bool) -> tuple[Tensor, Tensor]:
        """The two latents (N, c, h, w) from clean to noised or back; under the same prompts each undoes the other."""
        schedule, p = Schedule.from_config(pipe.scheduler.config, self.num_inference_steps), self.mixing
        embeds = encode_prompts(pipe, [*[""] * len(prompts), *prompts])

        def noise(latents: Tensor, level: int) -> Tensor:
            # What is rounded on the way up is amplified on the way down.
            prediction = predict_noise(pipe, torch.cat([latents] * 2), schedule.timesteps[level], embeds, exact=True)
            unconditional, conditional = prediction.chunk(2)
            prediction = guided(unconditional, conditional, self.guidance_scale)
            return clean_and_noise(schedule, latents, prediction, level)[1]

        levels = range(1, int(self.strength * self.num_inference_steps) + 1)
        for level in tqdm(levels if up else levels[::-1], desc="EDICT", leave=False):
            # The latents take turns at going first.
            y, x = (latents.double() for latents in (pair[::-1] if level % 2 else pair))
            here, below = schedule.alphas[level], schedule.alphas[level - 1]
            scale = (below / here) ** 0.5  # a DDIM step is scale * sample + shift * noise
            shift = (1 - below) ** 0.5 - scale * (1 - here) ** 0.5
            if up:
                y = (y - (1 - p) * x) / p
                x = (x - (1 - p) * y) / p
                y = (y - shift * noise(x, level)) / scale
                x = (x - shift * noise(y, level)) / scale
            else:
                x = scale * x + shift * noise(y, level)
                y = scale * y + shift * noise(x, level)
                x = p * x + (1 - p) * y
                y = p * y + (1 - p) * x
            pair = (x, y) if level % 2 else (y, x)
        return pair


@checked()
class Imagic(Editor):
    """Imagic (Kawar et al., CVPR 2023): tune an embedding, then the U-Net, to one image; interpolate.

    The target's embedding is optimised until it explains the image; LoRA adapters are tuned to the image under that
    embedding; a mixture of both embeddings is sampled, in which the target's share is `eta`: 0 is the image.
    """

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

    def invert(self, pipe: Pipe, images: Tensor, pairs: Pairs) -> list[Fit]:
        fits = []
        for image, pair in zip(tqdm(images, desc="imagic", leave=False), pairs, strict=True):
            seed = _seed_of(image, self.seed)
            noise = torch.Generator().manual_seed(seed)
            clean = encode_images(pipe.vae, image[None]).to(pipe.unet.dtype).expand(self.batch_size, -1, -1, -1)
            embedding = nn.Parameter(encode_prompts(pipe, [pair.target]).to(pipe.unet.dtype))
            _fit(pipe, clean, embedding, Adam([embedding], self.embedding_learning_rate), self.embedding_steps, noise)
            optimised = embedding.detach()
            with self._adapted(pipe, seed):
                weights = [value for value in pipe.unet.parameters() if value.requires_grad]
                _fit(pipe, clean, optimised, Adam(weights, self.unet_learning_rate), self.unet_steps, noise)
                tuned = get_peft_model_state_dict(pipe.unet, adapter_name=_ADAPTER)
                fits.append((image, optimised, {name: value.detach().clone() for name, value in tuned.items()}))
        return fits

    @torch.no_grad()
    def edit(self, pipe: Pipe, inverted: list[Fit], pairs: Pairs, change: Edit) -> Results:
        edited = []
        for (image, embedding, adapters), pair in zip(inverted, pairs, strict=True):
            seed = _seed_of(image, self.seed)
            target, empty = encode_prompts(pipe, [pair.target, ""]).to(pipe.unet.dtype).split(1)
            mixed = self.eta * target + (1 - self.eta) * embedding
            how: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, "channels": len(image)}
            how |= {"guidance_scale": self.guidance_scale, "seed": seed % 2**32}
            with self._adapted(pipe, seed):
                set_peft_model_state_dict(pipe.unet, adapters, _ADAPTER)
                edited.append(sample_images(pipe, mixed, empty, **how).cpu())
        return unmasked(pipe, torch.stack([image for image, *_ in inverted]), pairs, torch.cat(edited), self)

    @contextmanager
    def _adapted(self, pipe: Pipe, seed: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters = LoraConfig(r=self.rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
            pipe.unet.add_adapter(adapters, _ADAPTER)
        try:
            yield
        finally:
            pipe.unet.unload_lora()


def _fit(pipe: Pipe, clean: Tensor, embedding: Tensor, adam: Adam, steps: int, noise: torch.Generator) -> None:
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


def unmasked(pipe: Pipe, images: Tensor, pairs: Pairs, edited: Tensor, settings: object) -> Results:
    """Results of a method without a mask; the reconstruction is the autoencoder's."""
    decoded = decode_latents(pipe.vae, encode_images(pipe.vae, images), images.shape[1])
    edited, everywhere = edited.to(images), torch.ones_like(images[:, :1])
    return scored(images, edited, edited, decoded.to(images), everywhere, pairs, settings)


def _seed_of(image: Tensor, seed: int) -> int:
    """A seed for one image, (C, H, W), from its pixels and ``seed``: no result depends on the batch."""
    return stable_seed(seed, image_hash(image))


def _sharing(pipe: Pipe, kind: Any, scheduler: object) -> Any:
    """Another of diffusers' pipelines with the same networks and a scheduler of its own; ValueError for SDXL."""
    if len(text_encoders(pipe)) > 1:
        raise ValueError(f"{pipe.name_or_path} is SDXL; this editor runs Stable Diffusion 1 and 2 only")
    return assembled(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, scheduler, kind)
