"""Edits: against a plain implementation with full probability maps, against no edit, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler

from prism_lib.editing import attention, denoising, masks
from prism_lib.editing.alignment import token_span
from prism_lib.editing.attention import PromptToPromptProcessor
from prism_lib.editing.counterfactuals import edit, sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.masks import MaskConfig, evidence_region
from prism_lib.editing.settings import EditConfig, grid
from prism_lib.evaluation import selection
from prism_lib.language.edits import PromptPair
from prism_lib.models import schedule as ddim
from prism_lib.models.pipeline import decode_latents, encode_prompts, predict_noise
from tests.tiny import REMOVE, SOURCE, UNCHANGED, tiny_images, tiny_pipeline

STEPS = 5
# Values far from the defaults, so that every part of the edit shows.
STRONG = EditConfig(
    guidance_scale=5.0,
    guidance_start=0.0,
    guidance_end=1.0,
    cross_replace_steps=0.6,
    self_replace_steps=0.4,
    word_weight=2.0,
)
# An untrained model changes every pixel a little, so the automatic mask of tests takes the upper half.
HALF = MaskConfig(weak=1.0, strong=1.2, seed_evidence=0.5, grow_evidence=0.3, close=0, dilate=0)
REFERENCE = replace(STRONG, negative="empty", correct_drift=False, confine=0.0)


@cache
def inverted(pair=REMOVE, count=1, method="direct", **model):
    pipe = tiny_pipeline(**model)
    inversion = invert(pipe, tiny_images(4)[:count], [pair.source] * count, method, num_inference_steps=STEPS)
    return replace(inversion, latents=inversion.latents.to(pipe.unet.dtype))


# --- prompt-to-prompt, written out


class MapProcessor:
    """Attention with full probabilities, which `change(name, probabilities)` may read or replace."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        probabilities = attn.get_attention_scores(query, key)
        probabilities = self.change(self.name, probabilities, encoder_hidden_states is not None)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def reference_edit(pipe, inversion, pair, config):
    """Hertz et al. in plain loops, one U-Net call per prompt; yields the target's latents of each step."""
    unet, length = pipe.unet, pipe.tokenizer.model_max_length
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(STEPS)
    source_text, empty_text, target_text = encode_prompts(pipe, [pair.source, "", pair.target]).to(unet.dtype).split(1)
    # Source and target of REMOVE differ in one token: every other one keeps its index.
    new = token_span(pipe.tokenizer, pair.target, "without")
    weights = torch.ones(length)
    for word in pair.target_words:
        weights[token_span(pipe.tokenizer, pair.target, word)] = config.word_weight
    window = int(config.cross_replace_steps * STEPS + 0.5)
    stored = {}

    def store(name, probabilities, cross):
        stored[name] = probabilities
        return probabilities

    def inject(name, probabilities, cross):
        if not cross:
            small = probabilities.shape[1] <= attention.SELF_MAX_TOKENS
            return stored[name] if small and step < int(config.self_replace_steps * STEPS + 0.5) else probabilities
        edited = probabilities.clone()
        for j in range(length) if step < window else ():
            edited[:, :, j] = (probabilities if j in new else stored[name])[:, :, j] * weights[j]
        return edited

    def noise(latents, text, change):
        unet.set_attn_processor({name: MapProcessor(name, change) for name in unet.attn_processors})
        return unet(latents, t, encoder_hidden_states=text).sample

    before, target = unet.attn_processors, inversion.latents[-1]
    try:
        for step, t in enumerate(scheduler.timesteps):
            noise(inversion.latents[STEPS - step], source_text, store)
            unconditional = noise(target, empty_text, lambda name, probabilities, cross: probabilities)
            conditional = noise(target, target_text, inject)
            start, end = (int(share * STEPS + 0.5) for share in (config.guidance_start, config.guidance_end))
            scale = config.guidance_scale if start <= step < end else 1
            guided = unconditional + scale * (conditional - unconditional)
            target = scheduler.step(guided, int(t), target).prev_sample
            yield target
    finally:
        unet.set_attn_processor(before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"guidance_end": 0.4},
        {"guidance_start": 0.4, "guidance_end": 0.8},
        {"cross_replace_steps": 1.0, "word_weight": 1.0},
        {"cross_replace_steps": 0.0},
    ],
)
def test_the_fast_edit_equals_prompt_to_prompt_with_full_maps(prediction_type, change):
    """In double precision, so that only a difference of method could show."""
    model, config = {"prediction_type": prediction_type, "double": True}, replace(REFERENCE, **change)
    pipe, inversion = tiny_pipeline(**model), inverted(**model)
    fast = []
    edit(pipe, inversion, [REMOVE], config, callback=lambda i, t, latents: fast.append(latents))
    with torch.no_grad():
        slow = list(reference_edit(pipe, inversion, REMOVE, config))
    assert len(fast) == len(slow) == STEPS
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


