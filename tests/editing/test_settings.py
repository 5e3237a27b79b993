"""Settings that a model recommends: by edit, with overrides on top, and neutral ones for a model without any."""

import json
from dataclasses import replace

import pytest

from prism_lib import paths
from prism_lib.editing import settings
from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.editing.masks import MaskConfig
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import EditConfig, grid, recommended, recommended_inversion, resolved
from prism_lib.language.edits import NO_EDIT, PromptPair
from prism_lib.models.pipeline import load_pipeline
from tests.tiny import REMOVE, tiny_images, tiny_pipeline

SHIPPED = paths.weights() / paths.SHIPPED


def taken(source, target, words=(), model=SHIPPED, **overrides):
    config = recommended(model, PromptPair(source, target, words, words), **overrides)
    return config.addition_factor, config.guidance_start, config.guidance_end, config.confine


def model(folder, **content):
    folder.mkdir(exist_ok=True)
    (folder / "editing.json").write_text(json.dumps(content))
    return folder


def test_the_shipped_model_recommends_settings_by_edit():
    assert taken("with cardiomegaly", "without cardiomegaly", ("cardiomegaly",)) == (1, 0, 0.4, 0.33)
    assert taken("no effusion", "with effusion", ("Pleural effusion",)) == (1.75, 0, 0.4, 0.36)
    assert taken("with nodule", "without nodule", ("nodule",)) == taken("a", "a") == (1, 0, 0.4, 0.27)
    assert taken("without nodule", "with nodule", ("nodule",)) == (2, 0, 0.4, 0.27)
    # Only "with" differs: the words tell that something comes, not what.
    assert taken("without pacemaker", "with pacemaker", ("with",)) == (2, 0, 0.4, 0.27)


def test_a_mask_is_overridden_setting_by_setting():
    before = recommended(paths.weights() / "film-sd", REMOVE).mask
    assert before != MaskConfig()
    assert recommended(paths.weights() / "film-sd", REMOVE, mask={"dilate": 7}).mask == replace(before, dilate=7)
    assert recommended(paths.weights() / "film-sd", REMOVE, mask=MaskConfig(dilate=7)).mask == MaskConfig(dilate=7)
    with pytest.raises(ValueError, match="dilated"):
        recommended(paths.weights() / "film-sd", REMOVE, mask={"dilated": 7})


def test_an_edit_of_several_findings_takes_the_most_that_one_of_them_needs():
    words = ("cardiomegaly", "support devices")
    both = taken("with cardiomegaly, without support devices", "without cardiomegaly, with support devices", words)
    assert both == (1.5, 0, 0.7, 0.23)


def test_an_added_pacemaker_comes_on_one_side():
    words, prompts = ("pacemaker",), ("without support devices", "with pacemaker")
    plain = PromptPair(*prompts, ("support devices",), words)
    assert recommended(SHIPPED, plain).side == "left"
    asked = replace(plain, side="right")
    assert recommended(SHIPPED, asked).side == recommended("", asked).side == "right"
    assert recommended(SHIPPED, asked, side="").side == ""
    both = replace(plain, target="with pacemaker, with ecg leads", target_words=(*words, "ecg leads"))
    assert recommended(SHIPPED, both).side == "", "leads are on both sides"
    assert recommended(SHIPPED, PromptPair("with pacemaker", "without pacemaker", words, words)).side == ""


def test_overrides_replace_what_is_recommended():
    given = {"addition_factor": 3.0, "guidance_start": 0.5, "guidance_end": 0.6, "confine": 0.0}
    assert taken("without support devices", "with support devices", ("support devices",), **given) == (3, 0.5, 0.6, 0)
    assert taken("with support devices", "without support devices", ("support devices",), **given) == (1, 0.5, 0.6, 0)


def test_guidance_never_starts_after_its_end():
    words = ("support devices",)
    assert taken("without support devices", "with support devices", words)[1] > 0.05
    early = taken("without support devices", "with support devices", words, guidance_end=0.05)
    assert early[1:3] == (0.05, 0.05)
    with pytest.raises(ValueError, match=r"guidance_start is 0.6, after guidance_end, 0.5"):
        EditConfig(guidance_start=0.6, guidance_end=0.5)
    with pytest.raises(ValueError, match=r"guidance_start is 0.6, after guidance_end, 0.4"):
        taken("with cardiomegaly", "without cardiomegaly", ("cardiomegaly",), guidance_start=0.6)


def test_a_loaded_pipeline_has_the_settings_of_its_folder():
    assert recommended(load_pipeline(), REMOVE) == recommended(SHIPPED, REMOVE) != EditConfig()


def test_a_model_without_settings_gets_the_published_ones_and_says_so_once(caplog, tmp_path):
    settings._recommendation.cache_clear()
    assert recommended(tiny_pipeline(), REMOVE) == EditConfig() == recommended(tmp_path, REMOVE)
    recommended(tmp_path, NO_EDIT)
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["this", str(tmp_path)]


