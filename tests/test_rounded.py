"""Iterates on a grid: where they end, what is proved about that, and how the loop, gradients and files take it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from itertools import pairwise
from pathlib import Path
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
from equipoise.errors import ConvergenceWarning, FileFormatError, InputError, OptionError, StructureError
from equipoise.solvers import Problem, tuned
from equipoise.solvers.rounded import _round
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


# Grids


def test_ties_go_to_the_even_multiple() -> None:
    for spacing in (1.0, 0.25, 1024.0):
        u = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -3.2, 0.0]]) * spacing
        expected = torch.tensor([[0.0, 2.0, 2.0, 0.0, -2.0, 0.0, -3.0, 0.0]]) * spacing
        assert torch.equal(_round(u, torch.tensor([[spacing]])), expected)


@pytest.mark.parametrize("spacing", [0.0, 1e-45, 1e-20, 1e-7, 3.4e38])
def test_extreme_grids_make_no_nan(spacing: float) -> None:
    u = torch.tensor([[0.0, 1e-45, -1.0, 7.0, 3e38, -3e38]])
    found = _round(u, torch.tensor([[spacing]]))
    assert bool(torch.isfinite(found).all())
    assert bool(((found - u).abs() <= 0.51 * spacing + 1e-6 * u.abs()).all())


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_iterates_lie_on_their_grid(on: eq.Solver) -> None:
    layer = layer_of(matrix(6, 0.4, 3, gain=0.3), eq.ReLU())
    q = torch.randn(5, 6, dtype=F64)
    for k, (u, _) in enumerate(iterates(layer, eq.Rounded(on, 0.25, 0.5), q, 30)):
        multiple = u / (0.25 * 0.5**k)
        assert torch.equal(multiple, multiple.round())
    plain = iterates(layer, eq.Rounded(on, 2.0**-10), q, 30)
    assert all(torch.equal(u * 1024, (u * 1024).round()) for u, _ in plain)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_adaptive_grids_converge_where_fixed_ones_do_not(on: eq.Solver, dtype: torch.dtype) -> None:
    W = matrix(6, 0.5, 3, gain=0.3).to(dtype)
    layer = layer_of(W, eq.ReLU())
    q = torch.randn(8, 6, dtype=dtype)
    answer, tol = equilibrium(W, q, eq.ReLU()), 1e-4 if dtype == torch.float32 else 1e-9
    # looked at from the first step on, where the grid is coarse and the rounded iterates stand still
    for grid, decay, every in ((1.0, 0.5, None), (4.0, 0.9, 1), (100.0, 0.97, 1)):
        solver = eq.Rounded(on, grid, decay, max_steps=2000, check_every=every)
        adaptive = layer.solve(q, solver=solver, tol=tol)
        assert bool(adaptive.converged.all())
        assert bool(((adaptive.value - answer).norm(dim=1) <= 1.01 * tol * answer.norm(dim=1) + 1e-6 * tol).all())
    with pytest.warns(ConvergenceWarning):
        fixed = layer.solve(q, solver=eq.Rounded(on, 0.25, max_steps=2000), tol=tol)
    short = ~fixed.converged  # but where the answer itself lies on the grid, as 0 does
    assert int(short.sum()) >= 6
    assert float((fixed.value - answer).norm(dim=1)[short].min()) > 10 * tol
    # the bound after k steps goes to what the arithmetic leaves; that of a fixed grid does not
    late = eq.iterate_floor(layer, q, eq.Rounded(on, 1.0, 0.5), steps=20_000)
    assert float(late.iterate.max()) < (1e-3 if dtype == torch.float32 else 1e-11)
    assert eq.iterate_floor(layer, q, eq.Rounded(on, 1.0, 0.5)).exact == 0
    assert float(eq.iterate_floor(layer, q, eq.Rounded(on, 0.25)).iterate.min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_a_grid_finer_than_the_arithmetic_changes_nothing(dtype: torch.dtype) -> None:
    layer = layer_of(matrix(6, 0.5, 3, gain=0.3).to(dtype), eq.ReLU())
    q = torch.randn(8, 6, dtype=dtype)
    for on in SPLITTINGS:
        plain = layer.solve(q, solver=on, tol=1e-4)
        for solver in (eq.Rounded(on, 1e-40), eq.Rounded(on, 1e-3, 1e-9), eq.Rounded(on, 1e-300)):
            found = layer.solve(q, solver=solver, tol=1e-4)
            torch.testing.assert_close(found.value, plain.value, rtol=2e-4, atol=1e-6)
            assert bool(found.converged.all())
    # a grid that has long shrunk to nothing
    last = iterates(layer, eq.Rounded(eq.PeacemanRachford(), 1.0, 0.5), q, 3000)[-1][1]
    assert bool(torch.isfinite(last).all())


# The loop


def test_a_repeating_iterate_ends_and_is_judged_as_it_is() -> None:
    """0.9 z + 1 from 0 on the integers stalls at 6 of 10 (5.5 is a tie): no more steps, no claim of convergence."""
    layer = layer_of(torch.tensor([[0.9]], dtype=F64), eq.ReLU())
    q = torch.tensor([[1.0], [0.25], [40.0]], dtype=F64)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), 1.0, check_every=1)
    with pytest.warns(ConvergenceWarning, match="3 of 3"):
        found = layer.solve(q, solver=solver)
    assert found.value.flatten().tolist() == [0.9 * 6 + 1, 0.25, 0.9 * 396 + 40]
    assert found.steps[0].item() <= 12
    assert found.steps[1].item() == 1
    assert bool((found.error_bound >= (found.value - 10 * q).abs()[:, 0]).all())
    # nobody judges a layer's forward: it returns what the grid gives, without a word
    own = eq.MonDEQ.from_weights(*(torch.tensor(v, dtype=F64) for v in ([[0.9]], [[1.0]], [0.0])), solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own(q[:1]).item() == 6.4


def test_a_cycle_runs_to_the_end_of_its_budget() -> None:
    """z⁺ = round(relu(5.5 − 0.9 z)) runs 0, 6, 0, 6, …, around the equilibrium 2.89."""
    layer = layer_of(torch.tensor([[-0.9]], dtype=F64), eq.ReLU())
    q = torch.tensor([[5.5], [0.4]], dtype=F64)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), 1.0, max_steps=321)
    assert [u[0].item() for u, _ in iterates(layer, solver, q, 5)] == [6.0, 0.0, 6.0, 0.0, 6.0]
    with pytest.warns(ConvergenceWarning, match="2 of 2"):
        found = layer.solve(q, solver=solver)
    assert found.steps.tolist()[0] == 321
    assert found.steps.tolist()[1] < 321  # this one stalls at 0
    assert bool((found.error_bound[0] >= abs(float(found.value[0]) - 5.5 / 1.9)).all())
    own = eq.MonDEQ.from_weights(*(torch.tensor(v, dtype=F64) for v in ([[-0.9]], [[1.0]], [0.0])), solver=solver)
    with pytest.warns(ConvergenceWarning, match="1 of 1"):
        own(q[:1])


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_a_sample_does_not_depend_on_its_batch(on: eq.Solver, decay: float | None) -> None:
    layer = layer_of(matrix(8, 0.8, 3, gain=0.2), eq.ReLU())
    q = torch.randn(300, 8, dtype=F64) * torch.logspace(-2, 2, 300, dtype=F64)[:, None]
    solver = eq.Rounded(on, 2.0**-9, decay)
    together = quietly(layer, q, solver=solver, tol=1e-4)
    some = list(range(0, 300, 20))
    alone = [quietly(layer, q[i : i + 1], solver=solver, tol=1e-4) for i in some]
    assert torch.equal(torch.cat([s.steps for s in alone]), together.steps[some])
    torch.testing.assert_close(torch.cat([s.value for s in alone]), together.value[some], rtol=1e-9, atol=1e-12)


def test_the_trial_run_is_the_splittings() -> None:
    layer = layer_of(matrix(6, 0.4, 3, gain=0.3), eq.ReLU())
    like = torch.zeros(1, dtype=F64)
    for on in SPLITTINGS:
        plain = tuned(on, layer.operator, eq.ReLU(), like)
        assert tuned(eq.Rounded(on, 1.0), layer.operator, eq.ReLU(), like) == plain
        slow = tuned(eq.Rounded(on, 1.0, 0.999), layer.operator, eq.ReLU(), like)
        assert slow == plain._replace(rate=0.999, pace=0.999)


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_gradients_are_not_rounded(on: eq.Solver) -> None:
    """The transposed problem at the point the grid gives, solved to tolerance: y = D (Wᵀ y + g)."""
    W = matrix(5, 0.6, 3, gain=0.2)
    layer = eq.MonDEQ.from_weights(W, torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64), solver=eq.Rounded(on, 0.5))
    x = torch.randn(4, 5, dtype=F64, requires_grad=True)
    g = torch.randn(4, 5, dtype=F64) * 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        z = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = torch.autograd.grad(z, x, g)
    D = (z > 0).double()
    expected = torch.linalg.solve(torch.eye(5, dtype=F64) - D[:, :, None] * W.mT, (D * g)[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)


# Options and files


@pytest.mark.parametrize(
    "on",
    [eq.Anderson(), eq.Broyden(), eq.Tseng(), eq.Picard(), eq.Rounded(eq.PeacemanRachford(), 0.1)],
    ids=lambda on: type(on).__name__,
)
def test_what_is_not_proved_to_contract_is_refused(on: eq.Solver) -> None:
    with pytest.raises(OptionError, match=rf"proved to contract.*not on {type(on).__name__}"):
        eq.Rounded(on, 0.1)


def test_accelerations_do_not_act_on_rounded_iterates() -> None:
    for kind in (eq.Anderson, eq.Broyden):
        with pytest.raises(OptionError, match="splitting"):
            kind(on=eq.Rounded(eq.PeacemanRachford(), 0.1))


@pytest.mark.parametrize("on", ["PeacemanRachford", eq.PeacemanRachford, None, 3])
def test_what_is_no_splitting_is_refused(on: Any) -> None:
    with pytest.raises(OptionError, match="Rounded acts on a splitting"):
        eq.Rounded(on, 0.1)


@pytest.mark.parametrize("grid", [0, 0.0, -1.0, math.nan, math.inf, True, "0.1", None])
def test_grids_out_of_range_are_refused(grid: Any) -> None:
    with pytest.raises(OptionError, match=f"grid is {grid!r}"):
        eq.Rounded(eq.PeacemanRachford(), grid)


@pytest.mark.parametrize("decay", [0, 0.0, 1, 1.0, 1.5, -0.5, math.nan, True, "0.5"])
def test_decays_out_of_range_are_refused(decay: Any) -> None:
    with pytest.raises(OptionError, match=f"decay is {decay!r}"):
        eq.Rounded(eq.PeacemanRachford(), 0.1, decay)


def test_options_belong_where_they_work() -> None:
    with pytest.raises(OptionError, match="give alpha to ForwardBackward, not to Rounded"):
        eq.Rounded(eq.ForwardBackward(), 0.1, alpha=0.5)
    for option in ("max_steps", "check_every"):
        with pytest.raises(OptionError, match=f"give {option} to Rounded, not to DouglasRachford"):
            eq.Rounded(eq.DouglasRachford(**{option: 9}), 0.1)
        with pytest.raises(OptionError, match=f"Rounded {option} is 0"):
            eq.Rounded(eq.DouglasRachford(), 0.1, **{option: 0})
    with pytest.raises(TypeError):
        eq.Rounded(eq.DouglasRachford())  # type: ignore[call-arg]
    solver = eq.Rounded(eq.PeacemanRachford(alpha=0.5), 0.1, 0.9, max_steps=7)
    assert hash(solver) == hash(dataclasses.replace(solver))
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.grid = 1.0  # type: ignore[misc]
    assert solver.to_dict()["on"] == eq.PeacemanRachford(alpha=0.5).to_dict()


@pytest.mark.parametrize("on", [eq.ForwardBackward(alpha=0.1), eq.PeacemanRachford(), eq.DouglasRachford()])
@pytest.mark.parametrize("decay", [None, 0.75])
def test_files_keep_it(on: eq.Solver, decay: float | None, tmp_path: Path) -> None:
    solver = eq.Rounded(on, 2.0**-5, decay, max_steps=60)
    layer = eq.MonDEQ(3, 4, solver=solver)
    eq.save(layer, tmp_path / "net.safetensors")
    loaded = eq.load(tmp_path / "net.safetensors")
    assert isinstance(loaded, eq.MonDEQ)
    assert loaded.solver == solver
    x = torch.randn(2, 3)
    assert torch.equal(quietly(loaded, x).value, quietly(layer, x).value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Rounded", "on": {"name": "Tseng"}, "grid": 1.0}, "proved to contract"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}}, "Rounded needs grid"),
        ({"name": "Rounded", "grid": 1.0}, "Rounded needs on"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": None}, "grid is None"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": "1"}, "numbers"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": 1.0, "decay": 2.0}, "decay is 2.0"),
    ],
)
def test_damaged_files_are_refused(values: dict[str, Any], message: str) -> None:
    from equipoise._codecs.options import read_solver
    from equipoise._codecs.tensors import Fields

    with pytest.raises((FileFormatError, OptionError), match=message):  # `load` names the file
        read_solver(Fields(values, "solver"))


def test_what_the_floor_is_asked_of() -> None:
    layer = eq.MonDEQ(3, 4)
    x, solver = torch.randn(2, 3), eq.Rounded(eq.PeacemanRachford(), 0.1)
    with pytest.raises(StructureError, match="Linear"):
        eq.iterate_floor(torch.nn.Linear(3, 4), x, solver)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"rounds none.*Rounded"):
        eq.iterate_floor(layer, x)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="steps"):
            eq.iterate_floor(layer, x, solver, steps=steps)  # type: ignore[arg-type]
    for bad in (x[0], x[:, :2], x.long(), x / 0, "x"):
        with pytest.raises(InputError, match="inputs"):
            eq.iterate_floor(layer, bad, solver)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float16"):
        eq.iterate_floor(eq.MonDEQ(3, 4).half(), x, solver)
    with pytest.raises(OptionError, match=r"Tanh.*alpha=1\.0"):
        eq.iterate_floor(eq.MonDEQ(3, 4, activation="tanh"), x, solver)
    with pytest.raises(eq.NotWellPosedError, match="nothing contracts"):
        eq.iterate_floor(layer_of(torch.eye(3) * 1.5, eq.ReLU(), check=False), x, solver)
    steep = layer_of(torch.tensor([[-3.0]]), eq.ReLU())
    with pytest.raises(eq.NotWellPosedError, match="another alpha"):
        eq.iterate_floor(steep, torch.ones(1, 1), eq.Rounded(eq.ForwardBackward(alpha=1.0), 0.1))
    empty = eq.iterate_floor(layer, x[:0], solver)
    assert empty.iterate.shape == empty.value.shape == (0,)