# --- no edit, and real ones


NO_CHANGE = [
    EditConfig(),
    replace(STRONG, word_weight=1.0),
    EditConfig(guidance_scale=1.0, negative="empty"),
    EditConfig(cross_replace_steps=0.0, self_replace_steps=0.0),
    EditConfig(cross_replace_steps=1.0, self_replace_steps=1.0),
]


@pytest.mark.parametrize("config", NO_CHANGE)
def test_an_edit_without_change_returns_the_reconstruction_and_the_input_itself(config):
    pipe, inversion = tiny_pipeline(), inverted(UNCHANGED)
    (result,) = edit(pipe, inversion, [UNCHANGED], config)
    torch.testing.assert_close(result.raw, decode_latents(pipe.vae, inversion.latents[0])[0], atol=5e-4, rtol=0)
    assert torch.equal(result.image, inversion.images[0])
    assert not result.mask.any()


@pytest.mark.parametrize("config", NO_CHANGE)
def test_an_edit_without_change_walks_the_sources_own_way(config):
    pipe = tiny_pipeline(double=True)
    inversion, latents = inverted(UNCHANGED, double=True), []
    edit(pipe, inversion, [UNCHANGED], config, callback=lambda i, t, x: latents.append(x))
    torch.testing.assert_close(torch.stack(latents), inversion.latents[:-1].flip(0), atol=1e-9, rtol=0)


def test_without_the_drift_correction_even_no_edit_leaves_the_source():
    pipe, inversion = tiny_pipeline(), inverted(UNCHANGED)
    (result,) = edit(pipe, inversion, [UNCHANGED], EditConfig(correct_drift=False))
    assert (result.raw - result.reconstruction).abs().max() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", ["direct", "ddim"])
def test_the_source_is_given_back_as_its_inversion_says(method):
    pipe, inversion = tiny_pipeline(), inverted(method=method)
    (result,) = edit(pipe, inversion, [REMOVE])
    latents = inversion.latents[0]
    if method == "ddim":
        latents, embeds = inversion.latents[-1], encode_prompts(pipe, inversion.prompts)
        for level in range(STEPS, 0, -1):
            prediction = predict_noise(pipe, latents, inversion.schedule.timesteps[level], embeds)
            latents = ddim.step(inversion.schedule, latents, prediction, level)
    torch.testing.assert_close(result.reconstruction, decode_latents(pipe.vae, latents)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.0},
        {"guidance_start": 0.2},
        {"guidance_end": 0.6},
        {"cross_replace_steps": 0.0},
        {"self_replace_steps": 0.0},
        {"word_weight": 1.0},
        {"negative": "empty"},
        {"correct_drift": False},
        {"local_blend": True, "local_blend_threshold": 0.9},
        {"confine": 0.9},
    ],
)
def test_every_setting_of_the_latent_edit_has_an_effect(change):
    pipe, inversion = tiny_pipeline(), inverted()
    config = replace(STRONG, cross_replace_steps=0.4)
    (plain,), (changed,) = (edit(pipe, inversion, [REMOVE], c) for c in (config, replace(config, **change)))
    assert (plain.raw - plain.reconstruction).abs().max() > 1e-2
    assert (plain.raw - changed.raw).abs().max() > 1e-5


