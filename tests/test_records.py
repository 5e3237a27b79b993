"""Records: what goes in comes out, what is no result is refused by name, no file is half-written."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_lib import paths, records


def write(folder, name="trial", metrics=None, parameters=None, **given):
    metrics = {"error": 0.5} if metrics is None else metrics
    given = {"notebook": "03_counterfactuals", "seed": 3, "model": "phantom-sd", "seconds": 1.234} | given
    return records.record(name, "phantom", parameters=parameters or {}, metrics=metrics, figures_dir=folder, **given)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 50
    window: tuple[float, float] = (0.0, 0.4)


def test_record_round_trip(tmp_path):
    metrics = {
        "remove_support_devices": {
            "cpg": torch.tensor(0.25),
            "flip_rate": np.float32(0.5),
            "count": np.int64(8),
        },
        "curve": torch.tensor([1.0, 2.0]),
    }
    path = write(tmp_path, metrics=metrics, parameters={"edit": Config(), "edits": ("a", "b"), "mask": None})
    record = records.load_record("trial", "phantom", tmp_path)
    assert path == tmp_path / "trial.json"
    assert tuple(record) == records.FIELDS
    assert record["metrics"] == {
        "remove_support_devices": {"cpg": 0.25, "flip_rate": 0.5, "count": 8},
        "curve": [1.0, 2.0],
    }
    assert record["parameters"] == {
        "edit": {"steps": 50, "window": [0.0, 0.4]},
        "edits": ["a", "b"],
        "mask": None,
    }
    assert (record["seed"], record["seconds"], record["model"]) == (3, 1.23, "phantom-sd")
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]


def test_numbers_keep_six_significant_digits(tmp_path):
    write(tmp_path, metrics={"a": 0.123456789, "b": 123456789, "c": 1.5e-12})
    assert records.load_record("trial", "phantom", tmp_path)["metrics"] == {
        "a": 0.123457,
        "b": 123456789,
        "c": 1.5e-12,
    }


@pytest.mark.parametrize(
    ("metrics", "key"),
    [
        ({"a": {"b": float("nan")}}, "a.b"),
        ({"a": torch.tensor([1.0, float("inf")])}, r"a\[1\]"),
        ({"a": "0.5"}, "a"),
        ({"a": {"b": None}}, "a.b"),
    ],
)
def test_what_is_no_finite_number_is_refused_by_key(tmp_path, metrics, key):
    with pytest.raises((ValueError, TypeError), match=f"'{key}'"):
        write(tmp_path, metrics=metrics)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted((paths.root() / "figures").glob("*/*.json")), ids=lambda path: path.stem)
def test_committed_records_are_whole(path):
    record = records.load_record(path.stem, path.parent.name)
    assert (record["name"], record["dataset"]) == (path.stem, path.parent.name)


@pytest.mark.parametrize("name", ["Two Words", "../up", "a/b", ""])
def test_record_names_are_snake_case(tmp_path, name):
    with pytest.raises(ValueError, match="snake_case"):
        write(tmp_path, name)


def test_parameters_name_no_machine(tmp_path):
    here = paths.root() / "notebooks"
    write(
        tmp_path,
        parameters={"inside": here, "outside": tmp_path / "xrays", "text": "a/b", "inside_text": str(here)},
    )
    assert records.load_record("trial", "phantom", tmp_path)["parameters"] == {
        "inside": "notebooks",
        "outside": "xrays",
        "text": "a/b",
        "inside_text": "notebooks",
    }


def test_parameter_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'model\.weights'"):
        write(tmp_path, parameters={"model": {"weights": object()}})


def test_a_failed_write_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()

    def full(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, metrics={"error": 0.1})
    assert [file.name for file in tmp_path.iterdir()] == ["trial.json"]
    assert path.read_bytes() == before


def test_loading_names_what_is_wrong(tmp_path):
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match="records there: trial"):
        records.load_record("other", "phantom", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        records.load_record("broken", "phantom", tmp_path)
    (tmp_path / "partial.json").write_text(json.dumps({"name": "partial"}))
    with pytest.raises(ValueError, match="lacks notebook"):
        records.load_record("partial", "phantom", tmp_path)


def test_default_folder_follows_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    assert write("") == tmp_path / "figures" / "phantom" / "trial.json"
    with pytest.raises(ValueError, match="cannot name a folder"):
        paths.figures("../elsewhere")


def test_folders_follow_their_environment_variables(tmp_path, monkeypatch):
    for variable, folder in {
        "PRISM_DATA": paths.data,
        "PRISM_RUNS": paths.runs,
        "PRISM_WEIGHTS": paths.weights,
    }.items():
        monkeypatch.delenv(variable, raising=False)
        assert folder().is_relative_to(paths.root())
        monkeypatch.setenv(variable, str(tmp_path))
        assert folder() == tmp_path


def test_commit_is_dirty_only_where_sources_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    assert records.commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for folder in ("prism_lib", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    head = records.commit()
    assert len(head) == 40
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "new.json").write_text("{}")
    assert records.commit() == head
    for source in ("prism_lib/b.py", "benchmarks/a.py"):
        (tmp_path / source).write_text("new = 1")
        assert records.commit() == f"{head}-dirty", source
        subprocess.run([*git, "stash", "-qu"], cwd=tmp_path, check=True)
        assert records.commit() == head


def test_timer_stops():
    with records.Timer() as timer:
        time.sleep(0.01)
    stopped = timer.seconds
    assert 0.01 <= stopped == timer.seconds
