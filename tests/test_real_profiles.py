"""The profiles of real data sets, run as a user runs them, on a few random images in the exact published format."""

import json
import os
import subprocess
import sys

import pytest

from prism_lib import paths
from prism_lib.apps.profiles import load_profile
from prism_lib.data.folder import load_table, read_images
from prism_lib.language.captions import corpus
from prism_lib.language.labels import vocabulary
from prism_lib.models.pipeline import build_pipeline
from tests import formats
from tests.tiny import tiny_config

SECONDS = 600
SMALL = {
    "SIZE": 32,
    "WORKERS": 2,
    "STEPS": 2,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION": 1,
    "WARMUP": 1,
    "EVERY": 2,
    "MIXED_PRECISION": "no",
    "IMAGES_PER_EDIT": 1,
    "SHEET_ROWS": 1,
    "JUDGE_TRAINING": {"network": "densenet-tiny", "steps": 2, "batch_size": 2},
    "JUDGE_MIN_AUC": 0.0,
}


def nih(root):
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"]
    for patient in range(24):
        findings = ["No Finding", "Cardiomegaly|Effusion", "Effusion", "Cardiomegaly"][patient % 4]
        formats.save(formats.noise(patient), root / "images_001" / "images" / f"{patient:08d}_000.png")
        rows.append(f"{patient:08d}_000.png,{findings},0,{patient},{40 + patient},M,PA")
    formats.write_lines(root / "Data_Entry_2017_v2020.csv", rows)


def run(profile, notebooks, parameters, folder):
    overrides = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return subprocess.run(
        [sys.executable, "-m", "prism_lib.apps.cli", "run", profile, "--only", *notebooks, *overrides],
        env=os.environ
        | {"PRISM_RUNS": str(folder / "runs"), "PRISM_DATA": str(folder / "data"), "PYTHONPATH": str(paths.root())},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.parametrize(
    ("profile", "write", "channels"),
    [
        ("chexpert", lambda root: formats.chexpert(root / "chexpert", patients=40), 1),
        ("isic", lambda root: formats.isic2019(root / "isic2019"), 3),
        ("nih", lambda root: nih(root / "nih"), 1),
    ],
    ids=["chexpert", "isic", "nih"],
)
def test_profile_runs_on_data_in_the_published_format(profile, write, channels, tmp_path):
    write(tmp_path / "data")
    vocab = vocabulary(load_profile(profile).sections["01_data"]["VOCABULARY"])
    build_pipeline(tiny_config(), seed=0, captions=corpus(vocab)).save_pretrained(tmp_path / "tiny")
    finished = run(profile, ["01", "02", "03"], SMALL | {"MODEL": tmp_path / "tiny"}, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    section = load_profile(profile).sections["01_data"]
    folder = tmp_path / "data" / section["OUTPUT"]
    table = load_table(folder)
    assert read_images(folder, table).shape[1:] == (channels, 32, 32)
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.rglob("figures/*.json")}
    assert {"data", "finetuning", "counterfactual_quality"} <= records.keys()
    assert records["data"]["metrics"]["unseen_edit_words"] == 0
    assert records["judge"]["metrics"]["auc"].keys() == records["judge"]["metrics"]["auc_low"].keys() != set()
    assert list((tmp_path / "runs" / "judges").glob("*/model.safetensors"))
    edits = set(load_profile(profile).sections["03_counterfactuals"]["EDITS"])
    assert set(records["counterfactual_quality"]["metrics"]) == edits


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.parametrize(
    ("profile", "write"),
    [
        ("mimic", lambda root: formats.mimic(root / "mimic", patients=20)),
        ("chexpert-plus", lambda root: formats.chexpert_plus(root / "chexpert-plus", patients=40)),
        ("padchest", lambda root: formats.padchest(root / "padchest", patients=20)),
        ("vindr", lambda root: formats.vindr(root / "vindr", train=40, test=10)),
    ],
    ids=["mimic", "chexpert-plus", "padchest", "vindr"],
)
def test_profile_prepares_data_in_the_published_format(profile, write, tmp_path):
    """What follows 01 is the same for all of these profiles."""
    write(tmp_path / "data")
    finished = run(profile, ["01"], {"SIZE": 32, "WORKERS": 1}, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    folder = tmp_path / "data" / load_profile(profile).sections["01_data"]["OUTPUT"]
    table = load_table(folder)
    assert read_images(folder, table).shape[1:] == (1, 32, 32)
    assert table.groupby("patient_id")["split"].nunique().max() == 1


@pytest.mark.slow
@pytest.mark.notebooks
def test_labels_of_any_body_part_go_through_the_notebooks(tmp_path):
    """A table with labels and reports of its own, as pandas writes it, from preparation to counterfactuals."""
    root, count = tmp_path / "data" / "spine", 40
    for number in range(count):
        formats.save(formats.noise(number), root / f"{number}.png")
    columns = {"file_name": [f"{number}.png" for number in range(count)], "patient_id": list(range(count))}
    columns |= {"Scoliosis": [number % 2 == 0 for number in range(count)]}
    columns |= {"tuberculosis": [number % 3 == 0 for number in range(count)]}
    formats.table(root, "metadata.csv", **columns)
    words = vocabulary("labels", ["Scoliosis", "tuberculosis"], "spine x-ray")
    build_pipeline(tiny_config(), seed=0, captions=corpus(words)).save_pretrained(tmp_path / "tiny")
    small = SMALL | {"MODEL": tmp_path / "tiny", "DATASET": "table", "DATA_ROOT": "spine", "MODE": "L"}
    small |= {
        "OUTPUT": "prepared/spine",
        "DATA": "prepared/spine",
        "VOCABULARY": "labels",
        "01.OPTIONS": {"subject": "spine x-ray"},
    }
    small |= {"EDITS": ["remove_scoliosis", "add tuberculosis"]}
    finished = run("nih", ["01", "02", "03"], small, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.rglob("figures/*.json")}
    assert set(records["counterfactual_quality"]["metrics"]) == {"remove_scoliosis", "add_tuberculosis"}
    assert vocabulary(str(next(tmp_path.rglob("pipeline/vocabulary.yaml")))).subject == "spine x-ray"
