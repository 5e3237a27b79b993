"""What is kept is done once, and only inside of the block."""

import copy
from dataclasses import replace

import pytest
from diffusers import StableDiffusionPipeline

from prism_lib.editing import inversion
from prism_lib.editing.inversion import invert
from prism_lib.editing.inversion_config import InversionConfig
from prism_lib.editing.reuse import kept, remember
from prism_lib.evaluation.evaluate import choose_cases
from prism_lib.language.edits import Edit
from prism_lib.studies import comparison, imagic
from prism_lib.studies.editors import PLAIN, PromptToPrompt
from prism_lib.studies.imagic import Imagic
from tests.tiny import REMOVE, tiny_images, tiny_pipeline


def test_the_same_question_is_answered_once_inside_of_the_block():
    done = []
    work = lambda: done.append(1) or len(done)  # noqa: E731
    assert [remember("a", work), remember("a", work)] == [1, 2]
    with kept():
        assert [remember(q, work) for q in ("a", "a", "b", "a")] == [3, 3, 4, 3]
    assert remember("a", work) == 5


def test_a_block_that_fails_keeps_nothing():
    with pytest.raises(ZeroDivisionError), kept():
        remember("a", lambda: remember("b", lambda: 1) / 0)
    assert remember("b", lambda: 2) == 2


def test_an_inversion_is_asked_for_by_all_that_decides_it():
    pipe, images = tiny_pipeline(), tiny_images(2)
    other_networks = StableDiffusionPipeline(**pipe.components | {"unet": copy.deepcopy(pipe.unet)})
    prompts = [REMOVE.source] * 2
    with kept():
        first = invert(pipe, images, prompts, "ddim", 2)
        assert invert(pipe, images.clone(), list(prompts), "ddim", 2) is first
        others = [
            invert(pipe, images, prompts, "direct", 2),
            invert(pipe, images, prompts, "ddim", 3),
            invert(pipe, images, [REMOVE.target] * 2, "ddim", 2),
            invert(pipe, images.mT, prompts, "ddim", 2),
            invert(pipe, 1 - images, prompts, "ddim", 2),
            invert(pipe, images, prompts, "ddim", 2, config=InversionConfig(inner_steps=1)),
            invert(other_networks, images, prompts, "ddim", 2),
        ]
        assert all(other is not first for other in others)
    assert invert(pipe, images, prompts, "ddim", 2) is not first


@pytest.mark.parametrize(
    "editors",
    [
        [PromptToPrompt("null_text", 2, replace(PLAIN, cross_replace_steps=share)) for share in (0.4, 0.8)],
        [Imagic(eta, 2, unet_steps=2, num_inference_steps=2) for eta in (0.7, 0.9)],
    ],
    ids=["null-text", "imagic"],
)
def test_settings_that_share_their_abduction_are_tuned_as_if_they_did_not(phantom_folder, editors, monkeypatch):
    change = Edit(remove=("Support Devices",))
    cases = {change: choose_cases(phantom_folder, change, 2, "val")}
    work = {"_null_text": inversion, "_fit": imagic.Imagic}
    calls = []
    for name, owner in work.items():
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real: calls.append(1) or real(*a))
    tuned = comparison.tune(tiny_pipeline(), phantom_folder, cases, {"method": editors})["method"]
    shared = len(calls)
    alone = [
        comparison.tune(tiny_pipeline(), phantom_folder, cases, {"method": [editor]})["method"].errors[0]
        for editor in editors
    ]
    assert list(tuned.errors) == alone and alone[0] != alone[1]
    assert shared > 0 and len(calls) == 3 * shared
