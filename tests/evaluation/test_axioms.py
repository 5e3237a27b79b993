"""Composition and reversibility on a tiny pipeline: what is exact is exact, and the rest is measured from the input."""

import pytest

from prism_lib.data.folder import read_images
from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import axioms, metrics
from prism_lib.evaluation.evaluate import choose_cases, evaluate_edits, summarise_rows
from prism_lib.language.edits import Edit, PromptPair
from tests.tiny import tiny_pipeline

REMOVE = Edit(remove=("Support Devices",))
HOW = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return choose_cases(phantom_folder, REMOVE, 3)


def test_a_null_edit_changes_no_pixel_and_its_latent_path_costs_the_autoencoder(phantom_folder, cases):
    table = axioms.composition(tiny_pipeline(), phantom_folder, cases, EditConfig(), **HOW)
    assert table["image"].tolist() == [0.0] * 3
    assert table["raw"].tolist() == pytest.approx([1.0] * 3, abs=1e-4), "the autoencoder's own error"
    summary = summarise_rows(table)
    assert summary["raw"] == pytest.approx(1.0, abs=1e-4) and summary["images"] == 3


def test_an_edit_that_is_undone_comes_back(phantom_folder, cases):
    pipe = tiny_pipeline()
    (known,) = evaluate_edits(pipe, phantom_folder, {REMOVE: cases}, EditConfig(), **HOW)
    table = axioms.reversibility(pipe, phantom_folder, cases, known, EditConfig(), **HOW)
    back = [
        PromptPair(pair.target, pair.source, pair.target_words, pair.source_words)
        for pair in prompt_pairs(phantom_folder, cases, REMOVE)
    ]
    inversion = invert(pipe, known.edited, [pair.source for pair in back], **HOW)
    returned = stack(edit(pipe, inversion, back, EditConfig()))
    expected = metrics.relative_l1(returned, read_images(phantom_folder, cases), known.reconstruction)
    assert table["image"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="the evaluated edit is of"):
        axioms.reversibility(pipe, phantom_folder, cases.tail(2), known, EditConfig(), **HOW)
