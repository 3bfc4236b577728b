"""What a layer accepts, and how it says what is wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, OptionError
from ..solvers import Solution, Solver
from ..solvers.loop import Stop

__all__ = [
    "check_affine",
    "check_finite",
    "check_sizes",
    "check_solver",
    "check_square",
    "check_stop",
    "check_tensors",
    "check_tol",
    "described",
    "height_and_width",
    "reached",
    "refuse",
]


def reached(solution: Solution, tol: float, stop: Stop, proved: bool, largest: bool = False) -> str:
    """How far the unfinished samples came, and what to do: the end of a warning.

    ``largest``: the solution's norms are ‖·‖_∞.
    """
    if bool(solution.converged.all()):
        return ""
    if stop == "bound" and not proved:
        return ": no positive margin is proved, so no bound exists; use stop='residual'"
    size = torch.linalg.vector_norm(solution.value, math.inf if largest else 2, dim=1).double()
    measure = solution.truncation / size if stop == "bound" else solution.residual
    worst = float(measure[~solution.converged].max())
    resolution = torch.finfo(solution.value.dtype).eps * 1e3
    remedy = "float64 resolves more" if worst < max(resolution, 100 * tol) else "raise the solver's max_steps or tol"
    return f" {tol:g} (worst {worst:.2g}); {remedy}, and see Solution.converged"


def check_solver(solver: Solver) -> Solver:
    if not isinstance(solver, Solver):
        raise OptionError(f"solver is {solver!r}; give one of equipoise's, e.g. PeacemanRachford()")
    return solver


def refuse(options: dict[str, Any], where: str, name: str, why: str) -> None:
    if name in options:
        raise OptionError(f"{where} takes no {name}: {why}")


def check_sizes(**sizes: int) -> None:
    """Raise :class:`OptionError` unless all are positive integers, and a ``kernel_size`` is odd."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is {value!r}; it is a positive integer")
    if sizes.get("kernel_size", 1) % 2 == 0:
        raise OptionError(f"kernel_size is {sizes['kernel_size']}; it is odd, so that a kernel has a centre")


def height_and_width(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """``size`` as (height, width)."""
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise OptionError(f"{name} is {size!r}; it is a number of pixels, or (height, width)")
    check_sizes(height=sides[0], width=sides[1])
    return sides[0], sides[1]


def described(x: object) -> str:
    """An input as a message shows it."""
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_stop(stop: Stop) -> None:
    if stop not in ("bound", "residual"):
        raise OptionError(f"stop is {stop!r}; it is 'bound' or 'residual'")


def check_tol(tol: float) -> float:
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise OptionError(f"tol is {tol!r}; it is a relative tolerance between 0 and 1")
    return tol


def check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} is {given}; a floating-point tensor is needed, as torch.as_tensor makes it")


def check_finite(tensor: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(f"{name} holds {bad} NaN or infinite entries of {tensor.numel()}")


def check_square(W: Tensor) -> None:
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise InputError(f"W is {tuple(W.shape)}; a square matrix (n, n) is needed")
    check_finite(W, "W")


def check_affine(W: Tensor, U: Tensor, b: Tensor) -> None:
    """Whether U ``(n, d)`` and b ``(n,)`` fit W ``(n, n)``, and all are finite."""
    n = W.shape[0]
    if U.ndim != 2 or U.shape[0] != n or tuple(b.shape) != (n,):
        raise InputError(f"U is {tuple(U.shape)} and b is {tuple(b.shape)}; needed are ({n}, d) and ({n},)")
    for tensor, name in ((W, "W"), (U, "U"), (b, "b")):
        check_finite(tensor, name)
