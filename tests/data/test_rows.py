"""A prepared folder holds what its source holds, keeps patients apart, and refuses what it cannot trust."""

import contextlib
import dataclasses
import io
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from prism_lib import paths
from prism_lib.data import preparation
from prism_lib.data.chest import ARCHIVES, chest_source
from prism_lib.data.folder import SPLITS, load_info, load_table, read_images
from prism_lib.data.images import ImageFiles
from prism_lib.data.preparation import SOURCES, PrepareConfig, prepare
from prism_lib.data.rows import edit_examples, editable, sample_captions, true_counterfactual
from prism_lib.data.tables import Columns, seeded_order, split_patients
from prism_lib.language.captions import caption
from prism_lib.language.edits import Edit
from prism_lib.language.labels import CHEST, PHANTOM, PHANTOM_LABELS
from prism_lib.phantom.patients import marker_mask, render, sample_patients
from tests import formats

SIZE = 32
NIH_COLUMNS = tuple(ARCHIVES["nih"].tables[0].columns)
NIH_SAMPLE = paths.data() / "nih-sample"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A prepared folder of 40 phantoms."""
    return prepare(PrepareConfig("phantom", tmp_path_factory.mktemp("data") / "phantom", size=SIZE, num_images=40))


def noise_image(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8))


@pytest.fixture
def nih(tmp_path):
    """A folder in NIH's format: 12 patients with two images each, spread over two image folders."""
    root = tmp_path / "nih"
    rows = []
    for patient in range(12):
        for study in range(2):
            name = f"{patient:08d}_{study:03d}.png"
            folder = root / f"images_{study + 1:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            noise_image(2 * patient + study).save(folder / name)
            findings = ["No Finding", "Cardiomegaly|Effusion", "Pleural_Thickening"][patient % 3]
            rows.append([name, findings, patient, 40 + patient, "MF"[patient % 2], "PA"])
    write_table(root, rows)
    return root


def write_table(root: Path, rows: list[list[object]], columns: tuple[str, ...] = NIH_COLUMNS) -> None:
    pd.DataFrame(rows, columns=list(columns)).to_csv(root / "Data_Entry_2017_v2020.csv", index=False)


def read_rows(root: Path) -> list[list[object]]:
    return pd.read_csv(root / "Data_Entry_2017_v2020.csv").to_numpy().tolist()


def edit_table(root: Path, row: int, column: str, value: object) -> None:
    rows = read_rows(root)
    rows[row][NIH_COLUMNS.index(column)] = value
    write_table(root, rows)


def image_path(root: Path, row: int) -> Path:
    return next(root.rglob(str(read_rows(root)[row][0])))


def config_for(root: Path, **changes: object) -> PrepareConfig:
    config = PrepareConfig("nih", root.parent / "prepared", data_root=root, size=SIZE)
    return dataclasses.replace(config, **changes)


def left_behind(root: Path) -> list[str]:
    return sorted(path.name for path in root.parent.iterdir() if path != root)


# --- the phantom


def test_phantom_images_are_the_rendered_ones(phantoms):
    table = load_table(phantoms)
    images = read_images(phantoms, table)
    patients = sample_patients(table["phantom_index"].tolist(), seed=0)
    assert images.shape == (40, 1, SIZE, SIZE)
    assert torch.equal(images, render(patients, SIZE))
    labels = patients.labels()
    for label in PHANTOM_LABELS:
        assert table[label].tolist() == labels[label].tolist()


def test_splits_share_no_patient_and_have_their_shares(phantoms):
    table = load_table(phantoms)
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert table["split"].value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}
    parts = [load_table(phantoms, split) for split in SPLITS]
    assert sum(map(len, parts)) == 40
    assert all(set(part["split"]) == {split} for part, split in zip(parts, SPLITS, strict=True))


def test_captions_hold_explicit_and_other_templates(phantoms):
    table = load_table(phantoms)
    explicit = [caption(row, "explicit", PHANTOM) for row in table[list(PHANTOM_LABELS)].to_dict("records")]
    share = np.mean([text == exact for text, exact in zip(table["text"], explicit, strict=True)])
    assert 0.25 < share < 0.75


def test_training_draws_the_captions_that_are_stored(phantoms):
    table = load_table(phantoms)
    assert sample_captions(phantoms, table, 0, 3, 0.5) != sample_captions(phantoms, table, 1, 3, 0.5)
    assert [texts[0] for texts in sample_captions(phantoms, table, 0, 3, 0.5)] == table["text"].tolist()
    assert table["text"].str.contains("pacemaker").any(), "details are said too"


