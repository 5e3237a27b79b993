"""Effects of edits on a classifier, the smallest edit that flips it, and classifiers with and without a shortcut."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from prism_lib.data.folder import load_table
from prism_lib.evaluation.evaluate import Evaluation
from prism_lib.language.edits import NO_EDIT, Edit
from prism_lib.models.classifier import Classifier, ClassifierConfig
from prism_lib.records import record
from prism_lib.reporting import tables
from prism_lib.studies import explanations, shortcut
from prism_lib.studies.editors import PromptToPrompt
from tests.tiny import tiny_pipeline

FLUID, DEVICES = "Pleural Effusion", "Support Devices"
REMOVE = Edit(remove=(FLUID,))


class Mean(torch.nn.Module):
    """Two logits: 100 times how much brighter the image is than 0.5, and the reverse."""

    def forward(self, images):
        logit = 100 * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([logit, -logit], 1)


CLASSIFIER = Classifier(Mean().eval(), (DEVICES, FLUID))


def shades(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 8, 8)


@pytest.fixture
def evaluation(phantom_folder):
    """Four images of 0.6; the edit darkens them by 0.05, 0.1, 0.2 and 0.3, the truth by twice that but for the last."""
    table = load_table(phantom_folder, "test").head(4)[["file_name", "patient_id"]]
    factual, edited, truth = shades(0.6, 0.6, 0.6, 0.6), shades(0.55, 0.5, 0.4, 0.3), shades(0.5, 0.4, 0.2, 0.1)
    none = torch.zeros_like(factual)
    return Evaluation(REMOVE, table, (NO_EDIT,) * 4, factual, edited, edited, factual, none, truth, none.bool())


def test_effects_by_hand(phantom_folder, evaluation):
    groups = explanations.subgroups(phantom_folder, ["sex"])
    table = explanations.responses(evaluation, {"mine": CLASSIFIER}, DEVICES, groups)
    assert table["before"].tolist() == pytest.approx([10] * 4, abs=1e-4)
    assert table["change"].tolist() == pytest.approx([-5, -10, -20, -30], abs=1e-4)
    assert table["flipped"].tolist() == [0, 0, 1, 1] and table["true_flipped"].tolist() == [0, 1, 1, 1]
    summary = explanations.effects(table, ["sex"])["mine"]
    whole = summary["remove_pleural_effusion"]
    assert whole["images"] == 4 and whole["change"] == pytest.approx(-16.25, abs=1e-4)
    assert whole["change_low"] < whole["change"] < whole["change_high"]
    assert whole["flipped"] == 0.5 and whole["true_flipped"] == 0.75
    assert whole["effect_ratio"] == pytest.approx(16.25 / 30, abs=1e-4) and whole["rank_correlation"] == 1
    parts = {name: values for name, values in summary.items() if name != "remove_pleural_effusion"}
    own = table.groupby("sex")["change"].mean()
    assert {name.removeprefix("remove_pleural_effusion, sex "): values["change"] for name, values in parts.items()} == (
        pytest.approx(own.to_dict())
    )
    assert sum(values["images"] for values in parts.values()) == 4


def test_without_a_truth_there_is_nothing_to_compare_with(evaluation):
    real = replace(evaluation, truth=None, truth_mask=None)
    table = explanations.responses(real, {"a": CLASSIFIER, "b": CLASSIFIER}, FLUID)
    assert len(table) == 8 and not [column for column in table if column.startswith("true_")]
    summary = explanations.effects(table)
    assert list(summary) == ["a", "b"] and list(summary["a"]) == ["remove_pleural_effusion"]
    assert summary["a"]["remove_pleural_effusion"]["change"] > 0
    assert not {"effect_ratio", "rank_correlation"} & set(summary["a"]["remove_pleural_effusion"])


def test_what_a_classifier_or_a_table_lacks_is_named(phantom_folder, evaluation):
    with pytest.raises(ValueError, match="does not read 'Edema'; it reads Support Devices, Pleural Effusion"):
        explanations.responses(evaluation, {"mine": CLASSIFIER}, "Edema")
    with pytest.raises(ValueError, match="no column 'scanner' for subgroups; it has patient_id"):
        explanations.subgroups(phantom_folder, ["scanner"])


def test_numbers_are_cut_into_thirds_and_missing_values_are_a_group():
    ages = explanations._bands(pd.Series([20, 25, 31, 42, 47, 53, 64, 71, 88, None]))
    assert ages.value_counts().tolist() == [3, 3, 3, 1]
    assert ages.iloc[-1] == "unknown" and ages.iloc[0] == "20 to 38.3"
    assert explanations._bands(pd.Series(["F", None, "M"])).tolist() == ["F", "unknown", "M"]
    assert explanations._bands(pd.Series([0, 1, 1])).tolist() == ["0", "1", "1"]


class Result:
    """What is needed of a `Counterfactual`."""

    def __init__(self, factual, image):
        self.factual, self.image = shades(factual)[0], shades(image)[0]
        self.scores = {"change": abs(image - factual)}


def swept(factual, *images):
    return [(f"remove_x, guidance_scale {n}", Result(factual, image)) for n, image in enumerate(images)]


ROWS = pd.DataFrame({"file_name": ["a", "b", "c"], "patient_id": ["1", "2", "3"]})


def test_the_smallest_flip_is_the_classifiers_own_and_the_judge_only_confirms():
    tried = [swept(0.6, 0.3, 0.45, 0.55), swept(0.6, 0.55, 0.7), swept(0.4, 0.3)]
    strict = Classifier(Mean().eval(), (FLUID, DEVICES))  # as a judge it reads the opposite
    found = explanations.smallest_flips(ROWS, tried, CLASSIFIER, DEVICES, strict)
    assert found["file_name"].tolist() == ["a", "b"], "the third is not read as present"
    assert found["flipped"].tolist() == [1, 0] and found["edit"].tolist() == ["remove_x, guidance_scale 1", ""]
    assert found["result"][0] is tried[0][1][1] and found["size"][0] == pytest.approx(0.15)
    assert found["confirmed"][0] == 1 and pd.isna(found["confirmed"][1])
    assert found["note"][0] == "remove_x\nguidance_scale 1\nlogit 10.0 to -5.0"
    summary = explanations.smallest_summary(found)
    assert summary["images"] == 2 and summary["flipped"] == 0.5 and summary["confirmed"] == 1
    assert summary["chosen remove_x"] == 1 and summary["size"] == pytest.approx(0.15)


class Never(torch.nn.Module):
    def forward(self, images):
        return torch.full((len(images), 1), 3.0)


def test_a_judge_that_sees_no_change_confirms_nothing_and_no_judge_says_nothing():
    tried = [swept(0.6, 0.3), swept(0.6, 0.4), swept(0.6, 0.2)]
    found = explanations.smallest_flips(ROWS, tried, CLASSIFIER, DEVICES, Classifier(Never().eval(), (DEVICES,)))
    assert explanations.smallest_summary(found)["confirmed"] == 0
    alone = explanations.smallest_summary(explanations.smallest_flips(ROWS, tried, CLASSIFIER, DEVICES))
    assert alone["flipped"] == 1 and "confirmed" not in alone
    nothing = explanations.smallest_summary(explanations.smallest_flips(ROWS, tried, CLASSIFIER, FLUID))
    assert nothing == {"images": 0}


def test_a_sweep_of_edits_names_what_it_tried(phantom_folder):
    rows = load_table(phantom_folder, "test")
    rows = rows[rows[FLUID].eq(1) & rows[DEVICES].eq(1)].head(2)
    edits, editor = [REMOVE, Edit(remove=(DEVICES,))], PromptToPrompt(num_inference_steps=2)
    made = explanations.sweep_edits(
        tiny_pipeline(), phantom_folder, rows, edits, editor, {"guidance_scale": [0.0, 2.0]}
    )
    names = [name for name, _ in made[0]]
    assert names == [
        f"remove_{label}, guidance_scale {n}" for label in ("pleural_effusion", "support_devices") for n in (0, 2)
    ]
    assert len(made) == len(rows) and all(len(own) == 4 for own in made)
    assert not torch.equal(made[0][0][1].factual, made[1][0][1].factual), "each image its own"


def test_a_planted_classifier_is_kept_by_what_it_was_trained_on(phantom_folder, tmp_path, monkeypatch):
    network = ClassifierConfig((DEVICES, FLUID), blocks=(1, 1), growth=4, features=4, batch_size=4, steps=2)
    study = shortcut.ShortcutConfig(DEVICES, FLUID, images=8, added=4, size=32, classifier=network)
    calls, real = [], shortcut.training_rows
    monkeypatch.setattr(shortcut, "training_rows", lambda *given: (calls.append(given[2]), real(*given))[1])
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    planted, again, clean = (shortcut.trained(phantom_folder, study, k, tmp_path) for k in (1.0, 1.0, 0.5))
    assert calls == [1.0, 0.5] and planted.labels == (DEVICES, FLUID)
    assert torch.equal(planted.read(images), again.read(images))
    assert not torch.equal(planted.read(images), clean.read(images))


def test_the_record_becomes_a_table_with_a_row_per_classifier_and_edit(tmp_path):
    rows = {"remove_x": {"change": -1.0, "change_low": -2.0, "change_high": 0.0}, "remove_x, sex F": {"change": 1.0}}
    record("dependence", "phantom", "07_your_classifier", {}, 0, {"mine": rows}, tmp_path, model="m", seconds=1.0)
    text = tables.as_tables(tables.load_all("phantom", tmp_path)["dependence"])
    assert "| mine / remove x | -1.00 (-2.00 to 0.00) |" in text["md"] and "mine / remove x, sex F" in text["md"]
