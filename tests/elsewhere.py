"""A pretended accelerator, for machines that have none: tensors that say they live elsewhere and compute on the CPU.

Within `elsewhere()` tensors may be sent to `DEVICE` as to a GPU. An operation on tensors of both places is an error,
as it is there, and so is a CPU generator that draws on the device. What runs here runs on a GPU as far as devices go;
speed, memory and rounding are not pretended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")  # any kind that PyTorch names and that nobody's machine has
_aten = torch.ops.aten
# As on a GPU: copies cross, and an index may lie on the CPU.
_CROSSING = (_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default)


class Remote(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Remote:
        """Wrap a CPU tensor."""
        remote = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        remote.inner = inner
        return remote  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Reached outside of `elsewhere()` too, where gradients run backwards."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    if remote and func not in _CROSSING and any(not isinstance(t, Remote) and t.dim() for t in tensors):
        raise RuntimeError(f"{func} got tensors on the CPU and on the device: {[tuple(t.shape) for t in tensors]}")
    device = kwargs.get("device")
    if device is not None:
        remote = device.type == DEVICE.type
        if remote and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func} draws on the device with a generator of the CPU")
        kwargs = kwargs | {"device": torch.device("cpu") if remote else device}
    done = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.is_mutable:
        return (kwargs["out"] if "out" in kwargs else args[0]) if func._schema.returns else None
    return tree_map(lambda leaf: Remote(leaf) if remote and isinstance(leaf, torch.Tensor) else leaf, done)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Remote) else leaf


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """`torch.tensor(values, device=...)` and lists as indices allocate below dispatch, so they are taken apart here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        return func(*args, **kwargs)


def _indices(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_indices(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The pretended device is there."""
    with _Function(), _Dispatch():
        yield DEVICE