def test_the_truth_holds_the_marker_of_the_same_patients(phantoms):
    table = load_table(phantoms)[:3]
    truth = true_counterfactual(phantoms, table, Edit(add=("Cardiomegaly",)))
    assert torch.equal(truth.marker, marker_mask(sample_patients(table["phantom_index"].tolist(), 0), SIZE))
    assert truth.images.shape == truth.changed.shape == truth.marker.shape


def test_info_says_what_was_done(phantoms):
    info, table = load_info(phantoms), load_table(phantoms)
    assert info["config"]["num_images"] == 40
    assert info["rejected"] == []
    train = info["counts"]["after"]["train"]
    assert train["images"] == train["patients"] == 28
    devices = table[table["split"] == "train"]["Support Devices"]
    assert train["labels"]["Support Devices"] == {
        "present": int((devices == 1).sum()),
        "absent": int((devices == 0).sum()),
        "uncertain": 0,
        "not mentioned": 0,
    }


def test_same_configuration_is_reused_and_gives_the_same_content(phantoms, tmp_path):
    before = (phantoms / "dataset.json").stat().st_mtime_ns
    again = PrepareConfig("phantom", phantoms, size=SIZE, num_images=40)
    assert prepare(again) == phantoms
    assert (phantoms / "dataset.json").stat().st_mtime_ns == before
    copy = prepare(dataclasses.replace(again, output=tmp_path / "copy"))
    assert load_info(copy) == load_info(phantoms)


def test_another_configuration_in_its_place_is_an_error(phantoms):
    with pytest.raises(FileExistsError, match="seed is 0 and not 1"):
        prepare(PrepareConfig("phantom", phantoms, size=SIZE, num_images=40, seed=1))


def test_true_counterfactual_undoes_itself(phantoms):
    edit, undo = Edit(remove=("Support Devices",)), Edit(add=("Support Devices",))
    rows = editable(load_table(phantoms), edit)
    assert (rows["Support Devices"] == 1).all()
    factual = read_images(phantoms, rows)
    image, mask, _ = true_counterfactual(phantoms, rows, edit)
    assert mask.flatten(1).any(1).all()
    assert torch.equal(image[~mask], factual[~mask])
    restored, *_ = true_counterfactual(phantoms, rows, undo)
    assert torch.equal(restored, factual)


def test_examples_show_what_the_source_knows(phantoms, nih):
    edits = [Edit(remove=("Cardiomegaly",)), Edit(remove=("Support Devices",))]
    examples = edit_examples(phantoms, edits)
    assert [example.edit for example in examples] == edits
    factual, truth, mask = examples[0].panels
    assert torch.equal(mask > 0, factual != truth)
    # Real images have no known counterfactual, and NIH has no label for devices.
    (example,) = edit_examples(prepare(config_for(nih)), edits)
    assert example.panels.shape == (1, 1, SIZE, SIZE)
    assert example.titles == ("factual",)
    with pytest.raises(ValueError, match="suits any of remove_support_devices"):
        edit_examples(nih.parent / "prepared", edits[1:])


@pytest.mark.parametrize("detail", ["pacemaker", "ecg leads", "left pleural effusion"])
def test_a_detail_is_removed_where_it_is_and_added_where_its_label_is_absent(phantoms, detail):
    table, label = load_table(phantoms), CHEST.owners[detail]
    for verb, edit in (("remove", Edit(remove=(detail,))), ("add", Edit(add=(detail,)))):
        rows = editable(table, edit)
        assert 0 < len(rows) < len(table)
        assert rows[label].eq(verb == "remove").all()
        image, mask, _ = true_counterfactual(phantoms, rows, edit)
        factual = read_images(phantoms, rows)
        assert mask.flatten(1).any(1).all() and torch.equal(image[~mask], factual[~mask])
    named = table["devices"].str.contains(detail) | table["effusion_side"].eq(detail.split()[0])
    assert len(editable(table, Edit(remove=(detail,)))) == named.sum()


def test_a_data_set_without_details_says_so(nih):
    table = load_table(prepare(config_for(nih)))
    with pytest.raises(ValueError, match="does not say which rows have 'left pleural effusion'"):
        editable(table, Edit(remove=("left pleural effusion",)))


def test_editable_refuses_an_unknown_label(phantoms):
    with pytest.raises(ValueError, match="no label 'Edema'"):
        editable(load_table(phantoms), Edit(add=("Edema",)))


# --- splits


