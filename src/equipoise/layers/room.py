"""Whether a multiscale network and a batch fit into memory: an estimate, made before anything is allocated."""

from __future__ import annotations

import math

import torch

from ..errors import InputError
from ..memory import installed
from ..solvers import Anderson, Broyden, Solver
from .blocks import Plan

__all__ = ["check_room", "memory_needed"]

KEPT = 4
"""Images that one evaluation keeps for its gradient per convolution, in sizes of what it gives: itself, normalized,
rectified, and room for one that is being made."""


def memory_needed(plan: Plan, batch: int, itemsize: int, solver: Solver, graph: bool) -> int:
    """An estimate of the bytes that solving for ``batch`` images takes beside the weights.

    One evaluation with its graph where gradients are asked for (steps of the solver keep nothing), the largest images
    alone where they are not; and the iterates, ``2 · memory`` more for Anderson and Broyden.
    """
    images = []
    for place in plan.convolutions().values():
        height, width = (-(-n // place.stride) for n in place.size)
        images.append(place.outputs * height * width)
    state = sum(math.prod(shape) for shape in plan.shapes)
    iterates = 6 + (3 * solver.memory if isinstance(solver, (Anderson, Broyden)) else 0)
    activations = KEPT * sum(images) if graph else KEPT * max(images)
    return itemsize * batch * (activations + iterates * state)


def check_room(plan: Plan, batch: int, like: torch.Tensor, solver: Solver, graph: bool) -> None:
    """Raise :class:`InputError` where a batch needs more than the device of ``like`` has altogether."""
    needed, there = memory_needed(plan, batch, like.element_size(), solver, graph), installed(like.device)
    if needed > there:
        fits = max(int(batch * there / needed), 0)
        remedy = f"at most about {fits} images at a time, or a smaller preset" if fits else "a smaller preset or image"
        raise InputError(
            f"a batch of {batch} images of this size needs about {needed / 2**30:.1f} GiB beside the weights, and this "
            f"{'GPU' if like.device.type == 'cuda' else 'machine'} has {there / 2**30:.1f}: take {remedy}"
        )
