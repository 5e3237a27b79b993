"""ISIC's and HAM10000's own formats: one diagnosis per image, lesions kept together, colour to the end."""

import dataclasses

import numpy as np
import pytest

from prism_lib.data.folder import load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.language.labels import SKIN, SKIN_DIAGNOSES
from tests import formats

ISIC2020 = (
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
)
HAM10000 = "lesion_id,image_id,dx,dx_type,age,sex,localization"


def config_for(dataset, root, **changes):
    config = PrepareConfig(dataset, root.parent / "prepared", data_root=root, size=32, vocabulary="skin")
    return dataclasses.replace(config, **changes)


def prepared(dataset, root, **changes):
    folder = prepare(config_for(dataset, root, **changes))
    return folder, load_table(folder).set_index("source_file")


def isic2020(root, *rows, name="ISIC_2020_Training_GroundTruth_v2.csv"):
    for seed, row in enumerate(rows):
        formats.save(formats.noise(seed, channels=3), root / "train" / f"{row.split(',')[0]}.jpg")
    formats.write_lines(root / name, [ISIC2020, *rows])
    return root


MANY = tuple(f"ISIC_900000{i},IP_9{i},IL_9{i},male,50.0,torso,nevus,benign,0" for i in range(6))


def test_isic2019_is_colour_with_one_diagnosis_and_whole_lesions(tmp_path):
    folder, table = prepared("isic2019", formats.isic2019(tmp_path / "isic", artefacts=False))
    assert read_images(folder, table.reset_index()).shape == (32, 3, 32, 32)
    diagnoses = table[list(SKIN_DIAGNOSES)]
    assert (diagnoses.sum(axis=1) == 1).all() and diagnoses.isin((0, 1)).all(axis=None)
    row = table.loc["ISIC_0000002"]
    assert (row["Melanocytic Nevus"], row["lesion_id"], row["patient_id"]) == (1, "MSK4_0000001", "MSK4_0000001")
    assert (row["age"], row["sex"], row["site"]) == (55, "M", "posterior torso")
    # A lesion without a name is its image.
    assert table.loc["ISIC_0000000_downsampled", "patient_id"] == "ISIC_0000000_downsampled"
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert (table.groupby("patient_id").size() == 2).sum() == 15
    assert table[list(SKIN.foreign)].isna().all(axis=None)
    assert not table["text"].str.contains("ruler").any()


def test_artefacts_are_known_where_their_table_has_the_image(tmp_path):
    _, table = prepared("isic2019", formats.isic2019(tmp_path / "isic"), explicit_share=1.0)
    covered = table.index.str[-1].astype(str).isin(list("13579")) & ~table.index.str.endswith("_downsampled")
    assert table.loc[covered, ["Ruler", "Dark Corner", "Ink"]].notna().all(axis=None)
    assert table.loc[~covered, "Ruler"].isna().all()
    assert table["Hair"].isna().all()
    assert table.loc["ISIC_0000001", ["Ruler", "Dark Corner"]].tolist() == [0, 1]
    assert table.loc["ISIC_0000001", "text"].endswith("without ruler, without ink marks, with dark corners")


def test_downsampled_images_have_the_artefacts_of_the_original(tmp_path):
    root = formats.isic2019(tmp_path / "isic")
    lines = (root / "isic_bias.csv").read_text().splitlines()
    formats.write_lines(root / "isic_bias.csv", [*lines, "ISIC_0000004.png;1;0;1"])
    _, table = prepared("isic2019", root)
    assert table.loc["ISIC_0000004_downsampled", ["Ruler", "Dark Corner", "Ink"]].tolist() == [1, 0, 1]


def test_isic2020_patients_hold_their_lesions_and_the_target_knows_melanoma(tmp_path):
    rows = [
        "ISIC_0000001,IP_1,IL_1,female,45.0,torso,melanoma,malignant,1",
        "ISIC_0000002,IP_1,IL_2,female,45.0,torso,unknown,benign,0",
        "ISIC_0000003,IP_2,IL_3,,,,solar lentigo,benign,0",
        "ISIC_0000004,,IL_4,male,60.0,head/neck,cafe-au-lait macule,benign,0",
        *MANY,
    ]
    _, table = prepared("isic2020", isic2020(tmp_path / "isic", *rows))
    assert table.loc["ISIC_0000001", list(SKIN_DIAGNOSES)].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    unknown = table.loc["ISIC_0000002"]
    assert unknown["Melanoma"] == 0
    assert unknown[list(SKIN_DIAGNOSES[1:])].isna().all()
    assert table.loc["ISIC_0000003", "Benign Keratosis"] == 1
    assert (table.loc["ISIC_0000004", list(SKIN_DIAGNOSES)] == 0).all()
    assert table.loc["ISIC_0000004", "patient_id"] == "IL_4"
    assert table.loc["ISIC_0000001", "split"] == table.loc["ISIC_0000002", "split"]
    assert np.isnan(table.loc["ISIC_0000003", "age"]) and table.loc["ISIC_0000003", "sex"] == "unknown"


