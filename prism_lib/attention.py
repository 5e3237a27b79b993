"""Prompt-to-prompt: one attention processor that lets an edit borrow the source image's attention (Hertz et
al., 2023).

A controlled U-Net call holds three rows per image, in this order: the source (conditional), the negative
prompt and the target (conditional), the last two on the edited latents. Inside their windows of steps

- cross-attention of the target is put together from the source's maps and its own, as an `Alignment` says,
  times a weight per token. There are few tokens, so probabilities are written out, but only in layers and
  steps that need them;
- self-attention of the target uses the source's queries and keys with its own values. That equals injecting
  the source's probabilities and stays a fused kernel; the target's own queries and keys are not even
  projected.

`WordMaps` sums up, over steps and layers, where the edit's words looked: material for masks. Nothing here
assumes a resolution, a number of channels or of tokens. The step is set explicitly and never counted from
layer calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from prism_lib.alignment import Alignment

ROWS = 3  # source, negative, target


@dataclass
class WordMaps:
    """Running sums of the cross-attention paid to some tokens, source and target, one sum per number of
    queries.

    `source_tokens` and `target_tokens` are (N, L) masks. Layers with more than `max_queries` queries are left
    out: fine layers are slow to write out and say little about where a word is.
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
        maps = torch.stack(
            [
                torch.einsum("nhql,nl->nq", probabilities.float(), tokens) / probabilities.shape[1]
                for probabilities, tokens in ((source, self.source_tokens), (target, self.target_tokens))
            ],
            dim=1,
        )
        self.sums[queries] = self.sums[queries] + maps if queries in self.sums else maps
        self.counts[queries] = self.counts.get(queries, 0) + 1

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
    """What the processor does at the current `step` (0 is the noisiest), for N images of a batch.

    `transfer` (N, L, L) and `own` (N, L) build the edited cross maps of the first `cross_steps` steps; token
    weights are already in them. Self-attention is injected in the first `self_steps` steps in layers of at
    most `self_max_tokens` queries, into the target row alone as the reference implementations do, or with
    `inject_negative` into the negative row too.
    """

    transfer: Tensor
    own: Tensor
    cross_steps: int = 0
    self_steps: int = 0
    self_max_tokens: int = 32 * 32
    inject_negative: bool = False
    maps: WordMaps | None = None
    step: int = 0

    @classmethod
    def of(
        cls, alignments: Sequence[Alignment], weights: Tensor, device: torch.device, **settings: object
    ) -> Controller:
        """A controller for one alignment per image; `weights` (N, L) multiply the edited maps (reweight)."""
        transfer = torch.stack([alignment.transfer for alignment in alignments]) * weights[:, None, :]
        own = torch.stack([alignment.own for alignment in alignments]) * weights
        return cls(transfer.to(device), own.to(device), **settings)  # type: ignore[arg-type]

    @property
    def images(self) -> int:
        """The number of images N; a controlled call has 3 N rows."""
        return len(self.transfer)

    def edits_cross(self) -> bool:
        """Whether cross-attention is edited at this step."""
        return self.step < self.cross_steps

    def injects_self(self, queries: int) -> bool:
        """Whether a self-attention layer with this many queries takes the source's attention at this step."""
        return self.step < self.self_steps and queries <= self.self_max_tokens

    def edit_cross(self, source: Tensor, target: Tensor) -> Tensor:
        """The target's probabilities, made of the source's and its own; both (N, heads, queries, L)."""
        transfer, own = self.transfer.to(source.dtype), self.own.to(source.dtype)
        return source @ transfer[:, None] + target * own[:, None, None, :]


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
        """Attention as in diffusers' AttnProcessor2_0, except for the three rows of an edit."""
        self.seen.add(id(attn))
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if spatial is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if len(hidden_states) != ROWS * self.controller.images:
            raise ValueError(
                f"a controlled call needs {ROWS} x {self.controller.images} rows, got {len(hidden_states)}"
            )
        if attention_mask is not None:
            raise ValueError("attention masks are not supported in a controlled U-Net call")
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            attended = self._self_attention(attn, hidden_states)
        else:
            attended = self._cross_attention(attn, hidden_states, encoder_hidden_states)

        attended = attended.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        attended = attn.to_out[1](attn.to_out[0](attended))
        if spatial is not None:
            attended = attended.transpose(1, 2).unflatten(2, spatial)
        if attn.residual_connection:
            attended = attended + residual
        return attended / attn.rescale_output_factor

    def _self_attention(self, attn: Attention, hidden_states: Tensor) -> Tensor:
        """(3N, queries, C) -> (3N, heads, queries, C / heads)."""
        injected = self.controller.injects_self(hidden_states.shape[1])
        looking = hidden_states
        if injected:
            kept = 1 if self.controller.inject_negative else 2
            looking = hidden_states[: kept * self.controller.images]
        query, key = _query(attn, looking), _key(attn, looking)
        if injected:
            query, key = self._with_source_rows(query), self._with_source_rows(key)
        return _attend(attn, query, key, _value(attn, hidden_states))

    def _with_source_rows(self, projected: Tensor) -> Tensor:
        """Fill up to three rows per image with copies of the source's."""
        images = self.controller.images
        missing = ROWS - len(projected) // images
        return torch.cat([projected, *[projected[:images]] * missing])

    def _cross_attention(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> Tensor:
        """(3N, queries, C), (3N, L, D) -> (3N, heads, queries, C / heads)."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = _query(attn, hidden_states), _key(attn, text), _value(attn, text)
        control = self.controller
        record = control.maps is not None and control.maps.wants(hidden_states.shape[1])
        if not (record or control.edits_cross()):
            return _attend(attn, query, key, value)

        n = control.images
        negative = slice(n, 2 * n)
        source = _probabilities(attn, query[:n], key[:n])
        target = _probabilities(attn, query[2 * n :], key[2 * n :])
        if control.edits_cross():
            target = control.edit_cross(source, target)
        if record and control.maps is not None:
            control.maps.add(source, target)
        unedited = _attend(attn, query[negative], key[negative], value[negative])
        return torch.cat([source @ value[:n], unedited, target @ value[2 * n :]])


@contextmanager
def controlled(unet: UNet2DConditionModel, controller: Controller) -> Iterator[Controller]:
    """Give every attention layer of `unet` to the controller; the old processors come back whatever happens.

    Raises ValueError for layers whose processor has weights of its own (an IP-Adapter, say), and RuntimeError
    on leaving if the U-Net ran without passing through all of its attention layers: then the edit was not
    what it seems.
    """
    before = dict(unet.attn_processors)
    _check_replaceable(before)
    processor = PromptToPromptProcessor(controller)
    unet.set_attn_processor(processor)
    try:
        yield controller
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


def _check_replaceable(processors: dict[str, object]) -> None:
    if not processors:
        raise ValueError("this U-Net has no attention layer that could be controlled")
    for name, processor in processors.items():
        if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
            raise ValueError(f"{name} ({type(processor).__name__}) has weights of its own and cannot be replaced")


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


def _query(attn: Attention, hidden_states: Tensor) -> Tensor:
    query = _heads(attn, attn.to_q(hidden_states))
    return query if attn.norm_q is None else attn.norm_q(query)


def _key(attn: Attention, hidden_states: Tensor) -> Tensor:
    key = _heads(attn, attn.to_k(hidden_states))
    return key if attn.norm_k is None else attn.norm_k(key)


def _value(attn: Attention, hidden_states: Tensor) -> Tensor:
    return _heads(attn, attn.to_v(hidden_states))


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=attn.scale)


def _probabilities(attn: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Softmax at least in float32, whatever the dtype; (N, heads, queries, tokens)."""
    scores = query @ key.transpose(-1, -2) * attn.scale
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