def test_an_edit_config_is_taken_as_it_is_and_overrides_are_not_alone():
    assert resolved(SHIPPED, REMOVE, 50, EditConfig()) == EditConfig()
    assert resolved(SHIPPED, REMOVE, 50, {"confine": 0.1}) == recommended(SHIPPED, REMOVE, confine=0.1)


def test_a_grid_keeps_what_it_is_given():
    assert grid({"confine": 0.1}, word_weight=[1, 2]) == [{"confine": 0.1, "word_weight": n} for n in (1, 2)]
    assert grid(EditConfig(confine=0.1), word_weight=[2]) == [EditConfig(confine=0.1, word_weight=2)]


@pytest.mark.parametrize(
    "content",
    [
        {"default": {}},
        {"defaults": {"guidance": 2.0}},
        {"defaults": {"confine": 2.0}},
        {"rules": [{"when": "always", "settings": {}}]},
        {"rules": [{"when": "add", "settings": {"confine": "much"}}]},
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(tmp_path, content):
    folder = model(tmp_path / "model", **content)
    with pytest.raises(ValueError, match=r"(?s)editing.json holds.*(default|guidance|confine|when)"):
        recommended(folder, REMOVE)


def test_few_steps_have_settings_of_their_own_below_the_rules_of_an_edit(tmp_path):
    few = {"steps": 3, "defaults": {"guidance_scale": 2.0, "confine": 0.5}, "inversion": {"spacing": 2.0}}
    rules = [{"when": "remove", "settings": {"confine": 0.1}}]
    pipe = tiny_pipeline.__wrapped__()
    content = {"defaults": {"guidance_scale": 5.0}, "rules": rules, "inversion": {"skip": 0.5}, "few_steps": few}
    pipe.register_to_config(_name_or_path=str(model(tmp_path / "few", **content)))
    for steps, scale, how in ((3, 2.0, InversionConfig(spacing=2.0)), (4, 5.0, InversionConfig(skip=0.5))):
        used = recommended(pipe, REMOVE, steps)
        assert (used.guidance_scale, used.confine) == (scale, 0.1)
        assert resolved(pipe, REMOVE, steps, {"confine": 0.3}) == recommended(pipe, REMOVE, steps, confine=0.3)
        assert (
            recommended_inversion(pipe, steps) == invert(pipe, tiny_images(1), [""], num_inference_steps=steps).config
        )
        assert recommended_inversion(pipe, steps) == how
    assert invert(pipe, tiny_images(1), [""], num_inference_steps=3).schedule.timesteps == (-1, 20, 250, 940)
    assert invert(pipe, tiny_images(1), [""], "direct", 3).schedule.timesteps[1] != 20, "only edit-friendly is spaced"
    inversion, pair = invert(pipe, tiny_images(1), [REMOVE.source], num_inference_steps=3), [REMOVE]
    (own,), (same,) = (edit(pipe, inversion, pair, one) for one in ({}, recommended(pipe, REMOVE, 3)))
    assert (own.image == same.image).all()
    with pytest.raises(ValueError, match=r"spacing=9.0 repeats timesteps in 5 steps"):
        invert(pipe, tiny_images(1), [""], num_inference_steps=5, config=InversionConfig(spacing=9))
    with pytest.raises(ValueError, match=r"(?s)editing.json holds.*guidance_scale"):
        recommended(model(tmp_path / "wrong", few_steps={"steps": 3, "defaults": {"guidance_scale": -1}}), REMOVE)
    late = {"defaults": {"guidance_end": 0.4}, "few_steps": {"steps": 3, "defaults": {"guidance_start": 0.5}}}
    with pytest.raises(ValueError, match=r"editing.json holds no settings of edits: guidance_start is 0.5, after"):
        recommended(model(tmp_path / "late", **late), REMOVE, 50)  # together they are wrong, whatever is asked for
    with pytest.raises(ValueError, match=r"editing.json holds .* few_steps.steps is -1"):
        recommended(model(tmp_path / "negative", few_steps={"steps": -1}), REMOVE)
    kept = model(tmp_path / "kept", inversion={"skip": 0.5}, few_steps={"steps": 3})
    assert recommended_inversion(kept, 3) == InversionConfig(skip=0.5), "few steps that say nothing of it"


def test_a_model_recommends_its_inversion_and_a_given_one_replaces_it(tmp_path):
    pipe = tiny_pipeline.__wrapped__()  # one that no other test has
    pipe.register_to_config(_name_or_path=str(model(tmp_path / "late", inversion={"skip": 0.5})))
    how = (tiny_images(1), [REMOVE.source], "edit_friendly", 4)
    assert invert(pipe, *how).start == 2
    assert invert(pipe, *how, config=InversionConfig()).start == 4
    assert recommended_inversion(pipe, seed=3) == InversionConfig(skip=0.5, seed=3)
    with pytest.raises(ValueError, match=r"(?s)editing.json holds.*skip"):
        recommended_inversion(model(tmp_path / "wrong", inversion={"skip": 1.5}))
