"""Convolutional monDEQs, of one tier or of several, through the dense matrix that their kernels define on the torus."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise.certificates import certify
from equipoise.errors import EquipoiseError, NotWellPosedError
from equipoise.operators.quantized_tiers import StructuredTiers
from equipoise.parametrizations import MonotoneKernels

from .constants import margin_of, norm_of, rates_of
from .convolution import dense
from .equilibria import Exact, State, codes, equilibria, through
from .files import round_trip
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, norms

__all__ = ["tiers"]

Rng = np.random.Generator

SOLVERS = (
    "PeacemanRachford", "DouglasRachford", "ForwardBackward", "Picard", "Tseng", "Anderson", "Broyden", "Rounded",
)  # fmt: skip


# Networks


def _layer(rng: Rng) -> Any:
    """Margins down to 1e-8, gains from denormal to hundreds, tori smaller than kernels."""
    dtype = torch.float32 if rng.random() < 0.6 else torch.float64
    margin = float(10 ** (rng.uniform(-8, -2) if rng.random() < 0.3 else rng.uniform(-2, 1)))
    size, k = (int(rng.integers(1, 4)), int(rng.integers(1, 4))), int(rng.choice([1, 3, 3, 5]))
    options: dict[str, Any] = {
        "kernel_size": k,
        "margin": margin,
        "border": int(rng.choice([0, 0, 1])),
        "activation": (eq.ReLU(), eq.ReLU(), eq.LeakyReLU(0.2), eq.Hardtanh(), eq.Tanh())[rng.integers(5)],
        "solver": (eq.PeacemanRachford, eq.DouglasRachford, eq.ForwardBackward, eq.Picard, eq.Tseng)[rng.integers(5)](
            float(10 ** rng.uniform(-1.5, 0.5)) if rng.random() < 0.4 else None
        ),
    }
    torch.manual_seed(int(rng.integers(2**31)))
    if rng.random() < 0.5:
        stride = int(rng.choice([1, 1, 2]))
        layer: Any = eq.MonConv2d(int(rng.integers(1, 3)), int(rng.integers(1, 4)), size, stride=stride, **options)
    else:
        channels = (1, 1, 1) if rng.random() < 0.2 else (1, int(rng.integers(1, 3)))
        sides = [2 ** (len(channels) - 1) * int(rng.integers(1, 3 if len(channels) == 2 else 2)) for _ in size]
        layer = eq.MultiTierMonDEQ(1, channels, (sides[0], sides[1]), **options)
    layer = layer.to(dtype)
    with torch.no_grad():
        for gains in (layer.recurrent.a, layer.recurrent.h, layer.recurrent.d):
            for gain in gains:
                gain.fill_(float(rng.choice([0.0, 1.0, 10 ** rng.uniform(-2, 1), 10 ** rng.uniform(-44, -36)])))
        if rng.random() < 0.3:
            layer.recurrent.h[0].fill_(10 ** rng.uniform(0, 2.5))  # a skew part that is large against the margin
        layer.injection.weight.mul_(10 ** rng.uniform(-1, 1))
    return layer


def _quantized(rng: Rng, model: nn.Module, several: bool) -> nn.Module:
    scale = {"scale": str(rng.choice(["max", "mse"])), "granularity": str(rng.choice(["tensor", "row"]))}
    if isinstance(model, nn.Sequential) and rng.random() < 0.5:
        scale["head_bits"] = int(rng.integers(1, 17))  # type: ignore[assignment]
    bits = int(rng.integers(1, 17))
    draw = 0.0 if several else rng.random()
    if draw < 0.6:
        skew = int(rng.integers(1, 17)) if rng.random() < 0.5 else None
        return eq.quantize(model, eq.Structured(bits, skew_bits=skew, **scale))  # type: ignore[arg-type]
    if draw < 0.8:
        return eq.quantize(model, eq.Assembled(bits, **scale))  # type: ignore[arg-type]
    return eq.quantize(model, eq.Compensated(bits, margin=float(10 ** rng.uniform(-3, 0)), **scale))  # type: ignore[arg-type]


# What is stored


def _skew(skew: Any) -> Array:
    """The kernel whose entries before their partners are stored, row by row."""
    C, k, values = skew.channels, skew.kernel_size, iter(codes(skew.taps))
    K = np.zeros((C, C, k, k), dtype=LD)
    for o, i, a, b in np.ndindex(C, C, k, k):
        if (o, i, a, b) < (i, o, k - 1 - a, k - 1 - b):
            K[o, i, a, b] = next(values)
            K[i, o, k - 1 - a, k - 1 - b] = -K[o, i, a, b]
    return K


def _down(K: Array, layer: Any, i: int) -> Array:
    """The matrix from tier i to tier i + 1: a convolution of stride 2, laid over the pixels that it was made of."""
    (height, width), (rows, columns) = layer.geometry.sizes[i : i + 2]
    outputs, start = len(K), layer.border // 2
    found = np.zeros((outputs, rows, columns, K.shape[1] * height * width), dtype=LD)
    every = dense(K, (height, width), 2).reshape(outputs, height // 2, width // 2, -1)
    found[:, start : start + height // 2, start : start + width // 2] = every
    return found.reshape(outputs * rows * columns, -1)


def matrix(layer: Any, applied: bool = False) -> Exact:
    """W of a layer's kernels, tiers channel by channel; of a quantized layer that of its codes, or ``applied``."""
    geometry, weights, blocks = layer.geometry, layer.recurrent, range(layer.geometry.tiers)
    if isinstance(weights, StructuredTiers) and not applied:
        lift = [codes(A) for A in weights.A]
        A = [dense(K, size) for K, size in zip(lift, geometry.sizes, strict=True)]
        m, down = LD(float(weights.margin)), [codes(K) for K in weights.down]
        own = [
            (1 - m) * np.eye(len(A[i]), dtype=LD) - A[i].T @ A[i] + dense(_skew(weights.K[i]), geometry.sizes[i])
            for i in blocks
        ]
        size = sum(norms(a.reshape(-1)) ** 2 for a in A) + sum(norms(w.reshape(-1)) + (1 + m) * len(w) for w in own)
    else:
        kernels = weights() if isinstance(weights, MonotoneKernels) and not applied else layer.operator.kernels
        if isinstance(weights, MonotoneKernels) or applied:
            own = [dense(exact(K), size) for K, size in zip(kernels.own, geometry.sizes, strict=True)]
        else:
            own = [dense(_plain(weights), geometry.sizes[0])]
        down, lift = [exact(K) for K in kernels.down], [None, *(exact(K) for K in kernels.lift)]
        A = [None if K is None else dense(K, at) for K, at in zip(lift, geometry.sizes, strict=False)]
        size = sum((norms(w.reshape(-1)) for w in own), LD(0))
    S = [_down(K, layer, i) for i, K in enumerate(down)]
    size = size + sum((norms(s.reshape(-1)) ** 2 for s in S), LD(0))
    ends = np.cumsum([0, *(len(w) for w in own)])
    W = np.zeros((ends[-1], ends[-1]), dtype=LD)
    for i in blocks:
        at = slice(ends[i], ends[i + 1])
        W[at, at] = own[i] - (S[i].T @ S[i] if i < len(S) else 0)
        if i:
            W[at, ends[i - 1] : ends[i]] = -2 * A[i].T @ S[i - 1]
            size = size + 2 * norms(A[i].reshape(-1)) * norms(S[i - 1].reshape(-1))
    return Exact(W, 4 * (len(W) + 8) * UNIT * size)


