"""Prompt-to-prompt: an attention processor that gives an edit the source image's attention (Hertz et al., 2023).

A controlled U-Net call holds one row per image for its source, then one for the negative prompt of each edit that is
guided at this step, and one per edit for its target. Several edits of one image share its source row. In their windows

- cross-attention of the target is made of the source's maps and its own, as an `Alignment` says, times a weight per
  token. Probabilities are written out, but only in layers and steps that need them;
- self-attention of the target uses the source's queries and keys with its own values. That equals injecting the
  source's probabilities and stays a fused kernel.

`WordMaps` sums up where the edit's words looked, for masks. The step is set explicitly, never counted from layer calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from prism_lib.editing.alignment import Alignment

SELF_MAX_TOKENS = 32 * 32  # queries of the finest self-attention layer that takes the source's, as in the references


@dataclass
class WordMaps:
    """Running sums of the cross-attention paid to some tokens of source and target, by number of queries.

    `source_tokens` and `target_tokens` are (N, L) masks. Layers with more than `max_queries` queries are left out: they
    are slow to write out and say little about where a word is.
    """

    source_tokens: Tensor
    target_tokens: Tensor
    max_queries: int
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def wants(self, queries: int) -> bool:
        """Whether a layer with this many queries is recorded."""
        return queries <= self.max_queries

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add one layer's probabilities, each (N, heads, queries, L)."""
        queries = source.shape[2]
        dtype = torch.promote_types(source.dtype, torch.float32)
        maps = torch.stack(
            [
                torch.einsum("nhql,nl->nq", probabilities.to(dtype), tokens.to(dtype)) / probabilities.shape[1]
                for probabilities, tokens in ((source, self.source_tokens), (target, self.target_tokens))
            ],
            dim=1,
        )
        self.sums[queries] = self.sums[queries] + maps if queries in self.sums else maps
        self.counts[queries] = self.counts.get(queries, 0) + 1

    def select(self, rows: Tensor) -> WordMaps:
        """The maps of some edits, also repeated ones: what a fork takes along."""
        return replace(
            self,
            source_tokens=self.source_tokens[rows],
            target_tokens=self.target_tokens[rows],
            sums={queries: maps[rows] for queries, maps in self.sums.items()},
            counts=dict(self.counts),
        )

    def mean(self, height: int, width: int) -> Tensor:
        """Mean attention over steps and layers at latent resolution, (N, 2, height, width)."""
        if not self.sums:
            raise ValueError(f"no cross-attention layer with at most {self.max_queries} queries was recorded")
        images = [
            F.interpolate(
                maps.unflatten(2, grid(queries, height, width)) / self.counts[queries],
                size=(height, width),
                mode="bilinear",
                align_corners=False,
            )
            for queries, maps in self.sums.items()
        ]
        return torch.stack(images).mean(0)


