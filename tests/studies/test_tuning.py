"""A search finds settings, writes them where the model reads them, and goes on where it stopped."""

import json
import math
import re
import shutil

import pandas as pd
import pytest
import torch

from prism_lib import devices, paths
from prism_lib.apps import cli
from prism_lib.data.folder import load_table
from prism_lib.data.rows import editable, prompt_pairs
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import FILE, EditConfig, recommended, recommended_inversion
from prism_lib.evaluation import evaluate, metrics
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier
from prism_lib.records import load_record
from prism_lib.studies import tuning
from prism_lib.studies.comparison import measure
from prism_lib.studies.editors import PromptToPrompt
from prism_lib.studies.tuning import NEUTRAL, TuningConfig, edit_fields, find_settings, losses_of
from tests.tiny import tiny_pipeline

KEYS = ("remove_support_devices", "add_cardiomegaly")
REMOVE = Edit(remove=("Support Devices",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(devices, "processes_for", lambda asked=0: 1)


@pytest.fixture
def config(model, phantom_folder, tmp_path):
    return TuningConfig(str(model), str(phantom_folder), str(tmp_path / "out"), KEYS, 2, 2, evaluations=250)


class Bright(torch.nn.Module):
    """Reads support devices where an image is bright."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # says which device it is on

    def forward(self, images):
        return 9 * (images.mean((1, 2, 3))[:, None] - 0.5)


def trials_of(found):
    return pd.read_csv(found.folder / "tuning.csv", index_col=["search", "row"])


def by(config, **changes):
    return TuningConfig(**dict(vars(config)) | changes)


def test_found_settings_are_what_the_model_recommends(config, phantom_folder):
    lines = []
    found = find_settings(config, lines.append)
    rows = editable(load_table(phantom_folder, "val"), REMOVE)
    (pair,) = prompt_pairs(phantom_folder, rows.head(1), REMOVE)
    assert recommended(found.folder, pair) == EditConfig(**found.settings.settings(pair))
    assert recommended_inversion(found.folder) == found.settings.inversion
    trials, record = trials_of(found), load_record("tuning", "", found.folder)["metrics"]
    assert len(lines) == len(trials) and record["evaluations"] == trials["user_attrs_evaluations"].sum() >= 250
    assert list(record["least_loss"]) == [tuning.ALL_EDITS, *KEYS]
    for name, least in record["least_loss"].items():
        whole = trials.loc[name][trials.loc[name]["state"] == "COMPLETE"]
        assert least == pytest.approx(whole["value"].min(), rel=1e-5)
    assert list(found.losses) == ["neutral", "before", "found"] and list(found.losses.index) == list(KEYS)
    assert (found.losses["before"] == found.losses["neutral"]).all(), "a model without the file has neutral settings"


def test_the_first_trial_is_neutral_and_worse_ones_stop_early(config):
    assert EditConfig(**edit_fields(NEUTRAL)) == EditConfig() and NEUTRAL["skip"] == InversionConfig().skip
    trials = trials_of(find_settings(config)).loc[tuning.ALL_EDITS]
    assert {name: trials.iloc[0][f"params_{name}"] for name in NEUTRAL} == pytest.approx(NEUTRAL)
    complete, evaluations = trials["state"] == "COMPLETE", trials["user_attrs_evaluations"]
    assert 0 < complete.sum() < len(trials) and set(trials["state"]) == {"COMPLETE", "PRUNED"}
    assert evaluations[~complete].max() < evaluations[complete].max()


@pytest.mark.slow
def test_a_search_that_stopped_ends_as_one_that_did_not(config, tmp_path):
    whole = find_settings(config)
    again = by(config, out=str(tmp_path / "again"))
    find_settings(by(again, evaluations=40))
    resumed = find_settings(again)
    assert (resumed.folder / FILE).read_bytes() == (whole.folder / FILE).read_bytes()
    before, after = (
        trials_of(found).filter(regex="params|value|state|evaluations").loc[tuning.ALL_EDITS]
        for found in (whole, resumed)
    )
    pd.testing.assert_frame_equal(after, before)


def test_without_the_truth_a_guide_and_the_identity_decide(config, monkeypatch):
    monkeypatch.setattr(tuning, "true_counterfactual", lambda *given: None)
    monkeypatch.setattr(evaluate, "true_counterfactual", lambda *given: None)
    guide = Classifier(Bright(), ("Support Devices",))
    with pytest.raises(ValueError, match="no true counterfactuals of remove_support_devices: name a classifier"):
        tuning.cases_of(config, None)
    with pytest.raises(ValueError, match="the guide reads Support Devices, each alone, and not add_cardiomegaly"):
        tuning.cases_of(config, guide)
    ((_, rows),) = tuning.cases_of(by(config, edits=KEYS[:1]), guide).items()
    measured = measure(tiny_pipeline(), config.data, {REMOVE: rows}, {"": PromptToPrompt("direct", 2)}, guide)
    (evaluation,) = measured[""].evaluations
    gained = guide.read(evaluation.factual) - guide.read(evaluation.edited)
    kept = metrics.ssim(evaluation.edited, evaluation.factual)
    assert losses_of(evaluation) == pytest.approx((2 - gained[:, 0] - kept).tolist(), abs=1e-5)


def test_edits_are_read_with_the_words_of_the_folder(config, tmp_path):
    folder = shutil.copytree(config.data, tmp_path / "own")
    info = json.loads((folder / "dataset.json").read_text())
    info["config"]["vocabulary"] = {"name": "own", "subject": "chest", "phrases": {"Support Devices": "gadgets"}}
    (folder / "dataset.json").write_text(json.dumps(info))
    cases = tuning.cases_of(by(config, data=str(folder), edits=("remove the gadgets",)), None)
    assert list(cases) == [REMOVE]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all is no diffusers pipeline"),
        ({"model": "phantom-sd", "--out": ""}, "phantom-sd is a shipped model, whose settings stay: name a folder"),
        ({"data": "nowhere"}, "nowhere is not a prepared data set"),
        ({"--images": "500"}, r"applies to \d+ patients of split 'val' in .*; 1000 were asked for"),
        ({"--images": "0"}, "images is 0: input should be greater than 0"),
        ({"--minutes": "0"}, "minutes is 0.0: input should be greater than 0"),
        ({"--edits": "remove_nonsense"}, "nonsense"),
        ({"--edits": "a chest -> a thorax"}, "no true counterfactuals of text_a_thorax"),
        ({"--guide": "phantom-judge"}, "'phantom-judge' is the judge"),
        ({"--guide": "nobody"}, "no classifier at .*nobody"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(given, said, model, phantom_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    values = {"model": str(model), "data": str(phantom_folder), "--out": str(tmp_path / "out"), "--images": "4"} | given
    options = [word for name, value in values.items() if name.startswith("--") and value for word in (name, value)]
    assert cli.main(["tune", values["model"], values["data"], *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prism: ") and len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_validation_images_is_refused(config, monkeypatch):
    for module in (tuning, evaluate):
        monkeypatch.setattr(module, "load_table", lambda folder, split: load_table(folder, split).head(0))
    with pytest.raises(ValueError, match="applies to 0 patients of split 'val'"):
        find_settings(config)
    with pytest.raises(ValueError, match=r"no label of .* is both present and absent in its validation images"):
        find_settings(by(config, edits=()))


def test_the_command_prints_what_it_found(config, capsys):
    assert cli.main(["tune", config.model, config.data, "--out", config.out, "--edits", KEYS[0], "--images", "2",
                     "--steps", "2", "--evaluations", "20"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "all edits, trial 1: " in printed and "2 images each" in printed and "found" in printed
    written = json.loads((paths.Path(config.out) / FILE).read_text())
    assert set(written) == {"measured", "inversion", "defaults", "rules"} and written["rules"] == []


@pytest.mark.parametrize("minutes", [0, math.nan, math.inf])
def test_a_search_without_an_end_is_refused(config, minutes):
    with pytest.raises(ValueError, match="minutes"):
        by(config, minutes=minutes)
