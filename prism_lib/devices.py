"""Where models run: one place that decides, so that a notebook says nothing about it."""

from __future__ import annotations

import os

import torch
from accelerate.utils import is_cuda_available


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
