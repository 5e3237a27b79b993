"""Checkpoints of a training run: safetensors and JSON only, written whole or not at all.

Randomness and learning rate follow from (seed, step), so weights, averages, moments and step continue a run exactly.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from prism_lib.files import atomic, existing, file_hash

State = Mapping[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, states: Mapping[str, State], optimizer: Optimizer, info: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write ``folder/step-XXXXXXXX`` and drop all but the newest ``keep`` checkpoints.

    ``states`` are tensors by file and name, ``info`` is plain JSON. OSError when the disk is full; older ones stay.
    """
    moments = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    final = folder / f"step-{step:08d}"
    for left in folder.glob(".partial-*-step-*"):
        shutil.rmtree(left)  # by a run that was killed
    with atomic(final) as partial:
        for name, tensors in {**states, "optimizer": moments}.items():
            write_tensors(partial / f"{name}.safetensors", tensors)
        hashes = {path.name: file_hash(path) for path in sorted(partial.glob("*.safetensors"))}
        (partial / "state.json").write_text(json.dumps({"step": step, "sha256": hashes, **info}, indent=1))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, states: Mapping[str, State], optimizer: Optimizer) -> dict[str, Any]:
    """Copy the newest checkpoint below ``folder`` into ``states`` and optimizer; returns its info, {} without one.

    Raises ValueError naming the file when one is missing, was altered, or is of another model.
    """
    if not (found := _checkpoints(folder)):
        return {}
    newest = found[-1]
    try:
        info: dict[str, Any] = json.loads((newest / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {newest} has no readable state.json: {error}") from None
    for name, expected in info["sha256"].items():
        path = newest / name
        if not path.is_file() or file_hash(path) != expected:
            fault = "was altered or is damaged" if path.is_file() else "is missing"
            raise ValueError(f"checkpoint file {path} {fault}; delete {newest} to use the one before")
    for name, tensors in states.items():
        read_tensors(newest / f"{name}.safetensors", tensors)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(newest / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused kernels walk moments and weights in memory order: they must share one layout.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return info


def write_tensors(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, whole or not at all; OSError says where it failed and what space is left."""
    try:
        with atomic(path) as partial:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial, dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(existing(path)).free / 2**30
        raise OSError(f"cannot write {path} ({free:.1f} GiB are free there): {error}") from error


@torch.no_grad()
def read_tensors(path: Path, into: State) -> None:
    """Copy a file's tensors into ``into``, in place; ValueError unless names and shapes are the same."""
    found = load_file(path)
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (found, into)]
    if differing := sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ValueError(f"{path} is of another model: {', '.join(differing[:3])} differ, {len(differing)} in all")
    for key, value in found.items():
        into[key].copy_(value)


def set_learning_rate(optimizer: Any, schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """The rate of a step, as a pure function of the step: nothing to save and restore."""
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)


def require_space(folder: Path, size: float, what: str) -> None:
    """Raise OSError before long work when ``folder`` has no room for ``size`` bytes of ``what``."""
    if (free := shutil.disk_usage(existing(folder)).free) < size:
        raise OSError(f"{what} need {size / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are free")


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))
