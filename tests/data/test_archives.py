"""Published data sets of chest X-rays in their exact layout: MIMIC-CXR-JPG, CheXpert Plus, PadChest and VinDr-CXR."""

import dataclasses
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prism_lib.apps.bulk_plan import _films
from prism_lib.data.chest import ARCHIVES
from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.language.labels import VOCABULARIES
from tests import formats

LAYOUTS = {
    "mimic": formats.mimic,
    "chexpert-plus": formats.chexpert_plus,
    "padchest": formats.padchest,
    "vindr": formats.vindr,
}


def config_for(name, root, **changes):
    config = PrepareConfig(name, root.parent / "prepared", data_root=root, size=32)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every layout, and what one process prepares of it."""
    made = {}
    for name, write in LAYOUTS.items():
        root = write(tmp_path_factory.mktemp(name) / "root")
        made[name] = root, prepare(config_for(name, root))
    return made


def edit(root, pattern, old, new):
    """Replace text once in the one table that fits."""
    (path,) = root.glob(pattern)
    packed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text()
    assert old in text
    text = text.replace(old, new, 1)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_label_is_in_the_vocabulary_and_no_published_name_is_both_used_and_ignored(name):
    archive = ARCHIVES[name]
    vocabulary = VOCABULARIES["skin" if archive.mode == "RGB" else "chest"]
    assert {*archive.labels, *archive.absent} <= {*vocabulary.labels}
    published = {label for names in archive.labels.values() for label in names}
    assert not published & {*archive.ignored, *archive.silent}


def test_headers_are_the_published_ones():
    described = {name: [{*table.columns} for table in ARCHIVES[name].tables] for name in LAYOUTS}
    assert described["mimic"][0] <= {*formats.MIMIC_METADATA.split(",")}
    assert described["chexpert-plus"][0] <= {*formats.CHEXPERT_PLUS_HEADER.split(",")}
    assert described["padchest"][0] <= {*formats.PADCHEST_HEADER.split(",")}
    vindr = {label for names in ARCHIVES["vindr"].labels.values() for label in names} | {*ARCHIVES["vindr"].ignored}
    assert vindr == {*formats.VINDR_LABELS.split(","), "Other disease"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_patients_are_in_one_split_and_two_processes_write_the_same(folders, name, tmp_path):
    root, folder = folders[name]
    table = load_table(folder)
    assert set(table["split"]) == {"train", "val", "test"}
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    again = prepare(config_for(name, root, output=tmp_path / "two", processes=2))
    pd.testing.assert_frame_equal(load_table(again), table)
    assert load_info(again)["content_hash"] == load_info(folder)["content_hash"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_unusable_files_are_listed(folders, name, tmp_path):
    root = LAYOUTS[name](tmp_path / "root")
    source = load_table(folders[name][1], "train")["source_file"].tolist()
    below = {path.relative_to(root): path for path in root.rglob("*.*")}
    first, second, third = (next(path for key, path in below.items() if str(key).endswith(file)) for file in source[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    third.write_bytes(b"")
    folder = prepare(config_for(name, root, max_rejected=0.3))
    rejected = {item["file"] for item in load_info(folder)["rejected"]}
    assert rejected == set(source[:3])
    assert not rejected & set(load_table(folder)["source_file"])
    with pytest.raises(ValueError, match=r"files cannot be used \(max_rejected=0\)"):
        prepare(config_for(name, root, output=tmp_path / "strict"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_films_are_found_again_for_full_size(folders, name):
    _, folder = folders[name]
    table = load_table(folder)
    paths = _films(str(folder), load_info(folder), table)
    assert len(paths) == len(table)


# --- MIMIC-CXR-JPG


def test_mimic_has_its_own_splits_views_and_labels(folders):
    _, folder = folders["mimic"]
    table, info = load_table(folder), load_info(folder)
    assert len(table) == 2 * 20
    assert set(table["view"]) == {"PA", "AP"} and set(table["projection"]) == {"frontal"}
    assert info["left_out"]["views"] == {"LATERAL": 20, "LL": 20, "unknown": 20, "LAO": 20}
    number = (table["patient_id"].astype(int) - 10000032) // 500000
    assert table["split"].tolist() == [("train", "val", "test", "train", "train")[n % 5] for n in number]
    for row, n in zip(table.to_dict("records"), number, strict=True):
        unlabelled = n == 0 and row["view"] == "PA"
        raw = [float(text or "nan") if not unlabelled else float("nan") for text in formats.chexpert_labels(n)]
        np.testing.assert_array_equal([row[label] for label in formats.LABELS], raw)
        assert row["source_file"].startswith(f"files/p{row['patient_id'][:2]}/p{row['patient_id']}/s5")
    assert info["left_out"]["no row in"] == {"mimic-cxr-2.0.0-chexpert.csv.gz": 1}


def test_mimic_labeller_and_films_without_a_view_are_chosen(folders, tmp_path):
    root, _ = folders["mimic"]
    config = config_for("mimic", root, output=tmp_path / "out", view="frontal or unknown", labelling="negbio")
    folder = prepare(config)
    table = load_table(folder)
    assert len(table) == 3 * 20
    assert not table[formats.LABELS].eq(-1).any(axis=None)
    assert load_info(folder)["label_policy"]["source"].endswith("negbio: labels of NegBio")


@pytest.mark.parametrize(
    ("pattern", "old", "new", "message"),
    [
        ("*-split*", "validate", "valid", r"line 8: split is none of train, validate, test: 'valid'"),
        ("*-split*", "00000006-00000000", "00000006-0000000f", r"split is none of .*: ''"),
        ("*-split*", "00000001-00000001", "00000001-00000000", r"split\.csv\.gz, line 9: repeated name: '00000001-"),
        ("*-chexpert*", ",50414268,", ",50414269,", r"chexpert\.csv\.gz, line 3: repeated patient_id and study_id"),
        ("*-chexpert*", ",1.0", ",2.0", r"chexpert\.csv\.gz, line \d+: label '.*' is not 1, 0, -1 or blank: '2\.0'"),
        ("*-metadata*", "subject_id", "subject", "lacks the column 'subject_id'"),
        ("*-metadata*", ",10000032,", ",,", r"metadata\.csv\.gz, line 2: empty subject_id"),
    ],
)
def test_mimic_bad_row_is_named(tmp_path, pattern, old, new, message):
    root = formats.mimic(tmp_path / "root", patients=10)
    edit(root, pattern, old, new)
    with pytest.raises(ValueError, match=message):
        prepare(config_for("mimic", root, max_rejected=1.0))


def test_mimic_patient_in_two_splits(tmp_path):
    root = formats.mimic(tmp_path / "root", patients=10)
    edit(root, "*-split*", "10000032,train", "10000032,test")
    with pytest.raises(ValueError, match="patient 10000032 is in two of the published splits"):
        prepare(config_for("mimic", root))


def test_damaged_table_is_named(tmp_path):
    root = formats.mimic(tmp_path / "root", patients=10)
    path = root / "mimic-cxr-2.0.0-split.csv.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"split\.csv\.gz is not a readable table"):
        prepare(config_for("mimic", root))


# --- CheXpert Plus


@pytest.mark.parametrize("images", ["PNG", "PNG/PNG"])
def test_chexpert_plus_joins_its_labels_by_path(tmp_path, images):
    root = formats.chexpert_plus(tmp_path / "root", images=images)
    config = config_for("chexpert-plus", root, split=(0.8, 0.2, 0.0))
    table = load_table(prepare(config))
    assert len(table) == 12 + 3
    test = table[table["split"] == "test"]
    assert set(test["patient_id"]) == {"patient64541", "patient64542", "patient64543"}
    for row in table.to_dict("records"):
        raw = [float(text or "nan") for text in formats.chexpert_labels(int(row["patient_id"][7:]))]
        np.testing.assert_array_equal([row[label] for label in formats.LABELS], raw)
        assert (
            row["source_file"]
            == f"{images}/{'valid' if row['split'] == 'test' else 'train'}/{row['patient_id']}/study1/view1_frontal.png"
        )
        assert (row["sex"], row["age"], row["race"], row["view"]) == ("F", 61, "Asian", "AP")


def test_chexpert_plus_labels_of_another_section(folders, tmp_path):
    root, folder = folders["chexpert-plus"]
    assert load_table(folder)["Edema"].isna().all()
    assert not load_table(folder)["source_file"].str.contains("/valid/").any()
    config = config_for("chexpert-plus", root, output=tmp_path / "out", labelling="report")
    assert load_table(prepare(config))["Edema"].eq(1).all()


def test_chexpert_plus_bad_label_is_named(tmp_path):
    root = formats.chexpert_plus(tmp_path / "root")
    edit(root, "chexbert_labels/impression*", '"Cardiomegaly": 0.0', '"Cardiomegaly": 3.0')
    with pytest.raises(ValueError, match=r"impression_fixed\.json, line 1: label 'Cardiomegaly' is not .* '3\.0'"):
        prepare(config_for("chexpert-plus", root))
    (root / "chexbert_labels" / "impression_fixed.json").write_text(json.dumps({"a": 1}) + "\n{")
    with pytest.raises(ValueError, match=r"impression_fixed\.json is not a readable table"):
        prepare(config_for("chexpert-plus", root))


# --- PadChest


def test_padchest_lists_become_labels(folders):
    _, folder = folders["padchest"]
    table, info = load_table(folder), load_info(folder)
    assert len(table) == 6 * 16  # PA, AP and AP_horizontal
    assert info["left_out"] == {
        "views": {"L": 16, "COSTAL": 16},
        "labels": {"costophrenic angle blunting": 16, "aortic elongation": 16},
    }
    rows = {place: table[table["file_name"].str.contains(f"40{place}_")] for place in range(8)}
    assert rows[1].empty and rows[5].empty
    assert rows[0]["No Finding"].eq(1).all() and rows[0]["Pleural Effusion"].eq(0).all()
    assert rows[2][["Pleural Effusion", "Fracture"]].eq(1).all(axis=None) and rows[2]["No Finding"].eq(0).all()
    assert rows[3][["Pleural Effusion", "Pneumothorax"]].eq(1).all(axis=None)
    assert rows[3]["Cardiomegaly"].isna().all()  # its list has an empty name: what is not listed is unknown
    labels = info["labels"]
    assert rows[4][labels].isna().all(axis=None) and rows[6][labels].isna().all(axis=None)
    assert rows[7]["Support Devices"].eq(1).all()
    assert table["age"].eq(84).all() and set(table["sex"]) == {"M", "F", "unknown"}


def test_padchest_lateral_films_physicians_and_normal_beside_a_finding(folders, tmp_path):
    root, _ = folders["padchest"]
    config = config_for("padchest", root, output=tmp_path / "out", view="all", labelling="Physician")
    folder = prepare(config)
    table = load_table(folder)
    assert len(table) == 8 * 12 and set(table["labelled_by"]) == {"Physician"}
    assert load_info(folder)["left_out"]["labelled by"] == {"RNN_model": 8 * 4}
    beside = table[table["projection"].eq("other")]
    assert beside["No Finding"].eq(-1).all() and beside["Hernia"].eq(1).all()
    tube = table[table["projection"].eq("lateral")]
    assert tube[["Cardiomegaly", "Pleural Effusion", "Support Devices"]].eq(1).all(axis=None)


def test_padchest_keeps_sixteen_bits_until_it_is_resized(tmp_path):
    root = formats.padchest(tmp_path / "root")
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for path in root.rglob("*.png"):
        Image.fromarray(ramp).save(path)
    folder = prepare(config_for("padchest", root, duplicates="keep"))
    levels = (read_images(folder, load_table(folder).head(1))[0, 0] * 255).round().numpy()
    np.testing.assert_array_equal(levels, np.round(ramp * (255 / 65535)))


def test_padchest_black_films_are_rejected_and_odd_cells_refused(tmp_path):
    root = formats.padchest(tmp_path / "root")
    black = next(root.rglob("*400_*.png"))
    Image.fromarray(np.zeros((40, 48), np.uint16)).save(black)
    folder = prepare(config_for("padchest", root, max_rejected=0.02))
    (rejected,) = load_info(folder)["rejected"]
    assert rejected == {"file": black.name, "reason": "blank image: every pixel is 0"}
    edit(root, "*.csv", "['normal']", "['normal'")
    with pytest.raises(ValueError, match=r"line 2: not a list of labels: \"\['normal'\""):
        prepare(config_for("padchest", root, output=tmp_path / "odd"))
    edit(root, "*.csv", "['normal'", "['normal']")
    edit(root, "*.csv", ",PA,", ",OBLIQUE,")
    with pytest.raises(ValueError, match=r"line 2: unknown view \(known: PA, .*\): 'OBLIQUE'"):
        prepare(config_for("padchest", root, output=tmp_path / "odd"))


# --- VinDr-CXR

AGREED = {  # label -> values of the five kinds of images, by rule
    "majority": {"No Finding": [1, 0, 0, 1, 0], "Cardiomegaly": [0, 1, 0, 0, 0], "Fracture": [0, 0, 1, 0, 0]},
    "any": {"No Finding": [1, 0, 0, 0, 0], "Cardiomegaly": [0, 1, 0, 0, 0], "Lung Lesion": [0, 0, 0, 1, 0]},
    "unanimous": {
        "No Finding": [1, -1, 0, -1, 0],
        "Cardiomegaly": [0, -1, 0, 0, 0],
        "Pleural Effusion": [0, 0, 0, 0, 1],
    },
}


@pytest.mark.parametrize("rule", AGREED)
def test_vindr_readers_agree_by_a_rule(folders, rule, tmp_path):
    root, _ = folders["vindr"]
    config = config_for("vindr", root, output=tmp_path / "out", labelling=rule, split=(0.8, 0.2, 0.0))
    folder = prepare(config)
    table = load_table(folder)
    assert len(table) == 20 + 4
    test = table[table["split"] == "test"]
    assert test["source_file"].str.startswith("test/").all() and len(test) == 4
    kind = table["patient_id"].str[1:4].astype(int) % 5
    train = table["split"] != "test"
    for label, values in AGREED[rule].items():
        assert table.loc[train, label].tolist() == [values[k] for k in kind[train]], label
    assert test["Lung Lesion"].tolist() == [float(k == 3) for k in kind[~train]]  # the consensus, whatever the rule
    assert load_info(folder)["left_out"]["labels"] == {"Aortic enlargement": 4}
    assert table["pixel_spacing_mm"].eq(0.2 * 48 / 32).all()
    assert "every image counts as a patient of its own" in load_info(folder)["label_policy"]["source"]


def test_vindr_half_of_two_readers_is_uncertain(tmp_path):
    table = load_table(prepare(config_for("vindr", formats.vindr(tmp_path / "root", readers=2))))
    kind = table["patient_id"].str[1:4].astype(int) % 5
    assert table["Lung Lesion"].tolist() == [-1.0 if k == 3 else 0.0 for k in kind]
    assert not table["source_file"].str.startswith("test/").any()


def test_vindr_disagreement_may_be_an_error(folders, tmp_path):
    root, _ = folders["vindr"]
    message = r"readers of image 'r00150a4\w+' disagree on No Finding, Cardiomegaly \(12 such images\)"
    with pytest.raises(ValueError, match=message):
        prepare(config_for("vindr", root, output=tmp_path / "out", labelling="refuse"))


def test_vindr_two_rows_of_one_reader(tmp_path):
    root = formats.vindr(tmp_path / "root")
    edit(root, "annotations/*train.csv", ",R9,", ",R8,")
    with pytest.raises(ValueError, match=r"image_labels_train\.csv, line 3: two rows of one reader for image: 'r000"):
        prepare(config_for("vindr", root))


@pytest.mark.parametrize(
    ("name", "labelling", "message"),
    [
        ("vindr", "most", "dataset 'vindr' has no labelling 'most'; it has majority, any, unanimous, refuse"),
        ("nih", "negbio", "dataset 'nih' has no labelling 'negbio'; it has no others"),
        ("phantom", "any", "dataset 'phantom' has no labelling 'any'"),
    ],
)
def test_unknown_labelling(tmp_path, name, labelling, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(name, tmp_path / "out", data_root=tmp_path, labelling=labelling)


def test_lateral_films_of_a_data_set_without_any(folders, tmp_path):
    root, _ = folders["vindr"]
    with pytest.raises(ValueError, match=r"image_labels_train\.csv has no lateral image with labelling 'majority'"):
        prepare(config_for("vindr", root, output=tmp_path / "out", view="lateral"))


def test_table_that_is_not_there(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected one table mimic-cxr-2\.\*-metadata\.csv\*"):
        prepare(config_for("mimic", tmp_path / "root"))
