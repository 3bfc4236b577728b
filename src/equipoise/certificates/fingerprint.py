"""Which network a certificate speaks of: a digest of its stored numbers and of what gives them a meaning."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

__all__ = ["fingerprint"]

PLAIN = (bool, int, float, str, tuple, torch.dtype)
"""Types of the attributes that count, besides frozen dataclasses: sizes and options."""

BESIDE = ("training", "preprocessing")
"""Attributes that do not."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of every tensor of ``model`` (name, dtype, shape, bytes), of the classes of its modules,
    and of their sizes and options.

    A change of one bit of one code gives another digest; device, training mode and what is computed from the weights
    do not count, so that a model and its file agree; nor does the preprocessing, which is of its inputs. It tells
    networks apart and is no signature.
    """
    digest = hashlib.sha256()

    def take(*values: object) -> None:
        digest.update(repr(values).encode())

    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in BESIDE}
        take(name, type(module).__qualname__, module.extra_repr())
        take(sorted((key, repr(value)) for key, value in own.items() if _counts(value)))
    state = model.state_dict()
    # what codes are multiplied in: of a layer whose every tensor is codes nothing else tells
    take(sorted((name, repr(buffer.dtype)) for name, buffer in model.named_buffers() if name not in state))
    for name, tensor in state.items():
        take(name, tensor.dtype, tuple(tensor.shape))
        # as bytes, since numpy does not know every dtype that torch has
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _counts(value: Any) -> bool:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(value.__dataclass_params__.frozen)  # type: ignore[attr-defined]  # the others count as they run
    return isinstance(value, PLAIN)
