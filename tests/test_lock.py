"""One run per folder, and a lock that does not outlive its process."""

import json
import os
import subprocess
import sys

import pytest

from prism_lib import lock
from prism_lib.lock import exclusive


def test_a_second_run_is_refused_and_the_first_one_frees_the_folder(tmp_path):
    in_use = pytest.raises(RuntimeError, match=rf"in use by process {os.getpid()} on ")
    with exclusive(tmp_path), in_use, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_live_process_keeps_its_lock_and_a_killed_one_loses_it(tmp_path):
    code = f"import time; from pathlib import Path; from prism_lib import lock\nwith lock.exclusive(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(600)"  # noqa: E501
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=str(holder.pid)), exclusive(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / ".lock").is_file(), "kill -9 leaves the file"
    with exclusive(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_number_in_use_again_is_not_the_old_process(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps(lock._owner(os.getpid()) | {"started": 1.0}))
    with exclusive(tmp_path):
        pass


def test_another_host_is_believed(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "node-7", "started": 1.0}))
    with pytest.raises(RuntimeError, match=r"process 1 on node-7.*delete .*\.lock"), exclusive(tmp_path):
        pass


def test_a_lock_file_that_tells_nothing_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("")
    with exclusive(tmp_path):
        pass
