"""Boxes, classes and radii: no sampled point of any box ever leaves what is proved (theory §7, [D22])."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.activations import Activation
from equipoise.certificates.boxes import Box, affine_box
from equipoise.data import Preprocessing
from equipoise.errors import InputError, NotWellPosedError
from equipoise.layers.box import box_equilibrium, doubled
from equipoise.linearized import Mirrored
from equipoise.norms import WeightedMax, metzler
from problems import matrix
from test_nemon import ACTIVATIONS, layer

PIXELS = Preprocessing(mean=0.3, std=0.5, scale=255.0, input_shape=(2, 3))


def network(n: int = 10, d: int = 6, seed: int = 0, gamma: float = 0.8, **options: Any) -> nn.Sequential:
    made = layer(n=n, d=d, seed=seed, gamma=gamma, **options)
    return nn.Sequential(made, nn.Linear(n, 3).double())


def images(count: int, seed: int = 0) -> Tensor:
    pixels = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (pixels - 0.3) / 0.5


def samples(low: Tensor, high: Tensor, count: int, seed: int = 0) -> Tensor:
    """Corners, edges and inner points ``(count, B, d)``."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(count, *low.shape, generator=generator, dtype=torch.float64)
    inner[: count // 2] = inner[: count // 2].round()
    inner[count // 2 :: 3] = (2 * inner[count // 2 :: 3] - 0.5).clamp(0, 1)
    return low + inner * (high - low)


# Boxes


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("bits", [None, 3])
def test_no_point_of_a_box_leaves_its_image(activation: Activation, bits: int | None) -> None:
    model = network(activation=activation, seed=len(activation.name))
    model = model if bits is None else eq.quantize(model, eq.Structured(bits, input_bits=bits, head_bits=4))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for eps in (0.0, 0.1, 1.0):
        box = eq.interval(model, x - eps, x + eps)
        assert bool(torch.isfinite(box.low + box.high).all())
        points = samples(x - eps, x + eps, 30)
        with torch.no_grad():
            out = model[1](model[0].solve(points.reshape(-1, 6), tol=1e-9, stop="residual").value)
        out = out.reshape(30, 8, 3)
        assert bool(((out >= box.low - 1e-7) & (out <= box.high + 1e-7)).all())


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-1.0, 0.95), st.floats(0.0, 2.0))
def test_state_boxes_hold_and_are_the_limit_of_the_iteration(seed: int, n: int, gamma: float, eps: float) -> None:
    made = layer(n=n, d=3, seed=seed, gamma=gamma)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    box = eq.interval(made, x - eps, x + eps)
    points = samples(x - eps, x + eps, 40, seed)
    z = made.solve(points.reshape(-1, 3), tol=1e-10, stop="residual").value.reshape(40, 4, n)
    assert bool(((z >= box.low - 1e-9) & (z <= box.high + 1e-9)).all())
    W = made.weight.detach()
    plus = W.clamp_min(0) + torch.diag(W.diagonal().clamp_max(0))
    minus = W - plus
    U, b = made.input_weight.detach(), made.bias.detach()
    q_lo = (x - eps) @ U.clamp_min(0).mT + (x + eps) @ U.clamp_max(0).mT + b
    q_hi = (x + eps) @ U.clamp_min(0).mT + (x - eps) @ U.clamp_max(0).mT + b
    lo, hi = torch.zeros(4, n).double(), torch.zeros(4, n).double()
    alpha = made.operator.averaging_step()
    for _ in range(20_000):
        new_lo = (1 - alpha) * lo + alpha * torch.relu(lo @ plus.mT + hi @ minus.mT + q_lo)
        new_hi = (1 - alpha) * hi + alpha * torch.relu(hi @ plus.mT + lo @ minus.mT + q_hi)
        done = float((new_lo - lo).abs().max() + (new_hi - hi).abs().max()) < 1e-14
        lo, hi = new_lo, new_hi
        if done:
            break
    size = 1 + float(hi.abs().max())
    assert bool((box.low <= lo + 1e-10 * size).all())
    assert bool((box.high >= hi - 1e-10 * size).all())
    # the iteration stops at 1e-5, and the rest is what inflating costs
    assert float((lo - box.low).max()) < 1e-2 * size
    assert float((box.high - hi).max()) < 1e-2 * size


@pytest.mark.slow
def test_a_hundred_thousand_points() -> None:
    model = network(n=40, seed=3).float()
    x = images(10).float()
    box = eq.interval(model, x - 0.1, x + 0.1)
    violated = 0
    for seed in range(10):
        points = samples(x.double() - 0.1, x.double() + 0.1, 1000, seed)
        with torch.no_grad():
            z = model[0].double().solve(points.reshape(-1, 6), tol=1e-8, stop="residual").value
            out = model[1].double()(z).reshape(1000, 10, 3)
        violated += int((~((out >= box.low) & (out <= box.high))).sum())
    assert violated == 0


def test_a_quantized_float32_layer_is_enclosed_as_stored_and_as_multiplied() -> None:
    model = network().float()
    q = eq.quantize(model, eq.Structured(2))
    x = images(20).float()
    box = eq.interval(q, x, x)
    with torch.no_grad():
        assert bool(box.contains(copy.deepcopy(q).double()(x.double())).all())
    assert float((box.high - box.low).max()) < 1e-3