def _plain(weights: Any) -> Array:
    """The kernel of codes of a kernel."""
    if hasattr(weights, "codes"):
        return codes(weights.codes)
    off, diagonal, k = codes(weights.off), codes(weights.diagonal), weights.kernel_size
    flat = np.stack([np.insert(row, i * k * k + k * k // 2, d) for i, (row, d) in enumerate(zip(off, diagonal))])  # noqa: B905
    return flat.reshape(len(flat), len(flat), k, k)


def _injected(layer: Any, x: torch.Tensor) -> State:
    """U ⋆ x + b on the interior of the first tier, zero elsewhere: states with borders, channel by channel."""
    U, b, wide, p = exact(layer.injection.weight), exact(layer.injection.bias), exact(x), layer.border
    stride, k, geometry = layer.injection.stride[0], layer.injection.weight.shape[2], layer.geometry
    framed = np.pad(wide, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    (height, width), count = geometry.sizes[0], len(wide)
    q = np.zeros((count, len(U), height, width), dtype=LD)
    size = np.zeros(count, dtype=LD)
    for i in range(height - 2 * p):
        for j in range(width - 2 * p):
            seen = framed[:, :, i * stride : i * stride + k, j * stride : j * stride + k].reshape(count, -1)
            q[:, :, p + i, p + j] = seen @ U.reshape(len(U), -1).T + b
            size = size + norms(np.abs(seen) @ np.abs(U.reshape(len(U), -1)).T + np.abs(b))
    rest = sum(geometry.features(i) for i in range(1, geometry.tiers))
    return State(
        np.concatenate([q.reshape(count, -1), np.zeros((count, rest), dtype=LD)], 1), (U[0].size + 8) * UNIT * size
    )


def _interior(layer: Any) -> Array:
    """Which entries of a state are not on a border."""
    masks, p = [], layer.border
    for channels, size in zip(layer.geometry.channels, layer.geometry.sizes, strict=True):
        mask = np.zeros((channels, *size), dtype=bool)
        mask[:, p : size[0] - p, p : size[1] - p] = True
        masks.append(mask.reshape(-1))
    return np.concatenate(masks)


# Trials


def tiers(rng: Rng, ledger: Ledger) -> None:
    """One network: its constants, its rate, its solutions, and what codes changed."""
    layer, head = _layer(rng), None
    inner = int(np.prod([n - 2 * layer.border for n in layer.geometry.sizes[-1]]))
    width, dtype = layer.geometry.channels[-1] * inner, layer.injection.weight.dtype
    model: Any = layer
    if rng.random() < 0.5:
        head = nn.Linear(width, 3).to(dtype)
        model = nn.Sequential(layer, nn.Flatten(), head)
    model, reference = model.eval(), None
    if rng.random() < 2 / 3:
        try:
            model, reference = _quantized(rng, model, layer.geometry.tiers > 1), model
        except NotWellPosedError:  # no diagonal reaches the target
            return
    layer, old = (None if m is None else m[0] if head is not None else m for m in (model, reference))
    count = 8
    x = torch.tensor(rng.standard_normal((count, layer.in_channels, *layer.image_size)) * 10 ** rng.uniform(-2, 2))
    x[0] = 0
    x = x.to(dtype)
    given = x if reference is not None and rng.random() < 0.6 else None
    certificate = certify(model, reference, given)
    if rng.random() < 0.3:
        round_trip(model, reference, given, certificate, ledger)
    known = matrix(layer)
    _constants(layer, certificate, known, ledger)
    rates_of(layer.solver, layer.activation, known, None, certificate, rng, ledger)
    theirs = None if old is None else matrix(old)
    if theirs is not None:
        value, slack = norm_of(known.W - theirs.W, None)
        ledger.most("tiers delta norm", certificate.delta_norm, value, slack + known.doubt + theirs.doubt)
        m, m_slack = margin_of(theirs.W, None)
        sure = value - slack - known.doubt - theirs.doubt < m + m_slack + theirs.doubt
        ledger.holds("tiers sufficient", certificate.sufficient or False, sure)
    if not certificate.certified:
        return
    z = _equilibria(layer, known, x)
    _solutions(layer, x, z, rng, ledger)
    if theirs is not None and certificate.displacement is not None:
        _displacements(model, reference, certificate, z, _equilibria(old, theirs, x), width, ledger)


def _constants(layer: Any, certificate: Any, known: Exact, ledger: Ledger) -> None:
    kinds = [known] if isinstance(layer.recurrent, MonotoneKernels) else [known, matrix(layer, applied=True)]
    for one in kinds:
        m, m_slack = margin_of(one.W, None)
        L, L_slack = norm_of(np.eye(len(one.W), dtype=LD) - one.W, None)
        size, size_slack = norm_of(one.W, None)
        m_slack, L_slack = m_slack + one.doubt, L_slack + one.doubt + 4 * UNIT
        ledger.least("tiers margin", certificate.margin, m, m_slack)
        ledger.least("tiers margin", eq.margin(layer), m, m_slack)
        ledger.most("tiers measure", certificate.measure, 1 - m, m_slack)
        ledger.most("tiers lipschitz", certificate.lipschitz, L, L_slack)
        ledger.holds("tiers certified", certificate.certified, m + m_slack > 0)
        if certificate.certified and m > 0:
            ledger.most("tiers condition", certificate.condition, (L - L_slack) / (m + m_slack))
            top = (size - size_slack - one.doubt) / (m + m_slack)
            ledger.most("tiers weight condition", certificate.weight_condition, top)


def _equilibria(layer: Any, known: Exact, x: torch.Tensor) -> State:
    """On the interior, tiers channel by channel, which is how the layer shows them."""
    inside, q = _interior(layer), _injected(layer, x)
    return equilibria(
        Exact(known.W[inside][:, inside], known.doubt), State(q.value[:, inside], q.error), layer.activation
    )


def _solutions(layer: Any, x: torch.Tensor, z: State, rng: Rng, ledger: Ledger) -> None:
    for name in rng.choice(SOLVERS, 2, replace=False):
        steps = int(rng.choice([1, 3, 20, 100]))
        solver = (
            eq.Rounded(eq.ForwardBackward(), grid=float(10 ** rng.uniform(-8, 0)), max_steps=steps)
            if name == "Rounded"
            else getattr(eq, str(name))(max_steps=steps)
        )
        try:
            stop = str(rng.choice(["bound", "residual"]))
            found = layer.solve(x, solver, tol=float(10 ** rng.uniform(-9, -2)), stop=stop)
        except EquipoiseError:  # a step too long, codes that name no rule
            continue
        ledger.most(f"tiers error bound {name}", exact(found.error_bound), norms(exact(found.value) - z.value), z.error)


def _displacements(
    model: Any, reference: Any, certificate: Any, z: State, other: State, width: int, ledger: Ledger
) -> None:
    truth, slack = norms(z.value - other.value), z.error + other.error
    ledger.most("tiers displacement", exact(certificate.displacement), truth, slack)
    if certificate.actual_displacement is not None:
        shown = norms((z.value - other.value)[:, -width:])  # of the coarsest tier, which is what is shown
        error = np.abs(exact(certificate.actual_displacement) - shown)
        ledger.most("tiers actual displacement's error", exact(certificate.actual_error), error, slack)
    if certificate.relative_bound is not None:
        size = norms(other.value)
        known = size > 1e9 * other.error
        safe = np.where(known, size, 1)
        claimed = np.where(known, LD(certificate.relative_bound), np.inf)
        ledger.most("tiers relative bound", claimed, truth / safe, slack / safe * (1 + truth / safe))
    if certificate.unproved is not None:
        proved = np.ones(len(truth), bool)
        proved[certificate.unproved.numpy()] = False
        ours, theirs = (
            through(m[-1], State(s.value[:, -width:], s.error)).value for m, s in ((model, z), (reference, other))
        )
        told = proved & np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
        ledger.holds("tiers class unchanged", told, ours.argmax(1) == theirs.argmax(1))
