"""Build, load and call a `StableDiffusionPipeline`, of any number of latent channels and any factor."""

import copy
import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from pydantic import PositiveInt
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from prism_lib import devices, paths
from prism_lib.configs import checked
from prism_lib.devices import default_device, dtype_of
from prism_lib.files import check_images, model_hash
from prism_lib.language.captions import corpus
from prism_lib.models.published import load_whole, locate
from prism_lib.models.wavelets import HaarAutoencoder

Pipe: TypeAlias = StableDiffusionPipeline  # what `load_pipeline` gives, or SDXL's, used in the same way
_ARITHMETIC = "prism_arithmetic"  # attribute of a U-Net: the dtype of its arithmetic where its weights have another
_SIZES = 6  # numbers that SDXL's U-Net reads: height and width before cropping, the crop's corner, height and width


@checked()
class PipelineConfig:
    """Sizes of a complete small Stable Diffusion; the defaults are the shipped `phantom-sd`."""

    image_size: PositiveInt = 256
    vae_channels: tuple[PositiveInt, ...] = (16, 32, 64)
    latent_channels: PositiveInt = 4
    unet_channels: tuple[PositiveInt, ...] = (32, 64, 128, 128)
    unet_attention: tuple[bool, ...] = (False, False, True, True)  # cross-attention at each resolution
    unet_layers: PositiveInt = 1
    text_width: PositiveInt = 128
    text_layers: PositiveInt = 4
    attention_heads: PositiveInt = 4
    vocab_size: PositiveInt = 1024
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


def build_pipeline(config: PipelineConfig, seed: int, captions: Iterable[str] = ()) -> Pipe:
    """An untrained pipeline, weights drawn from ``seed``, tokenizer trained on ``captions`` (or the chest corpus)."""
    tokenizer = train_tokenizer(list(captions) or corpus(), config.vocab_size)
    depth = len(config.vae_channels)
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.unet_attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.unet_attention)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=config.vae_channels,
            latent_channels=config.latent_channels,
            norm_num_groups=min(8, *config.vae_channels),
            mid_block_add_attention=False,
            sample_size=config.image_size,
            scaling_factor=1.0,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.attention_heads,
                projection_dim=config.text_width,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=config.image_size // image_factor(vae),
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.unet_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=config.unet_layers,
            cross_attention_dim=config.text_width,
            attention_head_dim=config.attention_heads,  # diffusers' name of the number of heads
            norm_num_groups=min(16, *config.unet_channels),
        )
    return assembled(vae, text_encoder, tokenizer, unet, ddim_scheduler(config.prediction_type))


