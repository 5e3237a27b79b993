"""Prompt-to-prompt: the fast processor against full probabilities, and against no processor at all."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import nn

from prism_lib.editing import attention
from prism_lib.editing.alignment import align, word_mask
from prism_lib.editing.attention import Controller, PromptToPromptProcessor, WordMaps, controlled, grid
from prism_lib.models.pipeline import encode_prompts
from tests.tiny import SOURCE, TARGET, tiny_pipeline

IMAGES, LENGTH = 2, 77


@pytest.fixture(scope="module")
def unet():
    return tiny_pipeline().unet


@pytest.fixture(scope="module")
def rows():
    """Source, negative and target rows of two images, and their text."""
    source = torch.randn(IMAGES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    target = torch.randn(IMAGES, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = encode_prompts(tiny_pipeline(), [SOURCE] * IMAGES + [""] * IMAGES + [TARGET] * IMAGES)
    return torch.cat([source, target, target]), text


def word_maps(max_queries):
    return WordMaps(torch.ones(IMAGES, LENGTH), torch.ones(IMAGES, LENGTH), max_queries)


def controller(transfer=None, weights=1.0, cross_steps=0, self_steps=0, maps=None, step=0):
    """One edit of each image, guided at every step; without `maps` nothing is recorded."""
    transfer = align(tiny_pipeline().tokenizer, SOURCE, TARGET, LENGTH) if transfer is None else transfer
    return Controller(
        transfer=(transfer * weights).expand(IMAGES, LENGTH, LENGTH),
        own=((transfer.sum(0) == 0) * weights).expand(IMAGES, LENGTH),
        cross_steps=[cross_steps] * IMAGES,
        self_steps=[self_steps] * IMAGES,
        guided_steps=[range(10)] * IMAGES,
        parents=range(IMAGES),
        maps=word_maps(0) if maps is None else maps,
        step=step,
    )


def run(unet, latents, text, control=None):
    with torch.no_grad():
        if control is None:
            return unet(latents, 500, encoder_hidden_states=text).sample
        with controlled(unet, control):
            return unet(latents, 500, encoder_hidden_states=text).sample


def test_outside_its_windows_the_controller_changes_nothing(unet, rows):
    plain = run(unet, *rows)
    control = controller(cross_steps=3, self_steps=3, step=3)
    torch.testing.assert_close(run(unet, *rows, control), plain, atol=1e-5, rtol=0)


def test_the_identity_controller_equals_no_controller(unet, rows):
    """Source and target alike, all maps handed over: nothing may change, whatever path is taken."""
    latents, text = (part[:IMAGES].repeat(3, *[1] * (part.ndim - 1)) for part in rows)
    control = controller(torch.eye(LENGTH), cross_steps=1, self_steps=1)
    torch.testing.assert_close(run(unet, latents, text, control), run(unet, latents, text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"cross_steps": 1}, {"self_steps": 1}, {"cross_steps": 1, "self_steps": 1}])
def test_only_the_target_row_is_edited(unet, rows, settings):
    plain, edited = run(unet, *rows), run(unet, *rows, controller(**settings))
    torch.testing.assert_close(edited[: 2 * IMAGES], plain[: 2 * IMAGES], atol=1e-5, rtol=0)
    assert (edited - plain)[2 * IMAGES :].abs().max() > 1e-4


def test_layers_finer_than_the_limit_keep_their_self_attention(unet, rows, monkeypatch):
    made = []
    for limit in (8 * 8, 16 * 16, 8 * 8 - 1):
        monkeypatch.setattr(attention, "SELF_MAX_TOKENS", limit)
        made.append(run(unet, *rows, controller(self_steps=1)))
    coarse, fine, none = made
    torch.testing.assert_close(none, run(unet, *rows), atol=1e-5, rtol=0)
    assert (coarse - none).abs().max() > 1e-5
    assert (fine - coarse).abs().max() > 1e-5


def test_injected_self_attention_equals_the_source_probabilities_on_the_target_values():
    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=2, dim_head=4)
    hidden = torch.randn(3 * IMAGES, 16, 8)
    processor = PromptToPromptProcessor(controller(self_steps=1))
    heads = [layer(hidden).unflatten(2, (2, 4)).transpose(1, 2).detach() for layer in (attn.to_q, attn.to_k, attn.to_v)]
    query, key, value = (part[:IMAGES] if n < 2 else part[2 * IMAGES :] for n, part in enumerate(heads))
    probabilities = (query @ key.transpose(2, 3) / 4**0.5).softmax(-1)
    expected = attn.to_out[0]((probabilities @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(processor(attn, hidden)[2 * IMAGES :], expected, atol=1e-6, rtol=0)


def test_reweighting_scales_the_maps_of_its_word_alone(unet, rows):
    marked = word_mask(tiny_pipeline().tokenizer, TARGET, ["support devices"], LENGTH)
    control, plain = controller(weights=1 + 2 * marked, cross_steps=1), controller(cross_steps=1)
    source, target = torch.rand(2, IMAGES, 2, 9, LENGTH).softmax(-1)
    ratio = control.edit_cross(source, target) / plain.edit_cross(source, target)
    torch.testing.assert_close(ratio, (1 + 2 * marked).expand_as(ratio))


def test_attention_to_all_tokens_sums_to_one_in_every_cell(unet, rows):
    maps = word_maps(16 * 16)
    run(unet, *rows, controller(maps=maps))
    assert set(maps.sums) == {16 * 16, 8 * 8}
    torch.testing.assert_close(maps.mean(16, 16), torch.ones(IMAGES, 2, 16, 16))


def test_word_maps_leave_out_fine_layers_and_need_at_least_one(unet, rows):
    maps = word_maps(8 * 8)
    run(unet, *rows, controller(maps=maps))
    assert set(maps.sums) == {8 * 8}
    with pytest.raises(ValueError, match="at most 3 queries"):
        word_maps(3).mean(16, 16)


def test_recording_does_not_change_the_prediction(unet, rows):
    recorded = run(unet, *rows, controller(maps=word_maps(16 * 16)))
    torch.testing.assert_close(recorded, run(unet, *rows), atol=1e-5, rtol=0)


def test_processors_come_back_after_an_exception(unet):
    before = unet.attn_processors
    assert all(isinstance(processor, AttnProcessor2_0) for processor in before.values())

    def interrupted():
        with controlled(unet, controller()):
            assert all(isinstance(p, PromptToPromptProcessor) for p in unet.attn_processors.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert unet.attn_processors == before


def test_a_layer_that_was_passed_by_is_an_error(unet):
    before = unet.attn_processors
    with (
        pytest.raises(RuntimeError, match="attention layers were not controlled"),
        controlled(unet, controller()),
    ):
        pass
    assert unet.attn_processors == before


def model_of(layer):
    model = nn.ModuleDict({} if layer is None else {"up": layer})
    model.attn_processors = {}
    return model


def test_processors_with_weights_of_their_own_are_refused():
    model = model_of(Attention(8, processor=IPAdapterAttnProcessor2_0(8, cross_attention_dim=8)))
    with (
        pytest.raises(ValueError, match=r"up \(IPAdapter.* has weights of its own"),
        controlled(model, controller()),
    ):
        pass


def test_layers_of_other_families_are_refused():
    model = model_of(Attention(8, qk_norm="layer_norm"))
    with pytest.raises(ValueError, match=r"up is not an attention layer of"), controlled(model, controller()):
        pass


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention layer"), controlled(model_of(None), controller()):
        pass


def test_a_batch_of_the_wrong_size_is_refused(unet, rows):
    latents, text = rows
    with pytest.raises(ValueError, match=r"needs 2 \+ 2 \+ 2 rows .*, got 5"):
        run(unet, latents[:5], text[:5], controller())


@pytest.mark.parametrize(
    ("queries", "size", "expected"),
    [(256, (16, 16), (16, 16)), (64, (16, 16), (8, 8)), (96, (16, 24), (8, 12)), (12, (5, 7), (3, 4))],
)
def test_a_layers_grid_follows_from_its_queries(queries, size, expected):
    """Odd sides round up, as strided convolutions do."""
    assert grid(queries, *size) == expected


def test_a_layer_that_fits_no_grid_is_refused():
    with pytest.raises(ValueError, match="6 queries does not belong to latents of 5 x 7"):
        grid(6, 5, 7)
