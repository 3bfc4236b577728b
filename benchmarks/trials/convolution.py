"""Convolutional layers through their dense matrices, on images so small that Newton's method takes them whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import equipoise as eq
from equipoise.certificates import certify
from equipoise.errors import EquipoiseError

from .constants import margin_of, norm_of
from .equilibria import Exact, State, codes, equilibria
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, norms

__all__ = ["convolution", "dense"]


def dense(K: Array, size: tuple[int, int], stride: int = 1, around: bool = True) -> Array:
    """The matrix ``(o·H'·W', i·H·W)`` of a convolution of images of ``size``, circular (taps that fall together
    added up) unless ``around`` is False: then with zeros beyond the edges."""
    outputs, inputs, k, _ = K.shape
    height, width = size
    rows, columns = -(-height // stride), -(-width // stride)
    W = np.zeros((outputs, rows, columns, inputs, height, width), dtype=LD)
    for i, j, a, b in np.ndindex(rows, columns, k, k):
        y, x = i * stride + a - k // 2, j * stride + b - k // 2
        if around or (0 <= y < height and 0 <= x < width):
            W[:, i, j, :, y % height, x % width] += K[:, :, a, b]
    return W.reshape(outputs * rows * columns, -1)


def _kernel(layer: Any) -> Array:
    weights = layer.recurrent
    if hasattr(weights, "codes") or hasattr(weights.T, "codes"):
        T, eta, gamma = codes(weights.T), exact(weights.eta), LD(float(weights.gamma))
        K = T * (eta[:, None] / eta[None, :])[:, :, None, None]
        middle = T.shape[2] // 2
        K[:, :, middle, middle] += np.diag(gamma - np.abs(T).sum((1, 2, 3)))
        return K
    with torch.no_grad():
        return exact(weights())


def _injected(layer: Any, x: torch.Tensor) -> Array:
    """U ∗ x + b, circular, with stride."""
    U, b, wide = exact(layer.injection.weight), exact(layer.injection.bias), exact(x)
    k, stride = U.shape[2], layer.injection.stride[0]
    count, _, height, width = wide.shape
    out = np.zeros((count, len(U), -(-height // stride), -(-width // stride)), dtype=LD)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for a in range(k):
                for c in range(k):
                    pixel = wide[:, :, (i * stride + a - k // 2) % height, (j * stride + c - k // 2) % width]
                    out[:, :, i, j] += pixel @ U[:, :, a, c].T
    return (out + b[:, None, None]).reshape(count, -1)


def convolution(rng: np.random.Generator, ledger: Ledger) -> None:
    """One NEMONConv2d, float or of codes: its constants and its solutions."""
    channels, k = int(rng.integers(1, 3)), int(rng.choice([1, 3]))
    size, stride = (int(rng.integers(2, 4)), int(rng.integers(2, 4))), int(rng.choice([1, 1, 2]))
    gamma = 1 - float(10 ** rng.uniform(-5, 0.5))
    activation = (eq.ReLU(), eq.Tanh(), eq.LeakyReLU(0.2), eq.Hardtanh())[rng.integers(4)]
    dtype = torch.float32 if rng.random() < 0.6 else torch.float64
    layer: Any = eq.NEMONConv2d(int(rng.integers(1, 3)), channels, k, gamma, stride, activation).to(dtype)
    with torch.no_grad():
        layer.recurrent.T.copy_(torch.tensor(rng.standard_normal(layer.recurrent.T.shape) * 10 ** rng.uniform(-2, 0.5)))
        layer.recurrent.d.copy_(torch.tensor(rng.uniform(-1, 1, channels) * rng.choice([0.0, 1.0, 4.0])))
        for parameter in layer.injection.parameters():
            parameter.copy_(torch.tensor(rng.standard_normal(parameter.shape)))
    reference = None
    if rng.random() < 0.6:
        reference = layer
        layer = eq.quantize(layer, eq.Structured(int(rng.integers(1, 17)), scale=str(rng.choice(["max", "mse"])),
                                                 granularity=str(rng.choice(["tensor", "row"]))))  # fmt: skip
    found = certify(layer, reference)
    eta = exact(layer.recurrent.family().eta).repeat(size[0] * size[1])
    kernels = [dense(_kernel(layer), size), dense(exact(layer.kernel), size)]
    for W in kernels:
        room = 64 * len(W) * UNIT * (1 + norms(W.reshape(-1))) * eta.max() / eta.min()
        value, slack = margin_of(W, eta)
        ledger.least("conv margin", found.margin, value, slack + room)
        value, slack = norm_of(np.eye(len(W), dtype=LD) - W, eta)
        ledger.most("conv lipschitz", found.lipschitz, value, slack + room)
    if reference is not None:
        theirs = exact(reference.recurrent.family().eta).repeat(size[0] * size[1])
        other = dense(_kernel(reference), size)
        value, slack = norm_of(kernels[0] - other, theirs)
        room = (
            64
            * len(other)
            * UNIT
            * (norms(kernels[0].reshape(-1)) + norms(other.reshape(-1)))
            * theirs.max()
            / theirs.min()
        )
        ledger.most("conv delta norm", found.delta_norm, value, slack + room)
        m, m_slack = margin_of(other, theirs)
        ledger.holds("conv sufficient", found.sufficient or False, value - slack - room - m_slack < m)
    x = torch.tensor(rng.standard_normal((12, layer.in_channels, *(stride * s for s in size)))).to(dtype)
    q = _injected(layer, x)
    rounding = (layer.injection.weight[0].numel() + 8) * UNIT * 16 * norms(np.abs(q) + 10)
    doubt = 8 * len(kernels[0]) * UNIT * norms(kernels[0].reshape(-1))
    z = equilibria(Exact(kernels[0], doubt), State(q, rounding), layer.activation)
    for name in rng.choice(["ForwardBackward", "Picard", "Anderson", "Broyden"], 2, replace=False):
        steps = None if rng.random() < 0.4 else int(rng.choice([1, 3, 20]))
        on = {} if name in ("ForwardBackward", "Picard") else {"on": eq.Picard()}
        try:
            s = layer.solve(x, getattr(eq, str(name))(max_steps=steps, **on), tol=float(10 ** rng.uniform(-9, -2)))
        except (EquipoiseError, TypeError):
            continue
        ledger.most(f"conv error bound {name}", exact(s.error_bound), np.abs(exact(s.value) - z.value).max(1), z.error)
