"""Any table of images, and DICOM films with one: what is a label, what is copied, and what is refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from prism_lib.data.folder import load_info, load_table, load_vocabulary, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.rows import editable, prompt_pairs, sample_captions
from prism_lib.data.tables import Columns
from prism_lib.language.captions import caption
from prism_lib.language.edits import Edit
from prism_lib.models.pipeline import load_pipeline
from tests import formats

COUNT = 10


def images(root, **columns):
    """Ten images in two folders, two per patient, with a table."""
    files = [f"site{index % 2}/{index:02d}.png" for index in range(COUNT)]
    for index, file in enumerate(files):
        formats.save(formats.noise(index, channels=3), root / file)
    given = {
        "file_name": files,
        "patient_id": [f"p{index // 2}" for index in range(COUNT)],
        "Cardiomegaly": [1, 0, -1, None, 1, 0, 1, 0, 1, 0],
    }
    return formats.table(root, "metadata.csv", **(given | columns))


def config_for(root, **changes):
    config = PrepareConfig("table", root.parent / "prepared", data_root=root, size=32, mode="L")
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_labels_are_the_columns_that_are_nothing_else(tmp_path, mode, channels):
    folder = prepare(config_for(images(tmp_path / "own"), mode=mode))
    table = load_table(folder).set_index("source_file")
    assert load_info(folder)["labels"] == ["Cardiomegaly"]
    values = table.sort_index()["Cardiomegaly"].to_numpy()
    order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]  # site0, then site1
    np.testing.assert_array_equal(values, np.array([1, 0, -1, np.nan, 1, 0, 1, 0, 1, 0])[order])
    assert read_images(folder, table.reset_index()).shape == (COUNT, channels, 32, 32)
    assert table.loc["site1/03.png", "file_name"].endswith("/site1_03.png")
    assert table.groupby("patient_id")["split"].nunique().max() == 1


def test_only_asked_columns_are_copied(tmp_path):
    extra = {"surname": ["Doe"] * COUNT, "scanner": ["A"] * COUNT, "Edema": [0] * COUNT}
    root = images(tmp_path / "own", **extra)
    folder = prepare(config_for(root, columns=Columns(labels=("Edema",), extra=("scanner",))))
    table = load_table(folder)
    assert set(table["scanner"]) == {"A"}
    assert {"surname", "Cardiomegaly"}.isdisjoint(table.columns)
    assert b"Doe" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert load_info(folder)["labels"] == ["Edema"]


def test_small_images_are_refused_with_the_settings_that_take_them(tmp_path):
    with pytest.raises(
        ValueError, match=r"10 of 10 files .* smaller than 512x512\. A smaller size or a larger max_upscale"
    ):
        prepare(config_for(images(tmp_path / "own"), size=512))


def test_given_splits_are_kept(tmp_path):
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 4
    folder = prepare(config_for(images(tmp_path / "own", split=splits)))
    table = load_table(folder)
    by_file = dict(zip(table["source_file"], table["split"], strict=True))
    assert [by_file[f"site{index % 2}/{index:02d}.png"] for index in range(COUNT)] == splits


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"Cardiomegaly": [1, 0, 3, *[0] * 7]}, r"line 4: label 'Cardiomegaly' is not 1, 0, -1 or blank: '3'"),
        ({"Cardiomegalie": [1] * COUNT}, r"vocabulary 'chest' lacks the label 'Cardiomegalie'; did you mean 'Cardiom"),
        ({"split": ["train"] * 5 + ["test"] * 5}, r"line 6: one patient in two given splits: 'p2'"),
        ({"split": ["train"] * 9 + ["valid"]}, r"line 11: split is none of train, val, test: 'valid'"),
        ({"patient_id": [""] + ["p"] * 9}, "line 2: empty patient_id"),
        ({"file_name": ["../a.png", *[f"{i}.png" for i in range(9)]]}, "line 2: path outside the data root"),
        ({"file_name": ["/a.png", *[f"{i}.png" for i in range(9)]]}, "line 2: path outside the data root"),
        ({"file_name": ["a.png"] * COUNT}, "line 3: repeated file_name"),
        ({"file_name": ["a/b.png", "a_b.png", *[f"{i}.png" for i in range(8)]]}, "differs only in"),
    ],
)
def test_bad_tables_are_named_before_any_work(tmp_path, columns, message):
    root = images(tmp_path / "own", **columns)
    with pytest.raises(ValueError, match=message):
        prepare(config_for(root, max_rejected=1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": Columns(labels=("Edema",))}, "lacks the column 'Edema'"),
        ({"columns": Columns(extra=("text",))}, "'text' cannot be carried along"),
        ({"columns": Columns(labels=("Cardiomegaly", "path")), "vocabulary": "labels"}, "'path' cannot be carried"),
        ({"columns": Columns(caption="file_name")}, "'file_name' cannot be the caption"),
        ({"columns": Columns(labels=("Cardiomegaly",), caption="Cardiomegaly")}, "'Cardiomegaly' cannot be the cap"),
        ({"columns": Columns(header=("PatientAge",))}, "header fields can be copied from the dataset 'dicom' only"),
        ({"table": "labels.csv"}, r"expected one table labels\.csv"),
    ],
)
def test_bad_columns(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(config_for(images(tmp_path / "own"), **changes))


def test_a_table_needs_a_mode(tmp_path):
    with pytest.raises(ValueError, match="dataset 'table' needs a mode: L or RGB"):
        PrepareConfig("table", tmp_path / "out", data_root=tmp_path)


def test_a_link_out_of_the_root_is_refused(tmp_path):
    root = images(tmp_path / "own")
    formats.noise(99).save(tmp_path / "outside.png")
    (root / "site0" / "00.png").unlink()
    (root / "site0" / "00.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match=r"'site0/00\.png' is a link that leads outside"):
        prepare(config_for(root, max_rejected=1.0))


# --- DICOM


def films(root, count=COUNT, **fields):
    files = [f"study{index}/film.dcm" for index in range(count)]
    for index, file in enumerate(files):
        pixels = np.array(formats.noise(index)).astype(np.uint16) * 16
        formats.dicom(root / file, pixels, **({"PixelSpacing": [0.3, 0.3]} | fields))
    given = {"file_name": files, "patient_id": list(range(count)), "Edema": [index % 2 for index in range(count)]}
    return formats.table(root, "metadata.csv", **given)


def test_dicom_films_keep_spacing_and_only_the_asked_fields(tmp_path):
    root = films(tmp_path / "films", StationName="Room 7", InstitutionName="Clinic of Doe")
    folder = prepare(config_for(root, dataset="dicom", mode="", columns=Columns(header=("PatientAge", "StationName"))))
    table = load_table(folder)
    assert read_images(folder, table).shape == (COUNT, 1, 32, 32)
    assert table["pixel_spacing_mm"].tolist() == pytest.approx([0.3 * 48 / 32] * COUNT)
    assert set(table["PatientAge"]) == {"067Y"}
    assert set(table["StationName"]) == {"Room 7"}
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(secret in content for secret in (b"Doe", b"Jane", b"19500101", b"SECRET"))
    with pytest.raises(ValueError, match="'Patient Age' is no keyword"):
        prepare(
            config_for(root, output=tmp_path / "b", dataset="dicom", columns=Columns(header=("Patient Age",)), mode="")
        )


def test_films_that_cannot_be_used_are_listed(tmp_path):
    root = films(tmp_path / "films")
    formats.dicom(root / "study3" / "film.dcm", np.zeros((40, 48), np.uint16), NumberOfFrames=2)
    (root / "study5" / "film.dcm").write_bytes(b"no film at all" * 20)
    folder = prepare(config_for(root, dataset="dicom", mode="", max_rejected=0.2))
    assert {item["file"]: item["reason"] for item in load_info(folder)["rejected"]} == {
        "study3/film.dcm": "DICOM of 2 frames: only single images can be used",
        "study5/film.dcm": "not a DICOM file",
    }
    assert len(load_table(folder)) == COUNT - 2


# --- Tables as pandas and Excel write them


def test_what_pandas_writes_is_read(tmp_path):
    states = pd.Series([True, False, None, True, False, True, False, True, False, True], dtype=object)
    root = images(tmp_path / "own", Cardiomegaly=states)
    folder = prepare(config_for(root))
    written = (root / "metadata.csv").read_text()
    assert "True" in written and "False" in written
    table = load_table(folder).set_index("source_file").sort_index()
    assert table["Cardiomegaly"].value_counts().to_dict() == {1: 5, 0: 4}
    text = written.replace("True", "TRUE").replace("False", "0.0").replace(".png,p1,\n", ".png,p1,nan\n")
    assert "nan" in text and "TRUE" in text
    (root / "metadata.csv").write_text(text)
    again = load_table(prepare(config_for(root, output=tmp_path / "again"))).set_index("source_file").sort_index()
    pd.testing.assert_series_equal(again["Cardiomegaly"], table["Cardiomegaly"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_excel_writes_is_read(tmp_path, separator, encoding):
    root = images(tmp_path / "own", place=["Zürich"] * COUNT)
    table = pd.read_csv(root / "metadata.csv")
    table["file_name"] = table["file_name"].str.replace("/", "\\")  # of Windows
    table.to_csv(root / "metadata.csv", index=False, sep=separator, encoding=encoding, lineterminator="\r\n")
    written = (root / "metadata.csv").read_bytes().decode(encoding)  # two empty columns at the end
    (root / "metadata.csv").write_bytes(written.replace("\r\n", f"{separator * 2}\r\n").encode(encoding))
    columns = Columns(
        labels=("Cardiomegaly",), extra=("place",), encoding="cp1252" if encoding == "cp1252" else "utf-8"
    )
    if encoding == "cp1252":
        with pytest.raises(ValueError, match=r"metadata\.csv is not in 'utf-8'; name its encoding, such as"):
            prepare(config_for(root, columns=dataclasses.replace(columns, encoding="utf-8")))
    prepared = load_table(prepare(config_for(root, columns=columns)))
    assert set(prepared["place"]) == {"Zürich"} and "site1/03.png" in set(prepared["source_file"])
    assert prepared["Cardiomegaly"].eq(1).sum() == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,patient_id,Edema\n", r"metadata\.csv has a header and no rows"),
        ("file_name,patient_id,Edema\na.png,nan,1\n", r"metadata\.csv, line 2: empty patient_id"),
        ("file_name,patient_id,Edema\nC:\\a.png,p,1\n", r"line 2: path outside the data root: 'C:/a\.png'"),
        ("file_name,patient_id,Edema\n..\\a.png,p,1\n", "line 2: path outside the data root"),
        ("file_name,patient_id,Edema\na\\b.png,p,1\na/b.png,p,1\n", "line 3: repeated file_name"),
        ("file_name,patient_id,Edema\na.png,p,yes\n", "line 2: label 'Edema' is not 1, 0, -1 or blank: 'yes'"),
        ("", r"metadata\.csv is not a readable table"),
    ],
)
def test_what_is_no_table_is_refused_by_its_line(tmp_path, content, message):
    images(tmp_path / "own")
    (tmp_path / "own" / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(config_for(tmp_path / "own", max_rejected=1.0))


# --- Any labels


def test_labels_of_any_body_part(tmp_path):
    root = images(
        tmp_path / "own", **{"Scoliosis": [1, 0] * 5, "tuberculosis": [0, 1] * 5, "Cardiomegaly": [0] * COUNT}
    )
    config = config_for(root, vocabulary="labels", subject="spine x-ray", explicit_share=1.0)
    folder = prepare(config, ["remove_scoliosis", "add tuberculosis"])
    table, vocab = load_table(folder), load_vocabulary(folder)
    assert load_info(folder)["labels"] == ["Cardiomegaly", "Scoliosis", "tuberculosis"]
    row = table[table["Scoliosis"] == 1].iloc[0]
    assert row["text"] == "spine x-ray without cardiomegaly, with scoliosis, without tuberculosis"
    edit = Edit.parse("remove scoliosis", vocab)
    (pair,) = prompt_pairs(folder, editable(table, edit, vocab).head(1), edit)
    assert pair.target == "spine x-ray without cardiomegaly, without scoliosis, without tuberculosis"
    with pytest.raises(ValueError, match=r"vocabulary 'chest' lacks the label 'Scoliosis'.*'labels', or a YAML file"):
        prepare(config_for(root, output=tmp_path / "chest"))


def test_a_changed_vocabulary_file_is_another_configuration(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("subject: knee x-ray\nphrases: {Cardiomegaly: big heart}\ndetails: {Cardiomegaly: [huge heart]}\n")
    root = images(tmp_path / "own")
    folder = prepare(config := config_for(root, vocabulary=str(own)))
    vocab = load_vocabulary(folder)
    assert prepare(config) == folder and vocab.subject == "knee x-ray"
    absent = editable(load_table(folder), Edit(add=("huge heart",)), vocab)
    assert absent["Cardiomegaly"].eq(0).all() and len(absent)
    own.write_text("subject: knee x-ray\nphrases: {Cardiomegaly: enlarged heart}\n")
    with pytest.raises(FileExistsError, match="was prepared otherwise: vocabulary is"):
        prepare(config_for(root, vocabulary=str(own)))
    own.unlink()
    assert load_vocabulary(folder) is vocab


# --- Captions that a person wrote

LONG = "The heart is enlarged. " + "There is no pleural effusion and there is no edema. " * 12


def reports(root, **changed):
    texts = [f"Heart  size\nis {index}." for index in range(COUNT)]
    for index, text in changed.items():
        texts[int(index.removeprefix("row"))] = text
    return images(root, impression=texts)


def caption_config(root, **changes):
    columns = Columns(caption="impression")
    return config_for(root, columns=columns, explicit_share=0.0, **changes)


def test_a_column_of_captions_replaces_those_of_labels(tmp_path):
    folder = prepare(caption_config(reports(tmp_path / "own")))
    table = load_table(folder)
    assert load_info(folder)["labels"] == ["Cardiomegaly"]
    expected = "Heart size is " + table["source_file"].str.extract(r"0(\d)")[0] + "."
    assert table["text"].tolist() == expected.tolist()
    drawn = sample_captions(folder, table, 0, 40, 0.5)
    for (row, own), texts in zip(zip(table.to_dict("records"), expected, strict=True), drawn, strict=True):
        explicit = caption({"Cardiomegaly": row["Cardiomegaly"]})
        assert set(texts) == {own, explicit} and 8 < texts.count(own) < 32
    assert load_info(folder)["captions_shortened"] == 0


def test_long_captions_are_refused_or_keep_their_first_sentences(tmp_path):
    root = reports(tmp_path / "own", row3=LONG, row5="word " * 200)
    with pytest.raises(
        ValueError, match=r"2 captions have more than 77 tokens of .*phantom-sd: site1/0[35]\.png, site"
    ):
        prepare(caption_config(root))
    with pytest.raises(ValueError, match=r"1 captions have in the first sentence alone more than .*: site1/05\.png$"):
        prepare(caption_config(root, long_captions="sentences"))
    folder = prepare(caption_config(reports(tmp_path / "own", row3=LONG), long_captions="sentences"))
    table = load_table(folder).set_index("source_file")
    text = table.loc["site1/03.png", "text"]
    assert text.startswith("The heart is enlarged. There is") and LONG.startswith(text) and text.endswith("edema.")
    tokenizer = load_pipeline().tokenizer
    assert len(tokenizer(text).input_ids) <= 77 < len(tokenizer(f"{text} {LONG[23:74]}").input_ids)
    assert load_info(folder)["captions_shortened"] == 1


def test_a_model_of_captions_that_is_not_there_is_told_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="caption_model 'nowhere/model' is neither a folder with a tokenizer nor"):
        prepare(config_for(images(tmp_path / "own"), caption_model="nowhere/model"))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_who_counts_tokens_does_not_decide_what_is_prepared_without_reports(tmp_path):
    root = images(tmp_path / "own")
    folder = prepare(config_for(root))
    assert prepare(config_for(root, long_captions="sentences", caption_model="other")) == folder


def test_blank_captions_are_refused_by_their_line(tmp_path):
    root = reports(tmp_path / "own", row0=None, row3=" ", row5="nan")
    with pytest.raises(ValueError, match=r"line 2: no impression: 'site0/00\.png' \(3 such rows\)"):
        prepare(caption_config(root))
    with pytest.raises(ValueError, match="lacks the column 'impression'"):
        prepare(caption_config(images(tmp_path / "other"), output=tmp_path / "new"))
    with pytest.raises(ValueError, match=r"captions in a column \('impression'\) are for the datasets 'table' and"):
        prepare(PrepareConfig("phantom", tmp_path / "new", size=32, columns=Columns(caption="impression")))
