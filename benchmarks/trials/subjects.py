"""Random and adversarial networks: one function a kind, registered by the share of trials that it gets.

A new kind of network registers a function ``(rng) -> Subject | None`` under :func:`register`; the trials that can be
made of it are those that :mod:`.campaign` lists for the type of its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import EquipoiseError
from equipoise.mixed import Parts, scheme_of

from .equilibria import activate
from .wide import exact

__all__ = ["KINDS", "Subject", "make", "register"]

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to be tried: ``model`` maybe quantized from ``reference``, inputs ``x (B, d)`` in its dtype."""

    kind: str
    model: nn.Module
    reference: nn.Module | None
    x: Tensor


KINDS: dict[str, tuple[float, Callable[[Rng], Subject | None]]] = {}
"""Registered kinds: (share, function)."""


def register(share: float) -> Callable[[Callable[[Rng], Subject | None]], Callable[[Rng], Subject | None]]:
    def keep(function: Callable[[Rng], Subject | None]) -> Callable[[Rng], Subject | None]:
        KINDS[function.__name__] = share, function
        return function

    return keep


def make(rng: Rng) -> Subject | None:
    """A network of a random kind; None where the draw made none that the library takes."""
    names, shares = list(KINDS), np.array([share for share, _ in KINDS.values()])
    function = KINDS[names[rng.choice(len(names), p=shares / shares.sum())]][1]
    try:
        with np.errstate(all="ignore"):
            return function(rng)
    except EquipoiseError:  # refused, as some of these must be
        return None


# Parts


def _log(rng: Rng, low: float, high: float) -> float:
    return float(10 ** rng.uniform(low, high))


def _activation(rng: Rng) -> Any:
    smooth = (eq.Tanh(), eq.Sigmoid(), eq.Softplus(), eq.ELU(float(rng.uniform(0.1, 1))))
    choices = (
        *(eq.ReLU(),) * 5, *(eq.LeakyReLU(float(rng.uniform(0, 1))),) * 2, *(eq.Hardtanh(),) * 2,
        eq.SoftThreshold(_log(rng, -2, 0)), eq.SoftThreshold(0.0), smooth[rng.integers(4)],
    )  # fmt: skip  # few smooth ones: their proximal maps are found by iteration, which is slow
    return choices[rng.integers(len(choices))]


def _size(rng: Rng) -> int:
    return int(rng.choice([1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8])) if rng.random() < 0.96 else int(rng.integers(9, 21))


def _dtype(rng: Rng) -> torch.dtype:
    return torch.float32 if rng.random() < 0.6 else torch.float64


def _scale(rng: Rng, dtype: torch.dtype) -> float:
    """Mostly about 1, sometimes huge or tiny, sometimes denormal."""
    draw = rng.random()
    if draw < 0.75:
        return 1.0
    if draw < 0.9:
        return _log(rng, -6, 6)
    if dtype == torch.float32:
        return _log(rng, -44, -36) if draw < 0.94 else _log(rng, -30, 15)
    return _log(rng, -320, -305) if draw < 0.93 else _log(rng, -120, 120)