def test_an_addition_is_guided_by_the_factor_more_and_a_removal_is_not():
    pipe, add = tiny_pipeline(), PromptPair(REMOVE.target, REMOVE.source, REMOVE.target_words, REMOVE.source_words)
    for pair, scale in ((add, 4.0), (REMOVE, 2.0)):
        inversion = inverted(pair)
        (result,) = edit(pipe, inversion, [pair], replace(STRONG, guidance_scale=2.0, addition_factor=2.0))
        (plain,) = edit(pipe, inversion, [pair], replace(STRONG, guidance_scale=scale, addition_factor=1.0))
        (other,) = edit(pipe, inversion, [pair], replace(STRONG, guidance_scale=6 - scale, addition_factor=1.0))
        assert torch.equal(result.raw, plain.raw)
        assert (result.raw - other.raw).abs().max() > 1e-5


def test_a_result_tells_the_settings_that_it_was_made_with():
    (result,) = edit(tiny_pipeline(), inverted(), [REMOVE], EditConfig())
    assert result.settings == EditConfig()


@pytest.mark.parametrize("config", [EditConfig(), replace(STRONG, local_blend=True)])
def test_an_image_does_not_depend_on_its_batch(config):
    """In double precision: an untrained model amplifies the rounding of batched float32 kernels."""
    pipe, inversion = tiny_pipeline(double=True), inverted(count=4, double=True)
    pairs = [REMOVE, UNCHANGED, REMOVE, PromptPair(SOURCE, "chest x-ray", ("support devices",), ())]
    results, latents = {}, {size: [] for size in (4, 1)}
    for size, seen in latents.items():
        results[size] = edit(
            pipe, inversion, pairs, replace(config, batch_size=size), callback=lambda i, t, x, seen=seen: seen.append(x)
        )
    together, alone = (torch.cat(latents[size]).unflatten(0, (-1, size)) for size in (4, 1))
    alone = alone.unflatten(0, (4, STEPS))[:, :, 0].transpose(0, 1)
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    for one, other in zip(results[4], results[1], strict=True):
        torch.testing.assert_close(one.raw, other.raw, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.mask, other.mask, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.image, other.image, atol=1e-5, rtol=0)


