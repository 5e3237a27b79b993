"""Checkpoints: whole or not at all, the newest kept, nothing altered, and intact when the disk is full."""

import resource
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

from prism_lib.training import checkpoints


def trained(seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def save(folder, step, seed=0):
    module, optimizer = trained(seed)
    checkpoints.save_checkpoint(folder, step, {"unet": module.state_dict()}, optimizer, {"note": step})
    return module, optimizer


def test_what_is_saved_is_what_is_loaded_in_place(tmp_path):
    module, optimizer = save(tmp_path, 7)
    other, other_optimizer = trained(seed=1)
    info = checkpoints.load_checkpoint(tmp_path, {"unet": other.state_dict()}, other_optimizer)
    assert (info["step"], info["note"]) == (7, 7)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    pairs = zip(optimizer.state.values(), other_optimizer.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def test_only_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    module, optimizer = trained()
    assert checkpoints.load_checkpoint(tmp_path, {"unet": module.state_dict()}, optimizer)["step"] == 100


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".partial-1-step-00000005").mkdir()
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    module, optimizer = trained()
    assert checkpoints.load_checkpoint(tmp_path, {"unet": module.state_dict()}, optimizer) == {}


def drop(folder):
    (folder / "unet.safetensors").unlink()


def alter(folder):
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)


def cut(folder):
    (folder / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "unet.safetensors is missing"),
        (alter, "optimizer.safetensors was altered"),
        (cut, "no readable state.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_deleting_it_helps(tmp_path, damage, message):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002")
    module, optimizer = trained()
    with pytest.raises(ValueError, match=message):
        checkpoints.load_checkpoint(tmp_path, {"unet": module.state_dict()}, optimizer)
    shutil.rmtree(tmp_path / "step-00000002")
    assert checkpoints.load_checkpoint(tmp_path, {"unet": module.state_dict()}, optimizer)["step"] == 1


def test_tensors_of_another_model_are_refused(tmp_path):
    save(tmp_path, 1)
    _, optimizer = trained()
    for other in (nn.Linear(4, 2), nn.Linear(3, 2, bias=False)):
        with pytest.raises(ValueError, match="of another model"):
            checkpoints.load_checkpoint(tmp_path, {"unet": other.state_dict()}, optimizer)


def test_a_full_disk_is_told_and_the_old_checkpoint_is_intact(tmp_path):
    save(tmp_path, 1)
    module = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(module.parameters())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system refuses to write more, as on a full disk
    try:
        with pytest.raises(OSError, match=r"cannot write .*unet\.safetensors \(.* GiB are free there\)"):
            checkpoints.save_checkpoint(tmp_path, 2, {"unet": module.state_dict()}, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    module, optimizer = trained()
    assert checkpoints.load_checkpoint(tmp_path, {"unet": module.state_dict()}, optimizer)["step"] == 1


def test_missing_room_is_found_before_long_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 0, 3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    checkpoints.require_space(tmp_path / "not" / "yet", 2 * 2**30, "latents")
    with pytest.raises(OSError, match=r"latents need 4\.0 GiB in .*, where 3\.0 GiB are free"):
        checkpoints.require_space(tmp_path, 4 * 2**30, "latents")
