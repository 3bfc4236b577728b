"""What a convolution is at each frequency, and proved bounds over all of them (theory §6, §8).

On a torus of H × W pixels z ↦ K ⋆ z, ``y[n] = Σ_a K[a] z[n + a − c]``, c = ⌊k/2⌋, multiplies the mode ω by
``K̂(ω) = Σ_a K[a] e^{iω(a − c)}``, an (o, i) matrix. With stride s the s² modes that fall together make one block row,
``(1/s) [K̂(ω_1), …, K̂(ω_{s²})]``, in unitary coordinates. For real K, ω and −ω are complex conjugates: half of the
frequencies say everything.

Over :mod:`equipoise.verified` it is taken for granted that ``math.cos`` and ``math.sin`` are right to 4 units in the
last place between 0 and π/4. Complex matrices are bounded by the real ones ``[[Re, −Im], [Im, Re]]``, whose singular
values and eigenvalues are theirs, each twice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import verified
from ..errors import InputError, OptionError
from ..memory import check_memory

__all__ = ["Spectrum", "frequencies", "lipschitz", "margin", "min_eigenvalue", "norm", "symbols"]

ROOT = 16 * verified.UNIT
"""What a root of unity may be wrong by: its angle by three roundings, its parts by four units each."""

FLUSH = 2.0**-900
"""More than underflow can cost matrices with entries of about one."""

BATCH = 2**24
"""Entries of a batch of real matrices worked on at a time."""


class Spectrum(NamedTuple):
    """Symbols ``(F, o, i)``, complex128, each within 2-norm ``error`` of that of the stored kernel, at frequencies
    which together with their conjugates are all."""

    values: Tensor
    error: float


def frequencies(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Indices ``(F,)``, ``(F,)`` of the frequencies 2π(p/H, q/W) kept for images of ``size``: those of rfft2."""
    height, width = size
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width // 2 + 1))
    return grid[:, 0], grid[:, 1]