@dataclass
class Controller:
    """What the processor does at the current `step` (0 is the noisiest), for K edits of N images.

    `transfer` (K, L, L) and `own` (K, L) build the edited cross maps; token weights are already in them. A token is
    edited in its first `cross_steps` (K, L) steps. Self-attention is injected in an edit's
    first `self_steps` steps in layers of at most `SELF_MAX_TOKENS` queries, into the target row alone. An edit has a
    negative row in the steps of its `guided_steps`. `parents` holds the image of each edit.
    """

    transfer: Tensor
    own: Tensor
    cross_steps: Tensor
    self_steps: tuple[int, ...]
    guided_steps: tuple[range, ...]
    parents: tuple[int, ...]
    maps: WordMaps | None = None
    step: int = 0
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        alignments: Sequence[Alignment],
        weights: Tensor,
        device: torch.device,
        *,
        cross_steps: int | Tensor = 0,
        self_steps: int | Sequence[int] = 0,
        guided_steps: Sequence[range] = (),
        parents: Sequence[int] | None = None,
        maps: WordMaps | None = None,
        step: int = 0,
    ) -> Controller:
        """A controller of one alignment per edit; `weights` (K, L) multiply the edited maps (reweight).

        Settings are one for all edits or one each; `cross_steps` may also be (K, L), one per token.
        Without `guided_steps` every step is guided.
        """
        edits = len(alignments)
        transfer = torch.stack([alignment.transfer for alignment in alignments]) * weights[:, None, :]
        own = torch.stack([alignment.own for alignment in alignments]) * weights
        return cls(
            transfer.to(device),
            own.to(device),
            torch.as_tensor(cross_steps).expand(weights.shape),
            _each(self_steps, edits),
            tuple(guided_steps) or (range(sys.maxsize),) * edits,
            tuple(range(edits)) if parents is None else tuple(parents),
            maps,
            step,
        )

    @property
    def images(self) -> int:
        """The number of source rows N."""
        return max(self.parents) + 1

    @property
    def edits(self) -> int:
        """The number of edits K, the rows of a controlled call that are targets."""
        return len(self.parents)

    @property
    def guided(self) -> tuple[int, ...]:
        """The edits with a negative row at this step, in the order of these rows."""
        return tuple(edit for edit, steps in enumerate(self.guided_steps) if self.step in steps)

    @property
    def guided_rows(self) -> Tensor:
        """`guided` as an index into rows of edits."""
        return self._index(self.guided)

    def select(self, rows: Sequence[int]) -> Controller:
        """The controller of some edits, also repeated ones, with the maps they have collected."""
        index = self._index(tuple(rows))
        return replace(
            self,
            transfer=self.transfer[index],
            own=self.own[index],
            cross_steps=self.cross_steps[list(rows)],
            self_steps=tuple(self.self_steps[row] for row in rows),
            guided_steps=tuple(self.guided_steps[row] for row in rows),
            parents=tuple(self.parents[row] for row in rows),
            maps=None if self.maps is None else self.maps.select(index),
            _indices={},
        )

    def edits_cross(self) -> bool:
        """Whether cross-attention of any token is edited at this step."""
        return bool(self._active().any())

    def injects_self(self, queries: int) -> tuple[bool, ...]:
        """Which edits take the source's attention in a self-attention layer with this many queries, at this step."""
        return tuple(self.step < steps and queries <= SELF_MAX_TOKENS for steps in self.self_steps)

    def edit_cross(self, source: Tensor, target: Tensor) -> Tensor:
        """The targets' probabilities, made of their sources' and their own; both (K, heads, queries, L)."""
        transfer, own = self.transfer.to(source.dtype), self.own.to(source.dtype)
        active = self._active()
        if not bool(active.all()):
            active = active.to(source.device)
            transfer, own = transfer * active[:, None, :], torch.where(active, own, 1)
        return source @ transfer[:, None] + target * own[:, None, None, :]

    def of_parents(self, rows: Tensor) -> Tensor:
        """Something of the N images, repeated for each of their edits: (N, ...) -> (K, ...)."""
        return rows if self.parents == tuple(range(len(rows))) else rows[self._index(self.parents)]

    def looking(self, queries: int) -> tuple[Tensor, Tensor]:
        """Which rows look around for themselves in a self-attention layer, and by which of these each row sees."""
        first_target = self.images + len(self.guided)
        eyes = list(range(first_target + self.edits))
        for edit, injected in enumerate(self.injects_self(queries)):
            if injected:
                eyes[first_target + edit] = self.parents[edit]
        own = tuple(sorted(set(eyes)))
        place = {row: position for position, row in enumerate(own)}
        return self._index(own), self._index(tuple(place[row] for row in eyes))

    def _active(self) -> Tensor:
        return self.step < self.cross_steps

    def _index(self, rows: tuple[int, ...]) -> Tensor:
        """Row numbers as a tensor, copied to the device once."""
        if rows not in self._indices:
            self._indices[rows] = torch.tensor(rows, dtype=torch.long, device=self.transfer.device)
        return self._indices[rows]


