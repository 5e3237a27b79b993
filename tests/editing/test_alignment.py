"""Token alignment: words by offsets, maps between prompts, and padding that stays padding."""

from __future__ import annotations

import pytest
import torch

from prism_lib.editing.alignment import align, token_ids, token_span, word_mask
from tests.tiny import SOURCE, TARGET, tiny_pipeline

LENGTH = 77


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_pipeline().tokenizer


def text_of(tokenizer, prompt, span):
    ids = tokenizer(prompt).input_ids
    pieces = tokenizer.convert_ids_to_tokens([ids[i] for i in span])
    return "".join(pieces).replace("</w>", " ").strip()


@pytest.mark.parametrize(
    ("prompt", "word", "found"),
    [
        (SOURCE, "support devices", "support devices"),
        (SOURCE, "Cardiomegaly", "cardiomegaly"),
        ("unseenword here", "unseenword", "unseenword"),
        ("Edema, effusion", "edema", "edema"),
        ("support   devices in place", "support devices", "support devices"),
        ("with a, with b", "with", "with with"),
    ],
)
def test_a_span_is_made_of_the_tokens_of_its_word(tokenizer, prompt, word, found):
    assert text_of(tokenizer, prompt, token_span(tokenizer, prompt, word)) == found


def test_words_of_several_tokens_are_spanned_whole(tokenizer):
    assert len(token_span(tokenizer, "unseenword here", "unseenword")) > 1


@pytest.mark.parametrize("word", ["pneumothorax", "cardio", "", "devices support"])
def test_a_word_that_is_not_in_the_prompt_is_refused(tokenizer, word):
    with pytest.raises(ValueError, match="does not occur in the prompt"):
        token_span(tokenizer, SOURCE, word)


def test_a_word_without_tokens_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("prism_lib.editing.alignment._offsets", lambda tokenizer, prompt: [(0, 0), (0, 0)])
    with pytest.raises(ValueError, match="has no token"):
        token_span(tokenizer, SOURCE, "cardiomegaly")


def test_word_mask_marks_all_words_and_nothing_else(tokenizer):
    mask = word_mask(tokenizer, SOURCE, ("cardiomegaly", "support devices"), LENGTH)
    marked = set(mask.nonzero().flatten().tolist())
    spans = {
        *token_span(tokenizer, SOURCE, "cardiomegaly"),
        *token_span(tokenizer, SOURCE, "support devices"),
    }
    assert marked == spans
    assert mask.shape == (LENGTH,)


def test_equal_prompts_align_as_the_identity(tokenizer):
    torch.testing.assert_close(align(tokenizer, SOURCE, SOURCE, LENGTH), torch.eye(LENGTH))


def test_new_words_are_left_to_themselves(tokenizer):
    transfer = align(tokenizer, SOURCE, TARGET, LENGTH)
    new = token_span(tokenizer, TARGET, "without")
    assert (transfer.sum(0) == 0).nonzero().flatten().tolist() == new


def test_shared_words_are_followed_across_an_insertion(tokenizer):
    target = SOURCE.replace("cardiomegaly", "severe cardiomegaly")
    transfer = align(tokenizer, SOURCE, target, LENGTH)
    old, new = (
        token_span(tokenizer, SOURCE, "support devices"),
        token_span(tokenizer, target, "support devices"),
    )
    assert old != new
    assert torch.equal(transfer[old][:, new], torch.eye(len(old)))


@pytest.mark.parametrize(
    ("source", "target"),
    [(SOURCE, "chest x-ray with cardiomegaly"), ("chest x-ray with cardiomegaly", SOURCE)],
)
def test_padding_never_takes_the_map_of_a_word(tokenizer, source, target):
    transfer = align(tokenizer, source, target, LENGTH)
    words, padding = len(token_ids(tokenizer, source, LENGTH)), len(token_ids(tokenizer, target, LENGTH))
    assert not transfer[:words, padding:].any()
    assert (transfer[:, padding:].sum(0) == 1).all()


def test_padding_without_a_counterpart_keeps_its_own_map(tokenizer):
    length = len(token_ids(tokenizer, SOURCE, LENGTH))
    transfer = align(tokenizer, SOURCE, "chest x-ray", length)
    assert not transfer[:, len(token_ids(tokenizer, "chest x-ray", length)) :].any()


def test_a_long_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text encoder reads 77"):
        align(tokenizer, SOURCE, "with " * 100, LENGTH)
