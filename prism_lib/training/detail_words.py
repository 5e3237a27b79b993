"""Teach a text encoder the words that only details use: "left", "pacemaker".

A small CLIP that learned to read labels reads labels: "left", "right" and "bilateral pleural effusion" come out nearly
the same, and a U-Net cannot show what its text does not say. Only the embeddings of words that occur in no plain
caption are trained here. Every text without them keeps its states bit for bit, and with them all that a U-Net knows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.language.captions import Clause, Statement, corpus, explicit
from prism_lib.language.labels import Vocabulary


@dataclass(frozen=True)
class DetailConfig:
    """Recipe of the embeddings; distances are shares of what lies between "with" and "without" the label."""

    steps: int = 300
    contexts: int = 4  # captions of other labels in which a step compares the details
    learning_rate: float = 1e-2
    apart: float = 0.6  # details of a label at least as far from each other
    centre_weight: float = 1.0  # of the distance between the label's plain phrase and the middle of its details
    seed: int = 0


def detail_tokens(tokenizer: Any, vocab: Vocabulary) -> list[int]:
    """Tokens of the vocabulary's details that no plain caption has, sorted.

    Raises ValueError for a detail whose words are all in use: it cannot be told from others without a change to them.
    """
    own = {detail for details in vocab.details.values() for detail in details}
    plain = {token for text in corpus(vocab, details=False) for token in tokenizer(text).input_ids}
    found: set[int] = set()
    for detail in sorted(own):
        fresh = set(tokenizer(detail).input_ids) - plain
        if not fresh:
            raise ValueError(f"no word of {detail!r} is its own: plain captions have them all")
        found |= fresh
    return sorted(found)


def teach_details(
    pipeline: StableDiffusionPipeline, vocab: Vocabulary, config: DetailConfig | None = None
) -> list[dict[str, float]]:
    """Train the embeddings of `detail_tokens` in place; returns the losses, one dict per 50 steps.

    A label's details move away from each other until they are ``apart``, and stay centred on its plain phrase.
    """
    config = config or DetailConfig()
    encoder = pipeline.text_encoder.requires_grad_(False).eval()
    rows = torch.tensor(detail_tokens(pipeline.tokenizer, vocab), device=encoder.device)
    table = encoder.get_input_embeddings().weight
    (name,) = (name for name, value in encoder.named_parameters() if value is table)
    learned = table[rows].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([learned], lr=config.learning_rate)
    rng, history = random.Random(config.seed), []
    for step in tqdm(range(config.steps), desc="detail words"):
        replaced = {name: table.index_copy(0, rows, learned)}
        losses = torch.zeros(2, device=table.device)
        for _ in range(config.contexts):
            for label in vocab.details:
                texts = _contrasts(label, vocab, rng)
                ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(table.device)
                states = torch.func.functional_call(encoder, replaced, (ids,))[0].float().mean(1)
                losses = losses + torch.stack(_losses(states, config.apart)) / config.contexts
        (losses[0] + config.centre_weight * losses[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            history.append({"step": step + 1, "spread": losses[0].item(), "centre": losses[1].item()})
    with torch.no_grad():
        table[rows] = learned
    return history


def _contrasts(label: str, vocab: Vocabulary, rng: random.Random) -> list[str]:
    """One caption without a label, with it, and with every one of its details; the other labels are drawn at random."""
    clauses = [Clause(other, vocab.phrase(other), rng.random() < 0.5) for other in vocab.stated if rng.random() < 0.7]
    others = [clause for clause in clauses if clause.label != label]
    place = rng.randint(0, len(others))
    own = [Clause(label, phrase, True) for phrase in (vocab.phrase(label), *vocab.details[label])]
    own.insert(0, replace(own[0], present=False))
    return [explicit(Statement(vocab.subject, (*others[:place], c, *others[place:]), False, vocab.title)) for c in own]


def _losses(states: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """What details lack of their distance, and how far their middle is off, for states of `_contrasts` (N, width)."""
    without, plain, details = states[0], states[1], states[2:]
    unit = (plain - without).norm()
    between = torch.pdist(details) / unit
    return (apart - between).clamp(min=0).square().mean(), ((details.mean(0) - plain) / unit).square().sum()
