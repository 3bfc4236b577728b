"""Every solver on every problem whose answer is known, and the bound it returns under any circumstances."""

from __future__ import annotations

import dataclasses
import warnings

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq
from catalogue import ACTIVATIONS, SOLVERS, VARIANTS
from equipoise.activations import Activation
from equipoise.errors import ConvergenceWarning
from equipoise.linearized import Linearized
from equipoise.operators import DenseOperator
from equipoise.solvers import Problem, Solution, a_posteriori
from problems import CATALOGUE, Case, equilibrium, exact_rows, matrix, true_margin


def layer_of(W: Tensor, activation: Activation, check: bool = True) -> eq.MonDEQ:
    """The layer whose input is q itself: U = I, b = 0."""
    eye = torch.eye(len(W), dtype=W.dtype)
    return eq.MonDEQ.from_weights(W, eye, torch.zeros(len(W), dtype=W.dtype), check=check, activation=activation)


def promised(solver: eq.Solver, case: Case) -> bool:
    """Whether the solver promises to converge: Picard needs ‖W‖₂ < 1, the others a positive margin."""
    return not isinstance(solver, eq.Picard) or float(torch.linalg.matrix_norm(case.W, 2)) < 1


def name(solver: eq.Solver) -> str:
    return type(solver).__name__ + (f"-on-{name(solver.on)}" if getattr(solver, "on", None) else "")


PAIRS = [
    pytest.param(case, solver, id=f"{case}-{name(solver)}")
    for case in CATALOGUE
    for solver in (SOLVERS + VARIANTS if case.name in ("random4-ReLU", "random4-Tanh", "lcp10-ReLU") else SOLVERS)
    if promised(solver, case)
]
SINGLE = ("random4", "contraction4-ReLU", "contraction4-Tanh", "lcp10")
FEW = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))  # each of them on every solver


@pytest.mark.parametrize(("case", "solver"), PAIRS)
def test_exact_answers(case: Case, solver: eq.Solver) -> None:
    solution = layer_of(case.W, case.activation).solve(case.q, solver=solver, tol=1e-10)
    error = (solution.value - case.answer).norm(dim=1)
    size = case.answer.norm(dim=1)
    assert bool(solution.converged.all())
    assert bool((error <= 1.01e-10 * size + 1e-12 * (1 + case.q.norm(dim=1))).all())
    assert bool((error <= solution.error_bound + 1e-14 * (size + case.q.norm(dim=1)) + 1e-20).all())
    assert bool((solution.truncation <= solution.error_bound).all())


@pytest.mark.parametrize(("case", "solver"), [pair for pair in PAIRS if pair.values[0].name.startswith(SINGLE)])
def test_exact_answers_in_single_precision(case: Case, solver: eq.Solver) -> None:
    W, q = case.W.float(), case.q.float()
    answer = equilibrium(W, q, case.activation)
    solution = layer_of(W, case.activation).solve(q, solver=solver, tol=1e-4)
    error = (solution.value.double() - answer).norm(dim=1)
    assert solution.value.dtype == torch.float32
    assert bool(solution.converged.all())
    assert bool((error <= 1.01e-4 * answer.norm(dim=1) + 1e-5).all())
    assert bool((error <= solution.error_bound).all())


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not isinstance(s, eq.Picard)], ids=name)
def test_hard_problems(solver: eq.Solver) -> None:
    """Condition number about 80 with a dominant skew part; a budget for FB, which needs κ² steps."""
    activation = eq.ReLU()
    W = matrix(6, 0.05, 21, rank=3, gain=0.6)
    q = torch.randn(3, 6, dtype=torch.float64)
    patient = dataclasses.replace(solver, max_steps=100_000, check_every=200)
    solution = layer_of(W, activation).solve(q, solver=patient, tol=1e-8)
    error = (solution.value - equilibrium(W, q, activation)).norm(dim=1)
    assert bool(solution.converged.all())
    assert bool((error <= solution.error_bound + 1e-13).all())


# The bound


def assert_bounds(found: Solution, W: Tensor, q: Tensor, activation: Activation) -> None:
    """error_bound against the distance to the exact equilibrium of the stored W, q, in 50 digits."""
    for row, exact, bound in zip(
        found.value.double().tolist(), exact_rows(W, q, activation), found.error_bound.tolist(), strict=True
    ):
        error = mpmath.norm(mpmath.matrix(row) - exact)
        assert error <= bound, f"{activation}: ‖p − z*‖ = {float(error)} > bound {bound}"


