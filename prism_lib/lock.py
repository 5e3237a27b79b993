"""One run per folder: a lock file with the process and the host that hold it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock`` while the block runs.

    Raises RuntimeError when another live process holds it. A lock whose process has ended, by kill -9 or a power cut,
    is taken over; on another host nobody can tell, so there the message says which file to delete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    own = _owner(os.getpid())
    if not _create(path, own):
        holder = _read(path)
        if holder and (holder["host"] != own["host"] or _owner(holder["pid"]) == holder):
            raise RuntimeError(
                f"{folder} is in use by process {holder['pid']} on {holder['host']}; choose another output folder, "
                f"or delete {path} if that process is dead"
            )
        path.unlink(missing_ok=True)
        if not _create(path, own):
            raise RuntimeError(f"{folder} was taken by another process at this moment; choose another output folder")
    try:
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _owner(pid: int) -> dict[str, Any]:
    """Process, host and starting time: process numbers are reused, also after a reboot."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.Error:
        started = 0.0
    return {"pid": pid, "host": socket.gethostname(), "started": started}


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Write the lock file, whole, unless there is one: a hard link cannot replace what exists."""
    partial = path.with_name(f".lock.partial-{os.getpid()}")
    partial.write_text(json.dumps(owner))
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None when nobody does or the file tells nothing."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and owner.keys() == {"pid", "host", "started"} else None
