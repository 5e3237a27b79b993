"""Files and folders written whole, folders with one writer, work that a signal ends, hashes, seeds, checked images."""

import hashlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import torch


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path, for a file or a folder, that replaces ``path`` when the block ends.

    Readers of a file find the old content or the new one. If the block raises, the old content stays.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{threading.get_ident()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        _remove(partial)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file atomically and return its path; the OSError of a full disk names it."""
    try:
        with atomic(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, as UTF-8; returns its path."""
    return write_bytes(path, text.encode())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock`` while the block runs; RuntimeError names the process that already holds it.

    The operating system frees the lock of a process that was killed; what it had half written in the folder is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock-holder"
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        name = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise RuntimeError(f"{folder} is in use by {name}; choose another output folder") from None
    with held:
        for left in folder.glob(".partial-*"):
            _remove(left)
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            (folder / ".lock").unlink(missing_ok=True)


def existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


class Stopped(SystemExit):
    """A signal asked for the end, and what was done is saved: uncaught, the process exits with 0."""


@contextmanager
def stop_asked(then: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGUSR1 sets during the block, calling `then`; never in a thread other than the main."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        then()

    numbers = {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}  # Windows has one of them
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in numbers if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_now() -> None:
    """For `stop_asked` where nothing has to be finished: files are whole at any time."""
    raise Stopped(0)


def stop_children() -> None:
    """For `stop_asked` while other processes do the work: they are asked in turn."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.terminate()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def image_hash(image: "torch.Tensor") -> str:
    """SHA-256 of an image's float32 values: equal hashes are equal images, bit for bit."""
    return hashlib.sha256(image.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def check_images(images: "torch.Tensor", factor: int = 1, name: str = "images") -> None:
    """ValueError naming what is wrong with a batch that should be floats (N, 1 or 3, H, W) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"{name} must be (N, 1 or 3, H, W); got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point in [0, 1]; got {images.dtype}")
    if bad := (~images.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist():
        raise ValueError(f"{name} {bad} of the batch have NaN or infinite pixels")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {low:.4g} to {high:.4g}")
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"image size {height}x{width} is not a multiple of the autoencoder's factor {factor}")


def model_hash(module: "torch.nn.Module") -> str:
    """SHA-256 of a module's parameters and buffers, by name."""
    import torch  # late: the command line reads files without it

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
