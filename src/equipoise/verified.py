"""Proved bounds by float64 arithmetic: definiteness, eigenvalues, norms, margins (theory §6, [R06]).

Every number returned is a bound, in exact real arithmetic, about the stored numbers passed in. Taken for granted:
doubles rounded to nearest, underflow gradual or flushed; sums of products in any order, fused or not, so that an inner
product of length k is off by at most ``gamma(k)`` times that of the absolute values; Cholesky by the usual recurrence,
blocked or not, dividing by pivots or multiplying by their reciprocals. Matrices are scaled by a power of two to entries
of about one, so that all that underflow can cost (``TINY`` an operation) disappears in one ``_FLUSH``.

Raises everywhere: InputError for tensors of another dtype or shape, not finite, or not exactly symmetric where they
must be; OptionError for a negative ``error`` (a 2-norm distance) and a step ``alpha`` that is not positive.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from .errors import InputError, OptionError

__all__ = [
    "TINY", "UNIT", "absolute_norm", "cayley_lipschitz", "cayley_margin", "cayley_norm", "down", "gamma",
    "is_positive_semidefinite", "lipschitz", "margin", "min_eigenvalue", "product_rounding", "quotient_norm",
    "row_norms", "row_norms_lower", "spectral_norm", "up",
]  # fmt: skip

UNIT = 2.0**-53
TINY = 2.0**-1022
_FLUSH = 2.0**-900  # above all that underflow can cost a scaled matrix of up to a million rows
_MAGNITUDE = 0x7FFF_FFFF_FFFF_FFFF  # denormals are told by their bits: where they are flushed, they equal 0
_DIRECT = 512  # up to this size all eigenvalues are computed to estimate one


def up(x: float) -> float:
    """The next double above ``x``."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """The next double below ``x``."""
    return math.nextafter(x, -math.inf)


def gamma(k: int, unit: float = UNIT) -> float:
    """Upper bound of ``k·u / (1 − k·u)``: what ``k`` roundings can do, ``u`` a power of two.

    Raises:
        OptionError: ``k`` is negative, ``k·u >= 1``, or ``u`` is not a power of two.
    """
    if not (k >= 0 and 0 < unit < 1 and math.frexp(unit)[0] == 0.5 and k * unit < 1):
        raise OptionError(f"gamma({k}, {unit}): need k >= 0, unit a power of two, k * unit < 1: a finer dtype?")
    return up(k * unit / (1 - k * unit)) if k else 0.0


def is_positive_semidefinite(H: Tensor, error: float = 0.0) -> bool:
    """Whether all symmetric matrices within 2-norm ``error`` of ``H (n, n)`` are proved positive definite.

    Cholesky of H, its diagonal lowered by ``error + c``, ``c >= Σ_j γ_{j+1}/(1 − γ_{j+1}) h_jj`` [R06]. False
    says that there is no proof; so it is for singular matrices, and where entries are not finite.
    """
    H = _matrix("is_positive_semidefinite", H, "symmetric", finite=False)
    if not bool(torch.isfinite(H).all()):
        return False
    H, e = _scaled(H)
    return H.shape[0] == 0 or _factor(H, 0.0, _ldexp_up(_distance(error), -e)) is not None


def min_eigenvalue(H: Tensor, error: float = 0.0) -> float:
    """Lower bound of the eigenvalues of all symmetric matrices within 2-norm ``error`` of ``H (n, n)``.

    An estimate, lowered until ``H − μI`` is proved definite: some ``n² u / 2`` times the mean of ``h_jj − λ``
    below the truth, and never below Gershgorin's bound. ``inf`` for n = 0.
    """
    (H, e), error = _scaled(_matrix("min_eigenvalue", H, "symmetric")), _distance(error)
    n, d = H.shape[0], H.diagonal()
    if not bool(H.any()):
        return 0.0 - error if n else math.inf
    radii = H.abs().fill_diagonal_(0.0).sum(1) * (1 + 2 * gamma(n + 4)) + _FLUSH
    gershgorin, estimate = down(float((d - radii).min())), _lowest_estimate(H)
    c = UNIT * float(torch.dot(torch.arange(3, n + 3).to(d), (d - estimate).abs()))
    slack, growth = 1.25 * c + 8 * UNIT * abs(estimate), 2.0
    while (mu := estimate - slack) > gershgorin and _factor(H, mu, 0.0) is None:
        slack, growth = slack * growth, growth * 2
    low = -_ldexp_up(-max(gershgorin, mu), e)
    return down(low - error) - TINY if error else low  # TINY, in case that the difference was flushed


def spectral_norm(X: Tensor, error: float = 0.0) -> float:
    """Upper bound of ``‖X'‖₂`` for all ``X'`` within 2-norm ``error`` of ``X (m, n)``.

    From the definiteness of ``t² I − XᵀX`` or ``t² I − XXᵀ``, the smaller; at most :func:`absolute_norm`.
    """
    (X, e), error = _scaled(_matrix("spectral_norm", X)), _distance(error)
    if not bool(X.any()):
        return error
    X = X if X.shape[0] >= X.shape[1] else X.T
    G, bound = X.T @ X, _gram_bound(X)
    G = (G + G.T).mul_(-0.5)
    rounding = _above(gamma(X.shape[0] + 1) * bound)
    del X  # of some size
    square = min(bound, -min_eigenvalue(G, rounding))
    t = _ldexp_up(up(math.sqrt(square)), e)
    return up(t + error) if error else t


def absolute_norm(X: Tensor) -> float:
    """Upper bound of ``‖ |X| ‖₂``, hence of ``‖X‖₂``, for ``X (m, n)``, in O(mn) operations.

    The square root of ``‖ |X|ᵀ|X| ‖_∞ <= ‖X‖₁ ‖X‖_∞``, or the Frobenius norm where that is smaller.
    """
    X, e = _scaled(_matrix("absolute_norm", X))
    return _ldexp_up(up(math.sqrt(_gram_bound(X))), e) if bool(X.any()) else 0.0


def margin(W: Tensor, error: float = 0.0) -> float:
    """Lower bound of ``λ_min(sym(I − W'))``, all ``W'`` within 2-norm ``error`` of ``W (n, n)`` (theory §1)."""
    Y, e = _scaled(_matrix("margin", W, "square"), least=1)
    S = (Y + Y.T).mul_(-0.5)
    S.diagonal().add_(math.ldexp(1.0, -e))
    rounding = UNIT * absolute_norm(S)  # one rounding an entry: of the sum or, on the diagonal, of 1 − w
    return -_ldexp_up(-min_eigenvalue(S, _above(_ldexp_up(_distance(error), -e) + rounding)), e)


def lipschitz(W: Tensor, error: float = 0.0) -> float:
    """Upper bound of ``‖I − W'‖₂``, all ``W'`` within 2-norm ``error`` of ``W (n, n)`` (theory §1)."""
    Y, e = _scaled(_matrix("lipschitz", W, "square"), least=1)
    F, rounding = _plus_identity(-Y, e)
    return _ldexp_up(spectral_norm(F, _above(_ldexp_up(_distance(error), -e) + rounding)), e)


def quotient_norm(P: Tensor, Q: Tensor, error_p: float = 0.0, error_q: float = 0.0) -> float | None:
    """A ``ρ``: ``‖P'x‖₂ <= ρ ‖Q'x‖₂`` for all x, ``P' (m, n)``, ``Q' (n, n)`` within the errors of P, Q.

    With a stored ``R ≈ Q⁻¹`` and a proof of ``‖I − Q'R‖₂ <= ε < 1``, ``‖P'Q'⁻¹‖₂ <= ‖P'R‖₂ / (1 − ε)``: that
    is ``ρ² Q'ᵀQ' ⪰ P'ᵀP'`` without squaring the condition number. None where Q is numerically singular.
    """
    P, Q = _matrix("quotient_norm", P), _matrix("quotient_norm", Q, "square")
    if P.shape[1] != Q.shape[1]:
        raise InputError(f"quotient_norm: P {tuple(P.shape)}, Q {tuple(Q.shape)} differ in their columns")
    return _quotient(P, Q, _distance(error_p), _distance(error_q))


def cayley_norm(W: Tensor, alpha: float, error: float = 0.0) -> float | None:
    """Upper bound of ``‖(I − αF)(I + αF)⁻¹‖₂``, ``F = I − W'``, all ``W'`` within ``error`` of ``W (n, n)``.

    The factor of Peaceman–Rachford (theory §2); None where ``I + αF`` is numerically singular.
    """
    (a, b), (Y, e) = _step("cayley_norm", alpha), _scaled(_matrix("cayley_norm", W, "square"))
    g = max(1, b, b + e)  # I, αI and αW are all divided by 2^g; the quotient does not notice
    one, step = math.ldexp(1.0, -g), math.ldexp(a, b - g)
    P = (a * Y).mul_(math.ldexp(1.0, b + e - g))
    moved, spread, Q = a * _ldexp_up(_distance(error), b - g), absolute_norm(P), -P
    P.diagonal().add_(one - step)
    Q.diagonal().add_(one + step)
    error_p, error_q = gamma(4) * (abs(one - step) + spread), gamma(4) * (one + step + spread)
    return _quotient(P, Q, _above(moved + error_p), _above(moved + error_q))


def cayley_margin(C: Tensor, alpha: float) -> float | None:
    """Lower bound of the margin of ``W̃ = I − α⁻¹ (I − C)(I + C)⁻¹``, which ``C (n, n)`` stands for.

    By congruence with ``I + C``: the largest μ with ``I − CᵀC − μα (I + C)ᵀ(I + C) ⪰ 0``, which is proved
    without an inverse. Never below ``(1 − ‖C‖)/(α(1 + ‖C‖))`` (theory §4). None where nothing can be proved.
    """
    (a, b), C = _step("cayley_margin", alpha), _matrix("cayley_margin", C, "square")
    rho = spectral_norm(C)
    closed = down(down(1 - rho) / up(1 + rho)) if rho < 1 else -math.inf
    mu = max(closed, _cayley_form(*_scaled(C, least=0), closed))
    return None if mu == -math.inf else -_ldexp_up(up(-mu / a), -b)


def cayley_lipschitz(C: Tensor, alpha: float) -> float | None:
    """Upper bound of ``‖I − W̃‖₂``, ``W̃`` as for :func:`cayley_margin`; None where nothing can be proved.

    From :func:`quotient_norm`, and never above ``(1 + ‖C‖)/(α(1 − ‖C‖))`` (theory §4).
    """
    (a, b), C = _step("cayley_lipschitz", alpha), _matrix("cayley_lipschitz", C, "square")
    rho, (Y, e) = spectral_norm(C), _scaled(C, least=0)
    closed = up(up(1 + rho) / down(1 - rho)) if rho < 1 else math.inf
    (P, error_p), (Q, error_q) = _plus_identity(-Y, e), _plus_identity(Y.clone(), e)
    bound = min(closed, _quotient(P, Q, error_p, error_q) or math.inf)
    return None if bound == math.inf else _ldexp_up(up(bound / a), -b)


def row_norms(X: Tensor) -> Tensor:
    """Upper bounds ``(B,)`` of the 2-norms of the rows of ``X (B, n)``, ``inf`` where that overflows."""
    return _row_norms(_matrix("row_norms", X), 1.0)


def row_norms_lower(X: Tensor) -> Tensor:
    """Lower bounds ``(B,)`` of the 2-norms of the rows of ``X (B, n)``."""
    return _row_norms(_matrix("row_norms_lower", X), -1.0)


def product_rounding(
    W_abs_norm: float, k: int, w_norms: Tensor, *, unit: float = UNIT, outputs: int | None = None
) -> Tensor:
    """Upper bounds ``(B,)`` of ``‖fl(w Wᵀ) − w Wᵀ‖₂``, w of length ``k`` and 2-norm at most ``w_norms (B,)``.

    ``γ_k ‖|W|‖₂ ‖w‖₂``, where ``W_abs_norm >= ‖|W|‖₂`` (:func:`absolute_norm`), plus what underflow can cost.
    ``unit`` is the unit roundoff of an arithmetic whose exponents go as low as float32's; W has ``outputs``
    rows, by default ``k``. ``inf`` where ``w_norms`` is.
    """
    bad = int((~(w_norms >= 0)).sum())
    if bad:
        raise InputError(f"product_rounding: {bad} of {w_norms.numel()} w_norms are negative or NaN; see row_norms")
    if not (W_abs_norm >= 0 and k >= 0):
        raise OptionError(f"product_rounding: W_abs_norm is {W_abs_norm} and k {k}; both are at least 0")
    tiny, rows = (TINY if unit == UNIT else 2.0**-126), (k if outputs is None else outputs)
    # flushed: up to 2k results an output, entries of w (they meet columns of |W|) and of W (they meet |w|)
    slope = gamma(k, unit) * W_abs_norm + 2 * tiny * math.sqrt(rows * k)
    offset = 2 * tiny * (2 * k * math.sqrt(rows) + math.sqrt(k) * W_abs_norm) + 8 * TINY * (1 + slope)
    bound = (w_norms.detach().to("cpu", torch.float64) * slope + offset) * (1 + 2.0**-48)
    return bound.nan_to_num(math.inf, math.inf)


def _factor(H: Tensor, mu: float, error: float) -> Tensor | None:
    """A Cholesky factor near ``H − μI`` that proves ``H' ≻ μI``, all ``H'`` within ``error`` of H; or None.

    With A the lowered matrix, ``LLᵀ = A + E``, ``|E_ij| <= γ_{i+2} ‖l_i‖ ‖l_j‖`` for i <= j, and the rows of
    L have ``‖l_j‖² <= a_jj / (1 − γ_{j+2})``; so ``‖E‖₂ <= c``. Over [R06], one rounding for reciprocals.
    """
    weight = torch.arange(3, H.shape[0] + 3).to(H) * UNIT
    weight /= 1 - 2 * weight  # γ/(1 − γ)
    gap = H.diagonal() - mu
    high, low = (torch.nextafter(gap, torch.full_like(gap, end)) for end in (math.inf, -math.inf))
    c = float(torch.dot(weight, high.clamp_(min=0))) / (1 - gamma(H.shape[0] + 4))
    low = torch.nextafter(low - _above(c + error), torch.full_like(gap, -math.inf))
    if not bool((low > 0).all()):
        return None
    A = H.clone()
    A.diagonal().copy_(low)
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal()
    return L if int(info) == 0 and bool((torch.isfinite(pivots) & (pivots > 0)).all()) else None


def _lowest_estimate(H: Tensor) -> float:
    """An estimate, not a bound, of the smallest eigenvalue; nan where there is none."""
    n = H.shape[0]
    try:
        if n <= _DIRECT:
            return float(torch.linalg.eigvalsh(H).amin()) if n else math.nan
        start = torch.randn(n, generator=torch.Generator().manual_seed(0), device="cpu").to(H)
        low, vector, gap = _lanczos(H, None, start, 60)
        for _ in range(8):
            if gap <= n * n * UNIT / 8:
                break
            L, gap = _factor(H, low - gap, 0.0), 8 * gap
            if L is not None:  # in the inverse of the shifted matrix the lowest eigenvalue stands out
                vector = _lanczos(H, L, vector, 16)[1]
                low = float(vector @ (H @ vector))
                gap = float((H @ vector - low * vector).norm())
        return low
    except RuntimeError:  # LAPACK did not converge
        return math.nan


def _lanczos(H: Tensor, L: Tensor | None, v: Tensor, steps: int) -> tuple[float, Tensor, float]:
    """The lowest Ritz value of H, or of ``−(LLᵀ)⁻¹``, its unit vector and the norm of its residual."""
    V, T, last = v.new_zeros(steps, len(v)), v.new_zeros(steps, steps), 0
    for j in range(steps):
        last, V[j] = j, v / v.norm()
        v = H @ V[j] if L is None else -torch.cholesky_solve(V[j, :, None], L)[:, 0]
        T[j, j] = v @ V[j]
        for _ in range(2):
            v = v - (V[: j + 1] @ v) @ V[: j + 1]
        if j + 1 == steps or not v.norm() > 1e-14 * T.abs().max():
            break
        T[j, j + 1] = T[j + 1, j] = v.norm()
    s, U = torch.linalg.eigh(T[: last + 1, : last + 1])
    return float(s[0]), U[:, 0] @ V[: last + 1], float(v.norm() * U[-1, 0].abs())


def _gram_bound(X: Tensor) -> float:
    """Upper bound of ``‖ |X|ᵀ|X| ‖₂``: its largest row sum or its trace."""
    a = X.abs()
    sums, v = float((a.sum(1) @ a).max()) / (1 - gamma(sum(a.shape))), a.flatten()
    return _above(min(sums, float(v @ v) / (1 - gamma(len(v)))))


def _quotient(P: Tensor, Q: Tensor, error_p: float, error_q: float) -> float | None:
    (P, p), (Q, q), n = _scaled(P), _scaled(Q), Q.shape[0]
    R, info = torch.linalg.inv_ex(Q)
    E, size_q, T, size_p = Q @ R, absolute_norm(Q), P @ R, absolute_norm(P)
    del P, Q  # 134 MB each at n = 4096
    if int(info) != 0 or not all(bool(torch.isfinite(A).all()) for A in (R, T, E)):
        return None
    size = absolute_norm(R)
    E.diagonal().sub_(1.0)
    error_p, error_q = _above(_ldexp_up(error_p, -p)), _above(_ldexp_up(error_q, -q))
    eps = _above(absolute_norm(E) + gamma(n + 1) * (size_q * size + 1) + error_q * size)
    del E, R
    t = spectral_norm(T, _above(gamma(n) * size_p * size + error_p * size))
    return _ldexp_up(up(t / down(1 - eps)), p - q) if eps < 1 and t < math.inf else None


def _cayley_form(C: Tensor, e: int, floor: float) -> float:
    """The largest ``τ = μα > floor`` found with ``I − XᵀX − τ (I + X)ᵀ(I + X) ≻ 0``, ``X = 2^e C``; or −inf.

    Where that is proved, I + X is regular: on a null vector of it the form is 0.
    """
    n, s = C.shape[0], math.ldexp(1.0, -e)
    F, info = torch.linalg.solve_ex(_plus_identity(C.clone(), e)[0], _plus_identity(-C, e)[0])
    if int(info) != 0 or not bool(torch.isfinite(F).all()):
        return -math.inf
    estimate, gram, spread = _lowest_estimate((F + F.T).mul_(0.5)), _gram_bound(C), absolute_norm(C)
    G, S = C.T @ C, C + C.T
    G = (G + G.T).mul_(0.5)
    slack = gamma(n) * (1 + abs(estimate)) / 4
    for _ in range(48):
        tau = estimate - slack
        if not floor < tau < 2.0**60:
            break
        M = (-1 - tau) * G - (tau * s) * S
        M.diagonal().add_((1 - tau) * s * s)
        rounding = gamma(8) * (2 * abs(tau) * s * spread + abs(1 - tau) * s * s)
        if _factor(M, 0.0, _above(gamma(n + 8) * abs(1 + tau) * gram + rounding)) is not None:
            return tau
        slack *= 2
    return -math.inf


def _row_norms(X: Tensor, sign: float) -> Tensor:
    if X.numel() == 0:
        return X.new_zeros(X.shape[0])
    n, top = X.shape[1], (X.view(torch.int64) & _MAGNITUDE).amax(1)
    e = ((top >> 52) - 1022).clamp_(-1000, 1000)
    scale, back = (((1023 + k) << 52).view(torch.float64) for k in (-e, e))  # powers of two, exactly
    roots = (X * scale[:, None]).square_().sum(1).sqrt_() * (1 + sign * gamma(n + 16))
    norms = roots * back + sign * 4 * math.sqrt(n) * TINY  # the last term for denormals lost on the way
    return torch.where(top > 0, norms.clamp_(0.0, math.inf if sign > 0 else sys.float_info.max), 0.0)


def _matrix(name: str, X: Tensor, kind: str = "", finite: bool = True) -> Tensor:
    """``X`` in float64 on the CPU, exactly; ``kind`` is "", "square" or "symmetric"."""
    if X.dtype not in (torch.float32, torch.float64) or X.dim() != 2 or (kind and X.shape[0] != X.shape[1]):
        raise InputError(f"{name}: {tuple(X.shape)}, {X.dtype}; a {kind} float matrix of 32 or 64 bits is needed")
    X = X.detach().cpu()
    bad = 0 if math.isfinite(float(X.sum())) else X.numel() - int(torch.isfinite(X).sum())  # NaN, inf stay in sums
    if bad and finite:
        raise InputError(f"{name}: {bad} of {X.numel()} entries are not finite; remove NaN and inf first")
    if kind == "symmetric" and not bad and not torch.equal(X, X.T):
        off = float((X - X.T).abs().max())
        raise InputError(f"{name}: H − Hᵀ reaches {off:.3g}; an exactly symmetric H is needed: pass (H + H.T) / 2")
    return X if X.dtype == torch.float64 else _with_denormals(X.double(), X.view(torch.int32), 23, -149)


def _with_denormals(Y: Tensor, bits: Tensor, mantissa: int, exponent: int) -> Tensor:
    """``Y``, entries that were denormal (by their ``bits``) set exactly, whatever the processor flushes."""
    size = bits & (_MAGNITUDE if bits.dtype == torch.int64 else 0x7FFF_FFFF)
    denormal, exact = (size > 0) & (size < 1 << mantissa), size.double() * math.ldexp(1.0, exponent)
    return torch.where(denormal, torch.where(bits < 0, -exact, exact), Y)


def _scaled(X: Tensor, least: int = -2000) -> tuple[Tensor, int]:
    """``(X / 2^e, e)``: entries at most 1, smallest such ``e >= least``; each off by 2^-962 at most."""
    bits = X.view(torch.int64)
    top = int((bits & _MAGNITUDE).max()) if X.numel() else 0
    e = max((top >> 52) - 1022 if top >> 52 else top.bit_length() - 1074, least) if top else max(least, 0)
    if e == 0 or top == 0:
        return X, e
    half = -e // 2
    Y = X * 2.0**-e if abs(e) < 1000 else X * 2.0**half * 2.0 ** (-e - half)
    return (Y if e > -60 else _with_denormals(Y, bits, 52, -1074 - e)), e


def _plus_identity(Y: Tensor, e: int) -> tuple[Tensor, float]:
    """``Y + 2^-e I``, in place, and the 2-norm of its rounding."""
    Y.diagonal().add_(math.ldexp(1.0, -e))
    return Y, UNIT * max(Y.diagonal().abs().tolist(), default=0.0)


def _distance(error: float) -> float:
    if not error >= 0:
        raise OptionError(f"error is {error}; it is a 2-norm distance, at least 0")
    positive = bool(torch.tensor(error, dtype=torch.float64).view(torch.int64) & _MAGNITUDE)
    return max(float(error), TINY) if positive else 0.0


def _step(name: str, alpha: float) -> tuple[float, int]:
    if not TINY <= alpha < math.inf:
        raise OptionError(f"{name}: alpha is {alpha}; it is a step, a finite number above 0")
    return math.frexp(alpha)


def _above(x: float) -> float:
    """An upper bound of what ``x >= 0`` was computed for, in at most 24 roundings; inf for nan."""
    return x * (1 + 2.0**-48) + _FLUSH if x < math.inf else math.inf


def _ldexp_up(x: float, e: int) -> float:
    """Upper bound of ``x · 2^e``."""
    try:
        y = math.ldexp(x, e)
    except OverflowError:
        return math.inf if x > 0 else -sys.float_info.max
    return y if abs(y) > TINY or x == 0 else TINY if x > 0 else 0.0
