"""Records: the numbers of an experiment as JSON, with all it takes to make them again.

A record is `figures/<dataset>/<name>.json`. Tables, curves and the README are redrawn from records alone,
so a record refuses what would not survive it, such as a number that is not finite.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from prism_lib import paths
from prism_lib.devices import default_device
from prism_lib.files import write_text

FIELDS = (
    *("name", "notebook", "dataset", "model", "parameters", "seed"),
    *("metrics", "commit", "versions", "device", "seconds", "created"),
)
# What decides a result; figures are left out, or every run would call its own checkout dirty.
_SOURCES = ("prism_lib", "notebooks", "benchmarks", "pyproject.toml", "requirements.lock")
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "monai", "numpy")


class Timer:
    """Seconds of a `with` block; `seconds` can also be read while it runs."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._stop: float | None = None

    def __enter__(self) -> Timer:
        self._start, self._stop = time.perf_counter(), None
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the block was entered, until it was left."""
        if self._start is None:
            raise RuntimeError("the timer has not been started: use it as `with Timer() as timer:`")
        return (time.perf_counter() if self._stop is None else self._stop) - self._start


def record(
    name: str,
    dataset: str,
    notebook: str,
    parameters: Mapping[str, Any],
    seed: int,
    metrics: Mapping[str, Any],
    figures_dir: str | os.PathLike[str] = "",
    *,
    model: str,
    seconds: float,
) -> Path:
    """Write a record and return its path; `figures_dir` replaces `figures/<dataset>/`.

    Args:
        parameters: what the numbers depend on; frozen configs and paths are turned into plain JSON.
        metrics: finite numbers, lists of them or further mappings, kept to six significant digits.
    """
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
        raise ValueError(f"record name {name!r} must be snake_case")
    plain = {str(key): _numbers(value, str(key)) for key, value in metrics.items()}
    content = {
        "name": name,
        "notebook": notebook,
        "dataset": dataset,
        "model": model,
        "parameters": {str(key): _plain(value, str(key)) for key, value in parameters.items()},
        "seed": int(seed),
        "metrics": plain,
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "seconds": _numbers(round(float(seconds), 2), "seconds"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return write_text(paths.figures(dataset, figures_dir) / f"{name}.json", json.dumps(content, indent=2) + "\n")


def load_record(name: str, dataset: str, figures_dir: str | os.PathLike[str] = "") -> dict[str, Any]:
    """Read a record; `load_record("judge", "phantom")["metrics"]` are its numbers."""
    path = paths.figures(dataset, figures_dir) / f"{name}.json"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no record {path}; records there: {found}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = [field for field in FIELDS if not isinstance(content, dict) or field not in content]
    if missing:
        raise ValueError(f"{path} is not a record: it lacks {', '.join(missing)}")
    return content


def commit() -> str:
    """The commit that ran; `-dirty` if code, notebooks or versions differ from it, `unknown` without git."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", *_SOURCES) else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> str:
    """What the numbers were computed on, in words: the GPU's name, or `cpu` with architecture and threads."""
    place = default_device()
    if place.type != "cpu":
        return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    threads = torch.get_num_threads()
    return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=paths.root(), capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def _numbers(value: Any, key: str) -> Any:
    """Finite plain numbers, or the dotted key of the first thing that is none."""
    if isinstance(value, Mapping):
        return {str(name): _numbers(item, f"{key}.{name}") for name, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_numbers(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, bool | numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {key!r} is no number: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"metric {key!r} is {float(value)}, which a record cannot hold")
    return float(f"{float(value):.6g}")


def _plain(value: Any, key: str) -> Any:
    """A parameter as JSON; absolute paths are shortened, so that a record names no one's machine."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(items)]
    if isinstance(value, str | Path):
        return _relative(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"parameter {key!r} cannot be recorded: {value!r}")


def _relative(value: str | Path) -> str:
    path = Path(value)
    if path.is_absolute():
        return path.relative_to(paths.root()).as_posix() if path.is_relative_to(paths.root()) else path.name
    return str(value)
