"""Labels from a second table, in the layouts of FastDiME's tables (Weng et al., ECCV 2024): `shortcut_annotations`."""

import dataclasses

import pandas as pd
import pytest

from prism_lib.data.folder import load_info, load_table, load_vocabulary
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.rows import editable, prompt_pairs
from prism_lib.data.tables import ExtraLabels, joined
from prism_lib.language.edits import Edit
from prism_lib.language.labels import vocabulary
from tests import formats

DRAIN = "extends: chest\nphrases: {Chest Drain: chest drain}\nforeign: [Support Devices, Chest Drain]\n"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_DATA", str(tmp_path))


def nih(root, count=10):
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"]
    for index in range(count):
        name = f"{index // 2:08d}_{index % 2:03d}.png"
        formats.save(formats.noise(index), root / f"images_{index % 2 + 1:03d}" / "images" / name)
        rows.append(f"{name},{'Pneumothorax' if index % 3 else 'No Finding'},0,{index // 2},50,F,PA")
    formats.write_lines(root / "Data_Entry_2017_v2020.csv", rows)
    return root


def config_for(dataset, root, **changes):
    config = PrepareConfig(dataset, root.parent / "prepared", data_root=root, size=32)
    return dataclasses.replace(config, **changes)


def test_drains_of_nih(tmp_path):
    lines = [f"{index // 2:08d}_{index % 2:03d}.png,1,{index % 2}.0,{index % 2},train" for index in range(8)]
    strangers = ["00030651_005.png,1,1.0,1,train", "00030640_003.png,1,1.0,1,test"]
    formats.write_lines(
        tmp_path / "nih_drain_meta.csv", ["img_name,Pneumothorax,drain_annotated,Drain,split", *lines, *strangers]
    )
    (tmp_path / "drains.yaml").write_text(DRAIN)
    extra = ExtraLabels("nih_drain_meta.csv", {"Drain": "Chest Drain"}, "img_name")
    folder = prepare(
        config_for("nih", nih(tmp_path / "nih"), vocabulary="drains.yaml", extra_labels=extra, split=(0.6, 0.2, 0.2)),
        ["remove_chest_drain"],
    )
    (tmp_path / "drains.yaml").unlink()
    table, info = load_table(folder).set_index("source_file").sort_index(), load_info(folder)
    assert table["Chest Drain"].iloc[:8].tolist() == [0, 1] * 4 and table["Chest Drain"].iloc[8:].isna().all()
    assert table["Pneumothorax"].tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0], "NIH's own, which was not asked for"
    assert info["labels"][-1] == "Chest Drain" and "split" in table and set(table["split"]) == {"train", "val", "test"}
    assert info["extra_labels"] == {
        "rows_without_image": 2, "first_of_these": ["00030651_005.png", "00030640_003.png"]
    }  # fmt: skip
    assert load_vocabulary(folder).phrase("Chest Drain") == "chest drain", "kept when the file is gone"
    drained = editable(table.reset_index(), Edit(remove=("Chest Drain",)))
    assert len(drained) == 4
    assert "without chest drain" in prompt_pairs(folder, drained, Edit(remove=("Chest Drain",)))[0].target


def test_pacemakers_of_chexpert_by_the_names_of_fastdime(tmp_path):
    root = formats.chexpert(tmp_path / "chexpert", patients=6)
    lines = [
        f"patient{number:05d}_study{study}_view1_frontal.jpg,1,{study - 1},train"
        for number in range(1, 7)
        for study in (1, 2)
    ]
    formats.write_lines(tmp_path / "che_pm_meta.csv", ["img_name,Cardiomegaly,PM,split", *lines])
    extra = ExtraLabels("che_pm_meta.csv", {"PM": "Support Devices"}, "img_name")
    folder = prepare(config_for("chexpert", root, extra_labels=extra, split=(0.5, 0.5, 0)))
    table = load_table(folder)
    study = table["source_file"].str.extract(r"study(\d)")[0].astype(float)
    named = table["split"] != "test"  # which is CheXpert's valid.csv
    assert table.loc[named, "Support Devices"].eq(study[named] - 1).all() and named.sum() == 12
    numbers = table.loc[~named, "patient_id"].str.removeprefix("patient").astype(int)
    own = [float(formats.chexpert_labels(number)[-1] or "nan") for number in numbers]
    assert own == pytest.approx(table.loc[~named, "Support Devices"].tolist(), nan_ok=True)
    assert load_info(folder)["extra_labels"]["rows_without_image"] == 0


