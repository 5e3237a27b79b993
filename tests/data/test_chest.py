"""CheXpert's own format: columns, paths, views, labels, and the published validation set kept apart."""

import dataclasses

import numpy as np
import pytest

from prism_lib.data.chest import ARCHIVES
from prism_lib.data.folder import load_info, load_table
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.rows import label_counts
from prism_lib.language.labels import CHEXPERT_LABELS
from tests import formats


@pytest.fixture
def chexpert(tmp_path):
    return formats.chexpert(tmp_path / "CheXpert-v1.0-small")


def config_for(root, **changes):
    config = PrepareConfig("chexpert", root.parent / "prepared", data_root=root, size=32)
    return dataclasses.replace(config, **changes)


def edit_line(root, line, old, new, table="train.csv"):
    """Replace text in a line of a table, counted as an editor counts: the header is line 1."""
    lines = (root / table).read_text().splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    formats.write_lines(root / table, lines)


def test_fixture_has_the_published_columns():
    (table,) = ARCHIVES["chexpert"].tables
    assert [*table.columns, *ARCHIVES["chexpert"].labels] == formats.CHEXPERT_HEADER.split(",")
    assert tuple(formats.CHEXPERT_HEADER.split(",")[5:]) == CHEXPERT_LABELS


@pytest.mark.parametrize("version", ["CheXpert-v1.0", "CheXpert-v1.0-small"])
def test_labels_views_and_patients_are_the_published_ones(tmp_path, version):
    # The folder may have any name by now: paths in the table begin with the published one.
    root = formats.chexpert(tmp_path / "downloaded", version=version)
    table = load_table(prepare(config_for(root)))
    assert len(table) == 24
    assert set(table["projection"]) == {"frontal"}
    assert set(table["view"]) == {"AP"}
    assert not table["source_file"].str.contains("valid/").any()
    for row in table.to_dict("records"):
        number = int(row["patient_id"].removeprefix("patient"))
        raw = [float(text or "nan") for text in formats.chexpert_labels(number)]
        np.testing.assert_array_equal([row[label] for label in CHEXPERT_LABELS], raw)
        assert (row["sex"], row["age"]) == ("M" if number % 2 else "F", 40 + number % 40)
        assert row["file_name"].split("/")[1] in {f"{row['patient_id']}_study{s}_view1_frontal.png" for s in (1, 2)}
    assert table.groupby("patient_id")["split"].nunique().max() == 1


@pytest.mark.parametrize(("view", "count"), [("frontal", 24), ("lateral", 12), ("all", 36)])
def test_lateral_films_are_chosen_by_name(chexpert, view, count):
    table = load_table(prepare(config_for(chexpert, view=view)))
    assert len(table) == count
    lateral = table[table["projection"] == "lateral"]
    assert lateral["source_file"].str.endswith("_lateral.jpg").all()
    assert set(lateral["view"]) <= {"unknown"}


def test_published_validation_set_is_all_of_the_test_split_or_left_out(chexpert):
    table = load_table(prepare(config_for(chexpert, split=(0.8, 0.2, 0.0), num_images=10)))
    test = table[table["split"] == "test"]
    assert len(test) == 6
    assert test["source_file"].str.contains("/valid/").all()
    assert len(table) == 16
    assert not set(test["patient_id"]) & set(table.loc[table["split"] != "test", "patient_id"])


def test_same_patient_in_both_published_sets(chexpert):
    edit_line(chexpert, 2, "valid/patient64541", "valid/patient00003", "valid.csv")
    with pytest.raises(ValueError, match="patient patient00003 is in two of the published splits"):
        prepare(config_for(chexpert, split=(0.8, 0.2, 0.0)))


def test_blank_is_never_said_and_is_counted(chexpert):
    folder = prepare(config_for(chexpert, explicit_share=1.0))
    table = load_table(folder)
    blank = table["Support Devices"].isna() | (table["Support Devices"] == -1)
    assert blank.any() and not blank.all()
    assert not table.loc[blank, "text"].str.contains("support devices").any()
    assert table.loc[~blank, "text"].str.contains("support devices").all()
    train = table[table["split"] == "train"]["Support Devices"]
    counts = label_counts(folder, "before").loc["Support Devices"]
    assert counts["not mentioned"] == train.isna().sum() > 0
    assert counts["blank, not absent"] == pytest.approx(train.isna().sum() / (train.isna() | (train == 0)).sum())


