"""`prism doctor`: what is wrong with a machine is found, and said with what helps."""

import os
import re
import subprocess
import sys

import pytest
import torch

from prism_lib import paths
from prism_lib.apps import doctor


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("PRISM_RUNS", "PRISM_DATA", "PRISM_WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def lines():
    said = []
    return doctor.report(said.append), said


def test_every_finding_that_can_fail_has_its_remedy(checkout, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_GB", 1e9)
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e9)
    code, said = lines()
    assert code == 1
    assert said[-1] == "\n1 of these must be put right before the notebooks run; do what the arrows say."
    for name in ("weights", "judge", "film-sd", "film-kinds", "film-judge", "disk", "memory"):
        at = next(i for i, line in enumerate(said) if line[8:].startswith(name))
        assert said[at].startswith("FAILED" if name == "weights" else "note")
        assert said[at + 1].lstrip().startswith("-> ")


def test_a_broken_torchvision_is_found_without_importing_it_here(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor._torchvision()
    assert not check.ok and check.required
    assert "cannot be imported" in check.detail and "uninstall torchvision" in check.remedy
    (tmp_path / "torchvision.py").write_text("")
    assert doctor._torchvision().ok


def test_a_folder_that_cannot_be_written_is_named(checkout, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "no")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = {check.name: check for check in doctor.checks()}["runs"]
    assert not check.ok and str(checkout) in check.detail and "PRISM_RUNS" in check.remedy


def test_what_is_whole_has_no_remedy_shown(checkout):
    weights = paths.weights() / doctor.WEIGHTS
    weights.mkdir(parents=True)
    (weights / "model_index.json").write_text("{}")
    code, said = lines()
    assert code == 0 and any(line.startswith("note    judge") for line in said), "an edit needs no judge"
    (paths.weights() / doctor.JUDGE).mkdir()
    (paths.weights() / doctor.JUDGE / "model.safetensors").write_text("")
    code, said = lines()
    assert code == 0 and said[-1].startswith("\nThe notebooks run here")
    assert any(str(weights) in line for line in said)
    assert not any("PRISM_WEIGHTS" in line for line in said)


@pytest.mark.parametrize(("name", "said"), [("gpu", "no device of PyTorch"), ("cuda", "CUDA|NVIDIA")])
def test_a_device_that_is_not_here_is_one_failed_line(monkeypatch, name, said):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setenv("PRISM_DEVICE", name)
    check = {check.name: check for check in doctor.checks()}["device"]
    assert not check.ok and re.search(said, check.detail) and "PRISM_DEVICE" in check.remedy


@pytest.mark.parametrize(
    ("policy", "before", "said"),
    [
        ("ACTIVE", "", "note .* OMP_WAIT_POLICY is ACTIVE: waiting threads spin"),
        ("", "import torch; ", "note .* OMP_WAIT_POLICY was not set when torch was loaded"),
        ("", "", "ok .* wait without spinning"),
        ("passive", "import torch; ", "ok .* wait without spinning"),
    ],
)
def test_threads_that_spin_are_noted(policy, before, said):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    code = f"{before}from prism_lib.apps import doctor; doctor.report(print)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line[8:].startswith("threads")]
    assert re.match(said, line), line