def symbols(kernel: Tensor, size: tuple[int, int], stride: int = 1) -> Spectrum:
    """K̂ of ``kernel (o, i, k, k)``, or ``(o, i, k, l)``, on a torus of ``size`` = (H, W), at the frequencies of rfft2.

    With ``stride`` s, which divides H and W: blocks ``(o, s² i)`` at the frequencies of (H/s, W/s); columns
    ``(a, b, channel)`` belong to the input's frequency (p + a H/s, q + b W/s).

    Raises:
        InputError: another shape or dtype, or entries that are not finite.
        OptionError: sizes or a stride that are not positive integers, or do not go together.
    """
    _check(kernel, size, stride)
    K = kernel.detach().to("cpu", torch.float64)
    outputs, inputs, tall, wide = K.shape
    rows, columns = (n // stride for n in size)
    # values, their parts, and what proofs about them hold at a time; and the waves
    needed = 16 * rows * (columns // 2 + 1) * stride**2 * (6 * outputs * inputs + 3 * tall * wide)
    check_memory(needed, f"a proof about {rows * columns:,} frequencies", "take smaller images or fewer channels")
    p, q = frequencies((rows, columns))
    steps = torch.arange(stride)
    p = (p[:, None] + rows * steps)[:, :, None].expand(-1, -1, stride).reshape(-1)
    q = (q[:, None] + columns * steps)[:, None, :].expand(-1, stride, -1).reshape(-1)
    down = _roots(size[0])[(p[:, None] * (torch.arange(tall) - tall // 2)) % size[0]]
    right = _roots(size[1])[(q[:, None] * (torch.arange(wide) - wide // 2)) % size[1]]
    waves = (down[:, :, None] * right[:, None, :]).reshape(len(p), tall * wide)
    flat = K.reshape(outputs * inputs, tall * wide)
    values = torch.complex(waves.real @ flat.mT, waves.imag @ flat.mT) / stride
    values = values.view(-1, stride * stride, outputs, inputs).transpose(1, 2).reshape(-1, outputs, stride**2 * inputs)
    # A wave is a product of two roots, then a sum of ``taps`` products, real and imaginary part each
    taps = tall * wide
    slip = 2 * ROOT + verified.gamma(4) + verified.gamma(taps + 4) * (1 + 2 * ROOT + verified.gamma(4)) * math.sqrt(2)
    lost = torch.finfo(kernel.dtype).tiny * math.sqrt(outputs * inputs) * 4 * taps
    spread = verified.absolute_norm(K.abs().sum((2, 3))) * (1 + verified.gamma(taps + 4))
    return Spectrum(values, (slip * spread + lost) * (1 + 2.0**-40))  # √(s²) blocks, each divided by s


def norm(X: Tensor, error: float = 0.0) -> float:
    """Upper bound of max_ω ‖X'(ω)‖₂, all ``X'`` within 2-norm ``error`` of ``X (F, m, n)``, complex128."""
    X, e = _scaled(X)
    if not bool((X != 0).any()):
        return error
    if X.shape[1] < X.shape[2]:
        X = X.mH
    top = 0.0
    for part in _parts(X):
        R = _real(part)
        G = R.mT @ R
        spread = float(R.square().sum((1, 2)).max()) if R.numel() else 0.0
        rounding = verified.gamma(R.shape[1] + 4) * spread * (1 + 2 * verified.gamma(R[0].numel() + 8)) + FLUSH
        top = max(top, -_lowest((G + G.mT).mul_(-0.5), rounding))
    t = verified.up(math.ldexp(verified.up(math.sqrt(max(top, 0.0))), e))
    return verified.up(t + error)


def min_eigenvalue(H: Tensor, error: float = 0.0) -> float:
    """Lower bound of min_ω λ_min(H'(ω)), all Hermitian ``H'`` within 2-norm ``error`` of the Hermitian part of
    ``H (F, n, n)``, complex128."""
    H, e = _scaled(H)
    low = math.inf
    for part in _parts(H):
        R = _real(part)
        spread = float(R.square().sum((1, 2)).max()) ** 0.5 if R.numel() else 0.0
        low = min(low, _lowest((R + R.mT).mul_(0.5), 4 * verified.UNIT * spread + FLUSH))
    return verified.down(verified.down(math.ldexp(low, e)) - error)


def margin(W: Tensor, error: float = 0.0) -> float:
    """Lower bound of min_ω λ_min(herm(I − W'(ω))), all ``W'`` within 2-norm ``error`` of ``W (F, n, n)``."""
    F, rounding = _from_identity(W)
    return min_eigenvalue(F, error + rounding)


def lipschitz(W: Tensor, error: float = 0.0) -> float:
    """Upper bound of max_ω ‖I − W'(ω)‖₂, all ``W'`` within 2-norm ``error`` of ``W (F, n, n)`` (theory §8)."""
    F, rounding = _from_identity(W)
    return norm(F, error + rounding)


def _from_identity(W: Tensor) -> tuple[Tensor, float]:
    """(I − W, the 2-norm of its rounding)."""
    F = -W
    F.diagonal(dim1=1, dim2=2).add_(1.0)
    largest = float(F.diagonal(dim1=1, dim2=2).abs().max()) if F.numel() else 0.0
    return F, 2 * verified.UNIT * largest + verified.TINY


def _check(kernel: Tensor, size: tuple[int, int], stride: int) -> None:
    if kernel.ndim != 4 or kernel.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the kernel is {tuple(kernel.shape)}, {kernel.dtype}; floats (o, i, k, k) are needed")
    if bad := int((~torch.isfinite(kernel)).sum()):
        raise InputError(f"the kernel holds {bad} NaN or infinite entries of {kernel.numel()}; nothing can be proved")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (*size, stride)):
        raise OptionError(f"size {size!r} and stride {stride!r}: positive integers are needed")
    if any(n % stride for n in size):
        raise OptionError(f"a stride of {stride} does not divide images of {size[0]}×{size[1]}")


def _roots(n: int) -> Tensor:
    """e^{2πij/n} for j = 0 … n − 1, ``(n,)`` complex128, each within :data:`ROOT`: from angles of at most π/4."""

    def root(j: int) -> complex:
        eighths = (8 * j + n) // (2 * n) % 4  # the nearest quarter turn
        rest = 4 * j - n * ((8 * j + n) // (2 * n))  # quarter turns beyond it, times n
        angle = math.pi * rest / (2 * n)
        c, s = math.cos(angle), math.sin(angle)
        return (complex(c, s), complex(-s, c), complex(-c, -s), complex(s, -c))[eighths]

    return torch.tensor([root(j) for j in range(n)], dtype=torch.complex128)


def _scaled(X: Tensor) -> tuple[Tensor, int]:
    """``(X / 2^e, e)`` with entries of about one at most."""
    if X.ndim != 3 or X.dtype != torch.complex128:
        raise InputError(f"symbols are {tuple(X.shape)}, {X.dtype}; complex128 (F, m, n) are needed")
    parts = torch.view_as_real(X.resolve_conj())
    if not bool(torch.isfinite(parts).all()):
        raise InputError("symbols hold NaN or infinite entries; nothing can be proved")
    top = float(parts.abs().max()) if parts.numel() else 0.0
    e = min(max(math.frexp(top)[1], -900), 1000) if top else 0
    return X * math.ldexp(1.0, -e), e


def _parts(X: Tensor) -> tuple[Tensor, ...]:
    return X.split(max(1, BATCH // max(4 * X.shape[1] * X.shape[2], 1)))


def _real(X: Tensor) -> Tensor:
    """``[[Re, −Im], [Im, Re]]``, ``(F, 2m, 2n)``."""
    X = X.resolve_conj()
    return torch.cat((torch.cat((X.real, -X.imag), 2), torch.cat((X.imag, X.real), 2)), 1)


def _lowest(H: Tensor, error: float) -> float:
    """Lower bound of the eigenvalues of all symmetric matrices within 2-norm ``error`` of one of ``H (F, n, n)``.

    Eigenvalues are estimated where they may be lowest; then all are proved to lie above, and where they do not they
    are estimated as well. As :func:`equipoise.verified.min_eigenvalue`.
    """
    count, n = H.shape[:2]
    if not count or not n:
        return math.inf
    sums = H.abs().sum(2)
    radii = sums - 2 * H.diagonal(dim1=1, dim2=2).clamp(min=0)  # Gershgorin: −(h_jj − Σ |h_jk|)
    gershgorin = -float(radii.max()) - 4 * verified.gamma(n + 4) * float(sums.max()) - FLUSH
    look, estimate, slack, mu = _promising(H), math.inf, 1.0, math.inf
    open_ = torch.arange(count)
    for _ in range(60):
        if len(look):
            estimate = min(estimate, float(torch.linalg.eigvalsh(H[look]).amin()))
        size = max(float((H.diagonal(dim1=1, dim2=2) - estimate).abs().sum(1).max()), abs(estimate))
        lowered = slack * (2 * n * verified.UNIT * size + 8 * verified.UNIT * abs(estimate)) + FLUSH
        mu = min(mu, estimate - lowered)
        if not mu > gershgorin:
            break
        proved = _definite(H[open_], mu)
        if bool(proved.all()):
            return verified.down(mu - error)
        failed = open_[~proved]
        fresh = failed[~torch.isin(failed, look)]
        # what was proved at a higher level need not be proved again
        open_, look, slack = failed, fresh[:16], slack if len(fresh) else 4 * slack
    return verified.down(gershgorin - error)


def _promising(H: Tensor) -> Tensor:
    """Indices of a few matrices of which one may well have the lowest eigenvalue: by the power method, roughly."""
    shift = H.abs().sum(2).amax(1)[:, None]
    v = torch.linspace(1, 2, H.shape[1], dtype=H.dtype).expand(len(H), -1)
    v = v + torch.sin(17.0 * v)
    for _ in range(8):
        v = shift * v - (H @ v[:, :, None])[:, :, 0]
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(verified.TINY)
    rayleigh = (v * (H @ v[:, :, None])[:, :, 0]).sum(1)
    return rayleigh.topk(min(8, len(H)), largest=False).indices


def _definite(H: Tensor, mu: float) -> Tensor:
    """For which of ``H (F, n, n)`` it is proved that ``H − μI ≻ 0``: the lemma of ``verified``, in batches [R06].

    With A the lowered matrix, ``LLᵀ = A + E`` with ``‖E‖₂ <= c = Σ_j γ_{j+3}/(1 − γ_{j+3}) a_jj``.
    """
    n = H.shape[1]
    weight = torch.arange(3, n + 3, dtype=torch.float64) * verified.UNIT
    weight /= 1 - 2 * weight
    gap = H.diagonal(dim1=1, dim2=2) - mu
    infinity = torch.full_like(gap, math.inf)
    high, low = torch.nextafter(gap, infinity), torch.nextafter(gap, -infinity)
    c = (high.clamp(min=0) @ weight) * (1 + 4 * verified.gamma(n + 4)) + FLUSH
    low = torch.nextafter(low - c[:, None] * (1 + 2.0**-48), -infinity)
    A = H.clone()
    A.diagonal(dim1=1, dim2=2).copy_(low)
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal(dim1=1, dim2=2)
    return (low > 0).all(1) & (info == 0) & (torch.isfinite(pivots) & (pivots > 0)).all(1)