problem_shapes = {
    "n": st.integers(1, 3),
    "margin": st.sampled_from([0.02, 0.3, 2.0]),
    "gain": st.sampled_from([0.1, 0.5, 1.5]),
    "size": st.sampled_from([1e-6, 1.0, 30.0, 1e5]),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@given(**problem_shapes, offset=st.sampled_from([0.0, 1e-12, 1e-6, 1e-2, 1.0, 1e3]))
def test_bound_holds_for_any_point(
    dtype: torch.dtype,
    activation: Activation,
    n: int,
    margin: float,
    gain: float,
    size: float,
    seed: int,
    offset: float,
) -> None:
    torch.manual_seed(seed)
    W = matrix(n, margin, seed, gain=gain).to(dtype)
    if true_margin(W) <= 1e-3:
        return
    q = (torch.randn(2, n, dtype=torch.float64) * size).to(dtype)
    near = equilibrium(W, q, activation)
    w = (near + torch.randn(2, n, dtype=torch.float64) * offset * (near.norm() + 1)).to(dtype)
    found = a_posteriori(Problem(DenseOperator(W), q, activation), w)
    assert_bounds(found, W, q, activation)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@FEW
@given(
    **problem_shapes,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    steps=st.integers(1, 12),
    which=st.integers(0, len(ACTIVATIONS) - 1),
)
def test_bound_holds_wherever_a_solver_stops(
    solver: eq.Solver,
    dtype: torch.dtype,
    n: int,
    margin: float,
    gain: float,
    size: float,
    seed: int,
    steps: int,
    which: int,
) -> None:
    torch.manual_seed(seed)
    activation = ACTIVATIONS[which]
    W = matrix(n, margin, seed, gain=gain).to(dtype)
    q = (torch.randn(1, n, dtype=torch.float64) * size).to(dtype)
    if true_margin(W) <= 1e-3:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = layer_of(W, activation).solve(q, solver=dataclasses.replace(solver, max_steps=steps), tol=1e-6)
    assert int(found.steps.max()) <= steps
    assert_bounds(found, W, q, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@given(**problem_shapes)
def test_bound_holds_for_the_linearized_problem(
    dtype: torch.dtype, n: int, margin: float, gain: float, size: float, seed: int
) -> None:
    """The backward problem y = D (Wᵀ y + g), which has a linear answer."""
    torch.manual_seed(seed)
    W = matrix(n, margin, seed, gain=gain).to(dtype)
    if true_margin(W) <= 1e-3:
        return
    g = (torch.randn(2, n, dtype=torch.float64) * size).to(dtype)
    D = torch.rand(2, n, dtype=dtype).round(decimals=1)
    w = torch.randn(2, n, dtype=dtype)
    found = a_posteriori(Problem(DenseOperator(W).transposed(), g, Linearized(D)), w)
    for i in range(2):
        slopes, M = mpmath.matrix(D[i].tolist()), mpmath.matrix(W.mT.tolist())
        system, right = mpmath.eye(n), mpmath.matrix(n, 1)
        for a in range(n):
            right[a] = slopes[a] * mpmath.mpf(g[i, a].item())
            for b in range(n):
                system[a, b] -= slopes[a] * M[a, b]
        exact = mpmath.lu_solve(system, right)
        error = mpmath.norm(mpmath.matrix(found.value[i].tolist()) - exact)
        assert error <= found.error_bound[i].item()


def test_bound_is_not_loose_without_reason() -> None:
    """With W = w I the truncation part is exact up to |w|/(1 − w) against the true slope; here linear, so equal."""
    W = torch.tensor([[0.5]], dtype=torch.float64)
    w = torch.tensor([[3.0]], dtype=torch.float64)
    q = torch.ones(1, 1, dtype=torch.float64)
    found = a_posteriori(Problem(DenseOperator(W), q, eq.ReLU()), w)
    # p = 0.5 · 3 + 1 = 2.5, z* = 2: ‖W e‖/m = 0.5 · 0.5/0.5 = 0.5, the very distance
    assert found.value.item() == 2.5
    assert found.truncation.item() == pytest.approx(0.5, rel=1e-12)
    assert 0.5 <= found.error_bound.item() <= 0.5 + 1e-11


def test_bound_is_infinite_without_a_margin() -> None:
    W = torch.eye(2, dtype=torch.float64) * 1.2
    one = torch.ones(1, 2, dtype=torch.float64)
    found = a_posteriori(Problem(DenseOperator(W), one, eq.Tanh()), one)
    assert found.error_bound.item() == float("inf")
    assert found.truncation.item() == float("inf")
