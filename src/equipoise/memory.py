"""How much memory there is, so that what cannot fit is refused before it is begun."""

from __future__ import annotations

import os

import torch

from .errors import InputError

__all__ = ["check_memory", "installed"]

SMALL = 2**30
"""Bytes that are not worth asking about."""


def installed(device: torch.device) -> int:
    """Bytes of memory of ``device``, or of the machine; less where the process may not have all of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        there = 2**63 - 1
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    except ImportError:  # Windows
        return there
    return there if allowed == resource.RLIM_INFINITY else min(there, allowed)


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise :class:`InputError` where ``what`` takes more bytes than this machine has altogether."""
    if needed > SMALL and needed > (there := installed(torch.device("cpu"))):
        raise InputError(
            f"{what} needs about {needed / 2**30:,.1f} GiB of memory, and there are {there / 2**30:.1f}: {remedy}"
        )