def test_policies_are_per_label_and_counted_before_and_after(chexpert):
    uncertain, blank = {"Support Devices": "ones", "*": "zeros"}, {"Edema": "zeros"}
    folder = prepare(config_for(chexpert, uncertain=uncertain, blank=blank, explicit_share=1.0))
    table, info = load_table(folder), load_info(folder)
    assert (table["Edema"] == 0).all()
    assert table["text"].str.contains("without edema").all()
    assert table["Fracture"].isna().all()
    numbers = table["patient_id"].str.removeprefix("patient").astype(int)
    assert (table.loc[numbers % 5 == 3, "Support Devices"] == 1).all()
    assert table.loc[numbers % 5 == 1, "Support Devices"].isna().all()
    before, after = (info["counts"][when]["train"]["labels"] for when in ("before", "after"))
    assert before["Edema"]["absent"] == 0 and after["Edema"]["not mentioned"] == 0
    raised = before["Support Devices"]["uncertain"]
    assert raised > 0
    assert after["Support Devices"]["present"] == before["Support Devices"]["present"] + raised
    assert info["label_policy"]["uncertain"] == uncertain
    assert info["label_policy"]["blank"] == blank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uncertain": {"Edma": "ones"}}, "uncertain names 'Edma', which is no label"),
        ({"blank": {"Edema": "ones"}}, r"blank\.Edema is 'ones': .*'ignore' or 'zeros'"),
        ({"uncertain": {"Edema": "perhaps"}}, r"uncertain\.Edema\s.*'perhaps'"),
        ({"vocabulary": "skin"}, "vocabulary 'skin' has words for no label of 'chexpert'"),
        ({"mode": "RGB"}, "mode of dataset 'chexpert' is 'L', not 'RGB'"),
        ({"view": "oblique"}, r"view is 'oblique': .*'frontal', 'lateral', 'frontal or unknown' or 'all'"),
    ],
)
def test_bad_configuration(chexpert, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_for(chexpert, **changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",1.0", ",2.0", r"train\.csv, line 5: label '.*' is not 1, 0, -1 or blank: '2\.0' \(1 such rows\)"),
        (",1.0", ",yes", r"line 5: label '.*' is not 1, 0, -1 or blank: 'yes'"),
        (",1.0", ",inf", r"line 5: label '.*' is not 1, 0, -1 or blank: 'inf'"),
        ("Frontal", "Oblique", r"line 5: unknown view \(known: Frontal, Lateral\): 'Oblique'"),
        ("CheXpert-v1.0-small/train/", "CheXpert-v1.0-small/../train/", "line 5: path outside the data root"),
        ("CheXpert-v1.0-small/", "/", "line 5: path outside the data root: '/train"),
        ("CheXpert-v1.0-small/train/", "elsewhere/", r"line 5: Path is not CheXpert-v1\.0\.\.\."),
        ("patient00002", "patient00001", "line 5: repeated Path"),
    ],
)
def test_bad_row_is_named_before_any_work(chexpert, old, new, message):
    edit_line(chexpert, 5, old, new)
    with pytest.raises(ValueError, match=message):
        prepare(config_for(chexpert, max_rejected=1.0))
    assert sorted(path.name for path in chexpert.parent.iterdir()) == ["CheXpert-v1.0-small"]


def test_missing_column_names_the_nearest(chexpert):
    edit_line(chexpert, 1, "Pleural Effusion", "Pleural_Effusion")
    with pytest.raises(ValueError, match=r"lacks the column 'Pleural Effusion'.* did 'Pleural_Effusion' mean that"):
        prepare(config_for(chexpert))


def test_missing_film_and_link_out_of_the_root(chexpert, tmp_path):
    film = next((chexpert / "train").rglob("*frontal.jpg"))
    film.unlink()
    with pytest.raises(ValueError, match=r"1 of 24 files cannot be used.*not found below"):
        prepare(config_for(chexpert))
    formats.noise(1).save(tmp_path / "outside.jpg")
    film.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(ValueError, match="is a link that leads outside"):
        prepare(config_for(chexpert, max_rejected=1.0))
