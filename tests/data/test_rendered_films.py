"""Films with rendered devices: every pair differs by its devices alone, and patients stay apart."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from prism_lib.apps.bulk_plan import BulkConfig, plan
from prism_lib.data.chest import NOT_THERE, acquired
from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.rows import editable, sample_captions, true_counterfactual
from prism_lib.language.edits import Edit
from prism_lib.studies import augmentation
from tests.formats import nih_films

REMOVE = Edit(remove=("Support Devices",))
SIZE = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return nih_films(tmp_path_factory.mktemp("films") / "nih", SIZE)


def config(root, output, **changes):
    return PrepareConfig("films", output, root, size=SIZE, vocabulary="phantom", **changes)


@pytest.fixture(scope="module")
def films(root, tmp_path_factory):
    return prepare(config(root, tmp_path_factory.mktemp("data") / "films", copies=3))


def test_every_film_has_a_twin_with_devices_and_train_has_more_copies(films):
    table = load_table(films)
    assert table.groupby("patient_id")["split"].nunique().eq(1).all()
    first = table[table["copy"] == 0]
    assert len(first) == 36 and first["rendered"].sum() == 18
    assert set(table.loc[table["copy"] > 0, "split"]) == {"train"}
    train = first.query("split == 'train' and not rendered")
    assert (table["copy"] > 0).sum() == 2 * 2 * len(train)
    assert table.loc[table["rendered"], "twin"].isin(table["file_name"]).all()
    assert table.loc[table["rendered"], "kinds"].ne(NOT_THERE).all()
    assert table.loc[~table["rendered"], "kinds"].eq(NOT_THERE).all()
    assert load_info(films)["duplicates"] == {"across_splits": 0, "within_split": 0}


def test_the_truth_about_removed_devices_is_the_twin(films):
    cases = editable(load_table(films, "test"), REMOVE)
    factual, truth = read_images(films, cases), true_counterfactual(films, cases, REMOVE)
    assert truth.changed.flatten(1).any(1).all() and not truth.marker.any()
    assert torch.equal(factual[~truth.changed], truth.images[~truth.changed])
    assert (factual[truth.changed] - truth.images[truth.changed]).mean() > 0.02, "devices are dense"
    assert true_counterfactual(films, cases, Edit(remove=("Pleural Effusion",))) is None
    assert true_counterfactual(films, cases, Edit(add=("Support Devices",))) is None


def test_the_truth_about_one_kind_of_device_is_the_film_with_the_others(films):
    table = load_table(films).query("copy == 0")
    seen = 0
    for kind in ("ecg leads", "pacemaker", "endotracheal tube", "central venous catheter"):
        change = Edit(remove=(kind,))
        cases = editable(table, change)
        assert cases["kinds"].str.split("|").map(lambda kinds, kind=kind: kind in kinds).all()
        if cases.empty:
            continue
        factual, truth, none = (
            read_images(films, cases),
            true_counterfactual(films, cases, change),
            true_counterfactual(films, cases, REMOVE),
        )
        alone = torch.tensor(cases["kinds"].eq(kind).to_numpy())
        assert torch.equal(truth.images[alone], none.images[alone]), "nothing else was there"
        assert truth.changed.flatten(1).any(1).all() and (factual >= truth.images).all(), "devices are bright"
        assert (truth.images >= none.images).all()
        assert (truth.images != none.images).flatten(1).any(1)[~alone].all(), "the others stay"
        seen += len(cases)
    assert seen > 3
    with pytest.raises(ValueError, match="does not say which rows have 'left pleural effusion'"):
        editable(table, Edit(remove=("left pleural effusion",)))
    moved = load_table(films, "train").query("rendered and copy == 1").head(2)
    assert true_counterfactual(films, moved, Edit(remove=("ecg leads",))) is None, "its devices were moved"


def test_the_twins_are_the_truth_of_a_training_set_in_both_directions(films):
    table = load_table(films, "train")
    devices = table[table["rendered"]].head(3)
    plain = table.set_index("file_name").loc[devices["twin"]].reset_index()
    assert torch.equal(augmentation.truth(films, devices, REMOVE), read_images(films, plain))
    assert torch.equal(augmentation.truth(films, plain, Edit(add=("Support Devices",))), read_images(films, devices))
    with pytest.raises(ValueError, match=r"truth of remove_edema is unknown"):
        augmentation.truth(films, plain, Edit(remove=("Edema",)))


def test_one_kind_of_device_is_rendered_if_asked(root, tmp_path):
    table = load_table(prepare(config(root, tmp_path / "films", kinds=("pacemaker",))))
    assert set(table.loc[table["rendered"], "kinds"]) == {"pacemaker"}
    with pytest.raises(ValueError, match=r"kinds must be one or more of pacemaker, .*got .*'stent'"):
        prepare(config(root, tmp_path / "other", kinds=("stent",)))
    with pytest.raises(ValueError, match="copies, screened and kinds are settings of the dataset 'films' only"):
        PrepareConfig("phantom", tmp_path / "phantom", kinds=("pacemaker",))


def test_captions_say_nothing_about_devices_where_nothing_is_known(films):
    table = load_table(films, "train")
    for row, captions in zip(table.to_dict("records"), sample_captions(films, table, 0, 4, 0.5), strict=True):
        told = any("devices" in text for text in captions)
        assert told == row["rendered"] == (row["Support Devices"] == 1)


def test_screened_films_are_left_out_or_count_as_clean(root, tmp_path):
    names = [f"{number // 2:08d}_{number % 2:03d}.png" for number in range(18)]
    verdict = ["1", "0", ""] * 6
    screened = tmp_path / "screened.csv"
    pd.DataFrame({"file_name": names, "Support Devices": verdict}).to_csv(screened, index=False)
    table = load_table(prepare(config(root, tmp_path / "films", screened=screened)))
    assert not set(table["source_file"]) & set(names[::3])
    paired = table[table["rendered"] & (table["split"] != "train")]
    assert len(table) < 24 and set(paired["source_file"]) <= set(names[1::3]) and len(paired)
    plain = table[~table["rendered"]].set_index("source_file")["Support Devices"]
    assert plain[names[1::3]].eq(0).all() and plain[names[2::3]].isna().all()
    pd.DataFrame({"file_name": names, "Support Devices": ["yes"] * 18}).to_csv(screened, index=False)
    with pytest.raises(ValueError, match=r"screened.csv, line 2.*'yes'"):
        prepare(config(root, tmp_path / "other", screened=screened))


def test_the_number_of_processes_changes_nothing(root, films, tmp_path):
    again = prepare(config(root, tmp_path / "films", copies=3, processes=2))
    assert load_info(again)["content_hash"] == load_info(films)["content_hash"]


@pytest.mark.parametrize(
    ("names", "verdicts", "message"),
    [
        (["00000000_000.png"] * 2, [0, 1], r"line 3: repeated file_name: '00000000_000.png'"),
        (["other.png"], [0], r"screened.csv names none of the images, such as '0000"),
        (
            [f"{number // 2:08d}_{number % 2:03d}.png" for number in range(18)],
            [1] * 18,
            "screened.csv leaves out every",
        ),
    ],
)
def test_a_screened_table_that_does_not_fit_is_refused(root, tmp_path, names, verdicts, message):
    screened = tmp_path / "screened.csv"
    pd.DataFrame({"file_name": names, "Support Devices": verdicts}).to_csv(screened, index=False)
    with pytest.raises(ValueError, match=message):
        prepare(config(root, tmp_path / "films", screened=screened))
    assert [path.name for path in tmp_path.iterdir()] == ["screened.csv"]


def test_settings_that_contradict_films_are_refused(root, tmp_path):
    for dataset, size, changes, message in (
        ("films", 64, {}, "128 pixels or more; size is 64"),
        ("films", 128, {"screened": tmp_path, "blank": {"*": "zeros"}}, "blank 'Support Devices' of screened films"),
        ("nih", 128, {"copies": 2}, "dataset 'films' only"),
        ("nih", 128, {"screened": tmp_path}, "dataset 'films' only"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(dataset, tmp_path / "films", root, size=size, **changes)


def test_a_film_in_two_splits_goes_with_its_twin_and_its_copies(root, tmp_path):
    again = shutil.copytree(root, tmp_path / "nih")
    for path in sorted((again / "images").glob("*_000.png"))[1:]:
        shutil.copy(again / "images" / "00000000_000.png", path)
    films = prepare(config(again, tmp_path / "films", copies=3))
    table = load_table(films)
    assert table[table["source_file"].str.endswith("_000.png")]["split"].unique().tolist() == ["test"]
    assert set(table["twin"]) - {NOT_THERE} <= set(table["file_name"])


def test_films_that_are_not_there_are_named(root, tmp_path):
    (tmp_path / "nih").mkdir()
    shutil.copy(root / "Data_Entry_2017_v2020.csv", tmp_path / "nih")
    with pytest.raises(ValueError, match=r"18 of 18 files cannot be used.*00000000_000.png: not found below"):
        prepare(config(tmp_path / "nih", tmp_path / "films"))


def test_a_film_and_the_same_with_devices_are_acquired_with_the_same_grain():
    film = np.full((128, 128), 120, dtype=np.uint8)
    device = film.copy()
    device[60:64, 20:100] = 180
    levels, spread = set(), []
    for seed in range(12):
        plain, shown = acquired(film, seed), acquired(device, seed)
        assert np.array_equal(plain, acquired(film, seed))
        assert np.array_equal(plain[:30], shown[:30]) and np.array_equal(plain[94:], shown[94:]), "far from the device"
        assert abs(shown[60:64, 30:90].mean() - 180) < 30 and abs(shown[60:64, 30:90].mean() - plain.mean()) > 30
        levels.add(int(shown[58:66, 60].max()))
        spread.append(plain.std())
    assert len(levels) > 4 and max(spread) > 2 * min(spread), "each film in its own way"


def test_a_bulk_run_of_all_films_edits_those_that_show_the_kind(films, tmp_path):
    (edits := tmp_path / "edits.csv").write_text("file_name,edit\nall,remove_ecg_leads\n")
    tasks = plan(BulkConfig(str(films), str(edits), str(tmp_path / "out")))
    kinds = load_table(films).set_index("file_name")["kinds"]
    shown = {name for name, said in kinds.items() if "ecg leads" in said.split("|")}
    assert {task.file_name for task in tasks} == shown and 0 < len(shown) < (kinds != NOT_THERE).sum()
