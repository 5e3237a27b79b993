"""`prism doctor`: can this machine run the notebooks, and with the versions the figures were made with?"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from prism_lib import paths, results

WEIGHTS = "phantom-sd"
FREE_GB = 5.0


@dataclass(frozen=True)
class Check:
    """One line of the report; a failed check that is not required is a warning."""

    name: str
    ok: bool
    detail: str
    required: bool = True


def report(show: Callable[[str], None]) -> int:
    """Show every check and return 1 if a required one failed, else 0."""
    failed = False
    for check in checks():
        failed |= check.required and not check.ok
        verdict = "ok" if check.ok else "FAILED" if check.required else "note"
        show(f"{verdict:<7} {check.name:<9} {check.detail}")
    return int(failed)


def checks() -> Iterator[Check]:
    """The checks, one by one."""
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0])
    yield _versions()
    yield Check("device", True, results.device())
    index = paths.weights() / WEIGHTS / "model_index.json"
    yield Check("weights", index.is_file(), str(index.parent) if index.is_file() else f"no {index}")
    for name, folder in {"runs": paths.runs(), "figures": paths.root() / "figures"}.items():
        yield _writable(name, folder)
    free = shutil.disk_usage(_existing(paths.runs())).free / 1e9
    yield Check("disk", free >= FREE_GB, f"{free:.0f} GB free, {FREE_GB:.0f} wanted", required=False)


def _versions() -> Check:
    lock = paths.root() / "requirements.lock"
    if not lock.is_file():
        return Check("versions", False, f"no {lock}", required=False)
    pinned = dict(
        line.split("==") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"
    )
    missing, other = [], []
    for package, wanted in pinned.items():
        try:
            found = metadata.version(package).split("+")[0]  # the build, such as +cpu, is the machine's choice
        except metadata.PackageNotFoundError:
            missing.append(package)
            continue
        if found != wanted:
            other.append(f"{package} {found} rather than {wanted}")
    if missing:
        return Check("versions", False, f"not installed: {', '.join(missing)}")
    return Check("versions", not other, ", ".join(other) or f"all {len(pinned)} as locked", required=False)


def _writable(name: str, folder: Path) -> Check:
    """Whether a file can be made in the folder, or in the nearest one above it that exists."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check(name, True, str(folder))
    except OSError as error:
        return Check(name, False, f"{place} cannot be written: {os.strerror(error.errno or 0)}")


def _existing(folder: Path) -> Path:
    return folder if folder.is_dir() else _existing(folder.parent)
