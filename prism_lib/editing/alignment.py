"""Which token of the source prompt speaks for which token of the target prompt.

Prompt-to-prompt hands the source image's cross-attention maps to the target prompt, token by token, so it has
to know which tokens belong together. Words are found by the tokenizer's character offsets: phrases of several
words, words of several tokens and punctuation need no special case, and a word that has no token is an error
instead of an edit that silently does nothing.

Padding is aligned with padding only. Aligning it by index, as the reference implementations do, gives the
padding behind a shortened prompt the maps of the words that were removed, and so draws the deleted object
again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # plans check alignments by name, and need no transformers
    from transformers import PreTrainedTokenizerBase

ALIGNMENTS = ("refine", "replace")


@dataclass(frozen=True)
class Alignment:
    """How target maps are made of source maps: edited[j] = sum_i source[i] transfer[i, j] + own[j] target[j].

    `transfer` is (L, L) and `own` (L,), over the L tokens of a padded prompt. With "refine" a column of
    `transfer` holds a single one or nothing; with "replace" the tokens of a word share the maps of the word
    that they replace.
    """

    transfer: Tensor
    own: Tensor


def align(
    tokenizer: PreTrainedTokenizerBase, source: str, target: str, length: int, method: str = "refine"
) -> Alignment:
    """Align two prompts that the text encoder sees as `length` tokens each (Hertz et al., ICLR 2023).

    "refine" keeps the maps of the tokens that both prompts share, in order, and leaves the new ones to
    themselves; "replace" swaps words one for one and needs prompts of equally many words.
    """
    if method not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {method!r}; known: {', '.join(ALIGNMENTS)}")
    source_ids, target_ids = token_ids(tokenizer, source, length), token_ids(tokenizer, target, length)
    transfer = torch.zeros(length, length)
    if method == "refine":
        for i, j in _common_tokens(source_ids, target_ids):
            transfer[i, j] = 1
    else:
        for old, new in _word_pairs(tokenizer, source, target):
            _replace_word(transfer, old, new)
        transfer[0, 0] = transfer[len(source_ids) - 1, len(target_ids) - 1] = 1
    _align_padding(transfer, len(source_ids), len(target_ids))
    return Alignment(transfer, (transfer.sum(0) == 0).float())


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> list[int]:
    """The tokens of a prompt, begin and end but no padding; raises if they are more than `length`."""
    ids = list(tokenizer(prompt).input_ids)
    if len(ids) > length:
        raise ValueError(f"prompt of {len(ids)} tokens, but the text encoder reads {length}: {prompt!r}")
    return ids


def word_mask(tokenizer: PreTrainedTokenizerBase, prompt: str, words: Sequence[str], length: int) -> Tensor:
    """A (length,) mask, 1 at every token of every occurrence of `words` (words or phrases) in a prompt."""
    mask = torch.zeros(length)
    for word in words:
        mask[token_span(tokenizer, prompt, word)] = 1
    return mask


def token_span(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[int]:
    """Indices of the tokens of a word or phrase in a prompt, all its occurrences, whatever its case.

    Raises ValueError if the word does not occur as a word of its own, or if no token stands for it.
    """
    pattern = r"\s+".join(map(re.escape, word.split()))
    found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)) if pattern else []
    if not found:
        raise ValueError(f"the word {word!r} does not occur in the prompt {prompt!r}")
    offsets = _offsets(tokenizer, prompt)
    inside = [any(start < match.end() and stop > match.start() for match in found) for start, stop in offsets]
    span = [index for index, hit in enumerate(inside) if hit]
    if not span:
        raise ValueError(f"the word {word!r} has no token in the prompt {prompt!r}")
    return span


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[tuple[int, int]]:
    """Character range of each token; begin and end of text get empty ranges."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    ranges = zip(encoded["offset_mapping"], special, strict=True)
    return [(0, 0) if is_special else (int(start), int(stop)) for (start, stop), is_special in ranges]


def _common_tokens(source: list[int], target: list[int]) -> list[tuple[int, int]]:
    """Longest common subsequence as index pairs: Needleman-Wunsch with gap 0, match 1, mismatch -1."""
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            match = best[i + 1][j + 1] + 1 if source[i] == target[j] else 0
            best[i][j] = max(match, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        if source[i] == target[j] and best[i][j] == best[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def _word_pairs(tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> list[tuple[list[int], list[int]]]:
    """Token indices of the n-th word of either prompt, for every n."""
    old, new = _words(tokenizer, source), _words(tokenizer, target)
    if len(old) != len(new):
        raise ValueError(
            f"replacing words needs prompts of equally many words, got {len(old)} and {len(new)}: "
            f"{source!r}, {target!r}"
        )
    return list(zip(old, new, strict=True))


def _words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[list[int]]:
    offsets = _offsets(tokenizer, prompt)
    words = [match.span() for match in re.finditer(r"\S+", prompt)]
    return [
        [index for index, (start, stop) in enumerate(offsets) if start < last and stop > first] for first, last in words
    ]


def _replace_word(transfer: Tensor, old: list[int], new: list[int]) -> None:
    """Equally many tokens take over one by one; otherwise each new one gets an equal share of the old."""
    if len(old) == len(new):
        transfer[old, new] = 1
        return
    for j in new:
        transfer[old, j] = 1 / len(new)


def _align_padding(transfer: Tensor, source_length: int, target_length: int) -> None:
    """The n-th padding token takes the map of the n-th one of the source, surplus ones that of the last."""
    length = len(transfer)
    if source_length == length:
        return
    for n, j in enumerate(range(target_length, length)):
        transfer[min(source_length + n, length - 1), j] = 1
