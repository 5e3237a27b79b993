"""A small CLIP, whose text encoder conditions the U-Net, and the words that only details use: "left", "pacemaker".

A CLIP that learned labels reads "left" and "right pleural effusion" nearly the same, and so does a U-Net. So
`teach_details` trains the embeddings of words that no plain caption has; text without them keeps its states to the bit.
"""

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from prism_lib.configs import checked
from prism_lib.data.folder import image_batches, load_info, load_table
from prism_lib.data.rows import sample_captions
from prism_lib.devices import default_device
from prism_lib.language.captions import Clause, Statement, corpus, explicit
from prism_lib.language.labels import Vocabulary
from prism_lib.models.pipeline import Pipe

logger = logging.getLogger(__name__)


@checked()
class ClipConfig:
    """Recipe of the small CLIP whose text encoder conditions the U-Net."""

    steps: PositiveInt = 600
    batch_size: PositiveInt = 48
    image_size: PositiveInt = 128
    patch_size: PositiveInt = 16
    vision_width: PositiveInt = 128
    vision_layers: PositiveInt = 4
    learning_rate: PositiveFloat = 1e-3
    warmup: NonNegativeInt = 50
    seed: int = 0


def train_clip(pipeline: Pipe, dataset: str | Path, config: ClipConfig) -> CLIPModel:
    """Contrastive training on a prepared folder (Radford et al. 2021); the pipeline's text encoder takes the result.

    The target spreads over all pairs of a batch with equal captions. Contrast alone is slow to tell "with" from
    "without", so both towers also learn the labels, the text from its pooled state and from its tokens' mean.
    """
    device = default_device()
    text = pipeline.text_encoder.config
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=text.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=text.projection_dim,
    )
    table = load_table(dataset, "train")
    parts = tqdm(image_batches(dataset, table), desc="images for CLIP, by 64")
    size = (config.image_size, config.image_size)
    smaller = (F.interpolate(part, size, mode="bilinear", antialias=True, align_corners=False) for part in parts)
    images = torch.cat([(part.mean(1, keepdim=True) * 255).round().byte() for part in smaller])
    labels = torch.tensor(table[load_info(dataset)["labels"]].to_numpy(dtype=float)).float()
    joint = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clip = CLIPModel(joint).train().to(device)
        torch.manual_seed(config.seed)
        widths = (text.projection_dim, text.projection_dim, text.hidden_size)
        readers = nn.ModuleList(nn.Linear(width, labels.shape[1]) for width in widths)
    trained = [*clip.parameters(), *readers.to(device).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=1e-2, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    for step in tqdm(range(config.steps), desc="CLIP"):
        rows = torch.randint(len(table), (config.batch_size,), generator=generator)
        # A fresh seed per step, so that an image meets many captions.
        drawn = sample_captions(dataset, table.iloc[rows.tolist()], f"{config.seed}:{step}", 1, 0.5)
        texts = [captions[0] for captions in drawn]
        tokens = pipeline.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        output = clip(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=images[rows].to(device).float().div(127.5).sub(1).expand(-1, 3, -1, -1),
        )
        same = torch.tensor([[float(a == b) for b in texts] for a in texts])
        target = (same / same.sum(1, keepdim=True)).to(device)
        logits = output.logits_per_image
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        words = output.text_model_output.last_hidden_state * tokens.attention_mask[..., None]
        states = (
            output.vision_model_output.pooler_output,
            output.text_model_output.pooler_output,
            words.sum(1) / tokens.attention_mask.sum(1, keepdim=True),
        )
        known = labels[rows].to(device)
        reading = [_known_bce(head(state), known) for head, state in zip(readers, states, strict=True)]
        (contrast + torch.stack(reading).sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            read = [f"{value.item():.3f}" for value in reading]
            logger.info("CLIP step %d: contrast %.3f, labels %s", step + 1, contrast.item(), read)
    clip.eval().requires_grad_(False).to("cpu")
    pipeline.text_encoder.load_state_dict(clip.text_model.state_dict())
    return clip


def _known_bce(logits: Tensor, labels: Tensor) -> Tensor:
    known = torch.isfinite(labels) & (labels >= 0)
    loss = F.binary_cross_entropy_with_logits(logits, torch.where(known, labels, 0.0), known.float(), reduction="sum")
    return loss / known.sum().clamp(min=1)


CONTEXTS = 4  # captions of other labels in which a step compares the details
# Details of a label are at least as far from each other, as a share of what lies between "with" and "without" it.
APART = 0.6


def detail_tokens(tokenizer: Any, vocab: Vocabulary) -> list[int]:
    """Tokens of the vocabulary's details that no plain caption has, sorted; ValueError for a detail without one."""
    plain = {token for text in corpus(vocab, details=False) for token in tokenizer(text).input_ids}
    fresh = {word: set(tokenizer(word).input_ids) - plain for words in vocab.details.values() for word in words}
    for detail, tokens in fresh.items():
        if not tokens:
            raise ValueError(f"no word of {detail!r} is its own: plain captions have them all")
    return sorted(set().union(*fresh.values()))


def teach_details(pipeline: Pipe, vocab: Vocabulary, steps: int = 300, rate: float = 1e-2) -> None:
    """Train the embeddings of `detail_tokens` in place: details come `APART`, centred on their label."""
    encoder = pipeline.text_encoder.requires_grad_(False).eval()
    rows = torch.tensor(detail_tokens(pipeline.tokenizer, vocab), device=encoder.device)
    table = encoder.get_input_embeddings().weight
    (name,) = (name for name, value in encoder.named_parameters() if value is table)
    learned = table[rows].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([learned], lr=rate)
    rng = random.Random(0)
    for step in tqdm(range(steps), desc="detail words"):
        replaced = {name: table.index_copy(0, rows, learned)}
        losses = torch.zeros(2, device=table.device)
        for _ in range(CONTEXTS):
            for label in vocab.details:
                texts = _contrasts(label, vocab, rng)
                ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(table.device)
                states = torch.func.functional_call(encoder, replaced, (ids,))[0].float().mean(1)
                without, plain, details = states[0], states[1], states[2:]
                unit = (plain - without).norm()
                spread = (APART - torch.pdist(details) / unit).clamp(min=0).square().mean()
                centre = ((details.mean(0) - plain) / unit).square().sum()
                losses = losses + torch.stack((spread, centre)) / CONTEXTS
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info("detail words step %d: spread %.3f, centre %.3f", step + 1, *losses.tolist())
    with torch.no_grad():
        table[rows] = learned


def _contrasts(label: str, vocab: Vocabulary, rng: random.Random) -> list[str]:
    """Captions without a label, with it, and with each of its details; the other labels are drawn at random."""
    clauses = [Clause(other, vocab.phrase(other), rng.random() < 0.5) for other in vocab.stated if rng.random() < 0.7]
    others = [clause for clause in clauses if clause.label != label]
    place = rng.randint(0, len(others))
    own = [Clause(label, phrase, True) for phrase in (vocab.phrase(label), *vocab.details[label])]
    own.insert(0, replace(own[0], present=False))
    return [explicit(Statement(vocab.subject, (*others[:place], c, *others[place:]), False, vocab.title)) for c in own]