def assembled(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel | None,
    tokenizer: CLIPTokenizer | None,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    kind: Any = StableDiffusionPipeline,
) -> Pipe:
    """A pipeline of these parts, without a safety checker; without text parts it is called with embeddings."""
    pipeline = kind(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's noise schedule, every choice explicit."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    steps = {"num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False}
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **betas, **steps)


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format; equal captions give equal tokenizers."""
    backend = CLIPTokenizer().backend_tokenizer  # CLIP's own normalisation and word splitting
    # Single letters and digits keep every word spellable: one that no caption has would become "<|endoftext|>".
    texts = [*captions, " ".join(string.ascii_lowercase + string.digits)]
    suffix = "</w>"
    # The trainer numbers letters at the end of words in the order of a hash map, and breaks ties by these numbers.
    ends = {
        word[-1]
        for text in set(texts)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    }
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(letter + suffix for letter in sorted(ends))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    return CLIPTokenizer(vocab=learned["vocab"], merges=[*map(tuple, learned["merges"])], model_max_length=77)


def load_pipeline(
    name_or_path: str | Path = paths.SHIPPED,
    dtype: torch.dtype | str = torch.float32,
    *,
    unet: str | Path = "",
    vae: str | Path = "",
    channels_last: bool | None = None,
    device: str | torch.device | None = None,
    mixed_precision: str = "no",
) -> Pipe:
    """Load the shipped ``phantom-sd``, a diffusers folder (also below PRISM_RUNS), or a hub id; see `load_whole`.

    Args:
        dtype: of the weights, or a name of `devices.PRECISIONS`; latents and decoded images stay float32.
        unet, vae: published weights in place of these parts, in any layout that `published` reads.
        channels_last: memory layout of the convolutions, by default on CPUs and in half precision, where it is faster.
        device: by default `devices.default_device`.
        mixed_precision: of the U-Net's arithmetic (`devices.mixed_precision`); weights and latents stay float32.
    """
    dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
    device = torch.device(default_device() if device is None else device)
    arithmetic = dtype_of(devices.mixed_precision(mixed_precision, device))
    if torch.float32 not in (arithmetic, dtype):
        raise ValueError(f"weights are {dtype} and mixed_precision {mixed_precision!r}; it is for float32 weights")
    pipeline = load_whole(locate(str(name_or_path)), dtype, {"unet": unet, "vae": vae})
    if isinstance(pipeline.vae, HaarAutoencoder):  # in half precision it would not be lossless
        pipeline.vae = HaarAutoencoder.from_config(pipeline.vae.config)
    offset = pipeline.scheduler.config.get("steps_offset", 1)  # as StableDiffusionPipeline has it, clipping too
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, steps_offset=offset)
    pipeline.scheduler.register_to_config(_use_default_values=[])  # would have another order in every process
    pipeline.set_progress_bar_config(disable=True)
    if channels_last is None:
        channels_last = device.type == "cpu" or dtype != torch.float32
    layout = torch.channels_last if channels_last else torch.preserve_format
    for part in (pipeline.vae, *text_encoders(pipeline), pipeline.unet):
        part.requires_grad_(False).eval().to(memory_format=layout)
    pipeline.to(device)
    if len(text_encoders(pipeline)) > 1:
        pipeline.unet.register_forward_pre_hook(_beside_tokens, with_kwargs=True)
        if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
            pipeline.vae.float()  # in float16 it overflows
    if arithmetic != torch.float32:
        setattr(pipeline.unet, _ARITHMETIC, arithmetic)
    return pipeline


def predict_noise(pipe: Pipe, latents: Tensor, timestep: int | Tensor, embeds: Tensor, exact: bool = False) -> Tensor:
    """One U-Net evaluation per row, in its arithmetic or, if ``exact``, that of its weights; latents keep their own."""
    dtype, arithmetic = pipe.unet.dtype, None if exact else getattr(pipe.unet, _ARITHMETIC, None)
    with torch.autocast(latents.device.type, arithmetic) if arithmetic else nullcontext():
        prediction = pipe.unet(latents.to(dtype), timestep, encoder_hidden_states=embeds.to(dtype)).sample
    return prediction.to(latents)


@contextmanager
def mixed_calls(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside, diffusers' own pipelines call the U-Net in its arithmetic; the rest of them stays float32."""
    if (dtype := getattr(unet, _ARITHMETIC, None)) is None:
        yield
        return
    unet.forward = convert_outputs_to_fp32(torch.autocast(unet.device.type, dtype)(unet.forward))  # as accelerate does
    try:
        yield
    finally:
        del unet.forward


def compile_blocks(pipeline: Pipe, backend: str = "inductor") -> Pipe:
    """Compile residual blocks and feed-forwards of the U-Net; attention's processors change with every edit."""
    blocks = [part for part in pipeline.unet.modules() if isinstance(part, ResnetBlock2D | FeedForward)]
    # Blocks share their code, and torch.compile stops at 8 versions of one piece of code.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    return pipeline


def fingerprint(pipeline: Pipe) -> str:
    """A hash of all weights and of the U-Net's mixed precision."""
    hashes = [model_hash(part) for part in (pipeline.unet, pipeline.vae, *text_encoders(pipeline))]
    return hashlib.sha256(repr((getattr(pipeline.unet, _ARITHMETIC, None), hashes)).encode()).hexdigest()[:16]


def image_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent cell, along each axis."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def image_size(pipe: Pipe) -> int:
    """The side of the images that a model was made for, in pixels."""
    return int(pipe.unet.config.sample_size) * image_factor(pipe.vae)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the scaled latents (N, c, h, w), float32, for images (N, 1 or 3, H, W) in [0, 1]."""
    check_images(images, image_factor(vae))
    parameter = next(vae.parameters())
    pixels = (images.to(parameter.device, parameter.dtype) * 2 - 1).expand(-1, vae.config.in_channels, -1, -1)
    posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    return (posterior.mean.float() - (vae.config.shift_factor or 0.0)) * scale, posterior.std.float() * scale


def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) in [0, 1], checked, to scaled latents (N, c, h, w): the posterior's mean, float32."""
    return encode_moments(vae, images)[0]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, channels: int = 1) -> Tensor:
    """Scaled latents (N, c, h, w) to images (N, channels, H, W) in [0, 1]; gray is the mean of the colours."""
    parameter = next(vae.parameters())
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    images = vae.decode(unscaled.to(parameter.device, parameter.dtype)).sample.float().div(2).add(0.5).clamp(0, 1)
    return images.mean(dim=1, keepdim=True) if channels == 1 else images


