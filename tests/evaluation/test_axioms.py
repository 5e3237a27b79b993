"""Composition and reversibility on a tiny pipeline: what is exact is exact, and the rest is measured from the input."""

import pytest
import torch

from prism_lib.data.folder import read_images
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import axioms
from prism_lib.evaluation.evaluate import choose_cases, evaluate_edits, summarise_rows
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
    summary = summarise_rows(table)
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
    """What was evaluated is not edited again; the other cases are."""
    pipe = tiny_pipeline()
    (known,) = evaluate_edits(pipe, phantom_folder, {REMOVE: cases.head(2)}, EditConfig(), **HOW)
    seen = []
    real = axioms.edit_jobs

    def spy(pipe, jobs, settings, **how):
        seen.append(jobs)
        return real(pipe, jobs, settings, **how)

    monkeypatch.setattr(axioms, "edit_jobs", spy)
    table = axioms.reversibility(pipe, phantom_folder, cases, known, EditConfig(), **HOW)
    assert table["image"].ge(0).all()
    (((rest, there),), ((edited, back),)) = seen
    assert torch.equal(rest, read_images(phantom_folder, cases.tail(1)))
    assert torch.equal(edited[:2], known.edited) and len(edited) == len(back) == 3
    assert (back[2].source, back[2].target) == (there[0].target, there[0].source)
    (whole,) = evaluate_edits(pipe, phantom_folder, {REMOVE: cases}, EditConfig(), **HOW)
    one = axioms.reversibility(pipe, phantom_folder, cases, whole, EditConfig(), **HOW)
    assert one["image"].tolist() == pytest.approx(table["image"].tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="the evaluated edit is of"):
        axioms.reversibility(pipe, phantom_folder, cases.tail(2), known, EditConfig(), **HOW)
