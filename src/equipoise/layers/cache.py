"""Numbers derived from a module's tensors, kept until one of those tensors changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Derived", "keeping"]

SLICE = 2**15
"""Entries compared at a time: more would wake a second thread, which costs more than it helps."""


@contextmanager
def keeping() -> Iterator[None]:
    """Tensors made inside are ordinary ones that may be kept, even under ``torch.inference_mode``."""
    grad = torch.is_grad_enabled()  # leaving inference mode would switch gradients on
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _same(old: Tensor, new: Tensor) -> bool:
    if old.dtype != new.dtype or old.device != new.device or old.shape != new.shape:
        return False
    if new.device.type != "cpu" or new.numel() <= SLICE or not new.is_contiguous():
        return torch.equal(old, new)
    pairs = zip(old.view(-1).split(SLICE), new.detach().view(-1).split(SLICE), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


class Derived:
    """A dict that empties itself when a tensor of its module was written to, moved or replaced, or a module of it was:
    the same numbers may mean something else to another one, as to one that a parametrization stands before.

    The tensors are compared with a snapshot, entry by entry, because not every write shows in a version
    counter (``tensor.data`` hides it) and a stale constant would make a bound a lie. That costs one read of
    the weights per call. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []
        self._kinds: list[type] = []
        self._snapshot: list[Tensor] = []
        self._versions: list[int] = []
        self._values: dict[Any, Any] = {}

    def of(self, module: nn.Module) -> dict[Any, Any]:
        """The dict, empty if ``module``, its parts, parameters or buffers differ from those of the last call."""
        parts = list(module.modules())
        modules, kinds = [weakref.ref(part) for part in parts], [type(part) for part in parts]
        tensors = [*module.parameters(), *module.buffers()]
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
        same = modules == self._modules and kinds == self._kinds and versions == self._versions
        if not same or not all(map(_same, self._snapshot, tensors)):
            self._modules, self._kinds = modules, kinds
            self._snapshot = [tensor.detach().clone() for tensor in tensors]
            self._versions = versions
            self._values = {}
        return self._values

    def __deepcopy__(self, memo: Any) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()
