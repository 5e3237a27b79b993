"""However many processes write, and however often they are killed: the same folder, each image once."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prism_lib import paths
from prism_lib.data import preparation
from prism_lib.data.folder import building, load_info, load_table, read_images
from prism_lib.data.images import BATCH, ImageFiles
from prism_lib.data.preparation import PrepareConfig, prepare
from tests import formats

COUNT = 5 * BATCH + 3
RUN = """
import sys
from prism_lib.data import PrepareConfig, prepare
if __name__ == "__main__":
    prepare(PrepareConfig("table", sys.argv[2], data_root=sys.argv[1], size=32, num_images=999, mode="L",
            processes=int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """163 images of 40 patients."""
    root = tmp_path_factory.mktemp("images") / "own"
    files = [f"{index:03d}.png" for index in range(COUNT)]
    for index, file in enumerate(files):
        formats.save(formats.noise(index), root / file)
    labels = {"Cardiomegaly": [index % 2 for index in range(COUNT)]}
    return formats.table(root, "metadata.csv", file_name=files, patient_id=[i % 40 for i in range(COUNT)], **labels)


def config_for(root, output, **changes):
    config = PrepareConfig("table", output, data_root=root, size=32, num_images=999, mode="L")
    return dataclasses.replace(config, **changes)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    """What one process writes that nothing interrupts."""
    folder = prepare(config_for(images, tmp_path_factory.mktemp("one") / "out"))
    formats.verify(folder)
    return content(folder)


def test_two_processes_write_what_one_writes(images, expected, tmp_path):
    assert content(prepare(config_for(images, tmp_path / "out", processes=2))) == expected


def test_phantoms_do_not_depend_on_the_processes_either(tmp_path):
    config = PrepareConfig("phantom", tmp_path / "one", size=32, num_images=BATCH + 2, vocabulary="phantom")
    one = content(prepare(config))
    assert content(prepare(dataclasses.replace(config, output=tmp_path / "two", processes=2))) == one


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_at_any_moment_and_resume_gives_the_same_folder(images, expected, tmp_path, processes):
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(images), str(output), str(processes)]
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    rng, killed = random.Random(processes), 0
    for goal in (1, rng.randrange(20, 60), rng.randrange(80, 140)):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(partial.glob("t*/*.png"))) < goal:
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed > 0
    assert prepare(config_for(images, output)) == output
    assert content(output) == expected
    assert not partial.exists()


def test_finished_batches_are_not_read_again_and_damaged_ones_are(images, expected, tmp_path, monkeypatch):
    config = config_for(images, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_metadata", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    partial = tmp_path / ".out.partial"
    victim = sorted(partial.glob("t*/*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:50])
    max(partial.glob("*.json")).unlink()  # killed before it was written
    read, batches = ImageFiles.__call__, []
    monkeypatch.setattr(ImageFiles, "__call__", lambda self, rows: batches.append(1) or read(self, rows))
    prepare(config)
    assert len(batches) == 2
    assert content(tmp_path / "out") == expected


def test_work_of_another_configuration_is_begun_again(images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_metadata", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config_for(images, tmp_path / "out", size=40))
    folder = prepare(config_for(images, tmp_path / "out"))
    formats.verify(folder)
    assert read_images(folder, load_table(folder)).shape[-1] == 32


def test_two_runs_cannot_write_one_folder(images, tmp_path):
    with building(tmp_path / "out"), pytest.raises(RuntimeError, match="is in use by process"):
        prepare(config_for(images, tmp_path / "out"))


def test_full_disk_is_said_and_the_work_can_go_on(images, expected, tmp_path, monkeypatch):
    write, count = Path.write_bytes, [0]

    def full(path, data):
        count[0] += 1
        if count[0] > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"cannot write t\w+/\d+\.png: No space left on device") as caught:
            prepare(config_for(images, tmp_path / "out"))
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    assert content(prepare(config_for(images, tmp_path / "out"))) == expected


class Deadly:
    """A reader whose process ends at once, as one without memory does."""

    def __call__(self, rows):
        os._exit(9)


def test_a_process_that_dies_is_told_and_the_work_can_go_on(images, expected, tmp_path, monkeypatch):
    source = preparation.SOURCES["table"]
    with monkeypatch.context() as patch:
        deadly = lambda config: dataclasses.replace(source(config), images=Deadly())  # noqa: E731
        patch.setitem(preparation.SOURCES, "table", deadly)
        with pytest.raises(RuntimeError, match=r"a process that reads images died.*processes=1 needs less"):
            prepare(config_for(images, tmp_path / "out", processes=2))
    assert content(prepare(config_for(images, tmp_path / "out", processes=2))) == expected


# --- duplicates


def test_an_image_in_two_splits_stays_in_the_held_out_one(images, tmp_path):
    splits = {"train": ["a", "b", "c"], "val": ["d", "e"], "test": ["f", "g"]}
    seeds = {"a": 0, "b": 1, "c": 1, "d": 2, "e": 0, "f": 0, "g": 3}
    root = tmp_path / "own"
    for name, seed in seeds.items():
        formats.save(formats.noise(seed), root / f"{name}.{'png' if name != 'e' else 'bmp'}")
    files = [f"{name}.{'png' if name != 'e' else 'bmp'}" for name in seeds]
    given = [split for name in seeds for split, names in splits.items() if name in names]
    formats.table(root, "metadata.csv", file_name=files, patient_id=[*seeds], split=given, Edema=[0] * 7)
    folder = prepare(config_for(root, tmp_path / "out"))
    # a, e and f are one image, in all three splits; b and c are one in train alone.
    assert sorted(load_table(folder)["patient_id"]) == ["b", "c", "d", "f", "g"]
    info = load_info(folder)
    assert {item["file"]: item["reason"] for item in info["rejected"]} == {
        "train/a.png": "same pixels as test/f.png of patient f, which is held out",
        "val/e.png": "same pixels as test/f.png of patient f, which is held out",
    }
    assert info["duplicates"] == {"across_splits": 2, "within_split": 1}
    assert {path.stem for path in folder.rglob("*.png")} == {"b", "c", "d", "f", "g"}
    kept = prepare(config_for(root, tmp_path / "kept", duplicates="keep"))
    assert len(load_table(kept)) == 7


def test_a_folder_of_an_older_version_is_still_recognised(images, tmp_path):
    folder = prepare(config_for(images, tmp_path / "out"))
    info = load_info(folder)
    del info["config"]["duplicates"], info["config"]["max_upscale"]
    (folder / "dataset.json").write_text(json.dumps(info))
    assert prepare(config_for(images, tmp_path / "out")) == folder
    with pytest.raises(FileExistsError, match="duplicates is 'reject' and not 'keep'"):
        prepare(config_for(images, tmp_path / "out", duplicates="keep"))


def test_a_process_that_reads_files_loads_no_torch():
    code = (
        "import sys; from prism_lib.devices import side_by_side; "
        "loads = lambda _: (__import__('prism_lib.data.images'), 'torch' in sys.modules)[1]; "
        "print(*side_by_side(loads, range(4), 2))"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["False"] * 4
