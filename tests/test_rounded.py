"""Iterates on a grid: where they end, what is proved about that, and how the loop, gradients and files take it."""

from __future__ import annotations

import dataclasses
import warnings
from itertools import pairwise
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq
from equipoise.activations import Activation
from equipoise.certificates.convergence import geometric_sum
from equipoise.errors import ConvergenceWarning, InputError
from equipoise.solvers import Problem
from problems import equilibrium, exact_rows, matrix, true_margin
from test_solvers import layer_of

F64 = torch.float64
SPLITTINGS: list[eq.Solver] = [eq.ForwardBackward(), eq.PeacemanRachford(), eq.DouglasRachford()]
# their proximal maps have a closed form; of the others a rounding is proved at α = 1 only
PLAIN: list[Activation] = [eq.ReLU(), eq.LeakyReLU(0.1), eq.Hardtanh(), eq.SoftThreshold(0.3)]
SMOOTH: list[Activation] = [eq.Tanh(), eq.Sigmoid(), eq.Softplus(), eq.ELU(0.5)]
FEW = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))


def quietly(layer: eq.MonDEQ, q: Tensor, **options: Any) -> eq.Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return layer.solve(q, **options)


def iterates(layer: eq.MonDEQ, solver: eq.Rounded, q: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """(uᵏ, zᵏ) for k = 1 … steps, as the loop has them."""
    with torch.no_grad():
        fixed_point = solver.map(Problem(layer.operator, q, layer.activation), solver.tune(layer.operator))
        state, found = solver.init(fixed_point), []
        for _ in range(steps):
            found.append((state.image.clone(), fixed_point.point(state.image)))
            state = solver.step(fixed_point, state)
    return found


def distance(row: Tensor, exact: mpmath.matrix) -> mpmath.mpf:
    return mpmath.norm(mpmath.matrix(row.double().tolist()) - exact)


def fixed_points(W: Tensor, q: Tensor, activation: Activation, on: eq.Solver, alpha: float) -> list[Any]:
    """(u*, z*) row by row in 50 digits: u* = (1 − α) z* + α (W z* + q), and z* itself of forward–backward."""
    pairs = []
    M, a = mpmath.matrix(W.double().tolist()), mpmath.mpf(alpha)
    for z, row in zip(exact_rows(W, q, activation), q.double().tolist(), strict=True):
        u = z if isinstance(on, eq.ForwardBackward) else (1 - a) * z + a * (M * z + mpmath.matrix(row))
        pairs.append((u, z))
    return pairs


# What is proved


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
@FEW
@given(
    n=st.integers(1, 4),
    margin=st.sampled_from([0.05, 0.4, 2.0]),
    gain=st.sampled_from([0.1, 0.4, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    grid=st.sampled_from([1e-9, 1e-4, 2.0**-6, 0.3, 10.0]),
    decay=st.sampled_from([None, 0.5, 0.97]),
    which=st.integers(0, 7),
    alpha=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, F64]),
    seed=st.integers(0, 10**6),
)
def test_no_iterate_leaves_its_bound(
    on: eq.Solver,
    n: int,
    margin: float,
    gain: float,
    size: float,
    grid: float,
    decay: float | None,
    which: int,
    alpha: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    activation = (PLAIN + SMOOTH)[which]
    W = matrix(n, margin, seed, gain=gain).to(dtype)
    if true_margin(W) <= 1e-3:
        return
    if isinstance(on, eq.ForwardBackward):
        alpha = None  # it has limits, and none that all these weights share
        if activation in SMOOTH:
            return
    elif activation in SMOOTH:
        alpha = 1.0
    layer = layer_of(W, activation)
    q = (torch.randn(2, n, dtype=F64) * size).to(dtype)
    solver = eq.Rounded(dataclasses.replace(on, alpha=alpha), grid, decay)
    limit = eq.iterate_floor(layer, q, solver)
    answers = fixed_points(W, q, activation, on, limit.alpha)
    seen = iterates(layer, solver, q, 120)
    for k in (1, 4, 30, 120):
        bound = eq.iterate_floor(layer, q, solver, steps=k)
        u, z = seen[k - 1]
        p = activation(layer.operator.apply(z) + q)
        for i, (exact_u, exact_z) in enumerate(answers):
            assert distance(u[i], exact_u) <= bound.iterate[i].item()
            assert distance(z[i], exact_z) <= bound.iterate[i].item()
            assert distance(p[i], exact_z) <= bound.value[i].item()
            start = limit.rate**k * float(mpmath.norm(exact_u))
            assert decay is not None or distance(u[i], exact_u) <= limit.iterate[i].item() * (1 + 1e-9) + 1.01 * start


@FEW
@given(
    n=st.integers(1, 5),
    grid=st.sampled_from([2.0**-12, 0.01, 0.7]),
    which=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, F64]),
    seed=st.integers(0, 10**6),
)
def test_what_a_layer_returns_is_within_the_floor(
    n: int, grid: float, which: int, dtype: torch.dtype, seed: int
) -> None:
    """A tolerance below the floor makes every sample settle, or run to its end; float32 may finish in float64."""
    torch.manual_seed(seed)
    W = matrix(n, 0.5, seed, gain=0.3).to(dtype)
    solver = eq.Rounded(SPLITTINGS[which], grid)
    layer = eq.MonDEQ.from_weights(W, torch.randn(n, 3).to(dtype), torch.randn(n).to(dtype), solver=solver)
    x = torch.randn(3, 3, dtype=F64) * 3
    floor = eq.iterate_floor(layer, x)
    U, b = layer.input_weight.double(), layer.bias.double()
    answer = equilibrium(W, (x @ U.mT + b).detach(), eq.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = layer.solve(x, tol=1e-7).value, layer(x).detach()
    for value in found:
        assert bool(((value.double() - answer).norm(dim=1) <= floor.value * (1 + 1e-6) + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("w", [0.9, 0.99, 0.999])
def test_the_floor_is_nearly_met_in_one_dimension(w: float, dtype: torch.dtype) -> None:
    """z⁺ = round(w z + q) climbs to the first grid point with (1 − w)(z* − z) <= δ/2: ε/(1 − r), less one step."""
    delta = 2.0**-10
    layer = layer_of(torch.tensor([[w]], dtype=dtype), eq.ReLU())
    q = torch.tensor([[3.0004 * (1 - w)]], dtype=dtype)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), delta)
    floor = eq.iterate_floor(layer, q, solver)
    z = iterates(layer, solver, q, 8000)[-1][1]
    answer = q.double() / (1 - torch.tensor(w, dtype=dtype).double())
    error = float((answer - z).norm())
    assert floor.exact == pytest.approx(delta / 2 / (1 - w), rel=1e-4)
    assert floor.exact - delta <= error <= float(floor.iterate)
    assert float(floor.iterate) <= floor.exact * (1 + 1e-9 if dtype == F64 else 2)
    # and what is returned is one exact step further
    value = layer.activation(layer.operator.apply(z) + q).detach().double()
    assert float((value - answer).norm()) <= float(floor.value)
    assert float(floor.value) <= w * floor.exact * (1 + 1e-9 if dtype == F64 else 2)


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_bounds_fall_with_the_grid_and_rise_with_the_factor(on: eq.Solver) -> None:
    layer = layer_of(matrix(6, 0.4, 3, gain=0.3), eq.ReLU())
    q = torch.randn(5, 6, dtype=F64)
    for steps in (None, 1, 7, 200):
        by_grid = [eq.iterate_floor(layer, q, eq.Rounded(on, 2.0**-k), steps=steps) for k in range(12)]
        for coarse, fine in pairwise(by_grid):
            assert bool((fine.iterate <= coarse.iterate).all())
            assert bool((fine.value <= coarse.value).all())
            assert fine.exact <= coarse.exact
        decays = 0.1, 0.5, 0.99, None
        by_decay = [eq.iterate_floor(layer, q, eq.Rounded(on, 0.1, decay), steps=steps) for decay in decays]
        for fast, slow in pairwise(by_decay):
            assert bool((fast.iterate <= slow.iterate).all())
    many = eq.iterate_floor(layer, q, eq.Rounded(on, 0.1), steps=3000)
    torch.testing.assert_close(many.iterate, eq.iterate_floor(layer, q, eq.Rounded(on, 0.1)).iterate, rtol=1e-9, atol=0)


@given(rate=st.floats(0, 1), gap=st.sampled_from([0.0, 1e-16, 1e-9, 1e-3, 0.3, 1.0]), steps=st.integers(1, 20_000))
@example(rate=0.0, gap=0.0, steps=1)
@example(rate=0.0, gap=0.0, steps=3)
@example(rate=1.0, gap=1.0, steps=3)
@example(rate=1.0, gap=0.0, steps=20_000)
def test_geometric_sum(rate: float, gap: float, steps: int) -> None:
    decay = max(rate - gap, 0.0)
    a, b, k = mpmath.mpf(rate), mpmath.mpf(decay), steps
    exact = (a**k - b**k) / (a - b) if a != b else k * (a ** (k - 1) if k > 1 else 1)
    found = geometric_sum(rate, decay, steps)
    assert found == geometric_sum(decay, rate, steps)
    assert exact * (1 - mpmath.mpf(10) ** -40) - 1e-300 <= found <= exact * (1 + mpmath.mpf("1e-11")) + 1e-300


def test_the_total_covers_quantized_weights_as_well() -> None:
    """Iterates on a grid of a quantized network against the float network's exact equilibrium."""
    torch.manual_seed(1)
    reference = layer_of(matrix(5, 0.4, 4, gain=0.3), eq.ReLU())
    x = torch.randn(20, 5, dtype=F64)
    for bits in (4, 8):
        layer = eq.quantize(reference, eq.Structured(bits))
        solver = eq.Rounded(eq.PeacemanRachford(), 2.0**-7, None, max_steps=400)
        certificate = eq.certify(layer, reference, x)
        floor = eq.iterate_floor(layer, x, solver)
        total = floor.total(certificate)
        answer = equilibrium(reference.weight.detach(), x, eq.ReLU())
        error = (quietly(layer, x, solver=solver).value - answer).norm(dim=1)
        assert bool((error <= total + 1e-12).all())
        assert bool((total >= floor.value).all())
        with pytest.raises(InputError, match="same 20 inputs"):
            floor.total(eq.certify(layer, reference, x[:3]))
        with pytest.raises(InputError, match="certify"):
            floor.total(eq.certify(layer))


@pytest.mark.parametrize("scheme", [eq.Assembled(8), eq.Structured(2), eq.Compensated(4), eq.Cayley(8)])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_the_floor_of_codes_is_that_of_their_matrix(scheme: eq.Scheme, dtype: torch.dtype) -> None:
    layer = eq.quantize(layer_of(matrix(5, 0.8, 4, gain=0.2), eq.ReLU()).to(dtype), scheme)
    plain = layer_of(layer.weight.detach().double(), eq.ReLU())
    q = torch.randn(4, 5, dtype=F64)
    for on in SPLITTINGS:
        solver = eq.Rounded(dataclasses.replace(on, alpha=layer.solver.tune(layer.operator).alpha / 3), 0.01)
        found, expected = eq.iterate_floor(layer, q, solver), eq.iterate_floor(plain, q, solver)
        assert found.rate == pytest.approx(expected.rate, rel=1e-4)
        torch.testing.assert_close(
            found.iterate, expected.iterate, rtol=2e-2 if dtype == torch.float32 else 1e-6, atol=0
        )


def test_nothing_is_claimed_that_the_arithmetic_cannot_hold() -> None:
    """A factor so near 1 that float32's rounding eats the contraction; float64 still has a bound."""
    W = torch.tensor([[1 - 2.0**-23]], dtype=torch.float32)
    q = torch.ones(2, 1)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), 2.0**-10)
    assert torch.isinf(eq.iterate_floor(layer_of(W, eq.ReLU()), q, solver).iterate).all()
    assert torch.isinf(eq.iterate_floor(layer_of(W, eq.ReLU()), q, solver, steps=9).value).all()
    assert bool(torch.isfinite(eq.iterate_floor(layer_of(W.double(), eq.ReLU()), q, solver).iterate).all())


def test_a_certificate_claims_no_steps_for_rounded_iterates() -> None:
    layer = eq.MonDEQ(3, 4, solver=eq.Rounded(eq.PeacemanRachford(), 0.1))
    certificate = eq.certify(layer)
    assert certificate.certified
    assert (certificate.solver, certificate.rate, certificate.steps) == ("Rounded", None, None)
