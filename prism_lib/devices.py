"""Where models run, and in which precision: one place that decides, so that a notebook says nothing about it."""

from __future__ import annotations

import os

import torch
from accelerate.utils import is_cuda_available

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # accelerate's names


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of one of `PRECISIONS`; ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def cpu_processes() -> int:
    """How many processes are begun unasked where there is no GPU: one per core, four at most, for each holds torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


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
