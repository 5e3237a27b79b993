"""Words of details: told apart once taught, and no other text moves."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from prism_lib.language.captions import corpus
from prism_lib.language.labels import PHANTOM
from prism_lib.models.pipeline import build_pipeline, encode_prompts, fingerprint, told_apart
from prism_lib.training import clip
from tests.tiny import tiny_config

SUBJECT = "chest x-ray"


def pipeline():
    return build_pipeline(tiny_config(), seed=0, captions=corpus(PHANTOM))


def deaf():
    """A pipeline to which all words of details are nearly the same, as to a text encoder that learned labels."""
    pipe = pipeline()
    rows, table = clip.detail_tokens(pipe.tokenizer, PHANTOM), pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[rows] = table[rows].mean(0) + table[rows] / 100
    return pipe


def nearest(pipe):
    """The least distance between two details of one label, as a share of with to without."""
    pairs = [pair for details in PHANTOM.details.values() for pair in combinations(details, 2)]
    return min(told_apart(pipe, one, other, SUBJECT) for one, other in pairs)


def test_only_words_that_no_plain_caption_has_are_taught():
    tokenizer = pipeline().tokenizer
    words = {tokenizer.decode(token).strip() for token in clip.detail_tokens(tokenizer, PHANTOM)}
    assert {"left", "right", "bilateral", "pacemaker", "tube"} <= words
    assert not {"pleural", "effusion", "with", "and", "devices"} & words


def test_details_come_apart_and_all_other_text_stays_to_the_bit():
    pipe = deaf()
    plain = corpus(PHANTOM, details=False)
    before, apart = encode_prompts(pipe, plain), nearest(pipe)
    weights = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    clip.teach_details(pipe, PHANTOM, steps=100, rate=0.05)
    assert torch.equal(encode_prompts(pipe, plain), before)
    assert apart < 0.1 and nearest(pipe) > 0.3
    changed = [name for name, value in pipe.text_encoder.state_dict().items() if not torch.equal(value, weights[name])]
    assert len(changed) == 1 and "token_embedding" in changed[0]
    again = deaf()
    clip.teach_details(again, PHANTOM, steps=100, rate=0.05)
    assert fingerprint(again) == fingerprint(pipe)


def test_a_detail_without_a_word_of_its_own_is_named():
    vocab = replace(PHANTOM, details={"Pleural Effusion": ("pleural effusion with cardiomegaly",)}, sided=())
    with pytest.raises(ValueError, match="no word of 'pleural effusion with cardiomegaly' is its own"):
        clip.detail_tokens(pipeline().tokenizer, vocab)
