"""Prompt-to-prompt: an attention processor that gives an edit the source image's attention (Hertz et al., 2023).

A controlled U-Net call has a source row per image, a negative row per edit that is guided at this step, and a target
row per edit. In the cross window a target's maps are made of the source's and its own, token by token. In the self
window a target takes the source's queries and keys with its own values: injected maps, but in a fused kernel.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

SELF_MAX_TOKENS = 32 * 32  # queries of the finest self-attention layer that takes the source's, as in the references


@dataclass
class WordMaps:
    """Running sums of the cross-attention to some tokens of source and target, by number of queries.

    `source_tokens` and `target_tokens` are (K, L) masks. Layers of more than `max_queries` queries are left out: their
    probabilities are expensive to write out and say little about where a word is.
    """

    source_tokens: Tensor
    target_tokens: Tensor
    max_queries: int
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add one layer's probabilities, each (K, heads, queries, L)."""
        queries = source.shape[2]
        dtype = torch.promote_types(source.dtype, torch.float32)
        both = ((source.to(dtype), self.source_tokens.to(dtype)), (target.to(dtype), self.target_tokens.to(dtype)))
        maps = torch.stack([torch.einsum("nhql,nl->nq", part, tokens) / part.shape[1] for part, tokens in both], dim=1)
        self.sums[queries] = self.sums[queries] + maps if queries in self.sums else maps
        self.counts[queries] = self.counts.get(queries, 0) + 1

    def mean(self, height: int, width: int) -> Tensor:
        """Mean attention over steps and layers at latent resolution, (K, 2, height, width)."""
        if not self.sums:
            raise ValueError(f"no cross-attention layer with at most {self.max_queries} queries was recorded")
        size, found = (height, width), self.sums.items()
        images = (maps.unflatten(2, grid(queries, *size)) / self.counts[queries] for queries, maps in found)
        larger = [F.interpolate(image, size, mode="bilinear", align_corners=False) for image in images]
        return torch.stack(larger).mean(0)

    def continue_from(self, before: "WordMaps", rows: Sequence[int]) -> None:
        """Take the sums of these `rows` of `before`, one for each edit; rows may repeat."""
        self.sums = {queries: maps[list(rows)] for queries, maps in before.sums.items()}
        self.counts = before.counts