@pytest.mark.parametrize(("suffix", "separator"), [("", ","), (".csv", ","), (".tab", "\t")])
def test_ham10000_codes(tmp_path, suffix, separator):
    root, codes = tmp_path / "ham", ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"]
    lines = [HAM10000]
    for index in range(14):
        part = root / f"HAM10000_images_part_{1 + index % 2}"
        formats.save(formats.noise(index, channels=3), part / f"ISIC_{index:07d}.jpg")
        lines.append(f"HAM_{index // 2:07d},ISIC_{index:07d},{codes[index // 2]},histo,80.0,male,scalp")
    formats.write_lines(root / f"HAM10000_metadata{suffix}", [line.replace(",", separator) for line in lines])
    _, table = prepared("ham10000", root)
    for index in range(14):
        row = table.loc[f"ISIC_{index:07d}"]
        assert row[list(SKIN_DIAGNOSES)].tolist() == [float(index // 2 == place) for place in range(8)]
        assert row["patient_id"] == f"HAM_{index // 2:07d}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ISIC_1,IP_1,IL_1,male,5.0,torso,freckle,benign,0", r"line 2: unknown label .*'freckle'"),
        ("ISIC_1,IP_1,IL_1,male,5.0,torso,melanoma,malignant,0", "line 2: target and diagnosis contradict.*'ISIC_1'"),
        ("ISIC_1,IP_1,IL_1,male,5.0,torso,nevus,benign,maybe", "label 'target' is not 1, 0, -1 or blank: 'maybe'"),
        ("ISIC_1,IP_1,IL_90,male,5.0,torso,nevus,benign,0", "one lesion of two patients: 'IL_90'"),
        ("../ISIC_1,IP_1,IL_1,male,5.0,torso,nevus,benign,0", "line 2: path outside the data root"),
        (",IP_1,IL_1,male,5.0,torso,nevus,benign,0", "line 2: empty image_name"),
    ],
)
def test_bad_rows_of_isic2020(tmp_path, row, message):
    root = isic2020(tmp_path / "isic", *MANY)
    formats.write_lines(root / "ISIC_2020_Training_GroundTruth_v2.csv", [ISIC2020, row, *MANY])
    with pytest.raises(ValueError, match=message):
        prepare(config_for("isic2020", root, max_rejected=1.0))


def test_two_diagnoses_in_one_row(tmp_path):
    root = formats.isic2019(tmp_path / "isic")
    path = root / "ISIC_2019_Training_GroundTruth.csv"
    path.write_text(path.read_text().replace("ISIC_0000001,1.0,0.0", "ISIC_0000001,1.0,1.0"))
    with pytest.raises(ValueError, match=r"line 3: not one of MEL, .*UNK is 1, but: 'ISIC_0000001'"):
        prepare(config_for("isic2019", root))


def test_tables_that_are_missing_or_doubled(tmp_path):
    root = isic2020(tmp_path / "isic", *MANY)
    formats.write_lines(root / "ISIC_2020_Training_GroundTruth.csv", [ISIC2020, *MANY])
    with pytest.raises(FileNotFoundError, match=r"found ISIC_2020_Training_GroundTruth\.csv, .*_v2\.csv"):
        prepare(config_for("isic2020", root))
    other = formats.isic2019(tmp_path / "other")
    (other / "ISIC_2019_Training_Metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"ISIC_2019_\*Metadata\.csv .*found none"):
        prepare(config_for("isic2019", other))


def test_gray_mode_and_chest_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mode of dataset 'isic2019' is 'RGB'"):
        config_for("isic2019", tmp_path / "isic", mode="L")
    with pytest.raises(ValueError, match="vocabulary 'chest' has words for no label of 'isic2019'"):
        prepare(config_for("isic2019", formats.isic2019(tmp_path / "isic"), vocabulary="chest"))