def test_a_monotone_layer_is_enclosed_where_some_norm_proves_it() -> None:
    W = matrix(5, 0.5, 2, gain=0.1)
    made = eq.MonDEQ.from_weights(W, torch.randn(5, 3).double(), torch.zeros(5).double())
    assert 1 - float(torch.linalg.eigvals(metzler(W)).real.max()) > 0
    x = torch.randn(4, 3).double()
    box = eq.interval(made, x - 0.1, x + 0.1)
    z = made.solve(samples(x - 0.1, x + 0.1, 50).reshape(-1, 3), tol=1e-10).value.reshape(50, 4, 5)
    assert bool(((z >= box.low) & (z <= box.high)).all())


def test_a_layer_without_such_a_norm_says_the_abscissa() -> None:
    torch.manual_seed(0)
    B = torch.randn(6, 6).double()
    made = eq.MonDEQ.from_weights(B - B.mT, torch.eye(6).double(), torch.zeros(6).double())
    true = float(torch.linalg.eigvals(metzler(B - B.mT)).real.max())
    with pytest.raises(NotWellPosedError, match=rf"abscissa of its Metzler majorant is about {true:.6g}"):
        eq.interval(made, torch.zeros(1, 6), torch.zeros(1, 6))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(), nn.Flatten(), nn.Dropout()], ids=str
)
def test_modules_on_the_way_are_enclosed(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 5).double(), module, layer(n=4, d=5), nn.Identity(), nn.Linear(4, 2).double())
    x = torch.randn(5, 6).double()
    box = eq.interval(model, x - 0.2, x + 0.2)
    with torch.no_grad():
        out = model.eval()(samples(x - 0.2, x + 0.2, 60).reshape(-1, 6)).reshape(60, 5, 2)
    assert bool(((out >= box.low) & (out <= box.high)).all())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000), st.floats(0, 3))
def test_affine_boxes_reach_their_corners_and_not_much_further(k: int, m: int, seed: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, b, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (m,), (2, k)))
    box = affine_box(W, b, eq.Box(x - eps, x + eps))
    corners = torch.stack([x + eps * torch.tensor(signs).double() for signs in itertools.product((-1, 1), repeat=k)])
    out = corners @ W.mT + b
    assert bool((box.low <= out.amin(0)).all())
    assert bool((box.high >= out.amax(0)).all())
    torch.testing.assert_close(box.low, out.amin(0), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(box.high, out.amax(0), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (torch.ones(1, 2), torch.zeros(1, 2)),
        (torch.full((1, 2), math.nan), torch.zeros(1, 2)),
        (torch.zeros(1, 2), torch.full((1, 2), math.inf)),
        (torch.zeros(1, 2), torch.zeros(2, 2)),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)),
    ],
)
def test_bad_boxes_are_refused(low: Tensor, high: Tensor) -> None:
    with pytest.raises(InputError):
        eq.interval(eq.NEMON(2, 3), low, high)


def test_sums_that_overflow_enclose_everything() -> None:
    W, x = torch.tensor([[1.9, 1.9, -1.9]]).double(), torch.full((1, 3), 8e307, dtype=torch.float64)
    box = affine_box(W, torch.zeros(1).double(), Box(x, x))
    assert float(box.low) <= 1.9 * 8e307 <= float(box.high)


def test_a_box_that_is_not_proved_is_infinite() -> None:
    model = network()
    x = torch.full((2, 6), 1e200, dtype=torch.float64)
    x[1] = 0.0
    box = eq.interval(model[0], x, x)
    assert bool((box.low[0] == -math.inf).all())
    assert bool((box.high[0] == math.inf).all())
    assert bool(torch.isfinite(box.low[1] + box.high[1]).all())
    assert eq.certified_classes(model, x, x).tolist()[0] == -1


def test_wider_boxes_enclose_narrower_ones() -> None:
    model = network()
    x = images(5)
    inner, outer = (eq.interval(model, x - e, x + e) for e in (0.1, 0.11))
    assert bool((outer.low <= inner.low).all())
    assert bool((outer.high >= inner.high).all())


# The doubled system


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_doubled_matrix_keeps_the_measure(n: int, seed: int) -> None:
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    family, twice = WeightedMax(torch.ones(n)), WeightedMax(torch.ones(2 * n))
    assert twice.margin(doubled(W)) == pytest.approx(family.margin(W), abs=1e-12)


def test_the_mirrored_activation() -> None:
    for activation in ACTIVATIONS:
        mirrored = Mirrored(activation)
        v = torch.randn(7, 6, dtype=torch.float64)
        a, b = v.chunk(2, 1)
        torch.testing.assert_close(mirrored(v), torch.cat((-activation(-a), activation(b)), 1))
        torch.testing.assert_close(
            mirrored.prox(v, 0.3), torch.cat((-activation.prox(-a, 0.3), activation.prox(b, 0.3)), 1)
        )
        torch.testing.assert_close(
            mirrored.derivative(v), torch.cat((activation.derivative(-a), activation.derivative(b)), 1)
        )


def test_boxes_are_differentiable() -> None:
    made = layer(n=3, d=2, seed=5, activation=eq.Tanh())
    low = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    high = (low.detach() + 0.5).requires_grad_()

    def ends(low: Tensor, high: Tensor) -> Tensor:
        return torch.cat(box_equilibrium(made, low, high, 1e-12), 1)

    assert torch.autograd.gradcheck(ends, (low, high), atol=1e-6)
    weights = torch.randn(2, 6, dtype=torch.float64)
    (ends(low, high) * weights).sum().backward()
    for p in made.recurrent.parameters():
        direction = torch.randn_like(p)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                p += step * direction
                values.append(float((ends(low, high) * weights).sum()))
            p += 1e-6 * direction
        assert p.grad is not None
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((p.grad * direction).sum()), rel=1e-4, abs=1e-6)