def test_split_does_not_depend_on_the_order_of_patients():
    patients = pd.Series([f"p{i}" for i in range(50)])
    shuffled = patients.sample(frac=1, random_state=1)
    shares = (0.7, 0.15, 0.15)
    split = split_patients(patients, shares, 3)
    assert split == split_patients(shuffled, shares, 3)
    assert split != split_patients(patients, shares, 4)
    assert sorted(seeded_order(patients, 3)) == sorted(patients)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (100, (0.7, 0.15, 0.15), (70, 15, 15)),
        (10, (0.7, 0.15, 0.15), (7, 2, 1)),
        (4, (0.7, 0.15, 0.15), (2, 1, 1)),
        (3, (0.9, 0.05, 0.05), (1, 1, 1)),
        (7, (0.5, 0.0, 0.5), (4, 0, 3)),
        (5, (0.0, 0.0, 1.0), (0, 0, 5)),
    ],
)
def test_split_sizes(count, shares, expected):
    names = list(split_patients(pd.Series(range(count)), shares, 0).values())
    assert tuple(names.count(split) for split in SPLITS) == expected


def test_too_few_patients_for_a_split():
    with pytest.raises(ValueError, match="2 patients are too few"):
        split_patients(pd.Series(["a", "b"]), (0.7, 0.15, 0.15), 0)


# --- NIH's format


def test_nih_labels_become_chexpert_names(nih):
    folder = prepare(config_for(nih))
    table = load_table(folder).set_index("source_file")
    sick = table.loc["00000001_000.png"]
    assert (sick["Cardiomegaly"], sick["Pleural Effusion"], sick["No Finding"], sick["Mass"]) == (1, 1, 0, 0)
    assert table.loc["00000002_000.png", "Pleural Thickening"] == 1
    assert table["Support Devices"].isna().all()
    assert not table["text"].str.contains("device").any()
    assert (sick["patient_id"], sick["age"], sick["sex"], sick["view"]) == ("1", 41, "F", "PA")
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert true_counterfactual(folder, table, Edit(add=("Cardiomegaly",))) is None


def test_fewer_images_are_whole_patients_in_any_order_of_the_table(nih):
    chosen = load_table(prepare(config_for(nih, num_images=8)))
    assert chosen["patient_id"].value_counts().tolist() == [2, 2, 2, 2]
    write_table(nih, read_rows(nih)[::-1])
    again = load_table(prepare(config_for(nih, num_images=8, output=nih.parent / "again")))
    pd.testing.assert_frame_equal(chosen, again)


def test_images_are_only_resized(nih):
    folder = prepare(config_for(nih, size=48))
    table = load_table(folder)
    read = (read_images(folder, table)[:, 0] * 255).round().byte().numpy()
    for name, image in zip(table["source_file"], read, strict=True):
        assert np.array_equal(image, np.array(Image.open(next(nih.rglob(name)))))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_text("no image"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "unreadable image"),
        (lambda path: noise_image(0, 20, 31).save(path), "20x31 pixels is smaller than 32x32"),
        (lambda path: Image.new("L", (48, 48), 7).save(path), "blank image: every pixel is 7"),
        (lambda path: path.unlink(), "not found below"),
    ],
)
def test_unusable_files_are_listed_or_refused(nih, damage, reason):
    name = read_rows(nih)[5][0]
    damage(image_path(nih, 5))
    with pytest.raises(ValueError, match=rf"1 of 24 files cannot be used.*{name}: .*{reason}"):
        prepare(config_for(nih))
    folder = prepare(config_for(nih, max_rejected=0.05))
    assert left_behind(nih) == ["prepared"]
    (rejected,) = load_info(folder)["rejected"]
    assert rejected["file"] == name
    assert reason in rejected["reason"]
    assert name not in set(load_table(folder)["source_file"])
    assert len(load_table(folder)) == 23


def test_no_damage_to_a_file_stops_the_preparation(nih):
    path, rng = image_path(nih, 0), random.Random(0)
    original = path.read_bytes()
    for _ in range(150):
        broken = bytearray(original[: rng.randrange(1, len(original))])
        broken[rng.randrange(len(broken))] ^= rng.randrange(1, 256)
        path.write_bytes(bytes(broken))
        with contextlib.suppress(ValueError):  # either a reason or an image, and nothing else
            assert ImageFiles(SIZE).read(path).pixels.shape == (SIZE, SIZE)


def test_one_error_names_several_files(nih):
    for row in range(4):
        image_path(nih, row).write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 24 files .* are .*; .*; .*; "):
        prepare(config_for(nih, max_rejected=0.1))


