"""Numbers derived from a module's tensors, kept until one of those tensors changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Derived"]


class Derived:
    """A dict that empties itself when a tensor of its module was written to, moved or replaced.

    The tensors are compared with a snapshot, entry by entry, because not every write shows in a version
    counter (``tensor.data`` hides it) and a stale constant would make a bound a lie. That costs one read of
    the weights per call. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._snapshot: list[Tensor] = []
        self._versions: list[int] = []
        self._values: dict[Any, Any] = {}

    def of(self, module: nn.Module) -> dict[Any, Any]:
        """The dict, empty if ``module``'s parameters or buffers differ from those of the last call."""
        tensors = [*module.parameters(), *module.buffers()]
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
        if versions != self._versions or not all(
            old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
            for old, new in zip(self._snapshot, tensors, strict=True)
        ):
            self._snapshot = [tensor.detach().clone() for tensor in tensors]
            self._versions = versions
            self._values = {}
        return self._values

    def __deepcopy__(self, memo: Any) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()
