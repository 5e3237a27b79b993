"""Which tokens of a source prompt correspond to which tokens of a target prompt, for prompt-to-prompt.

Padding is aligned with padding only: aligned by index, as in the reference implementations, the padding behind a
shortened prompt takes the maps of the removed words, and the removed object is drawn again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prism_lib.language.edits import find_phrase


def align(tokenizer: PreTrainedTokenizerBase, source: str, target: str, length: int) -> Tensor:
    """How target maps are made of source maps: edited[j] = sum_i source[i] transfer[i, j]; (length, length).

    Tokens that both prompts share, in order, take the source's maps. A token whose column is 0 keeps its own map: the
    refinement of Hertz et al. (ICLR 2023).
    """
    source_ids, target_ids = token_ids(tokenizer, source, length), token_ids(tokenizer, target, length)
    transfer = torch.zeros(length, length)
    for i, j in _common_tokens(source_ids, target_ids):
        transfer[i, j] = 1
    if len(source_ids) < length:  # n-th padding from n-th padding; surplus padding from the last
        for n, j in enumerate(range(len(target_ids), length)):
            transfer[min(len(source_ids) + n, length - 1), j] = 1
    return transfer


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> list[int]:
    """The tokens of a prompt with begin and end, without padding; ValueError for more than `length`."""
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
    """Token indices of all occurrences of a word or phrase in a prompt, in any case.

    ValueError if the prompt has no such word, or no token for it.
    """
    found = find_phrase(prompt, word)
    if not found:
        raise ValueError(f"the word {word!r} does not occur in the prompt {prompt!r}")
    offsets = _offsets(tokenizer, prompt)
    span = sorted({n for m in found for n, (start, stop) in enumerate(offsets) if start < m.end() and stop > m.start()})
    if not span:
        raise ValueError(f"the word {word!r} has no token in the prompt {prompt!r}")
    return span


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[tuple[int, int]]:
    """Character range of each token; begin and end of text get empty ranges."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True)
    ranges = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return [(0, 0) if special else (int(start), int(stop)) for (start, stop), special in ranges]


def _common_tokens(source: list[int], target: list[int]) -> list[tuple[int, int]]:
    """Longest common subsequence as index pairs: Needleman-Wunsch with gap 0, match 1, mismatch -1."""
    best: list[list[list[tuple[int, int]]]] = [[[] for _ in range(len(target) + 1)] for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            match = [(i, j), *best[i + 1][j + 1]] if source[i] == target[j] else []
            best[i][j] = max(match, best[i + 1][j], best[i][j + 1], key=len)
    return best[0][0]