@pytest.mark.parametrize("column", NIH_COLUMNS)
def test_missing_column_is_named(nih, column):
    columns = tuple("Something" if name == column else name for name in NIH_COLUMNS)
    write_table(nih, read_rows(nih), columns)
    with pytest.raises(ValueError, match=f"Data_Entry_2017_v2020.csv lacks the column '{column}'"):
        prepare(config_for(nih))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("Finding Labels", "Effusion|Zeppelin", r"line 5: unknown label .*'Effusion\|Zeppelin'"),
        ("Finding Labels", "", "line 5: unknown label"),
        ("Finding Labels", "No Finding|Mass", "line 5: contradiction"),
        ("Image Index", "", "line 5: empty Image Index"),
        ("Image Index", "00000000_000.png", "line 5: repeated Image Index: '00000000_000.png'"),
        ("Image Index", "../../secret.png", r"line 5: path outside the data root: '\.\./\.\./secret\.png'"),
        ("Image Index", "/etc/secret.png", "line 5: path outside the data root"),
        ("Image Index", "a\\..\\..\\secret.png", "line 5: path outside the data root"),
        ("Image Index", "C:\\secret.png", "line 5: path outside the data root"),
    ],
)
def test_bad_row_is_named_before_any_work(nih, column, value, message):
    edit_table(nih, 3, column, value)
    with pytest.raises(ValueError, match=message):
        prepare(config_for(nih, max_rejected=1.0))
    assert left_behind(nih) == []


def test_link_out_of_the_data_root_is_refused(nih, tmp_path):
    noise_image(99).save(tmp_path / "outside.png")
    path = image_path(nih, 0)
    path.unlink()
    path.symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match=r"'00000000_000\.png' is a link that leads outside"):
        prepare(config_for(nih, max_rejected=1.0))


def test_two_images_of_one_name_are_refused(nih):
    noise_image(99).save(nih / read_rows(nih)[0][0])
    (nih / "deeper").mkdir()
    noise_image(98).save(nih / "deeper" / read_rows(nih)[0][0])
    with pytest.raises(ValueError, match="have one name"):
        prepare(config_for(nih))


def test_impossible_age_is_left_out(nih):
    edit_table(nih, 0, "Patient Age", "414")
    edit_table(nih, 2, "Patient Age", "058Y")
    ages = load_table(prepare(config_for(nih))).set_index("source_file")["age"]
    assert np.isnan(ages["00000000_000.png"])
    assert ages["00000001_000.png"] == 58


# --- label policy


@pytest.mark.parametrize(("policy", "expected"), [("ignore", -1), ("zeros", 0), ("ones", 1)])
def test_uncertain_labels_follow_the_policy(nih, monkeypatch, policy, expected):
    def with_uncertain(config):
        images = ImageFiles(config.size, config.fit)
        source = chest_source(nih, config.num_images, config.seed, images, "nih", "frontal", "", test=False)
        return dataclasses.replace(source, table=source.table.assign(Cardiomegaly=-1.0))

    monkeypatch.setitem(SOURCES, "nih", with_uncertain)
    folder = prepare(config_for(nih, uncertain={"*": policy}, explicit_share=1.0))
    table, counts = load_table(folder), load_info(folder)["counts"]
    assert (table["Cardiomegaly"] == expected).all()
    said = {-1: "", 0: "without cardiomegaly", 1: "with cardiomegaly"}[expected]
    assert table["text"].str.contains(said or "x-ray").all()
    assert table["text"].str.contains("cardiomegaly").any() == bool(said)
    before, after = (counts[when]["train"]["labels"]["Cardiomegaly"] for when in ("before", "after"))
    assert before["uncertain"] == counts["before"]["train"]["images"]
    assert after["uncertain"] == (before["uncertain"] if policy == "ignore" else 0)


# --- bad configurations and outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "brain"}, "^dataset is 'brain': input should be 'phantom', 'films', 'chexpert', .*'nih'"),
        ({"split": (0.7, 0.2, 0.2)}, "sum to 1"),
        ({"split": (0.7, 0.3)}, r"^split\.2 is missing$"),
        ({"split": (1.7, 0.3, -1.0)}, r"^split\.0 is 1\.7: .*less than or equal to 1$"),
        ({"num_images": 0}, "^num_images is 0: .*greater than or equal to 1$"),
        ({"size": 16}, "^size is 16: .*greater than or equal to 32$"),
        ({"processes": 0}, "^processes is 0: .*greater than or equal to 1$"),
        ({"confounding": 2.0}, r"^confounding is 2\.0: .*less than or equal to 1$"),
        ({"max_rejected": -0.1}, r"^max_rejected is -0\.1: .*greater than or equal to 0$"),
        ({"uncertain": {"*": "maybe"}}, r"^uncertain\.\* is 'maybe': input should be 'ignore', 'zeros' or 'ones'$"),
        ({"fit": "squash"}, "^fit is 'squash': input should be 'letterbox' or 'crop'$"),
        (
            {"vocabulary": "brain"},
            "unknown vocabulary 'brain'; known: chest, films, phantom, skin, labels, and YAML files",
        ),
        ({"subject": "knee x-ray"}, "subject 'knee x-ray' is for the vocabulary 'labels', not for 'chest'"),
        ({"num_image": 3}, r"^unknown setting 'num_image'; did you mean 'num_images'\?$"),
        ({"columns": Columns(header=("PatientAge",))}, "header fields can be copied from the dataset 'dicom' only"),
    ],
)
def test_bad_configuration(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"dataset": "phantom", "output": tmp_path} | changes))


