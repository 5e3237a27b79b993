"""Composition and reversibility on a tiny pipeline: what is exact is exact, and the rest is measured from the input."""

import pytest
import torch

from prism_lib.data.folder import read_images
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import axioms
from prism_lib.evaluation.evaluate import choose_cases, edit_images
from prism_lib.language.edits import Edit
from tests.tiny import tiny_pipeline

REMOVE = Edit(remove=("Support Devices",))
HOW = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return choose_cases(phantom_folder, REMOVE, 3)


def test_a_null_edit_changes_no_pixel_and_its_latent_path_costs_the_autoencoder(phantom_folder, cases):
    table = axioms.composition(tiny_pipeline(), phantom_folder, cases, EditConfig(), 2, **HOW)
    assert table["image_1"].tolist() == table["image_2"].tolist() == [0.0] * 3
    assert table["raw_1"].tolist() == pytest.approx([1.0] * 3, abs=1e-4), "one round is the autoencoder's own error"
    assert table["raw_2"].ne(table["raw_1"]).all()
    summary = axioms.summarise(table)
    assert summary["raw_1"] == pytest.approx(1.0, abs=1e-4) and summary["images"] == 3
    with pytest.raises(ValueError, match="at least one round"):
        axioms.composition(tiny_pipeline(), phantom_folder, cases, EditConfig(), 0)


def test_the_latent_path_of_rounds_is_the_autoencoder_again_and_again(phantom_folder, cases):
    pipe, images = tiny_pipeline(), read_images(phantom_folder, cases)
    table = axioms.composition(pipe, phantom_folder, cases, EditConfig(), 2, **HOW)
    once = invert(pipe, images, [""] * 3, **HOW).reconstruct(pipe)
    twice = invert(pipe, once, [""] * 3, **HOW).reconstruct(pipe)
    expected = (twice - images).abs().mean((1, 2, 3)) / (once - images).abs().mean((1, 2, 3))
    torch.testing.assert_close(torch.tensor(table["raw_2"].tolist()), expected, atol=1e-3, rtol=1e-3)


def test_an_edit_that_is_undone_comes_back(phantom_folder, cases, monkeypatch):
    seen = []
    real = edit_images

    def spy(pipe, images, pairs, config, **how):
        seen.append((images, pairs))
        return real(pipe, images, pairs, config, **how)

    monkeypatch.setattr(axioms, "edit_images", spy)
    table = axioms.reversibility(tiny_pipeline(), phantom_folder, cases, REMOVE, EditConfig(), **HOW)
    assert table[["image", "raw"]].ge(0).all(axis=None)
    (_, there), (edited, back), _ = seen
    assert [pair.source for pair in back] == [pair.target for pair in there]
    assert [pair.target for pair in back] == [pair.source for pair in there]
    assert not torch.equal(edited, read_images(phantom_folder, cases))
    seen.clear()
    one = axioms.reversibility(tiny_pipeline(), phantom_folder, cases, REMOVE, EditConfig(), paths=("image",), **HOW)
    assert len(seen) == 2 and "raw" not in one
    assert one["image"].tolist() == table["image"].tolist()