def _inputs(rng: Rng, count: int, d: int, scale: float) -> np.ndarray[Any, Any]:
    """Rows of all sizes, one of zeros, some with zero entries."""
    x = rng.standard_normal((count, d)) * scale
    x[0] = 0
    x[1 : count // 4] *= 10.0 ** rng.uniform(-6, 3, (count // 4 - 1, 1))
    x[rng.random((count, d)) < 0.1] = 0
    return x


def _affine(rng: Rng, out: int, d: int, scale: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    U, b = rng.standard_normal((out, d)), rng.standard_normal(out) * scale
    draw = rng.random()
    if draw < 0.2 and out == d:
        U = np.eye(d)
    elif draw < 0.3:
        U[rng.random(out) < 0.5] = 0
    elif draw < 0.4:
        U = np.abs(U)
    b[rng.random(out) < 0.3] = 0
    return U * _log(rng, -1, 1), b


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.asarray(values, float), dtype=torch.float64).to(dtype)


def _margin(rng: Rng) -> float:
    """κ up to 1e8: margins down to 1e-8 against Lipschitz constants about 1, and ordinary ones."""
    return _log(rng, -8, -2) if rng.random() < 0.3 else _log(rng, -2, 1)


def _monotone_matrix(rng: Rng, n: int) -> np.ndarray[Any, Any]:
    """W of a chosen margin: skew parts large against it, margins nearly singular, eigenvalues graded or equal."""
    m = _margin(rng)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.concatenate(([m], m + 10.0 ** rng.uniform(-8, 1, n - 1) * rng.integers(0, 2, n - 1)))
    K = rng.standard_normal((n, n)) * (0.0 if rng.random() < 0.3 else _log(rng, -2, 2))
    return np.eye(n) - (Q * values) @ Q.T + K - K.T


def _factors(rng: Rng, n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    rank = int(rng.integers(0, n + 1))
    A = rng.standard_normal((rank, n)) * _log(rng, -2, 0.5)
    B = rng.standard_normal((n, n)) * (0.0 if rng.random() < 0.2 else _log(rng, -2, 1))
    if rng.random() < 0.2 and n > 1:
        A[:, rng.integers(n)] = 0
    return A, B, _margin(rng)


def _rows_matrix(rng: Rng, n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(W, η) of a measure below 1 in ‖·‖_η, with η spread over up to six decades; mostly no Euclidean margin."""
    T = rng.standard_normal((n, n)) * _log(rng, -2, 1)
    T[rng.random((n, n)) < 0.2] = 0
    d = rng.uniform(-1, 1, n) * rng.choice([0.0, 0.5, 2.0, 7.0])
    gap = _log(rng, -7, -2) if rng.random() < 0.3 else _log(rng, -2, 0.7)
    W = T * np.exp(d[None, :] - d[:, None])
    return W + np.diag((1 - gap) - np.abs(T).sum(1)), np.exp(-d)


def _solver(rng: Rng) -> Any:
    alpha = _log(rng, -1.5, 0.5) if rng.random() < 0.4 else None
    plain = (eq.PeacemanRachford, eq.DouglasRachford, eq.ForwardBackward, eq.Picard, eq.Tseng)
    return plain[rng.integers(len(plain))](alpha)


def _near_kinks(rng: Rng, layer: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Inputs whose equilibria lie on or next to kinks of σ, where U can reach them."""
    U, W, b = (exact(t) for t in (layer.input_weight, layer.weight, layer.bias))
    if U.shape[0] != U.shape[1]:
        return x
    v = rng.standard_normal((len(x) // 3, len(W))) * float(np.abs(x).max() or 1)
    v[rng.random(v.shape) < 0.5] = 0
    q = v - activate(layer.activation, v.astype(np.longdouble)) @ W.T - b
    try:
        found = np.linalg.solve(U.astype(float), q.astype(float).T).T
    except np.linalg.LinAlgError:
        return x
    x = x.copy()
    x[-len(found) :] = np.where(np.isfinite(found), found, x[-len(found) :])
    return x


def _scheme(rng: Rng, kinds: tuple[Any, ...]) -> Any:
    bits = int(rng.integers(1, 17))
    options: dict[str, Any] = {
        "granularity": str(rng.choice(["tensor", "row"])),
        "scale": str(rng.choice(["max", "mse"])),
    }
    for name in ("input_bits", "bias_bits"):
        if rng.random() < 0.3:
            options[name] = int(rng.integers(1, 17))
    kind = kinds[rng.integers(len(kinds))]
    if kind is eq.Compensated:
        options |= {"margin": _log(rng, -3, 0), "diagonal_bits": int(rng.integers(6, 17))}
    if kind is eq.Structured and rng.random() < 0.4 and eq.Cayley in kinds:  # every part with bits of its own
        return scheme_of(
            Parts(bits, int(rng.integers(1, 17)), options.get("input_bits"), options.get("bias_bits"), None)
        )
    return kind(bits, **options)


MONOTONE = (eq.Assembled, eq.Structured, eq.Compensated, eq.Cayley)
ROWS = (eq.Assembled, eq.Structured)


def _finish(rng: Rng, kind: str, layer: Any, x: np.ndarray[Any, Any], schemes: tuple[Any, ...]) -> Subject:
    """The layer by itself, with a linear head, or in a chain; quantized in two cases of three."""
    dtype = layer.bias.dtype
    x = _near_kinks(rng, layer, x)
    model: nn.Module = layer
    draw = rng.random()
    if draw < 0.5:
        head = _linear(rng, layer.features, int(rng.integers(2, 5)), dtype)
        parts: list[nn.Module] = [layer, head]
        if draw < 0.15:
            parts = [_linear(rng, layer.in_features, layer.in_features, dtype), _plain(rng), *parts]
        elif draw < 0.25:
            n = int(rng.integers(1, 4))
            second = eq.MonDEQ.from_factors(
                *(_tensor(t, dtype) for t in _factors(rng, n)[:2]), _log(rng, -1, 0.5),
                *(_tensor(t, dtype) for t in _affine(rng, n, layer.features, 1.0)),
            )  # fmt: skip
            parts = [layer, _plain(rng), second, _linear(rng, n, 3, dtype)]
            schemes = tuple(s for s in schemes if s in ROWS) if isinstance(layer, eq.NEMON) else schemes
        model = nn.Sequential(*parts)
    model = model.eval()
    narrow = isinstance(model, nn.Sequential) and not isinstance(model[0], type(layer))
    inputs = _tensor(x, dtype if narrow or rng.random() < 0.85 else torch.float64)  # a layer rounds its inputs itself
    if rng.random() < 1 / 3:
        return Subject(f"{kind} float", model, None, inputs)
    scheme = _scheme(rng, schemes)
    if draw < 0.5 and rng.random() < 0.4:
        scheme = type(scheme)(**{**_options(scheme), "head_bits": int(rng.integers(1, 17))})
    return Subject(f"{kind} {scheme}", eq.quantize(model, scheme), model, inputs)


def _options(scheme: Any) -> dict[str, Any]:
    return {name: getattr(scheme, name) for name in scheme.__dataclass_fields__ if name != "_"}


def _linear(rng: Rng, d: int, k: int, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(d, k).to(dtype)
    with torch.no_grad():
        for parameter, values in zip(linear.parameters(), _affine(rng, k, d, 1.0), strict=True):
            parameter.copy_(_tensor(values, dtype))
    return linear


def _plain(rng: Rng) -> nn.Module:
    return (nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardtanh(), nn.Identity(), nn.Softplus())[rng.integers(6)]


def _start(rng: Rng) -> tuple[int, int, torch.dtype, float, dict[str, Any]]:
    n, dtype = _size(rng), _dtype(rng)
    d = n if rng.random() < 0.4 else int(rng.integers(1, 7))
    activation = _activation(rng)
    return n, d, dtype, _scale(rng, dtype), {"activation": activation, "solver": _solver(rng)}


COUNT = 48
"""Inputs a network."""


# Kinds. A NEW KIND OF LAYER REGISTERS HERE, with one function (convolutional monDEQs, LipschitzMDEQ, …); its exact
# equilibria go into :mod:`.equilibria` (or, of a convolution, through its dense matrix as in :mod:`.convolution`).


@register(3)
def structured(rng: Rng) -> Subject:
    """MonDEQ.from_factors."""
    n, d, dtype, scale, options = _start(rng)
    A, B, margin = _factors(rng, n)
    U, b = _affine(rng, n, d, scale)
    layer = eq.MonDEQ.from_factors(
        _tensor(A, dtype), _tensor(B, dtype), margin, _tensor(U, dtype), _tensor(b, dtype), **options
    )
    return _finish(rng, "structured", layer, _inputs(rng, COUNT, d, scale), MONOTONE)


@register(3)
def free(rng: Rng) -> Subject:
    """MonDEQ.from_weights, of any margin, also a negative one."""
    n, d, dtype, scale, options = _start(rng)
    W = _monotone_matrix(rng, n)
    if rng.random() < 0.1:
        W = W + np.eye(n) * _log(rng, -8, 0)
    U, b = _affine(rng, n, d, scale)
    layer = eq.MonDEQ.from_weights(_tensor(W, dtype), _tensor(U, dtype), _tensor(b, dtype), check=False, **options)
    return _finish(rng, "free", layer, _inputs(rng, COUNT, d, scale), MONOTONE)


@register(1.5)
def free_by_rows(rng: Rng) -> Subject:
    """MonDEQ.from_weights where only a maximum norm proves anything."""
    n, d, dtype, scale, options = _start(rng)
    W = _rows_matrix(rng, n)[0]
    U, b = _affine(rng, n, d, scale)
    layer = eq.MonDEQ.from_weights(_tensor(W, dtype), _tensor(U, dtype), _tensor(b, dtype), check=False, **options)
    return _finish(rng, "free by rows", layer, _inputs(rng, COUNT, d, scale), (eq.Assembled,))


@register(2)
def nemon(rng: Rng) -> Subject:
    """NEMON, from its factors or from W."""
    n, d, dtype, scale, options = _start(rng)
    if isinstance(options["solver"], eq.Tseng):
        del options["solver"]
    U, b = _affine(rng, n, d, scale)
    if rng.random() < 0.6:
        T = rng.standard_normal((n, n)) * _log(rng, -2, 1)
        T[rng.random((n, n)) < 0.2] = 0
        spread = rng.uniform(-1, 1, n) * rng.choice([0.0, 0.5, 2.0, 7.0])
        gamma = 1 - (_log(rng, -6, -2) if rng.random() < 0.3 else _log(rng, -2, 0.7))
        layer = eq.NEMON.from_factors(
            _tensor(T, dtype), _tensor(spread, dtype), gamma, _tensor(U, dtype), _tensor(b, dtype), **options
        )
    else:
        W, eta = _rows_matrix(rng, n)
        layer = eq.NEMON.from_weights(
            _tensor(W, dtype), _tensor(U, dtype), _tensor(b, dtype),
            _tensor(eta, torch.float64) if rng.random() < 0.5 else None,
            **options,
        )  # fmt: skip
    return _finish(rng, "nemon", layer, _inputs(rng, COUNT, d, scale), ROWS)