def test_output_that_is_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="not a prepared data set"):
        prepare(PrepareConfig("phantom", tmp_path, num_images=3))
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_unwritable_output_is_an_error_before_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(SOURCES, "phantom", lambda config: pytest.fail("work began"))
    with pytest.raises(OSError, match="cannot write to the output"):
        prepare(PrepareConfig("phantom", tmp_path / "file" / "out", num_images=3))


def test_interruption_keeps_the_images_and_the_next_run_ends_the_work(tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    config = PrepareConfig("phantom", tmp_path / "out", size=SIZE, num_images=3)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_metadata", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    monkeypatch.setattr("prism_lib.phantom.patients.render", lambda *arguments: pytest.fail("an image was made twice"))
    formats.verify(prepare(config))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_root_must_exist_and_not_hold_the_output(nih, tmp_path):
    with pytest.raises(ValueError, match="needs a data_root"):
        prepare(config_for(nih, data_root=None))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        prepare(config_for(nih, data_root=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="inside the data root"):
        prepare(config_for(nih, output=nih / "prepared"))
    (nih / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(FileNotFoundError, match="found none"):
        prepare(config_for(nih))


# --- reading back


def test_reading_what_is_not_there(tmp_path, phantoms):
    with pytest.raises(FileNotFoundError, match=r"has no dataset\.json"):
        load_table(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        load_table(phantoms, "valid")
    table = load_table(phantoms)
    with pytest.raises(ValueError, match="no rows"):
        read_images(phantoms, table[:0])
    with pytest.raises(ValueError, match="leads outside"):
        read_images(phantoms, table[:1].assign(file_name="../../x.png"))


def test_incomplete_folder_is_not_reused(tmp_path):
    config = PrepareConfig("phantom", tmp_path / "out", size=SIZE, num_images=3)
    folder = prepare(config)
    (folder / load_table(folder)["file_name"][1]).unlink()
    with pytest.raises(FileNotFoundError, match="is incomplete"):
        prepare(config)


def test_images_of_two_sizes_are_refused(tmp_path):
    folder = prepare(PrepareConfig("phantom", tmp_path / "out", size=SIZE, num_images=3))
    table = load_table(folder)
    noise_image(0).save(folder / table["file_name"][1])
    with pytest.raises(ValueError, match=r"but the images before it are \(32, 32, 1\)"):
        read_images(folder, table)


@pytest.mark.parametrize("source", ["phantom", "nih"])
def test_hugging_face_reads_the_folder(source, nih, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hugging_face = pytest.importorskip("datasets")
    folder = phantoms if source == "phantom" else prepare(config_for(nih))
    table = load_table(folder)
    loaded = hugging_face.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    for ours, theirs in {"train": "train", "val": "validation", "test": "test"}.items():
        rows = table[table["split"] == ours].reset_index(drop=True)
        assert loaded[theirs]["text"][:] == rows["text"].tolist()
        assert loaded[theirs]["Cardiomegaly"][:] == rows["Cardiomegaly"].tolist()
        pixels = np.array(loaded[theirs][0]["image"])
        assert np.array_equal(pixels, (read_images(folder, rows[:1])[0, 0] * 255).round().byte().numpy())


def test_info_is_plain_json(phantoms):
    text = (phantoms / "dataset.json").read_text()
    assert json.loads(text) == load_info(phantoms)
    assert io.StringIO(text).readline() == "{\n"


# --- real images


@pytest.mark.skipif(not NIH_SAMPLE.is_dir(), reason="no nih-sample below PRISM_DATA")
def test_real_sample_is_prepared_without_a_rejection(tmp_path):
    folder = prepare(PrepareConfig("nih", tmp_path / "out", data_root=NIH_SAMPLE, size=64, num_images=40))
    table = load_table(folder)
    assert len(table) == 40
    assert load_info(folder)["rejected"] == []
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert read_images(folder, table).shape == (40, 1, 64, 64)