class PromptToPromptProcessor:
    """diffusers attention processor for every layer of a U-Net, steered by a `Controller`."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.seen: set[int] = set()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention as in diffusers' AttnProcessor2_0, except for the rows of an edit."""
        self.seen.add(id(attn))
        parts = self.controller.images, len(self.controller.guided), self.controller.edits
        if len(hidden_states) != sum(parts):
            raise ValueError(
                f"a controlled call needs {' + '.join(map(str, parts))} rows (sources, negatives, targets), "
                f"got {len(hidden_states)}"
            )
        if attention_mask is not None:
            raise ValueError("attention masks are not supported in a controlled U-Net call")
        if encoder_hidden_states is None:
            attended = self._self_attention(attn, hidden_states)
        else:
            attended = self._cross_attention(attn, hidden_states, encoder_hidden_states)

        attended = attended.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](attended))

    def _self_attention(self, attn: Attention, hidden_states: Tensor) -> Tensor:
        """(rows, queries, C) -> (rows, heads, queries, C / heads)."""
        value = _heads(attn, attn.to_v(hidden_states))
        if not any(self.controller.injects_self(hidden_states.shape[1])):
            query, key = _heads(attn, attn.to_q(hidden_states)), _heads(attn, attn.to_k(hidden_states))
            return _attend(attn, query, key, value)
        looking, eyes = self.controller.looking(hidden_states.shape[1])
        seen = hidden_states[looking]
        query, key = _heads(attn, attn.to_q(seen))[eyes], _heads(attn, attn.to_k(seen))[eyes]
        return _attend(attn, query, key, value)

    def _cross_attention(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> Tensor:
        """(rows, queries, C), (rows, L, D) -> (rows, heads, queries, C / heads)."""
        query, key, value = (
            _heads(attn, part) for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        control = self.controller
        record = control.maps is not None and control.maps.wants(hidden_states.shape[1])
        if not (record or control.edits_cross()):
            return _attend(attn, query, key, value)

        n, edited = control.images, control.images + len(control.guided)
        source = _probabilities(attn, query[:n], key[:n])
        target = _probabilities(attn, query[edited:], key[edited:])
        handed = control.of_parents(source)
        if control.edits_cross():
            target = control.edit_cross(handed, target)
        if record and control.maps is not None:
            control.maps.add(handed, target)
        unedited = _attend(attn, query[n:edited], key[n:edited], value[n:edited])
        return torch.cat([source @ value[:n], unedited, target @ value[edited:]])


@contextmanager
def controlled(unet: UNet2DConditionModel, controller: Controller) -> Iterator[PromptToPromptProcessor]:
    """Give every attention layer of `unet` to the controller; the old processors come back whatever happens.

    The processor that this yields takes another `controller` where edits fork.

    Raises ValueError for layers that are not those of Stable Diffusion 1.x or 2.x, or whose processor has weights of
    its own (an IP-Adapter, say), and RuntimeError on leaving if the U-Net did not pass through all attention layers.
    """
    before = dict(unet.attn_processors)
    _check_replaceable(unet)
    processor = PromptToPromptProcessor(controller)
    unet.set_attn_processor(processor)
    try:
        yield processor
        _check_all_seen(unet, processor)
    finally:
        unet.set_attn_processor(dict(before))  # set_attn_processor empties the dict that it is given


def grid(queries: int, height: int, width: int) -> tuple[int, int]:
    """The (rows, columns) of a layer with this many queries in a U-Net that keeps halving (height, width)."""
    rows, columns = height, width
    while rows * columns > queries:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != queries:
        raise ValueError(f"a layer of {queries} queries does not belong to latents of {height} x {width}")
    return rows, columns


def _each(setting: Any, edits: int) -> tuple[Any, ...]:
    """One setting per edit."""
    return tuple(setting) if isinstance(setting, Sequence) else (setting,) * edits


def _check_replaceable(unet: UNet2DConditionModel) -> None:
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise ValueError("this U-Net has no attention layer that could be controlled")
    for name, layer in layers.items():
        if isinstance(layer.processor, nn.Module) and any(True for _ in layer.processor.parameters()):
            raise ValueError(f"{name} ({type(layer.processor).__name__}) has weights of its own and cannot be replaced")
        norms = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
        if layer.residual_connection or layer.rescale_output_factor != 1 or any(norm is not None for norm in norms):
            raise ValueError(f"{name} is not an attention layer of Stable Diffusion 1.x or 2.x")


def _check_all_seen(unet: UNet2DConditionModel, processor: PromptToPromptProcessor) -> None:
    missing = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and id(module) not in processor.seen
    ]
    if missing:
        raise RuntimeError(f"{len(missing)} attention layers were not controlled, among them {missing[0]}")


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    """(B, tokens, C) -> (B, heads, tokens, C / heads)."""
    return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=attn.scale)


def _probabilities(attn: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Softmax at least in float32, whatever the dtype; (N, heads, queries, tokens)."""
    scores = query @ key.transpose(-1, -2) * attn.scale
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