def test_rulers_of_isic_beside_its_own_labels(tmp_path):
    root = formats.isic2019(tmp_path / "isic", lesions=8, artefacts=False)
    lines = [f"ISIC_{index:07d}.jpg,0.0,{index % 2}.0,train" for index in range(1, 16, 2)]
    formats.write_lines(tmp_path / "isic_ruler_meta.csv", ["img_name,Mal,Ruler,split", *lines])
    extra = ExtraLabels("isic_ruler_meta.csv", {"Ruler": "Ruler"}, "img_name")
    folder = prepare(config_for("isic2019", root, vocabulary="skin", extra_labels=extra))
    table = load_table(folder).set_index("source_file").sort_index()
    assert table["Ruler"].notna().sum() == 8 and load_info(folder)["labels"].count("Ruler") == 1


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (["a.png", "b.png"], ["x/a.jpg", "y/b.dcm"], [0, 1]),  # the file name
        (["x/a.png", "y/a.png"], ["y/a.png", "x/a.png"], [1, 0]),  # two of one name: the folder too
        (["C:\\films\\x\\a.png", "C:\\films\\y\\a.png"], ["y/a.png", "x/a.png"], [1, 0]),
        (["/mnt/y/a.png"], ["x/a.png", "y/a.png"], [None, 0]),
        (["p1_s1_a.jpg"], ["p1/s1/a.jpg", "p2/s1/a.jpg"], [0, None]),
        (["1.2.840.10", "1.2.840.11"], ["1.2.840.11.dcm", "1.2.840.12.dcm"], [1, None]),  # no suffix
    ],
)
def test_names_match_by_as_much_of_the_path_as_tells_files_apart(tmp_path, theirs, ours, found):
    formats.table(tmp_path, "more.csv", **{"file_name": theirs, "Edema": [1, 0][: len(theirs)]})
    images = pd.DataFrame({"source_file": ours, "name": ours})
    labels, unmatched = joined(images, ExtraLabels("more.csv", {"Edema": "Edema"}))
    expected = {row: 1.0 - place for row, place in enumerate(found) if place is not None}
    assert labels["Edema"].to_dict() == expected
    assert unmatched == [name for place, name in enumerate(theirs) if place not in found]


def test_a_compressed_table_in_another_encoding_with_semicolons(tmp_path):
    rows = pd.DataFrame({"Datei": ["a.png", "b.png"], "Ödem": [True, None]})
    rows.to_csv(tmp_path / "more.csv.gz", index=False, sep=";", encoding="cp1252")
    images = pd.DataFrame({"source_file": ["b.png", "a.png"], "name": ["b", "a"]})
    extra = ExtraLabels("more.csv.gz", {"Ödem": "Edema"}, "Datei", "cp1252")
    labels, _ = joined(images, extra)
    assert labels["Edema"].iloc[1] == 1 and labels["Edema"].isna().iloc[0]
    with pytest.raises(ValueError, match=r"more\.csv\.gz is not in 'utf-8'; name its encoding"):
        joined(images, dataclasses.replace(extra, encoding="utf-8"))


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"file_name": ["00000000_000.png", "x/00000000_000.png"][:1] * 2},
            {},
            "line 3: repeated file_name: '00000000",
        ),
        (
            {"file_name": ["other.png", "another.png"]},
            {},
            "more.csv names none of the images, such as '0000000",
        ),
        ({"Drain": [1, 2]}, {}, "line 3: label 'Edema' is not 1, 0, -1 or blank: '2'"),
        ({}, {"labels": {"Drain": "Drain"}}, "vocabulary 'chest' has no words for the extra label 'Drain'"),
        ({}, {"labels": {"drain": "Edema"}}, "more.csv lacks the column 'drain'; .* did 'Drain' mean that"),
        ({}, {"name": "img_name"}, "more.csv lacks the column 'img_name'"),
        ({}, {"labels": {}}, "at least 1 item"),
        ({}, {"labels": {"Drain": "Edema", "Tube": "Edema"}}, "two columns of more.csv are one label"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_any_work(tmp_path, columns, changes, message):
    given = {"file_name": ["00000000_000.png", "00000001_000.png"], "Drain": [1, 0]} | columns
    formats.table(tmp_path, "more.csv", **given)
    root = nih(tmp_path / "nih")
    with pytest.raises(ValueError, match=message):
        prepare(config_for("nih", root, extra_labels={"table": "more.csv", "labels": {"Drain": "Edema"}} | changes))
    assert not (tmp_path / "prepared").exists()


def test_data_sets_that_extra_labels_do_not_fit(tmp_path):
    formats.table(tmp_path, "more.csv", file_name=["a.png"], Drain=[1])
    extra = ExtraLabels("more.csv", {"Drain": "Support Devices"})
    with pytest.raises(ValueError, match=r"more\.csv cannot be joined: the images of this data set have no files"):
        prepare(PrepareConfig("phantom", tmp_path / "prepared", num_images=3, size=32, extra_labels=extra))
    with pytest.raises(ValueError, match="'Support Devices' of films are read from the table `screened`"):
        PrepareConfig("films", tmp_path / "prepared", tmp_path, extra_labels=extra)


def test_an_edit_without_words_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="unknown label 'scoliosis' in vocabulary 'chest'"):
        prepare(config_for("nih", nih(tmp_path / "nih")), ["remove_scoliosis"])
    assert not (tmp_path / "prepared").exists() and vocabulary("chest").name == "chest"
