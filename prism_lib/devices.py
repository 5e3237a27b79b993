"""Where models run, in which precision and in how many processes: one place that decides."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import convert_to_fp32, is_cuda_available
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Job = TypeVar("Job")
Result = TypeVar("Result")

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # accelerate's names
LARGEST_COPY = 2**30  # bytes of a model's weights; larger ones are not copied into other processes
# Progress bars of processes would write over each other; their caller shows one for all.
_HIDE_BARS = partial(setattr, tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))


def default_device() -> torch.device:
    """`PRISM_DEVICE` ("cpu", "cuda:1", "mps") where it is set, else the first GPU, else the CPU."""
    name = os.environ.get("PRISM_DEVICE", "").strip()
    if not name:
        # This does not initialise CUDA, so that training processes can be forked.
        return torch.device("cuda" if is_cuda_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"PRISM_DEVICE={name!r} is no device of PyTorch; expected cpu, cuda, cuda:1 or mps") from None


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of one of `PRECISIONS`; ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def mixed_precision(asked: str = "auto", device: torch.device | None = None) -> str:
    """ "no" or "bf16" as given; "auto" is "bf16" where the device multiplies in bfloat16, else "no"."""
    if asked not in ("auto", "no", "bf16"):  # with fp16, gradients of small networks would need a scaler
        raise ValueError(f"mixed_precision is {asked!r}; expected one of auto, no, bf16")
    if asked != "auto":
        return asked
    device = device or default_device()
    if device.type == "cuda":
        # Another process asks: once this one has used CUDA, training processes cannot be forked from it.
        code = f"import torch; print(torch.cuda.get_device_capability('{device}')[0])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{device} cannot be used: {done.stderr.strip().splitlines()[-1]}")
        return "bf16" if int(done.stdout.split()[-1]) >= 8 else "no"
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16")) else "no"


def autocast(device: str | torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for what is called inside; "no" changes nothing, on devices without autocast too."""
    return nullcontext() if precision == "no" else torch.autocast(torch.device(device).type, dtype_of(precision))


class Float32Attention(TorchFunctionMode):
    """Attention in float32 inside of an autocast in bfloat16, in the forward pass of what is called inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        given, named = convert_to_fp32((args, kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*given, **named).to(args[0].dtype)


def fast_attention(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """`Float32Attention` where it is the faster one: in bfloat16 on a CPU without units for matrices (AMX)."""
    slow = precision == "bf16" and device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16", False)
    return Float32Attention() if slow else nullcontext()


def processes_for(asked: int = 0) -> int:
    """``asked``, or for 0 one process with a GPU, else one per core, at most four because each loads torch."""
    if asked < 0:
        raise ValueError(f"processes is {asked}; expected 0 (as many as suit) or more")
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if default_device().type == "cpu" else 1


def side_by_side(work: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[Result]:
    """``work(job)`` of every job in order, in so many processes; on a CPU each has one thread.

    Two processes of one thread do more than one of two threads, and results do not depend on their number. Jobs are
    drawn as they are needed. With one process the work is done in this one, without start-up cost.
    """
    if processes == 1:
        for job in jobs:
            with threads(1 if default_device().type == "cpu" else 0):
                result = work(job)
            yield result
        return
    from joblib import Parallel, delayed, parallel_config  # late: most commands start no process

    with parallel_config("loky", n_jobs=processes, inner_max_num_threads=1, initializer=_HIDE_BARS):
        yield from Parallel(return_as="generator", pre_dispatch="n_jobs + 1")(delayed(work)(job) for job in jobs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copies_for(pipe: "DiffusionPipeline", jobs: int) -> int:
    """`processes_for`, but one for a pipeline that is not copied, and no more than there are jobs."""
    return 1 if _stays(pipe) else min(processes_for(), max(1, jobs))


def batch_for(pipe: "DiffusionPipeline") -> int:
    """Images of one batch: two where pipelines are copied into processes, and eight elsewhere."""
    return 8 if _stays(pipe) else 2


def with_copies(
    pipe: "DiffusionPipeline", work: Callable[[Any, Job], Result], jobs: Iterable[Job], processes: int
) -> Iterator[Result]:
    """`side_by_side` of ``work(pipe, job)``, in so many processes (`copies_for`) with a copy of the pipeline each."""
    if _stays(pipe):
        yield from (work(pipe, job) for job in jobs)
    elif processes == 1:
        yield from side_by_side(partial(work, pipe), jobs, 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(pipe, path := Path(folder) / "pipeline.pt")
            yield from side_by_side(lambda job: work(_loaded(path), job), jobs, processes)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)  # written by `with_copies` a moment ago


def _stays(pipe: "DiffusionPipeline") -> bool:
    """Whether a pipeline works in this process alone: on a GPU, or with weights too large to copy."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    size = sum(value.nbytes for network in networks for value in network.state_dict().values())
    return pipe.device.type != "cpu" or size > LARGEST_COPY
