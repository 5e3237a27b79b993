"""Checkpoints of a training run: safetensors and JSON only, written whole or not at all.

All randomness of a training step here is a function of (seed, step), so a checkpoint needs no random state: weights,
moving averages, optimizer moments and the step number continue a run bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` and drop all but the newest ``keep`` checkpoints."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        save_file(
            {key: value.contiguous() for key, value in module.state_dict().items()},
            partial / f"{name}.safetensors",
        )
    save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
    hashes = {path.name: _sha256(path) for path in sorted(partial.glob("*.safetensors"))}
    (partial / "state.json").write_text(json.dumps({"step": step, "sha256": hashes, **info}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest checkpoint below ``folder`` in place; {} when there is none.

    Raises ValueError naming the file when one is missing or was altered.
    """
    found = _checkpoints(folder)
    if not found:
        return {}
    newest = found[-1]
    info: dict[str, Any] = json.loads((newest / "state.json").read_text())
    for name, expected in info["sha256"].items():
        path = newest / name
        if not path.is_file():
            raise ValueError(f"checkpoint {newest} lacks {name}")
        if _sha256(path) != expected:
            raise ValueError(f"checkpoint file {path} was altered or is damaged; delete {newest} to use the one before")
    for name, module in modules.items():
        module.load_state_dict(load_file(newest / f"{name}.safetensors"))
    _load_optimizer(optimizer, load_file(newest / "optimizer.safetensors"))
    return info


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Per-parameter optimizer state, flattened to ``index.name``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused kernels walk moments and weights in memory order: they must share one layout.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
