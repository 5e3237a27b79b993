"""Every editor answers alike, leaves the pipeline as it found it, and does not depend on the batch."""

from dataclasses import replace

import pytest
import torch

from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import write_settings
from prism_lib.language.edits import Edit
from prism_lib.models.pipeline import build_pipeline, decode_latents, encode_images, encode_prompts, predict_noise
from prism_lib.models.schedule import Schedule, step
from prism_lib.studies import editors
from prism_lib.studies.editors import PLAIN, Edict, Imagic, LEdits, PromptToPrompt, SDEdit, TwoMasks, unmasked
from tests.tiny import REMOVE, UNCHANGED, tiny_config, tiny_images, tiny_pipeline

CHANGE = Edit(remove=("Support Devices",))
EDITORS = {
    "ours": PromptToPrompt(num_inference_steps=2),
    "ddim": PromptToPrompt("ddim", 2, PLAIN, "off"),
    "two masks": TwoMasks(num_inference_steps=3, margin=1),
    "sdedit": SDEdit(num_inference_steps=4),
    "ledits": LEdits(num_inference_steps=4, intersect=False),
    "edict": Edict(num_inference_steps=4),
    "imagic": Imagic(embedding_steps=2, unet_steps=2, num_inference_steps=2, batch_size=2),
}


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_answers_each_image_alone_and_leaves_no_trace(name):
    pipe, images, editor = tiny_pipeline(), tiny_images(2), EDITORS[name]
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    processors, scheduler = dict(pipe.unet.attn_processors), dict(pipe.scheduler.config)
    both = editor(pipe, images, [REMOVE, REMOVE], CHANGE)
    alone = editor(pipe, images[1:], [REMOVE], CHANGE)
    assert torch.allclose(both[1].image, alone[0].image, atol=1e-3)
    assert stack(both).shape == images.shape and stack(both, "mask").shape == (2, 1, 32, 32)
    assert torch.equal(stack(both, "factual"), images)
    assert float(stack(both).min()) >= 0 and float(stack(both).max()) <= 1
    assert {key: id(value) for key, value in processors.items()} == {
        key: id(value) for key, value in pipe.unet.attn_processors.items()
    }
    after = pipe.unet.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[key], weights[key]) for key in weights)
    assert dict(pipe.scheduler.config) == scheduler
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_ours_is_the_editor_itself():
    pipe, images = tiny_pipeline(), tiny_images(1)
    inversion = invert(pipe, images, [REMOVE.source], num_inference_steps=2)
    expected = edit(pipe, inversion, [REMOVE])
    assert torch.equal(stack(EDITORS["ours"](pipe, images, [REMOVE], CHANGE)), stack(expected))


def test_the_effect_of_ours_has_the_inversion_that_the_model_recommends(tmp_path):
    pipe, effects = tiny_pipeline.__wrapped__(), []
    for number, skip in enumerate((0.0, 0.5)):
        (tmp_path / str(number)).mkdir()
        write_settings(tmp_path / str(number), {"inversion": {"skip": skip}})
        pipe.register_to_config(_name_or_path=str(tmp_path / str(number)))
        effects.append(EDITORS["ours"].effect(pipe, [REMOVE]))
    assert (
        effects[0] != effects[1] == replace(EDITORS["ours"], inversion=InversionConfig(skip=0.5)).effect(pipe, [REMOVE])
    )


@pytest.mark.parametrize("name", ["ours", "imagic", "two masks"])
def test_settings_that_differ_only_in_the_edit_share_what_was_inverted(name):
    other = {"ours": {"settings": {"guidance_scale": 5.0}}, "imagic": {"eta": 0.3}, "two masks": {"margin": 3}}[name]
    pipe, images, first = tiny_pipeline(), tiny_images(1), EDITORS[name]
    second = replace(first, **other)
    assert first.inverts == second.inverts != replace(first, num_inference_steps=5).inverts or name == "imagic"
    inverted = first.invert(pipe, images, [REMOVE])
    first.edit(pipe, inverted, [REMOVE], CHANGE)
    (shared,), (alone,) = second.edit(pipe, inverted, [REMOVE], CHANGE), second(pipe, images, [REMOVE], CHANGE)
    assert torch.equal(shared.image, alone.image)


def test_a_weaker_sdedit_stays_closer_to_the_decoded_input():
    pipe, images = tiny_pipeline(), tiny_images(1)
    weak, strong = (
        SDEdit(strength, 1.0, num_inference_steps=50)(pipe, images, [REMOVE], CHANGE)[0] for strength in (0.02, 1.0)
    )
    assert (weak.image - weak.reconstruction).abs().mean() < (strong.image - strong.reconstruction).abs().mean()


def test_two_masks_start_from_the_mask_that_our_editor_finds():
    pipe, images = tiny_pipeline(), tiny_images(1)
    (ours,) = PromptToPrompt(num_inference_steps=4)(pipe, images, [REMOVE], CHANGE)
    (result,) = TwoMasks(num_inference_steps=4, margin=0)(pipe, images, [REMOVE], CHANGE)
    assert 0 < float(ours.mask.mean()) < 1
    assert torch.equal(result.mask, ours.mask)


def test_two_masks_keep_every_pixel_far_from_the_edit():
    (result,) = EDITORS["two masks"](tiny_pipeline(), tiny_images(1), [REMOVE], CHANGE)
    kept = result.mask == 0
    assert bool(kept.any())
    assert torch.equal(result.image[kept], result.factual[kept])


