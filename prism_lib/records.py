"""Records: the numbers of an experiment as JSON, `figures/<dataset>/<name>.json`, with what reproduces them."""

import dataclasses
import json
import math
import numbers
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

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
    """Wall-clock `seconds` of a `with` block, when it has ended."""

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start


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

    ``parameters``, configs and paths among them, become plain JSON. ``metrics`` are finite numbers, lists of them or
    further mappings, kept to six significant digits.
    """
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
        raise ValueError(f"record name {name!r} must be snake_case")
    content = {
        "name": name,
        "notebook": notebook,
        "dataset": dataset,
        "model": model,
        "parameters": _json(parameters, "", _parameter),
        "seed": int(seed),
        "metrics": _json(metrics, "", _number),
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "seconds": _number(round(float(seconds), 2), "seconds"),
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
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in _PACKAGES}


def device() -> str:
    """What the numbers were computed on, in words: the GPU's name, or `cpu` with architecture and threads."""
    place = default_device()
    if place.type != "cpu":
        return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    threads = torch.get_num_threads()
    return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.check_output(command, cwd=paths.root(), stderr=subprocess.PIPE, text=True, timeout=30).strip()


def _json(value: Any, key: str, leaf: Callable[[Any, str], Any]) -> Any:
    """Nested values as JSON; ``leaf`` turns a single value, with its dotted key, into what a record holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _json(item, f"{key}.{name}" if key else str(name), leaf) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_json(item, f"{key}[{index}]", leaf) for index, item in enumerate(items)]
    return leaf(value, key)


def _number(value: Any, key: str) -> int | float:
    """A finite number, to six significant digits."""
    if isinstance(value, numbers.Integral):  # bool too
        return int(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {key!r} is no number: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"metric {key!r} is {float(value)}, which a record cannot hold")
    return float(f"{float(value):.6g}")


def _parameter(value: Any, key: str) -> Any:
    """A parameter; of an absolute path outside the checkout only the name is kept."""
    if isinstance(value, str | Path):
        path = Path(value)
        if not path.is_absolute():
            return str(value)
        return path.relative_to(paths.root()).as_posix() if path.is_relative_to(paths.root()) else path.name
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"parameter {key!r} cannot be recorded: {value!r}")