def test_an_edit_is_deterministic_and_leaves_its_input_alone():
    pipe, inversion = tiny_pipeline(), inverted()
    images, latents = inversion.images.clone(), inversion.latents.clone()
    (first,), (second,) = (edit(pipe, inversion, [REMOVE]) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert torch.equal(inversion.images, images)
    assert torch.equal(inversion.latents, latents)


@pytest.mark.parametrize(
    ("change", "guided"),
    [
        ({}, STEPS),
        ({"guidance_end": 0.4}, 2),
        ({"guidance_end": 0.0}, 0),
        ({"guidance_start": 0.6}, 2),
        ({"guidance_start": 0.4, "guidance_end": 0.4}, 0),
        ({"guidance_scale": 1.0}, 0),
    ],
)
def test_three_evaluations_a_step_where_the_edit_is_guided_and_two_where_not(change, guided):
    pipe, inversion = tiny_pipeline(), inverted(count=3)
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    edit(pipe, inversion, [REMOVE] * 3, replace(STRONG, batch_size=2, **change))
    handle.remove()
    free = STEPS - guided
    late = change.get("guidance_start", 0) > 0
    first, last = [6] * guided + [4] * free, [3] * guided + [2] * free
    assert rows == (first[::-1] + last[::-1] if late else first + last)


# --- sweeps


def test_a_forked_sweep_equals_separate_edits():
    pipe = tiny_pipeline(double=True)
    inversion, pairs = inverted(count=2, double=True), [REMOVE, UNCHANGED]
    configs = grid(STRONG, self_replace_steps=(0.2, 0.4, 0.8), cross_replace_steps=(0.2, 0.6))
    configs += [replace(STRONG, local_blend=True), replace(STRONG, protect_text=False)]
    confined = replace(STRONG, confine=0.6)
    configs += [
        confined,
        replace(confined, confine=0.3),
        replace(confined, mask=MaskConfig(attention_weight=1.0)),
    ]
    configs += [replace(STRONG, guidance_end=end) for end in (0.2, 0.6)]
    configs += [replace(STRONG, guidance_start=start) for start in (0.2, 0.6)]
    swept = sweep(pipe, inversion, pairs, configs)
    assert [len(results) for results in swept] == [len(configs)] * 2
    for place, config in enumerate(configs):
        for results, alone in zip(swept, edit(pipe, inversion, pairs, config), strict=True):
            assert results[place].settings == config
            assert results[place].pair == alone.pair
            torch.testing.assert_close(results[place].raw, alone.raw, atol=1e-5, rtol=0)
            torch.testing.assert_close(results[place].mask, alone.mask, atol=1e-5, rtol=0)


def test_a_sweep_of_five_windows_takes_at_most_390_evaluations():
    pipe, rows = tiny_pipeline(), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    inversion = invert(pipe, tiny_images(1), [SOURCE], "direct", num_inference_steps=50)
    sweep(pipe, inversion, [REMOVE], grid(EditConfig(guidance_end=0.4), self_replace_steps=(0.4, 0.5, 0.6, 0.7, 0.8)))
    handle.remove()
    # Forks after 20, 25, 30 and 35 steps, and negative rows in the first 20.
    assert sum(rows) == 50 + 50 + 140 + 20


def test_on_a_cpu_a_batch_of_sweeps_makes_calls_of_a_dozen_rows_at_most():
    pipe, inversion, rows = tiny_pipeline(), inverted(count=3), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for ends in ((0.2, 0.4, 0.6), (0.2, 0.8)):
        sweep(pipe, inversion, [REMOVE] * 3, grid(STRONG, self_replace_steps=ends))
    handle.remove()
    # Three settings: an image at a time, 1 + 2 x 3 rows at last. Two settings: two images, then the third.
    assert [rows[step] for step in range(STEPS - 1, len(rows), STEPS)] == [7, 7, 7, 10, 5]


def test_a_grid_without_values_and_a_sweep_without_settings_are_refused():
    with pytest.raises(ValueError, match="guidance_scale is"):
        grid(EditConfig(), guidance_scale=())
    with pytest.raises(ValueError, match="at least one setting"):
        sweep(tiny_pipeline(), inverted(), [REMOVE], [])


def test_a_batch_that_does_not_fit_is_done_in_parts_with_equal_results(monkeypatch):
    """Room for five rows: one image at a time in place of three, and then a third of one image's edits."""
    pipe, inversion = tiny_pipeline(double=True), inverted(count=3, double=True)
    pairs, configs = [REMOVE, UNCHANGED, REMOVE], grid(STRONG, self_replace_steps=(0.0, 0.4, 0.8))
    whole = edit(pipe, inversion, pairs, STRONG), sweep(pipe, inversion[:1], [REMOVE], configs)[0]
    rows, predict = [], predict_noise

    def limited(pipe, latents, timestep, embeds):
        rows.append(len(latents))
        if len(latents) > 5:
            raise torch.OutOfMemoryError("no room")
        return predict(pipe, latents, timestep, embeds)

    monkeypatch.setattr(denoising, "predict_noise", limited)
    parts = [edit(pipe, inversion, pairs, STRONG)]
    assert rows == [9] + [3] * STEPS * 3
    rows.clear()
    parts.append(sweep(pipe, inversion[:1], [REMOVE], configs)[0])
    assert max(rows) == 7
    for one, other in zip(itertools.chain(*whole), itertools.chain(*parts), strict=True):
        assert (one.pair, one.settings) == (other.pair, other.settings)
        torch.testing.assert_close(one.raw, other.raw, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.image, other.image, atol=1e-5, rtol=0)


# --- confined edits


def latents_of(inversion, config, pipe=None):
    """The target's latents after each step of REMOVE, (T, N, c, h, w)."""
    seen = []
    edit(pipe or tiny_pipeline(), inversion, [REMOVE], config, callback=lambda i, t, x: seen.append(x))
    return torch.stack(seen)


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_a_confined_edit_is_the_source_itself_outside_the_evidence(monkeypatch, start):
    monkeypatch.setattr(denoising, "CONFINE_START", start)
    inversion, regions, original = inverted(), [], evidence_region

    def recorded(*args):
        regions.append(original(*args))
        return regions[-1]

    monkeypatch.setattr(masks, "evidence_region", recorded)
    latents = latents_of(inversion, replace(STRONG, confine=0.6))
    free = round(start * STEPS)
    assert len(regions) == STEPS - free
    for step, region in enumerate(regions, start=free):
        source = inversion.latents[STEPS - 1 - step]
        outside = (region == 0).expand_as(source)
        assert 0 < outside.float().mean() < 1
        assert torch.equal(latents[step][outside], source[outside])
        assert (latents[step] != source)[~outside].float().mean() > 0.9


@pytest.mark.parametrize(
    ("side", "own", "other"), [("left", slice(10, 16), slice(0, 6)), ("right", slice(0, 6), slice(10, 16))]
)
def test_an_edit_of_one_side_is_the_source_itself_at_the_other(monkeypatch, side, own, other):
    inversion = inverted()
    latents = latents_of(inversion, replace(STRONG, side=side))
    sources = inversion.latents[:STEPS].flip(0)
    assert torch.equal(latents[..., other], sources[..., other]), "the patient's right is at the image's left"
    assert (latents != sources)[..., 6:10].float().mean() > 0.9
    assert (latents != sources)[..., own].float().mean() > 0.9
    # A user's own area takes the place of a side.
    (plain,), (same,) = (
        edit(tiny_pipeline(), inversion, [REMOVE], replace(STRONG, side=s), mask=box()) for s in ("", side)
    )
    assert torch.equal(plain.raw, same.raw)
    monkeypatch.setattr(denoising, "CONFINE_START", 0.0)  # then nothing is asked for mirrored
    unmirrored = latents_of(inversion, replace(STRONG, side=side))
    assert (unmirrored != latents)[0][..., own].float().mean() > 0.9
    assert torch.equal(unmirrored[0][..., 6:10], latents[0][..., 6:10]), "only what is asked for at the other side"


def test_confining_starts_with_its_step():
    inversion, off = inverted(), latents_of(inverted(), replace(STRONG, confine=0.0))
    later = latents_of(inversion, replace(STRONG, confine=0.9))  # from 0.3 of five steps on: the third
    assert torch.equal(later[:2], off[:2])
    assert not torch.equal(later[2], off[2])


# --- masks


def box(rows=slice(8, 20), columns=slice(4, 16), count=1):
    mask = torch.zeros(count, 1, 32, 32, dtype=torch.bool)
    mask[:, :, rows, columns] = True
    return mask


def test_pixels_outside_a_users_mask_are_the_inputs_own():
    inversion = inverted()
    (result,) = edit(tiny_pipeline(), inversion, [REMOVE], STRONG, mask=box())
    assert torch.equal(result.image[~box()[0]], inversion.images[0][~box()[0]])
    assert (result.image != inversion.images[0])[box()[0]].float().mean() > 0.9
    assert torch.equal(result.mask, box()[0].float())


def test_pixels_outside_the_automatic_mask_are_the_inputs_own():
    inversion = inverted()
    (result,) = edit(tiny_pipeline(), inversion, [REMOVE], replace(STRONG, mask=HALF))
    outside = result.mask == 0
    assert 0 < outside.float().mean() < 1
    assert torch.equal(result.image[outside], inversion.images[0][outside])
    assert result.scores["mask_area"] == pytest.approx(1 - outside.float().mean().item())
    assert tuple(result.scores) == selection.EDIT, "a choice is planned by these names"


@pytest.mark.parametrize("mask", ["auto", "off", box(slice(0, 32), slice(0, 32))])
def test_pixels_to_keep_are_kept_whatever_the_mask(mask):
    inversion = inverted()
    (result,) = edit(tiny_pipeline(), inversion, [REMOVE], replace(STRONG, mask=HALF), mask=mask, keep=box())
    assert torch.equal(result.image[box()[0]], inversion.images[0][box()[0]])
    assert (result.image != inversion.images[0]).any()


def test_without_a_mask_the_result_is_the_raw_edit():
    (result,) = edit(tiny_pipeline(), inverted(), [REMOVE], mask="off")
    assert torch.equal(result.image, result.raw)
    assert (result.mask == 1).all()


def test_a_users_mask_bounds_the_edit_in_latent_space():
    latents, inversion = [], inverted()
    edit(tiny_pipeline(), inversion, [REMOVE], STRONG, mask=box(), callback=lambda i, t, x: latents.append(x))
    changed = (latents[-1] - inversion.latents[0]).abs().amax((0, 1)) > 0
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:10, 2:8] = True
    assert torch.equal(changed, expected)


