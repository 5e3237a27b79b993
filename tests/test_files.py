"""Writing whole files, holding a folder, and hashes."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import Timeout

from prism_lib.files import Stopped, atomic, exclusive, image_hash, stop_asked, stop_now, write_text


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = write_text(tmp_path / "a" / "notes.txt", "old")
    with pytest.raises(IsADirectoryError), atomic(path) as partial:
        (partial.write_text("ne"), partial.parent.read_text())
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_with_the_file_that_does_not_fit(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*notes\.txt: No space left on device"):
        write_text(tmp_path / "notes.txt", "text")
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_a_folder_whole(tmp_path):
    for content in ("one", "two"):
        with atomic(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).touch()
    assert [item.relative_to(tmp_path).as_posix() for item in tmp_path.rglob("*")] == ["model", "model/two"]


def test_a_second_run_is_refused_and_the_first_one_frees_the_folder(tmp_path):
    in_use = pytest.raises(RuntimeError, match=rf"in use by process {os.getpid()} on ")
    with exclusive(tmp_path), in_use, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_the_work_waits_for_is_not_taken_for_the_folders(tmp_path):
    with pytest.raises(Timeout), exclusive(tmp_path):
        raise Timeout("a download")
    assert not list(tmp_path.iterdir())


def test_a_live_process_keeps_its_lock_and_a_killed_one_loses_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from prism_lib.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=str(holder.pid)), exclusive(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / ".lock").is_file(), "kill -9 leaves the file"
    (tmp_path / ".partial-1-pipeline" / "unet").mkdir(parents=True)
    (tmp_path / ".partial-1-config.json").touch()
    with exclusive(tmp_path):
        assert not list(tmp_path.glob(".partial-*"))
        assert str(os.getpid()) in (tmp_path / ".lock-holder").read_text()


def test_images_that_differ_in_one_bit_have_other_hashes():
    image = torch.zeros(1, 2, 2)
    other = image.clone()
    other[0, 0, 0] = 1e-45
    assert image_hash(image) == image_hash(image.clone())
    assert image_hash(image) != image_hash(other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_event_and_handlers_come_back(number):
    called = []
    with stop_asked() as outer:
        with stop_asked(lambda: called.append(1)) as inner:
            os.kill(os.getpid(), number)
            assert inner.wait(10) and called == [1] and not outer.is_set()
        os.kill(os.getpid(), number)
        assert outer.wait(10) and called == [1]
        with pytest.raises(Stopped) as stopped, stop_asked(stop_now):
            signal.raise_signal(number)
        assert stopped.value.code == 0
    assert signal.getsignal(number) == signal.SIG_DFL


def test_in_another_thread_no_signal_is_expected():
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(lambda: stop_asked().__enter__().is_set()).result()