def test_an_edit_of_nothing_by_ledits_is_its_own_reconstruction():
    # Target minus source is zero, so only the inverted noise speaks.
    pipe, images = tiny_pipeline(), tiny_images(1)
    outcomes = [
        replace(EDITORS["ledits"], edit_guidance_scale=scale)(pipe, images, [UNCHANGED], CHANGE)[0].image
        for scale in (0.0, 9.0)
    ]
    assert torch.allclose(*outcomes, atol=1e-4)
    changed = replace(EDITORS["ledits"], edit_guidance_scale=9.0)(pipe, images, [REMOVE], CHANGE)[0].image
    assert not torch.allclose(outcomes[0], changed, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("mixing", [0.93, 1.0])
def test_edict_undoes_itself_with_guidance(prediction_type, mixing):
    pipe, editor = tiny_pipeline(prediction_type), Edict(7.5, 1.0, mixing, num_inference_steps=20)
    clean = encode_images(pipe.vae, tiny_images(2))
    with torch.no_grad():
        noised = editor.walk(pipe, (clean, clean), [REMOVE.source] * 2, up=True)
        back = editor.walk(pipe, noised, [REMOVE.source] * 2, up=False)
        elsewhere = editor.walk(pipe, noised, [REMOVE.target] * 2, up=False)
    for latents, other in zip(back, elsewhere, strict=True):
        assert (latents - clean).abs().max() <= 1e-4
        assert (other - clean).abs().max() > 1e-2
    assert all((latents - clean).abs().max() > 1e-1 for latents in noised)


def test_a_first_half_step_of_edict_is_ddim():
    pipe, editor = tiny_pipeline(), Edict(1.0, 1.0, mixing=1.0, num_inference_steps=1)
    schedule, prompts = Schedule.from_config(pipe.scheduler.config, 1), [REMOVE.source] * 2
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = editor.walk(pipe, (latents, latents), prompts, up=False)
        prediction = predict_noise(pipe, latents, schedule.timesteps[1], encode_prompts(pipe, prompts))
    expected = step(schedule, latents, prediction, 1)
    torch.testing.assert_close(first.float(), expected, atol=3e-6, rtol=0)  # a last step is a short one
    assert (second.float() - expected).abs().max() > 3e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixing": 0.0}, r"mixing is 0\.0: .*greater than 0"),
        ({"strength": 1.5}, r"strength is 1\.5: .*less than or equal to 1"),
        ({"strength": 0.1, "num_inference_steps": 5}, "strength 0.1 of 5 steps leaves none"),
    ],
)
def test_edict_says_what_it_cannot_do(settings, message):
    with pytest.raises(ValueError, match=message):
        Edict(**settings)


def test_imagic_fits_the_image():
    # With more steps of either fit, the diffusion loss on this image under the optimised embedding falls.
    pipe, image = tiny_pipeline(), tiny_images(1)
    losses = []
    for steps in (1, 60):
        clean = encode_images(pipe.vae, image)
        embedding = torch.nn.Parameter(torch.zeros(1, 77, pipe.unet.config.cross_attention_dim))
        adam, seeded = torch.optim.Adam([embedding], 0.1), torch.Generator().manual_seed(0)
        editors._fit(pipe, clean.expand(8, -1, -1, -1), embedding, adam, steps, seeded)
        noise = torch.randn(64, *clean.shape[1:], generator=torch.Generator().manual_seed(1))
        times = torch.linspace(0, 999, 64).long()
        noisy = pipe.scheduler.add_noise(clean.expand(64, -1, -1, -1), noise, times)
        with torch.no_grad():
            states = embedding.expand(64, -1, -1)
            losses.append(float((pipe.unet(noisy, times, encoder_hidden_states=states).sample - noise).square().mean()))
    assert losses[1] < losses[0]


def test_results_without_a_mask_are_measured_against_the_decoded_input():
    pipe, images = tiny_pipeline(), tiny_images(1)
    (result,) = unmasked(pipe, images, [REMOVE], 1 - images, "settings")
    assert torch.equal(result.reconstruction[None], decode_latents(pipe.vae, encode_images(pipe.vae, images)))
    assert result.scores["change"] == pytest.approx(float((1 - 2 * images).abs().mean()))
    assert bool((result.mask == 1).all()) and result.settings == "settings"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SDEdit(strength=0.0), r"strength is 0\.0: "),
        (lambda: SDEdit(strength=0.1, num_inference_steps=5), "leaves none to denoise"),
        (lambda: PromptToPrompt(mask="none"), r"mask is 'none': .*'auto' or 'off'"),
        (lambda: LEdits(threshold=1.0), r"threshold is 1\.0: "),
        (lambda: LEdits(skip=-0.1), r"skip is -0\.1: "),
        (lambda: TwoMasks(margin=-1), "margin is -1: "),
        (lambda: Imagic(unet_steps=0), "unet_steps is 0: "),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_inversion_is_an_error_before_any_work():
    with pytest.raises(ValueError, match="'nothing'"):
        PromptToPrompt("nothing")(tiny_pipeline(), tiny_images(1), [REMOVE], CHANGE)


def test_ledits_says_how_many_channels_of_latents_it_edits():
    pipe = build_pipeline(replace(tiny_config(), latent_channels=16), seed=0)
    with pytest.raises(ValueError, match="latents of 4 channels, this model has 16"):
        EDITORS["ledits"](pipe, tiny_images(1), [REMOVE], CHANGE)
