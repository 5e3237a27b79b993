"""Saved inversions: the same tensors and edits again, and nothing for anybody else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from prism_lib.editing import inversion_store
from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.editing.inversion_config import InversionConfig
from prism_lib.editing.inversion_store import load_inversion
from tests.tiny import REMOVE, SOURCE, TARGET, tiny_images, tiny_pipeline

STEPS = 3
CONFIG = InversionConfig(inner_steps=2, skip=0.4, seed=3)
PROMPTS = [SOURCE, SOURCE]


def made(method="direct"):
    return invert(tiny_pipeline(), tiny_images(2), PROMPTS, method, STEPS, config=CONFIG)


def load(path, pipe=None, images=None, prompts=PROMPTS, method="direct", steps=STEPS, config=CONFIG):
    images = tiny_images(2) if images is None else images
    return load_inversion(path, pipe or tiny_pipeline(), images, prompts, method, steps, config=config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return made().save(tmp_path_factory.mktemp("inversions") / "two.safetensors", tiny_pipeline())


@pytest.mark.parametrize("method", ["direct", "null_text", "edit_friendly", "bdia"])
def test_what_is_loaded_is_what_was_saved_and_edits_alike(tmp_path, method):
    pipe, inversion = tiny_pipeline(), made(method)
    path = inversion.save(tmp_path / "deep" / "er" / "it.safetensors", pipe)
    again = load(path, method=method)
    assert torch.equal(again.latents, inversion.latents)
    assert (again.negative_embeds is None) == (inversion.negative_embeds is None) == (method != "null_text")
    assert replace(again, latents=None, images=None, negative_embeds=None) == replace(
        inversion, latents=None, images=None, negative_embeds=None
    )
    for ours, theirs in zip(edit(pipe, again, [REMOVE] * 2), edit(pipe, inversion, [REMOVE] * 2), strict=True):
        assert torch.equal(ours.image, theirs.image)
    assert [file.name for file in path.parent.iterdir()] == ["it.safetensors"]


def test_a_slice_is_saved_as_the_inversion_of_its_images(tmp_path):
    path = made()[1:].save(tmp_path / "one.safetensors", tiny_pipeline())
    assert torch.equal(load(path, images=tiny_images(2)[1:], prompts=[SOURCE]).latents, made().latents[:, 1:])


def with_other_scheduler():
    pipe = copy.copy(tiny_pipeline())
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def with_other(part):
    pipe = copy.copy(tiny_pipeline())
    module = copy.deepcopy(getattr(pipe, part))
    next(module.parameters()).data.flatten()[0] += 1
    setattr(pipe, part, module)
    return pipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": tiny_images(2).flip(0)}, r"images differ \(first: images 0\)"),
        ({"images": tiny_images(2).clamp(max=0.9)}, "images differ"),
        ({"images": tiny_images(1), "prompts": [SOURCE]}, "prompts, tokens, images, shape differ"),
        ({"prompts": [SOURCE, TARGET]}, r"prompts, tokens differ \(prompts 1: .*with support.*, not .*without support"),
        ({"method": "ddim"}, r"method differ \(method: 'direct', not 'ddim'\)"),
        ({"steps": 2}, r"num_inference_steps, scheduler differ \(num_inference_steps: 3, not 2\)"),
        ({"config": replace(CONFIG, seed=4)}, r"settings differ \(seed: 3, not 4\)"),
        ({"pipe": with_other_scheduler()}, r"scheduler differ \(prediction_type: 'epsilon', not 'v_prediction'"),
        ({"prompts": [SOURCE]}, "2 images need as many prompts"),
        ({"steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(saved, change, message):
    with pytest.raises(ValueError, match=message):
        load(saved, **change)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_of_which_one_weight_changed_is_another(saved, part):
    with pytest.raises(ValueError, match=rf"something else: {part} differ \(first: {part}\); invert again"):
        load(saved, pipe=with_other(part))


def test_an_inversion_is_not_saved_as_another_models(tmp_path):
    with pytest.raises(ValueError, match="made by another model"):
        made().save(tmp_path / "it.safetensors", with_other_scheduler())
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_inversion_are_refused(tmp_path, saved):
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"latents": torch.zeros(2)}, foreign)
    damaged.write_bytes(saved.read_bytes()[:-10])
    for path, message in ((foreign, "foreign.* is no saved inversion"), (damaged, "damaged.* is damaged")):
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.safetensors")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = made().save(tmp_path / "it.safetensors", tiny_pipeline())
    before = path.read_bytes()

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("prism_lib.training.checkpoints.save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*it\.safetensors .*No space left"):
        inversion_store.save_inversion(path, made(), tiny_pipeline())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