@torch.no_grad()
def sample_images(
    pipe: Pipe,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    *,
    channels: int = 1,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Text-to-image samples (N, channels, H, W) in [0, 1]; row k starts from the noise of ``seed + k``."""
    unet = pipe.unet
    own = assembled(pipe.vae, None, None, unet, copy.deepcopy(pipe.scheduler))  # sampling sets a scheduler's steps
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(prompt_embeds))]
    with mixed_calls(unet):
        latents = own(
            prompt_embeds=prompt_embeds.to(unet.dtype),
            negative_prompt_embeds=negative_prompt_embeds.to(unet.dtype),
            latents=torch.stack(noise).to(prompt_embeds.device, unet.dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    return decode_latents(pipe.vae, latents.float(), channels)


def too_long(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> dict[str, int]:
    """Number of tokens of each text with more than the model reads, start and end counted."""
    texts = list(texts)
    rows = tokenizer(texts, verbose=False).input_ids if texts else []
    lengths = {text: len(row) for text, row in zip(texts, rows, strict=True)}
    return {text: length for text, length in lengths.items() if length > tokenizer.model_max_length}


def text_encoders(pipeline: Pipe) -> list[PreTrainedModel]:
    """The text encoder of Stable Diffusion 1 and 2, or the two of SDXL."""
    second = getattr(pipeline, "text_encoder_2", None)
    return [pipeline.text_encoder] if second is None else [pipeline.text_encoder, second]


def _beside_tokens(unet: UNet2DConditionModel, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before a call of SDXL's U-Net: take pooled text and sizes from the last row of the embeddings."""
    if given.get("added_cond_kwargs"):
        return None  # diffusers' own pipeline
    tokens, last = given["encoder_hidden_states"][:, :-1], given["encoder_hidden_states"][:, -1]
    pooled = unet.config.projection_class_embeddings_input_dim - _SIZES * unet.config.addition_time_embed_dim
    added = {"text_embeds": last[:, :pooled], "time_ids": last[:, pooled : pooled + _SIZES]}
    return args, given | {"encoder_hidden_states": tokens, "added_cond_kwargs": added}


@torch.no_grad()
def encode_prompts(pipeline: Pipe, texts: Sequence[str]) -> Tensor:
    """Prompt embeddings (N, tokens, width) in float32; ValueError for a prompt that would be cut.

    If the encoder's config has `known_prompts`, (pattern, prompt) each, a text is read as that of the first one found.
    SDXL's have one more row: the pooled text, and the sizes of an uncropped image of the model's own size.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    distinct = list(dict.fromkeys(texts))
    for text, length in too_long(tokenizer, distinct).items():
        raise ValueError(f"prompt has {length} tokens, the model reads {tokenizer.model_max_length}: {text!r}")
    if len(text_encoders(pipeline)) > 1:
        embeddings, _, pooled, _ = pipeline.encode_prompt(distinct, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            empty = [not text for text in distinct]
            embeddings[empty], pooled[empty] = 0, 0
        side = image_size(pipeline)
        sizes = torch.tensor([side, side, 0, 0, side, side]).to(pooled).expand(len(distinct), _SIZES)
        beside = torch.cat([pooled, sizes], dim=1)
        beside = F.pad(beside, (0, embeddings.shape[2] - beside.shape[1]))
        embeddings = torch.cat([embeddings, beside[:, None]], dim=1).float()
    else:
        known = getattr(encoder.config, "known_prompts", ())
        said = [next((prompt for fit, prompt in known if re.search(fit, text, re.I)), text) for text in distinct]
        tokens = tokenizer(said, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        tokens = tokens.to(encoder.device)
        masked = getattr(encoder.config, "use_attention_mask", False)  # as in diffusers
        embeddings = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0].float()
    row = {text: i for i, text in enumerate(distinct)}
    return embeddings[[row[text] for text in texts]]


def told_apart(pipeline: Pipe, phrase: str, other: str, subject: str) -> float:
    """Distance of two phrases to the text encoder, in units of "with" to "without" the first; near 0 edits mix them."""
    texts = (f"{subject} with {phrase}", f"{subject} with {other}", f"{subject} without {phrase}")
    one, two, without = encode_prompts(pipeline, texts).mean(1)
    return float((one - two).norm() / (one - without).norm())