@dataclass
class Controller:
    """What the processor does at the current `step` (0 is the noisiest), for K edits of N images.

    Edited cross maps are the source's times `transfer` (K, L, L) plus the target's times `own` (K, L). The other fields
    have one value per edit: its cross maps are edited in its first `cross_steps` steps, layers of at most
    `SELF_MAX_TOKENS` queries take the source's self-attention in its first `self_steps` steps, it has a negative row in
    its `guided_steps`, and `parents` holds the index of its image.
    """

    transfer: Tensor
    own: Tensor
    cross_steps: Sequence[int]
    self_steps: Sequence[int]
    guided_steps: Sequence[range]
    parents: Sequence[int]
    maps: WordMaps
    step: int = 0
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def guided(self) -> tuple[int, ...]:
        """The edits with a negative row at this step, in the order of these rows."""
        return tuple(edit for edit, steps in enumerate(self.guided_steps) if self.step in steps)

    @property
    def parts(self) -> tuple[int, int, int]:
        """The numbers of source, negative and target rows of a call at this step."""
        return max(self.parents) + 1, len(self.guided), len(self.parents)

    def edits_cross(self) -> bool:
        """Whether the cross-attention of any edit is edited at this step."""
        return any(self.step < steps for steps in self.cross_steps)

    def injects_self(self, queries: int) -> tuple[bool, ...]:
        """For each edit, whether a self-attention layer of this many queries takes the source's at this step."""
        return tuple(self.step < steps and queries <= SELF_MAX_TOKENS for steps in self.self_steps)

    def edit_cross(self, source: Tensor, target: Tensor) -> Tensor:
        """The targets' edited probabilities, made of their sources' and their own; all (K, heads, queries, L)."""
        transfer, own = self.transfer.to(source.dtype), self.own.to(source.dtype)
        crossed = [self.step < steps for steps in self.cross_steps]
        if not all(crossed):
            active = torch.tensor(crossed, device=source.device)[:, None]
            transfer, own = transfer * active[:, None, :], torch.where(active, own, 1)
        return source @ transfer[:, None] + target * own[:, None, None, :]

    def of_parents(self, rows: Tensor) -> Tensor:
        """Rows of the N images, repeated for each of their edits: (N, ...) -> (K, ...)."""
        return rows if tuple(self.parents) == tuple(range(len(rows))) else rows[self.index(self.parents)]

    def query_rows(self, queries: int) -> tuple[Tensor | slice, Tensor | slice]:
        """Rows of which a self-attention layer computes queries and keys, and for each row which of these it uses."""
        injected = self.injects_self(queries)
        if not any(injected):
            return slice(None), slice(None)
        sources, negatives, targets = self.parts
        used = list(range(sources + negatives + targets))
        for edit, parent in enumerate(self.parents):
            if injected[edit]:
                used[sources + negatives + edit] = parent
        computed = sorted(set(used))
        return self.index(computed), self.index([computed.index(row) for row in used])

    def index(self, rows: Sequence[int]) -> Tensor:
        """Row numbers as a tensor, copied to the device once."""
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, dtype=torch.long, device=self.transfer.device)
        return self._indices[key]


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
        parts = self.controller.parts
        if len(hidden_states) != sum(parts):
            needed = f"{' + '.join(map(str, parts))} rows (sources, negatives, targets)"
            raise ValueError(f"a controlled call needs {needed}, got {len(hidden_states)}")
        if attention_mask is not None:
            raise ValueError("attention masks are not supported in a controlled U-Net call")
        if encoder_hidden_states is None:
            computed, used = self.controller.query_rows(hidden_states.shape[1])
            seen = hidden_states[computed]
            query, key, value = _heads(attn, attn.to_q(seen), attn.to_k(seen), attn.to_v(hidden_states))
            attended = _attend(attn, query[used], key[used], value)  # (rows, heads, queries, C / heads)
        else:
            attended = self._cross_attention(attn, hidden_states, encoder_hidden_states)
        attended = attended.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](attended))

    def _cross_attention(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> Tensor:
        """(rows, queries, C), (rows, L, D) -> (rows, heads, queries, C / heads)."""
        query, key, value = _heads(attn, attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        control = self.controller
        record = hidden_states.shape[1] <= control.maps.max_queries
        if not (record or control.edits_cross()):
            return _attend(attn, query, key, value)

        queries, keys, values = (part.split(control.parts) for part in (query, key, value))
        source, target = (_probabilities(attn, queries[part], keys[part]) for part in (0, 2))
        handed = control.of_parents(source)
        if control.edits_cross():
            target = control.edit_cross(handed, target)
        if record:
            control.maps.add(handed, target)
        return torch.cat([source @ values[0], _attend(attn, queries[1], keys[1], values[1]), target @ values[2]])


@contextmanager
def controlled(unet: UNet2DConditionModel, controller: Controller) -> Iterator[PromptToPromptProcessor]:
    """Control every attention layer of `unet`; on leaving, the old processors always come back.

    Where edits fork, set `controller` of the yielded processor. ValueError for layers of other families than Stable
    Diffusion 1 and 2 and for processors with weights (an IP-Adapter); RuntimeError if a call left out a layer.
    """
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise ValueError("this U-Net has no attention layer that could be controlled")
    for name, layer in layers.items():
        if isinstance(layer.processor, nn.Module) and any(True for _ in layer.processor.parameters()):
            raise ValueError(f"{name} ({type(layer.processor).__name__}) has weights of its own and cannot be replaced")
        norms = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
        if layer.residual_connection or layer.rescale_output_factor != 1 or any(norm is not None for norm in norms):
            raise ValueError(f"{name} is not an attention layer of Stable Diffusion 1.x or 2.x")
    before = dict(unet.attn_processors)
    processor = PromptToPromptProcessor(controller)
    unet.set_attn_processor(processor)
    try:
        yield processor
        if missing := [name for name, layer in layers.items() if id(layer) not in processor.seen]:
            raise RuntimeError(f"{len(missing)} attention layers were not controlled, among them {missing[0]}")
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


def _heads(attn: Attention, *projected: Tensor) -> list[Tensor]:
    """Each (B, tokens, C) -> (B, heads, tokens, C / heads)."""
    return [attn.head_to_batch_dim(part, out_dim=4) for part in projected]


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=attn.scale)


def _probabilities(attn: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Softmax at least in float32, whatever the dtype; (N, heads, queries, tokens)."""
    scores = query @ key.transpose(-1, -2) * attn.scale
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
