"""Where models run, and in which precision: one place that decides, so that a notebook says nothing about it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache, partial, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import is_cuda_available
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Job = TypeVar("Job")
Result = TypeVar("Result")

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # accelerate's names
LARGEST_COPY = 2**30  # bytes of a model's weights; larger ones are not copied into other processes
TRAINED_IN = ("no", "bf16")  # precisions of small networks; gradients in "fp16" would need a scaler


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of one of `PRECISIONS`; ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def mixed_precision(asked: str = "auto", device: torch.device | None = None) -> str:
    """The one of `TRAINED_IN` that mixed precision has here: "auto" is "bf16" where the device multiplies in bfloat16.

    Elsewhere it is "no", for a device that only imitates bfloat16 is slower with it. ``device`` is by default
    `default_device`. ValueError for a name that is neither "auto" nor in `TRAINED_IN`.
    """
    if asked == "auto":
        return "bf16" if _multiplies_in_bfloat16(device or default_device()) else "no"
    if asked not in TRAINED_IN:
        raise ValueError(f"mixed_precision is {asked!r}; expected one of auto, {', '.join(TRAINED_IN)}")
    return asked


def autocast(device: str | torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for what is called inside; "no" asks nothing of the device, which may know no other."""
    return nullcontext() if precision == "no" else torch.autocast(torch.device(device).type, dtype_of(precision))


def _multiplies_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Newer than the oldest torch that the project takes.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def processes_for(asked: int = 0) -> int:
    """``asked``, or for 0 one process per core of a CPU, four at most, for each holds torch, and one with a GPU.

    ValueError for a number below 0.
    """
    if asked < 0:
        raise ValueError(f"processes is {asked}; expected 0 (as many as suit) or more")
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if default_device().type == "cpu" else 1


def side_by_side(work: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[Result]:
    """``work(job)`` of every job in order, in so many processes; on a CPU each has one thread.

    Two processes of one thread do more than one of two threads, and results do not depend on how many there are. Jobs
    are drawn as they are needed. With one process the work is done in this one, without start-up cost.
    """
    if processes == 1:
        for job in jobs:
            with _one_thread():
                result = work(job)
            yield result
        return
    from joblib import Parallel, delayed, parallel_config  # late: most commands start no process

    with parallel_config("loky", n_jobs=processes, inner_max_num_threads=1, initializer=_hide_bars()):
        yield from Parallel(return_as="generator", pre_dispatch="n_jobs + 1")(delayed(work)(job) for job in jobs)


@cache
def _hide_bars() -> Callable[[], None]:
    """Progress bars of processes that work side by side would write over each other; their caller has one for all.

    A nested function travels by value, so a process loads this module, and torch with it, only if its work does.
    """

    def hide() -> None:
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)

    return hide


def copies_for(pipe: DiffusionPipeline, asked: int, jobs: int) -> int:
    """`processes_for`, but one for a pipeline on a GPU or too large to copy, and no more than there are jobs."""
    return 1 if _stays(pipe) else min(processes_for(asked), max(1, jobs))


def batch_for(pipe: DiffusionPipeline) -> int:
    """Images that suit one batch: two where pipelines are copied into processes, and eight elsewhere."""
    return 8 if _stays(pipe) else 2


def with_copies(
    pipe: DiffusionPipeline, work: Callable[[Any, Job], Result], jobs: Iterable[Job], processes: int
) -> Iterator[Result]:
    """``work(pipe, job)`` of every job in order, in so many processes (`copies_for`) with a copy of the pipeline each.

    On a CPU each process has one thread, so results do not depend on their number.
    """
    if _stays(pipe):
        yield from (work(pipe, job) for job in jobs)
    elif processes == 1:
        yield from side_by_side(partial(work, pipe), jobs, 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(pipe, path := Path(folder) / "pipeline.pt")
            yield from side_by_side(partial(_with_copy, path, work), jobs, processes)


def _with_copy(path: Path, work: Callable[[Any, Job], Result], job: Job) -> Result:
    return work(_loaded(path), job)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)  # written by `with_copies` a moment ago


def _stays(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline works in this process alone: on a GPU, or with weights too large to copy."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    size = sum(value.nbytes for network in networks for value in network.state_dict().values())
    return pipe.device.type != "cpu" or size > LARGEST_COPY


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if default_device().type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_device() -> torch.device:
    """`PRISM_DEVICE` ("cpu", "cuda:1", "mps") where it is set, else the first GPU, else the CPU.

    Asking does not initialise CUDA, which would forbid to fork training processes later.
    """
    name = os.environ.get("PRISM_DEVICE", "").strip()
    if not name:
        return torch.device("cuda" if is_cuda_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"PRISM_DEVICE={name!r} is no device of PyTorch; expected cpu, cuda, cuda:1 or mps") from None