# --- what is refused


def test_a_cancelled_edit_restores_the_processors():
    def cancel(index, timestep, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(tiny_pipeline(), inverted(), [REMOVE], callback=cancel)
    assert not any(isinstance(p, PromptToPromptProcessor) for p in tiny_pipeline().unet.attn_processors.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cross_replace_steps", 1.1),
        ("self_replace_steps", -0.1),
        ("local_blend_start", float("nan")),
        ("confine", 1.5),
        ("confine", float("nan")),
        ("guidance_scale", float("inf")),
        ("word_weight", -1.0),
        ("addition_factor", -0.5),
        ("addition_factor", float("nan")),
        ("guidance_start", -0.1),
        ("guidance_start", float("nan")),
        ("guidance_end", 1.5),
        ("negative", "none"),
        ("batch_size", 0),
    ],
)
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\S* is .*: "):
        EditConfig(**{name: value})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "1 inverted images need as many prompt pairs, got 0"),
        ([REMOVE, REMOVE], "got 2"),
        ([PromptPair("another", "prompt", (), ())], "image 0 was inverted as"),
        ([replace(REMOVE, source_words=("pacemaker",))], "'pacemaker' does not occur"),
        ([replace(REMOVE, target_words=("pacemaker",))], "'pacemaker' does not occur"),
        ([replace(REMOVE, target="with " * 100)], "the text encoder reads 77"),
    ],
)
def test_prompt_pairs_that_do_not_fit_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        edit(tiny_pipeline(), inverted(), pairs)


def test_local_blend_without_words_is_refused():
    pair = replace(REMOVE, source_words=(), target_words=())
    with pytest.raises(ValueError, match="the edit of image 0 names none"):
        edit(tiny_pipeline(), inverted(), [pair], EditConfig(local_blend=True))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"mask": "automatic"}, "mask is 'automatic'; expected 'auto', 'off' or a tensor"),
        ({"mask": torch.ones(1, 1, 16, 16)}, "mask must be a tensor of shape"),
        ({"mask": torch.zeros(1, 1, 32, 32)}, "masks of image 0 leave no pixel"),
        ({"mask": torch.full((1, 1, 32, 32), 2.0)}, r"\[0, 1\]"),
        ({"keep": torch.ones(1, 1, 32, 32)}, "masks of image 0 leave no pixel"),
        ({"mask": box(), "keep": box()}, "masks of image 0 leave no pixel"),
        ({"keep": torch.ones(32, 32)}, "keep must be a tensor of shape"),
        ({"keep": torch.full((1, 1, 32, 32), float("nan"))}, "keep must be boolean"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        edit(tiny_pipeline(), inverted(), [REMOVE], **masks)
